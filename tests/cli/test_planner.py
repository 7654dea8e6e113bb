"""The planner against hand-made numbers, a real forward, and what must be so at any size."""

import math

import pytest
import torch

from selfmask_dist.backbones import find_blocks
from selfmask_dist.cli import main
from selfmask_dist.cli.model_size import build_on_meta, measure_size
from selfmask_dist.cli.plan import GIB, Hardware, choose, estimate, plan
from selfmask_dist.config import load_config
from tests.support.models import make

LARGE = [
    "backbone.name=timm:vit_giant_patch14_224",
    "backbone.kwargs={embed_dim: 6144, depth: 48, num_heads: 48, mlp_ratio: 4.0}",
    "engine.precision=bf16",
    "train.global_batch_size=4096",
]


def test_vit_b32_by_hand() -> None:
    config = load_config(None, ["backbone.name=timm:vit_base_patch32_224", "train.global_batch_size=64"])
    encoder, size = build_on_meta(config)
    shape = measure_size(encoder, size, "vit")
    block = 768 * 2304 + 2304 + 768 * 768 + 768 + 2 * 768 * 3072 + 3072 + 768
    assert size == 224
    assert shape.masked == 12 * block
    assert shape.masked + shape.frozen == sum(p.numel() for p in encoder.parameters())
    assert shape.largest_block == block + 4 * 768  # two norms, too few to be masked
    # 50 tokens; two operations for each weight and token, and the attention's own products
    weights = 12 * (block - 2304 - 768 - 3072 - 768) * 50 + 768 * 3 * 32 * 32 * 49
    assert shape.flops_per_image == pytest.approx(2 * (weights + 12 * 2 * 50 * 50 * 768), rel=0.01)


def test_kept_numbers_are_those_of_a_real_forward() -> None:
    for family in ("timm_vit", "conv"):
        model, preset = make(family, dtype=torch.float32)
        shape = measure_size(make(family, dtype=torch.float32)[0].to("meta"), 16, preset)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in ("attn", "mlp", "conv", "downsample.0")))
        kept: dict[int, torch.Tensor] = {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor: torch.Tensor, kept=kept, own=own) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        model.train()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.randn(4, 3, 16, 16))
        numbers = sum(t.untyped_storage().nbytes() / 4 for t in kept.values()) / 4
        assert shape.kept_per_image == pytest.approx(numbers, rel=0.15), family


def test_sharded_memory_falls_as_one_over_the_world() -> None:
    config = load_config(None, ["backbone.name=timm:vit_base_patch32_224", "train.global_batch_size=64"])
    encoder, size = build_on_meta(config)
    shape = measure_size(encoder, size, "vit")
    two, eight = ({e.engine: e for e in estimate(shape, config, Hardware(gpus_per_node=w))} for w in (2, 8))
    for name in ("fsdp", "deepspeed-3"):
        assert two[name].momentum == pytest.approx(4 * eight[name].momentum)
    assert two["fsdp"].weights == pytest.approx(4 * eight["fsdp"].weights)
    assert two["ddp"].weights == eight["ddp"].weights
    n, f = shape.masked, shape.frozen
    assert two["fsdp"].sent == pytest.approx(0.5 * (2 * 4 * (n + f) + 4 * n))
    assert eight["bits"].sent == pytest.approx(7 / 8 * (4 * n + n / 8))


def test_22_billion_weights_on_1024_ranks() -> None:
    config = load_config(None, LARGE)
    hardware = Hardware(nodes=128, gpus_per_node=8)
    estimates = {e.engine: e for e in plan(config, hardware)}
    num_weights = estimates["ddp"].weights / 8
    assert num_weights == pytest.approx(21.8e9, rel=0.02)
    assert estimates["ddp"].memory > 500 * GIB
    best = choose(list(estimates.values()), hardware.memory_gib)
    assert best is not None
    assert best.engine == "fsdp"
    assert best.memory < 72 * GIB
    assert all(math.isfinite(e.seconds[1]) and e.seconds[0] <= e.seconds[1] for e in estimates.values())


def test_activation_checkpointing_keeps_less_and_computes_more() -> None:
    base = ["backbone.name=timm:vit_base_patch32_224"]
    plain, saved = (
        plan(load_config(None, [*base, *more]), Hardware())[0]
        for more in ([], ["engine.checkpoint_activations=true"])
    )
    assert saved.activations < 0.3 * plain.activations
    assert saved.compute_seconds == pytest.approx(4 / 3 * plain.compute_seconds)


def test_the_command_prints_every_engine(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--nodes", "2", "--gpus-per-node", "4", "backbone.name=timm:resnet18"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for name in ("ddp", "fsdp", "bits", "deepspeed-1", "deepspeed-2", "deepspeed-3", "take engine.name="):
        assert name in printed
    assert main(["plan", "backbone.name=timm:vit_huge_patch3"]) == 2
    assert "timm has no model 'vit_huge_patch3'" in capsys.readouterr().err


def test_open_clip_towers_are_planned() -> None:
    config = load_config(None, ["backbone.name=open_clip:ViT-bigG-14", "backbone.pretrained=false"])
    encoder, size = build_on_meta(config)
    assert size == 224
    assert len(find_blocks(encoder)) == 48
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(1.84e9, rel=0.02)
