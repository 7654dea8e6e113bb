"""The planner against hand-made numbers, a real forward, and what must be so at any size."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.parallel.scale_tables import DOCUMENT, commands, printed
from selfmask_dist.backbones import find_blocks
from selfmask_dist.cli import main
from selfmask_dist.cli.plan.hardware import GIB, Hardware
from selfmask_dist.cli.plan.model_size import ModelSize, build_on_meta, measure_size
from selfmask_dist.cli.plan.stages import reckon_evaluating, reckon_experts, reckon_saving
from selfmask_dist.cli.plan.steps import choose, choose_with_micro_steps, estimate, measure, plan
from selfmask_dist.config import Config, load_config
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
    assert two["fsdp"].sent == pytest.approx(0.5 * shape.padded(2) * (2 * 4 * (n + f) + 4 * n))
    assert eight["bits"].sent == pytest.approx(7 / 8 * (4 * n + n / 8))


def test_22_billion_weights_on_1024_ranks() -> None:
    config = load_config(None, LARGE)
    hardware = Hardware(nodes=128, gpus_per_node=8)
    estimates = {e.engine: e for e in plan(config, hardware)}
    num_weights = estimates["ddp"].weights / 8
    assert num_weights == pytest.approx(21.8e9, rel=0.02)
    assert estimates["ddp"].memory > 450 * GIB
    best = choose(list(estimates.values()), hardware.memory_gib)
    assert best is not None
    assert best.engine == "fsdp/8", "groups of a node send the least"
    assert best.memory < 72 * GIB
    assert all(math.isfinite(e.seconds[1]) and e.seconds[0] <= e.seconds[1] for e in estimates.values())


def shape_of(*keys: str) -> tuple[Config, ModelSize]:
    config = load_config(None, ["backbone.name=timm:vit_base_patch32_224", *keys])
    encoder, size = build_on_meta(config)
    return config, measure_size(encoder, size, "vit")


def test_micro_steps_are_sent_one_by_one_and_resolutions_together() -> None:
    config, shape = shape_of("objective.name=swav", "train.global_batch_size=64")
    one = {e.engine: e for e in estimate(shape, config, Hardware(gpus_per_node=4))}
    config, _ = shape_of("objective.name=swav", "train.global_batch_size=64", "train.accumulate=4")
    four = {e.engine: e for e in estimate(shape, config, Hardware(gpus_per_node=4))}
    n, f = shape.masked, shape.frozen
    padding = shape.padded(4)
    assert one["fsdp"].sent == pytest.approx(0.75 * padding * (2 * 4 * (n + f) + 4 * n))
    assert four["fsdp"].sent == pytest.approx(4 * one["fsdp"].sent)
    assert four["bits"].sent == pytest.approx(0.75 * (4 * 4 * n + n / 8))
    assert four["ddp"].sent == one["ddp"].sent  # it waits for the last one
    for name in ("fsdp", "bits", "deepspeed-3"):
        assert four[name].memory < one[name].memory, "what is accumulated is cut"
    local = 6 * (96 / 224) ** 2
    assert one["fsdp"].activations == pytest.approx(shape.kept_per_image * 16 * (2 + local) * 4)


def test_a_teacher_gathers_once_more_and_computes_forwards_alone() -> None:
    swav, shape = shape_of("objective.name=swav", "train.global_batch_size=64")
    dino, _ = shape_of("objective.name=dino", "train.global_batch_size=64")
    without, with_teacher = (
        {e.engine: e for e in estimate(shape, c, Hardware(gpus_per_node=4))}["fsdp"] for c in (swav, dino)
    )
    gather = 0.75 * shape.padded(4) * 4 * (shape.masked + shape.frozen)
    assert with_teacher.sent - without.sent == pytest.approx(gather)
    assert with_teacher.activations == without.activations
    assert with_teacher.momentum == 2 * without.momentum  # and the averages
    images = 2 + 6 * (96 / 224) ** 2
    assert with_teacher.compute_seconds / without.compute_seconds == pytest.approx(1 + 2 / (3 * images))


def test_rows_are_padded_to_a_multiple_of_the_ranks() -> None:
    _, shape = shape_of()
    assert shape.padded(1) == 1
    assert replace(shape, shapes=((3, 12), (8, 8))).padded(2) == pytest.approx((4 * 4 + 8) / 20)


def test_hybrid_sharding_is_planned_in_the_smallest_groups_that_fit() -> None:
    config, shape = shape_of("train.global_batch_size=1024")
    hardware = Hardware(nodes=16, gpus_per_node=8)
    by_name = {e.engine: e for e in estimate(shape, config, hardware)}
    assert "fsdp/8" in by_name
    hybrid, over_all = by_name["fsdp/8"], by_name["fsdp"]
    assert hybrid.weights == pytest.approx(16 * over_all.weights)
    assert hybrid.send_seconds < over_all.send_seconds
    needs = []
    for group in (8, 16):
        config_of_group, _ = shape_of("train.global_batch_size=1024", f"engine.shard_size={group}")
        given = {e.engine: e for e in estimate(shape, config_of_group, hardware)}
        assert len(given) == 6, "a size that is given is not tried against others"
        needs.append(given["fsdp"].memory)
    assert needs[0] == hybrid.memory
    between = replace(hardware, memory_gib=sum(needs) / 2 / 0.9 / GIB)
    assert "fsdp/16" in {e.engine for e in estimate(shape, config, between)}


def test_a_checkpoint_is_shared_out_and_its_time_sets_the_keys() -> None:
    config, shape = shape_of("optim.kind=adamw")
    small, large = (
        reckon_saving(shape, config, Hardware(nodes=nodes, gpus_per_node=8), step_seconds=1.0)
        for nodes in (1, 4)
    )
    assert small.total == large.total == 12 * shape.masked
    assert small.of_rank == 4 * large.of_rank == small.total / 8
    assert small.seconds == pytest.approx(small.of_rank / 1e10 + small.total / 2e9)
    assert small.stop_seconds == 60
    slow = Hardware(nodes=1, gpus_per_node=8, node_storage_gbs=0.02)
    saving = reckon_saving(shape, config, slow, step_seconds=1.0)
    assert saving.stop_seconds >= 2 * (2 * saving.seconds + 1) > 60
    assert saving.signal_seconds > saving.stop_seconds


def test_an_evaluation_is_planned_in_its_precision() -> None:
    """float32 by default, and the engine's where fsdp computes in bf16; what only embeds keeps less."""
    hardware = Hardware(gpus_per_node=8)
    found = {}
    for keys in ((), ("eval.precision=bf16",), ("engine.precision=bf16",)):
        config, shape = shape_of(*keys)
        for engine in estimate(shape, config, hardware):
            found[keys, engine.engine] = reckon_evaluating(shape, config, hardware, engine)
    compute = hardware.pictures * shape.flops_per_image / 8 / 1e12
    assert found[(), "ddp"].seconds == pytest.approx(compute / 40)
    assert found[("eval.precision=bf16",), "ddp"].seconds == pytest.approx(compute / 300)
    computed = {name: found[("engine.precision=bf16",), name].precision for name in ("ddp", "fsdp", "bits")}
    assert computed == {"ddp": "float32", "fsdp": "bf16", "bits": "float32"}
    whole = found[(), "ddp"].memory
    assert whole == 4 * (2 * shape.masked + shape.frozen)
    assert found[(), "fsdp"].memory == found[(), "deepspeed-3"].memory < whole / 2


def test_scores_gradients_take_memory_where_theta_s_are_needed_again() -> None:
    """The same batch for all: what differs is the family that needs G again, and the score step on pieces."""
    needs = {}
    cases = {
        "plain": (),
        "joint": ("mask.family=joint",),
        "rms": ("optim.score_step=rms", "optim.score_lr=0.05"),
    }
    for case, keys in cases.items():
        config, shape = shape_of(*keys, "train.global_batch_size=1", "engine.checkpoint_activations=true")
        for one in estimate(shape, config, Hardware()):
            needs[case, one.engine] = one.gradients / shape.masked
    assert needs["plain", "ddp"] == needs["plain", "fsdp"] == needs["rms", "ddp"] == 4
    for of in (("joint", "ddp"), ("joint", "fsdp"), ("rms", "fsdp")):
        assert 4 < needs[of] <= 8, of


def test_experts_are_planned_on_their_groups() -> None:
    config, shape = shape_of("objective.name=swav", "train.global_batch_size=640", "cascade.clusters=[4]")
    experts = reckon_experts(shape, config, Hardware(nodes=4, gpus_per_node=8), image_size=224)
    assert (experts.count, experts.groups, experts.ranks) == (4, 4, 8)
    assert experts.engine is not None
    whole = {e.engine: e for e in estimate(shape, config, Hardware(nodes=4, gpus_per_node=8))}
    assert experts.engine.activations == pytest.approx(4 * whole["ddp"].activations)


def test_micro_steps_are_named_where_they_make_it_fit() -> None:
    config, shape = shape_of("objective.name=swav", "train.global_batch_size=4096")
    hardware = Hardware(gpus_per_node=8, memory_gib=40)
    assert choose(estimate(shape, config, hardware), 40) is None
    best, fitted = choose_with_micro_steps(shape, config, hardware, image_size=224)
    assert best is not None
    assert fitted.train.accumulate > 1
    assert best.memory < 36 * GIB


def test_the_tables_in_the_docs_are_what_the_command_prints() -> None:
    blocks = commands(DOCUMENT.read_text())
    assert len(blocks) == 5
    for command, below in blocks:
        assert printed(command) == below, "run python -m benchmarks.parallel.scale_tables"


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


def test_open_clip_towers_of_other_sizes_are_planned() -> None:
    """They are built as training builds them: with the picture's size, and with a part of `vision_cfg`."""
    name = [
        "backbone.name=open_clip:ViT-B-32-quickgelu",
        "backbone.pretrained=false",
        "backbone.image_size=64",
    ]
    size, pixels = measure(load_config(None, name))
    assert pixels == 64
    small = "backbone.kwargs={vision_cfg: {layers: 2, width: 64, head_width: 16, patch_size: 8}}"
    smaller, _ = measure(load_config(None, [*name, small]))
    assert smaller.masked == 2 * 12 * 64 * 64 + 2 * 9 * 64, "weights and biases of two blocks of width 64"
    assert smaller.masked < size.masked


def test_a_plan_in_a_line_knows_the_pictures_of_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ["backbone.name=timm:vit_tiny_patch16_224", "train.epochs=10", "train.global_batch_size=256"]
    (tmp_path / "dataset.json").write_text('{"num_samples": 2560000}')
    line = ["plan", "--line", "--nodes=2", "--gpus-per-node=8", *tiny]
    assert main([*line, f"data.train={tmp_path}", "engine.workers=2", "eval.final=false"]) == 0
    shown = capsys.readouterr().out
    # 100,000 steps of 16 pictures a GPU, which two workers read in 0.04 s, and a pass for the frozen baseline
    seconds = 100_000 * 16 / 400 + 2_560_000 / (16 * 400)
    assert f"2 x 8 H100, 16 images a GPU, about {seconds / 3600:.1f} h, " in shown
    assert "for 2,560,000 pictures)" in shown
    assert main([*line, "engine.workers=2"]) == 0
    assert "1,000,000 pictures, a guess" in capsys.readouterr().out


LEAN = ("engine.precision=bf16", "engine.weights=bf16", "eval.precision=bf16")


def test_what_numbers_are_held_in() -> None:
    def parts(*keys: str, world: int = 1) -> Any:
        config, shape = shape_of("train.global_batch_size=64", *keys)
        one = estimate(shape, config, Hardware(gpus_per_node=world))[0]
        n, held = shape.masked, one.weights - 4 * shape.frozen
        return tuple(round(part / n, 2) for part in (held, one.scores, one.momentum, one.gradients))

    largest = round(14 * 768 * 3072 / (12 * 7_079_424), 2)  # of the tensor that steps
    assert parts() == (8, 4, 4, 4)
    assert parts(*LEAN) == (4, 4, 4, pytest.approx(largest, abs=0.01))
    assert parts(*LEAN, world=2) == (4, 4, 4, pytest.approx(2 + largest, abs=0.01))
    assert parts(*LEAN, "engine.momentum=bf16")[2] == 2
    assert parts(*LEAN, "engine.momentum=bf16", "engine.scores=bf16")[1:3] == (2, 2)
    assert parts(*LEAN, "optim.kind=adamw")[2] == 8
    assert parts(*LEAN, "optim.clip_norm=1")[3] == 6
    assert parts(*LEAN, "optim.clip_norm=1", "optim.score_step=rms", "optim.score_lr=0.01")[3] > 2
    config, shape = shape_of("train.global_batch_size=64", *LEAN, "engine.momentum=bf16")
    assert [e.engine for e in estimate(shape, config, Hardware(gpus_per_node=8))] == ["ddp"], (
        "others refuse it"
    )
    assert reckon_saving(shape, config, Hardware(), 1.0).total == pytest.approx(6 * shape.masked, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["masked float32", "masked bf16 weights", "masked bf16 weights, momentum"])
def test_a_process_peaks_where_the_plan_says(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.harness import peak_memory
    from benchmarks.masking.lean_steps import SMALL, TINY, planned_bytes, run_steps

    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back at once
    peak = peak_memory(run_steps, mode, SMALL) - peak_memory(run_steps, mode, TINY)
    assert planned_bytes(mode, SMALL)[0] == pytest.approx(peak, rel=0.1)
