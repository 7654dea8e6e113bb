"""Fine-tuning's baselines: which weights are trained, low-rank additions, and files of what changed.

    all    every weight                       bias   bias terms (BitFit: Ben-Zaken et al., arXiv 2106.10199)
    norm   normalisation layers               lora   W x + (alpha / r) B A x    (Hu et al., arXiv 2106.09685)

with `freeze` taking parameters out again; `embedding` names the first layer, which stays as pretrained in
Kumar et al., arXiv 2211.09359. Additions are peft's own modules, A random and B zero at first, so the network
starts as it was. Knows nothing of engines, optimizers or objectives.
"""

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from selfmask_dist.common.files import replacing
from selfmask_dist.common.names import FINETUNED
from selfmask_dist.masking.selection import is_fused_qkv, norm_parameters
from selfmask_dist.training.additions.methods import add_method

Train = Literal["all", "bias", "norm", "lora"]

# the layer that turns pixels into features, with the normalisation right behind it (the paper's appendix);
# timm's and open_clip's names, at the top of a network or of open_clip's trunk
EMBEDDING = ("patch_embed.*", "stem.*", "stem_*", "conv_stem.*", "conv1.*", "bn1.*", "ln_pre.*", "norm_pre.*")
_LORA = ".lora_"  # in the names of what peft adds
_METADATA = "finetune"


def choose_weights(model: nn.Module, train: Train, *, freeze: Sequence[str] = ()) -> list[str]:
    """Return the names of the parameters to train, in the model's own order.

    Args:
        freeze: glob patterns over parameter names that are left out; `embedding` stands for `EMBEDDING`.

    Raises:
        ValueError: a pattern matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen = {
        "all": set(names),
        "bias": {name for name in names if name.rpartition(".")[2].endswith("bias")},
        "norm": norm_parameters(model),
        "lora": {name for name in names if _LORA in name},
    }[train]
    if not chosen:
        raise ValueError(
            f"finetune.train={train} finds nothing to train in this network; choose another kind"
        )
    for pattern in freeze:
        matched = _matches(pattern, names)
        if not matched:
            raise ValueError(
                f"finetune.freeze {pattern!r} matches no parameter; the first are {', '.join(names[:6])}"
            )
        chosen -= matched
    if not chosen:
        raise ValueError(f"finetune.freeze {list(freeze)} leaves nothing of finetune.train={train} to train")
    return [name for name in names if name in chosen]


def _matches(pattern: str, names: Sequence[str]) -> set[str]:
    globs = [glob for name in EMBEDDING for glob in (name, f"trunk.{name}")]
    return {
        name
        for name in names
        if any(fnmatchcase(name, glob) for glob in (globs if pattern == "embedding" else [pattern]))
    }


# ---- low-rank additions


def add_lora(
    model: nn.Module, *, rank: int, alpha: float, targets: Sequence[str] = ("auto",), seed: int = 0
) -> list[str]:
    """Put low-rank additions on modules of `model`, in place, before it is sharded; return their names.

    Args:
        rank, alpha: r and alpha of the module's docstring.
        targets: glob patterns over names of linear and convolutional modules. `auto`: q and v of attention,
            as in the paper; a fused q, k and v is one matrix to peft and gets one addition, which so adapts
            k too; networks without attention get their convolutions, the layers that masks are on.
        seed: of the matrices A; the global generators are left as they were.

    Raises:
        ValueError: peft is not installed, a pattern matches nothing, or what it matches cannot be added to.
    """
    names = lora_targets(model, targets)
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            f"finetune.train=lora needs peft ({error}); pip install 'selfmask_dist[lora]', or choose "
            "finetune.train=all, bias or norm"
        ) from error
    # no dropout: it would draw from the global generator, and a resumed run would differ
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model)
    return names


def add_peft(model: nn.Module, settings: Mapping[str, Any], *, seed: int) -> list[str]:
    """Put any method of peft on modules of `model`; see `additions.methods.add_method`."""
    return add_method(model, settings, seed=seed, auto_fn=lambda own: lora_targets(own, ["auto"]))


def lora_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the names of the modules that `add_lora` adds to, in the network's order; errors as there."""
    # nn.MultiheadAttention never calls the module of its output projection: there it would do nothing
    hidden = {
        f"{n}.out_proj" for n, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
    }
    modules = {
        name: module
        for name, module in model.named_modules()
        if name not in hidden
        and (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
    }
    found: set[str] = set()
    for pattern in targets:
        if pattern == "auto":
            matched = _auto_targets(model, modules)
        else:
            matched = {name for name in modules if fnmatchcase(name, pattern)}
        if not matched:
            raise ValueError(
                f"finetune.lora_targets {pattern!r} matches no linear or convolutional module; there are "
                f"{', '.join(list(modules)[:8])}, ..."
            )
        found |= matched
    return [name for name in modules if name in found]


def _auto_targets(model: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    if any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        # peft adds to that module's weights in each forward and subtracts after it: frozen weights would
        # drift by rounding, and be other parameters than those that engines hold
        raise ValueError(
            "finetune.lora_targets=auto does not fit nn.MultiheadAttention, whose q, k and v are no modules; "
            "name others (finetune.lora_targets=['*mlp.c_fc', '*mlp.c_proj']), or take timm's model of "
            "the same weights"
        )
    separate = {n for n in modules if fnmatchcase(n, "*attn.[qv]") or fnmatchcase(n, "*attn.[qv]_proj")}
    fused = {name for name in modules if is_fused_qkv(f"{name}.weight")}
    return separate | fused or {n for n, module in modules.items() if isinstance(module, nn.Conv2d)}


# ---- files


def save_changed(
    tensors: Mapping[str, Tensor],
    path: Path,
    *,
    lora: Mapping[str, Any] | None = None,
    peft: Mapping[str, Any] | None = None,
) -> int:
    """Write what fine-tuning changed, weights and moved statistics, as safetensors; return the bytes.

    Args:
        lora: the arguments of `add_lora`, where tensors are its additions.
        peft: those of `add_peft`, likewise.
    """
    about: dict[str, Any] = {"lora": None if lora is None else dict(lora)}
    metadata = {_METADATA: json.dumps({**about, **({"peft": dict(peft)} if peft else {})})}
    with replacing(path) as partial:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, partial, metadata=metadata)
    return path.stat().st_size


@torch.no_grad()
def load_changed(model: nn.Module, path: Path) -> list[str]:
    """Put what `save_changed` wrote onto the pretrained network, in place; return the tensors' names.

    Raises:
        ValueError: the file is not one of fine-tuning, or of another network.
    """
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_METADATA)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    if text is None:
        raise ValueError(f"{path} was not written by a fine-tuning run")
    about = json.loads(text)
    if (lora := about["lora"]) is not None:
        add_lora(model, **lora)
    if (peft := about.get("peft")) is not None:
        add_peft(model, peft["settings"], seed=peft["seed"])
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    odd = sorted(n for n, tensor in tensors.items() if n not in own or own[n].shape != tensor.shape)
    if odd:
        raise ValueError(f"{path} is of another network: {', '.join(odd[:5])} do not fit")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    return list(tensors)


@torch.no_grad()
def load_trained(model: nn.Module, path: Path) -> None:
    """Put what a fine-tuning run left onto the pretrained network, in place: the changed part or the whole
    encoder.

    Raises:
        ValueError: the file is of another network.
    """
    if path.name == FINETUNED:
        load_changed(model, path)
        return
    tensors, own = load_file(path), model.state_dict()
    odd = sorted(tensors.keys() ^ own.keys()) or [n for n in own if own[n].shape != tensors[n].shape]
    if odd:
        raise ValueError(f"{path} is of another network: {', '.join(odd[:5])} do not fit")
    model.load_state_dict(tensors)
