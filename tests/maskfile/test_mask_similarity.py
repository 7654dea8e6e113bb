"""What masks say: counts against plain sets, chance against shuffling, groups, errors, and the pictures."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from selfmask_dist import cli
from selfmask_dist.config import Config, to_yaml
from selfmask_dist.maskfile import Mask, MaskFile, from_masks, read_mask_file, write_mask_file
from selfmask_dist.maskfile.tools.comparison import (  # fmt: skip
    ComparedMask,
    as_dict,
    labels_of,
    masks,
    matrix,
    read_subjects,
    table,
)
from selfmask_dist.maskfile.tools.pictures import draw_similarity, draw_sparsity
from selfmask_dist.maskfile.tools.similarity import (
    agreement,
    changes,
    compare,
    kind_of,
    kinds_of,
    layers_of,
    tree_of,
)
from selfmask_dist.masking import attach
from tests.support.models import FAMILIES, make, scores_of

T = TypeVar("T")
SHAPES = {"blocks.0.attn.qkv.weight": (48, 16), "blocks.0.mlp.fc1.weight": (64, 16), "head.weight": (5, 16)}


def known(value: T | None) -> T:
    assert value is not None
    return value


def draw(generator: torch.Generator, **kept: float) -> dict[str, Tensor]:
    """Unrelated masks with a share kept in each layer."""
    shares = dict(zip(SHAPES, kept.values() or (0.9, 0.5, 0.7), strict=True))
    return {name: torch.rand(shape, generator=generator) < shares[name] for name, shape in SHAPES.items()}


def pruned_set(bits: dict[str, Tensor]) -> set[tuple[str, int]]:
    return {
        (name, i) for name, mask in bits.items() for i, kept in enumerate(mask.flatten().tolist()) if not kept
    }


def flat(bits: dict[str, Tensor]) -> np.ndarray:
    return np.concatenate([mask.flatten().numpy() for mask in bits.values()]).astype(float)


def test_similarity_equals_plain_sets_and_correlation(generator: torch.Generator) -> None:
    a, b = draw(generator), draw(generator)
    b["head.weight"] = a["head.weight"].clone()
    found, left, right = compare(a, b), pruned_set(a), pruned_set(b)
    every = {(name, i) for name, shape in SHAPES.items() for i in range(math.prod(shape))}
    assert found.weights == len(every)
    assert found.both_pruned == len(left & right)
    assert found.iou_pruned == pytest.approx(len(left & right) / len(left | right), rel=1e-12)
    assert found.iou_kept == pytest.approx(len(every - left - right) / len(every - (left & right)), rel=1e-12)
    assert found.phi == pytest.approx(np.corrcoef(flat(a), flat(b))[0, 1], rel=1e-9)
    assert compare(b, a) == found


def test_chance_is_what_shuffling_within_layers_gives(generator: torch.Generator) -> None:
    a, b = draw(generator), draw(generator)
    found = compare(a, b)

    def shuffled(bits: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view(mask.shape)
            for name, mask in bits.items()
        }

    rounds = [compare(a, shuffled(b)) for _ in range(400)]
    overlaps = np.array([one.both_pruned for one in rounds], dtype=float)
    error = overlaps.std() / math.sqrt(len(rounds))
    assert abs(overlaps.mean() - found.both_pruned_chance) < 4 * error
    spread = (found.both_pruned - found.both_pruned_chance) / known(found.sigmas)
    assert spread == pytest.approx(overlaps.std(ddof=1), rel=0.15)
    for name in ("iou_pruned", "iou_kept", "phi"):
        values = [getattr(one, name) for one in rounds]
        assert getattr(found, f"{name}_chance") == pytest.approx(np.mean(values), abs=0.01)


def test_masks_that_only_prune_the_same_layers_are_as_alike_as_chance(generator: torch.Generator) -> None:
    """Their plain correlation is high; beside chance for these layers it says nothing, and shows so."""
    a, b = draw(generator, a=0.99, b=0.1, c=0.5), draw(generator, a=0.99, b=0.1, c=0.5)
    found = compare(a, b)
    assert known(found.phi) > 0.5
    assert abs(known(found.phi) - known(found.phi_chance)) < 0.05
    assert abs(known(found.sigmas)) < 4
    same = compare(a, a)
    assert same.phi == pytest.approx(1.0) and same.iou_pruned == 1.0 and known(same.sigmas) > 10  # noqa: PT018


def test_what_is_not_defined_is_none_and_not_a_number() -> None:
    nothing = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    everything = {name: ~mask for name, mask in nothing.items()}
    found = compare(nothing, nothing)
    assert (found.iou_pruned, found.phi, found.sigmas, found.iou_kept) == (None, None, None, 1.0)
    assert compare(everything, everything).iou_kept is None
    assert compare(nothing, everything).iou_kept == 0.0
    assert agreement([nothing, nothing]).unanimous is None
    json.dumps(as_dict(masks([_compared("a", nothing), _compared("b", nothing)])), allow_nan=False)


def test_agreement_counts_votes(generator: torch.Generator) -> None:
    several = [draw(generator) for _ in range(3)]
    found = agreement(several)
    votes = (1 - np.stack([flat(bits) for bits in several])).sum(0).astype(int)
    assert found.counts == np.bincount(votes, minlength=4).tolist()
    assert sum(found.chance) == pytest.approx(sum(found.counts))
    # unrelated masks: as chance has it, within five standard deviations of a binomial
    for seen, expected in zip(found.counts, found.chance, strict=True):
        assert abs(seen - expected) < 5 * math.sqrt(expected)
    alike = agreement([several[0]] * 3)
    assert alike.unanimous == 1.0
    assert alike.unanimous_chance == pytest.approx(alike.chance[3] / sum(alike.chance[1:]))


def test_changes_are_the_bits_that_differ(generator: torch.Generator) -> None:
    a, b = draw(generator), draw(generator)
    differing = pruned_set(a) ^ pruned_set(b)
    assert pruned_set(changes(a, b)) == differing
    assert not pruned_set(changes(a, a))


@pytest.mark.parametrize("family", FAMILIES)
def test_sparsity_by_kind_is_that_of_the_model(family: str, generator: torch.Generator) -> None:
    model, preset = make(family, dtype=torch.float32)
    attached = attach(model, include=preset)
    attached.load_state_dict(
        {name: torch.rand(s.shape, generator=generator) - 0.4 for name, s in scores_of(attached).items()}
    )
    layers = layers_of(attached.masks())
    assert {layer.name: layer.share for layer in layers} == pytest.approx(attached.sparsity())
    kinds = {kind.name: kind for kind in kinds_of(layers)}
    expected = {
        "conv": {"conv", "downsample"},
        "timm_vit": {"attention qkv", "attention out", "mlp in", "mlp out", "bias"},
        "open_clip": {"attention qkv", "attention out", "mlp in", "mlp out", "bias"},
    }
    assert set(kinds) == expected[family]
    assert sum(kind.weights for kind in kinds.values()) == sum(layer.weights for layer in layers)
    one = next(iter(kinds.values()))
    assert one.pruned == sum(layer.pruned for layer in layers if layer.kind == one.name)


def test_kinds_of_names_that_presets_leave_out() -> None:
    assert kind_of("layer1.0.bn1.weight", (64,)) == "norm"
    assert kind_of("blocks.0.norm1.weight", (64,)) == "norm"
    assert kind_of("layer1.0.downsample.1.weight", (64,)) == "norm"
    assert kind_of("layer1.0.downsample.0.weight", (64, 64, 1, 1)) == "downsample"
    assert kind_of("patch_embed.proj.weight", (64, 3, 4, 4)) == "conv"
    assert kind_of("blocks.1.attn.q_proj.weight", (64, 64)) == "attention qkv"
    assert kind_of("fc.weight", (10, 64)) == "linear"


def test_the_tree_joins_the_most_alike_first() -> None:
    phi = np.array([[1, 0.1, 0.9, 0.1], [0.1, 1, 0.1, 0.8], [0.9, 0.1, 1, 0.1], [0.1, 0.8, 0.1, 1]])
    tree = known(tree_of(phi))
    assert [sorted(row[:2]) for row in tree.linkage] == [[0, 2], [1, 3], [4, 5]]
    assert [row[2] for row in tree.linkage] == pytest.approx([0.1, 0.2, 0.9])
    assert {frozenset(tree.order[:2]), frozenset(tree.order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}
    assert tree_of(np.eye(1)) is None
    undefined = known(tree_of(np.array([[1, np.nan], [np.nan, 1]])))
    assert undefined.linkage[0][2] == 1.0


# ---- from files


def _compared(label: str, bits: dict[str, Tensor], fingerprint: str = "w" * 64) -> ComparedMask:
    return ComparedMask(label, bits, Path("x"), weights_fingerprint=fingerprint)


def _mask(bits: dict[str, Tensor], fingerprint: str = "w" * 64) -> Mask:
    return Mask(bits=bits, weights_fingerprint=fingerprint)


def write(
    path: Path, bits: dict[str, Tensor], *, backbone: str = "b" * 64, **named: dict[str, Tensor]
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {name.replace("_", "-"): _mask(other) for name, other in named.items()}
    file = MaskFile({**found} or {"default": _mask(bits)}, backbone="timm:x", backbone_fingerprint=backbone)
    write_mask_file(path, file)
    return path


def write_run(folder: Path, bits: dict[str, Tensor], *, seed: int, data: str) -> Path:
    write(folder / "final.mask", bits)
    config = Config.model_validate({"seed": seed, "data": {"train": data, "test": data}})
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


def test_seeds_of_one_task_are_grouped_by_their_configurations(
    tmp_path: Path, generator: torch.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = {"flowers": draw(generator), "pets": draw(generator)}
    folders = []
    for (task, common), seed in itertools.product(tasks.items(), range(2)):
        noise = draw(generator, a=0.95, b=0.95, c=0.95)
        bits = {name: mask ^ ~noise[name] for name, mask in common.items()}
        folders.append(write_run(tmp_path / f"{task}-{seed}", bits, seed=seed, data=task))
    found = masks(read_subjects(folders))
    assert [group.masks for group in found.groups] == [["flowers-0", "flowers-1"], ["pets-0", "pets-1"]]
    for group in found.groups:
        assert group.kind == "seeds"
        assert known(group.phi) > 0.6 > 0.4 > known(group.phi_outside)
        assert known(group.agreement.unanimous) > 2 * known(group.agreement.unanimous_chance)
    order = [found.masks[i].label.partition("-")[0] for i in known(found.tree).order]
    assert order in (["flowers"] * 2 + ["pets"] * 2, ["pets"] * 2 + ["flowers"] * 2)
    draw_sparsity(found, tmp_path / "sparsity.png")
    draw_similarity(found, tmp_path / "similarity.png")
    for name in ("sparsity", "similarity"):
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100, "an empty picture"
    assert cli.main(["inspect", *map(str, folders)]) == 0
    printed = capsys.readouterr().out
    pairs = [line for line in printed.splitlines() if line.startswith(("flowers-0  flowers-1", "pets-0"))]
    assert f"{found.pairs[0].similarity.phi:.3f}" in pairs[-1] + pairs[-2] + pairs[-3]
    assert "seeds of flowers-0 (2): phi" in printed


def test_experts_of_a_bundle_are_compared_by_what_they_changed(
    tmp_path: Path, generator: torch.Generator
) -> None:
    dispatcher = draw(generator)
    flipped = {name: torch.rand(mask.shape, generator=generator) < 0.1 for name, mask in dispatcher.items()}
    alike = {name: mask ^ flipped[name] for name, mask in dispatcher.items()}
    other = {
        name: mask ^ (torch.rand(mask.shape, generator=generator) < 0.1) for name, mask in dispatcher.items()
    }
    path = write(
        tmp_path / "c" / "cascade.mask",
        {},
        dispatcher=dispatcher,
        expert_0=alike,
        expert_1=alike,
        expert_2=other,
    )
    found = masks(read_subjects([path.parent]))
    assert found.masks[0].label == "c: dispatcher"
    (group,) = found.groups
    assert (group.kind, group.masks) == ("experts", [f"c: expert-{k}" for k in range(3)])
    share = float(torch.cat([mask.flatten() for mask in flipped.values()]).double().mean())
    assert group.changed["c: expert-0"] == pytest.approx(share)
    by_pair = {(pair.a[-1], pair.b[-1]): pair.similarity for pair in group.changes}
    assert by_pair["0", "1"].iou_pruned == 1.0
    assert known(by_pair["0", "2"].iou_pruned) < 0.2
    assert group.agreement.counts[3] == len(pruned_set(alike) & pruned_set(other))
    assert "bits that are not the dispatcher's: " in table(found)


def test_masks_over_different_parameters_are_compared_on_the_common_ones(
    tmp_path: Path, generator: torch.Generator
) -> None:
    a, b = draw(generator), draw(generator)
    del b["head.weight"]
    paths = [write(tmp_path / name, bits) for name, bits in (("a.mask", a), ("b.mask", b))]
    found = masks(read_subjects(paths))
    assert found.left_out == ["head.weight"]
    assert found.pairs[0].similarity == compare({name: a[name] for name in b}, b)
    assert "compared without 1 parameters" in table(found)
    assert matrix(["a", "b"], found.pairs, "phi")[0, 1] == found.pairs[0].similarity.phi


def test_what_cannot_be_compared_is_named(tmp_path: Path, generator: torch.Generator) -> None:
    bits = draw(generator)
    a = write(tmp_path / "a.mask", bits)
    b = write(tmp_path / "b.mask", bits, backbone="c" * 64)
    with pytest.raises(
        ValueError, match=r"a\.mask and .*b\.mask are masks of different backbones .*b{12} and c{12}"
    ):
        masks(read_subjects([a, b]))
    one, two = _compared("a", bits), _compared("b", bits, "v" * 64)
    with pytest.raises(ValueError, match="different weights under the masks"):
        masks([one, two])
    with pytest.raises(ValueError, match="no parameter in common"):
        masks([one, replace(one, label="c", bits={"other": bits["head.weight"]})])
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(FileNotFoundError, match=r"unfinished holds no final\.mask and no cascade\.mask"):
        read_subjects([tmp_path / "unfinished"])
    a.write_bytes(a.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"a\.mask is damaged"):
        read_subjects([a])
    with pytest.raises(ValueError, match="no masks to compare"):
        masks([])
    with pytest.raises(ValueError, match="needs two masks"):
        draw_similarity(masks([one]), tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"head\.weight is \(5, 16\) in one mask and \(4, 16\)"):
        compare(bits, {**bits, "head.weight": bits["head.weight"][:4]})
    with pytest.raises(ValueError, match=r"1 parameters are in one mask only: head\.weight"):
        changes(bits, {name: mask for name, mask in bits.items() if name != "head.weight"})


def test_labels_tell_paths_apart() -> None:
    paths = [Path("runs/a/final.mask"), Path("runs/b"), Path("other/b"), Path("x.mask"), Path("runs/b")]
    assert labels_of(paths) == ["runs/a", "runs/b", "other/b", f"{Path.cwd().name}/x", "runs/b (2)"]
    assert labels_of([Path("runs/a"), Path("runs/b")]) == ["a", "b"]
    assert labels_of([]) == []


def test_saved_masks_are_read_as_they_were(tmp_path: Path) -> None:
    model, preset = make("timm_vit", dtype=torch.float32)
    attached = attach(model, include=preset)
    write_mask_file(tmp_path / "a.mask", MaskFile({"default": from_masks(attached)}))
    (subject,) = read_subjects([tmp_path / "a.mask"])
    assert (
        subject.weights_fingerprint
        == read_mask_file(tmp_path / "a.mask").masks["default"].weights_fingerprint
    )
    assert masks([subject]).masks[0].pruned.share == 0.0
