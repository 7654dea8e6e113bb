"""How libraries name and cut the parameters of one vision transformer.

    timm           blocks.3.attn.qkv.weight                      (q, k and v in one)
    transformers   encoder.layer.3.attention.q_proj.weight       (three)
    open_clip      transformer.resblocks.3.attn.in_proj_weight   (in one)

A dialect maps each name to the atoms that lie in it one below the other along the first dimension, for
example ("3.q.weight", "3.k.weight", "3.v.weight"). Knows names alone, neither tensors nor libraries.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Dialect:
    """The names of one library's vision transformers.

    name: for messages.
    block: what stands before a block's parameters, as an expression with # for its number.
    modules: of a block: modules with a weight and perhaps a bias, to the atoms in them.
    parameters: of a block: single parameters.
    outside: modules before and after the blocks.
    tables: single parameters before and after the blocks.
    """

    name: str
    block: str
    modules: Mapping[str, str]
    parameters: Mapping[str, str] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, str] = field(default_factory=dict)

    def parse(self, name: str) -> tuple[str, tuple[str, ...]] | None:
        """Return what stands before a parameter's own name, and its atoms; None where it is no such name."""
        block = re.fullmatch(rf"(|.*?\.){self.block.replace('#', '([0-9]+)')}(.+)", name)
        if block is not None:
            prefix, number, rest = block.groups()
            found = _look_up(rest, self.modules, self.parameters)
            return None if found is None else (prefix, tuple(f"{number}.{atom}" for atom in found))
        parts = name.split(".")
        for start in range(len(parts)):
            found = _look_up(".".join(parts[start:]), self.outside, self.tables)
            if found is not None:
                return "".join(f"{part}." for part in parts[:start]), found
        return None


def _look_up(rest: str, modules: Mapping[str, str], parameters: Mapping[str, str]) -> tuple[str, ...] | None:
    if rest in parameters:
        return tuple(parameters[rest].split())
    module, _, kind = rest.rpartition(".")
    if kind in ("weight", "bias") and module in modules:
        return tuple(f"{atom}.{kind}" for atom in modules[module].split())
    return None


_NORMS = {"norm1": "norm1", "norm2": "norm2"}
_TIMM_OUTSIDE = {"patch_embed.proj": "patch", "norm_pre": "pre", "norm": "norm"}
_TIMM_TABLES = {"cls_token": "class", "pos_embed": "position"}
_TIMM_PARAMETERS = {
    "ls1.gamma": "scale1",
    "ls2.gamma": "scale2",
    "gamma_1": "scale1",
    "gamma_2": "scale2",
    "attn.q_bias": "q.bias",
    "attn.v_bias": "v.bias",
}
_TIMM = {"attn.qkv": "q k v", "attn.proj": "out", "mlp.fc2": "down", **_NORMS}
_QKV = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}
_QUERIES = {"query": "q", "key": "k", "value": "v"}
_SCALES = {"layer_scale1.lambda1": "scale1", "layer_scale2.lambda1": "scale2"}
_EMBEDDINGS = {"embeddings.patch_embeddings.projection": "patch", "embeddings.patch_embeddings": "patch"}
_EMBEDDING_TABLES = {"embeddings.cls_token": "class", "embeddings.position_embeddings": "position"}
_GATED = {"mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"}
_BEFORE_AFTER = {"layernorm_before": "norm1", "layernorm_after": "norm2"}

DIALECTS = (
    Dialect(
        "timm",
        r"blocks\.#\.",
        {**_TIMM, "mlp.fc1": "up", "mlp.fc1_g": "gate", "mlp.fc1_x": "up"},
        _TIMM_PARAMETERS,
        _TIMM_OUTSIDE,
        _TIMM_TABLES,
    ),
    Dialect(  # DINOv2's largest
        "timm, SwiGLU in one",
        r"blocks\.#\.",
        {**_TIMM, "mlp.fc1": "gate up"},
        _TIMM_PARAMETERS,
        _TIMM_OUTSIDE,
        _TIMM_TABLES,
    ),
    Dialect(
        "transformers (DINOv2, DINOv3)",
        r"(?:encoder\.|model\.)?layer\.#\.",
        {
            **{f"attention.{name}": atom for name, atom in _QKV.items()},
            "attention.o_proj": "out",
            "mlp.fc1": "up",
            "mlp.fc2": "down",
            **_GATED,
            **_NORMS,
        },
        _SCALES,
        {**_EMBEDDINGS, "layernorm": "norm", "norm": "norm"},
        _EMBEDDING_TABLES,
    ),
    Dialect(
        "transformers 4 (DINOv2)",
        r"encoder\.layer\.#\.",
        {
            **{f"attention.attention.{name}": atom for name, atom in _QUERIES.items()},
            "attention.output.dense": "out",
            "mlp.fc1": "up",
            "mlp.fc2": "down",
            "mlp.weights_in": "gate up",
            "mlp.weights_out": "down",
            **_NORMS,
        },
        _SCALES,
        {**_EMBEDDINGS, "layernorm": "norm"},
        _EMBEDDING_TABLES,
    ),
    Dialect(
        "transformers (ViT, ViT-MAE)",
        r"layers\.#\.",
        {
            **{f"attention.{name}": atom for name, atom in _QKV.items()},
            "attention.o_proj": "out",
            "mlp.fc1": "up",
            "mlp.fc2": "down",
            **_BEFORE_AFTER,
        },
        {},
        {**_EMBEDDINGS, "layernorm": "norm"},
        _EMBEDDING_TABLES,
    ),
    Dialect(
        "transformers 4 (ViT, ViT-MAE)",
        r"encoder\.layer\.#\.",
        {
            **{f"attention.attention.{name}": atom for name, atom in _QUERIES.items()},
            "attention.output.dense": "out",
            "intermediate.dense": "up",
            "output.dense": "down",
            **_BEFORE_AFTER,
        },
        {},
        {**_EMBEDDINGS, "layernorm": "norm"},
        _EMBEDDING_TABLES,
    ),
    Dialect(
        "transformers (CLIP, SigLIP)",
        r"encoder\.layers\.#\.",
        {
            **{f"self_attn.{name}": atom for name, atom in _QKV.items()},
            "self_attn.out_proj": "out",
            "mlp.fc1": "up",
            "mlp.fc2": "down",
            "layer_norm1": "norm1",
            "layer_norm2": "norm2",
        },
        {},
        {"embeddings.patch_embedding": "patch", "pre_layrnorm": "pre", "post_layernorm": "norm"},
    ),
    Dialect(
        "open_clip",
        r"transformer\.resblocks\.#\.",
        {
            "attn.out_proj": "out",
            "mlp.c_fc": "up",
            "mlp.c_proj": "down",
            "ln_1": "norm1",
            "ln_2": "norm2",
        },
        {
            "attn.in_proj_weight": "q.weight k.weight v.weight",
            "attn.in_proj_bias": "q.bias k.bias v.bias",
            "ls_1.gamma": "scale1",
            "ls_2.gamma": "scale2",
        },
        {"conv1": "patch", "ln_pre": "pre", "ln_post": "norm"},
    ),
    Dialect(
        "torchvision",
        r"encoder\.layers\.encoder_layer_#\.",
        {
            "self_attention.out_proj": "out",
            "mlp.0": "up",
            "mlp.3": "down",
            "ln_1": "norm1",
            "ln_2": "norm2",
        },
        {
            "self_attention.in_proj_weight": "q.weight k.weight v.weight",
            "self_attention.in_proj_bias": "q.bias k.bias v.bias",
        },
        {"conv_proj": "patch", "encoder.ln": "norm"},
        {"class_token": "class", "encoder.pos_embedding": "position"},
    ),
)
