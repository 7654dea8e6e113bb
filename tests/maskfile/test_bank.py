"""A bank of masks: each image under its own mask as if it were alone, whatever was on before."""

import copy
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selfmask_dist import apply_masks, attach
from selfmask_dist.backbones import fingerprint
from selfmask_dist.cascade import Combination, Router
from selfmask_dist.cascade.model import load_cascade, save_cascade
from selfmask_dist.common.names import DISPATCHER, expert
from selfmask_dist.maskfile import Mask, MaskFile, MaskFileError, forms, from_masks, write_mask_file
from selfmask_dist.maskfile.bank import MaskBank
from selfmask_dist.masking import build_family
from tests.support.models import FAMILIES, make, scores_of

SHARES = {"sparse": 0.02, "half": 0.5, "dense": 0.98}


def images(count: int = 6, seed: int = 5) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def random_masks(model: nn.Module, preset: str, **options: Any) -> dict[str, Mask]:
    """Masks that prune few weights, half of them, and most."""
    masks = attach(copy.deepcopy(model), include=preset, **options)
    found = {}
    for seed, (name, share) in enumerate(SHARES.items()):
        generator = torch.Generator().manual_seed(seed)
        scores = {
            key: torch.rand(value.shape, generator=generator) - share
            for key, value in scores_of(masks).items()
        }
        masks.load_state_dict(scores)
        found[name] = from_masks(masks)
    return found


def embedded_alone(model: nn.Module, mask: Mask | None, pictures: Tensor, folder: Path) -> Tensor:
    """A copy of the backbone with one mask applied from its file."""
    model = copy.deepcopy(model).eval()
    if mask is not None:
        write_mask_file(folder / "one.mask", MaskFile({"default": mask}))
        apply_masks(model, folder / "one.mask")
    with torch.no_grad():
        return model(pictures)


@pytest.mark.parametrize(
    "options",
    [{}, {"family": build_family("threshold", scale="none")}, {"split_qkv": True}],
    ids=["scaled", "plain", "split"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mask_is_as_if_alone(family: str, options: dict, tmp_path: Path) -> None:
    model, preset = make(family, dtype=torch.float32)
    masks = random_masks(model, preset, **options)
    expected: dict[str | None, Tensor] = {
        name: embedded_alone(model, mask, images(), tmp_path) for name, mask in masks.items()
    }
    expected[None] = embedded_alone(model, None, images(), tmp_path)
    bank = MaskBank(copy.deepcopy(model))
    for name, mask in masks.items():
        bank.add(name, mask)
    for on in ("sparse", "half", None, "dense", "sparse", "dense", "half", None, None):
        assert torch.equal(bank.embed(images(), on), expected[on]), on


def test_statistics_of_one_mask_are_not_anothers() -> None:
    model, preset = make("conv", dtype=torch.float32)
    plain = random_masks(model, preset)["half"]
    mean = next(name for name, _ in model.named_buffers() if name.endswith("running_mean"))
    moved = replace(plain, statistics={mean: torch.full_like(model.get_buffer(mean), 3.0)})
    bank = MaskBank(model)
    bank.add("moved", moved)
    bank.add("plain", plain)
    frozen = bank.embed(images(), None)
    before = bank.embed(images(), "plain")
    assert not torch.equal(bank.embed(images(), "moved"), before)
    assert torch.equal(bank.embed(images(), "plain"), before)
    assert torch.equal(bank.embed(images(), None), frozen)


def mask_of_kind(model: nn.Module, kind: Any) -> Mask:
    """Half of every matrix, as a kind that is more than bits has it."""
    generator = torch.Generator().manual_seed(1)
    weights = {name: value.detach() for name, value in model.named_parameters() if value.ndim == 2}
    bits: dict[str, Tensor] = {}
    parts: dict[str, Any] = {"signs": {}, "scales": {}, "values": {}}
    for name, weight in weights.items():
        kept = torch.rand(weight.shape, generator=generator) < (2.0 if kind in forms.KEEPS_ALL else 0.5)
        bits[name] = kept
        if kind in forms.NUM_SCALES:
            parts["scales"][name] = torch.rand(2, forms.NUM_SCALES[kind], generator=generator).double()
        if kind in forms.WITH_SIGNS:
            parts["signs"][name] = (torch.rand(weight.shape, generator=generator) < 0.3) & kept
        if kind in forms.WITH_VALUES:
            parts["values"][name] = torch.randn(int(kept.sum()), generator=generator)
    segments = dict.fromkeys(weights, 2) if kind in forms.NUM_SCALES else {}
    return Mask(bits, fingerprint(weights.items()), kind=kind, num_segments=segments, **parts)


def test_every_kind_of_mask_is_as_if_alone(tmp_path: Path) -> None:
    model, preset = make("timm_vit", dtype=torch.float32)
    masks: dict[str, Mask] = {kind: mask_of_kind(model, kind) for kind in forms.KINDS if kind != "threshold"}
    masks["threshold"] = random_masks(model, preset)["half"]
    bank = MaskBank(copy.deepcopy(model))
    for name, mask in masks.items():
        bank.add(name, mask)
    for on in (*masks, *reversed(masks), None):
        alone = embedded_alone(model, masks.get(on or ""), images(), tmp_path)
        assert torch.equal(bank.embed(images(), on), alone), on
    assert len({bank.embed(images(), on)[0, 0].item() for on in (*masks, None)}) == len(masks) + 1


def test_a_mixed_batch_is_each_image_under_its_mask(tmp_path: Path) -> None:
    model, preset = make("timm_vit", dtype=torch.float32)
    masks = random_masks(model, preset)
    bank = MaskBank(copy.deepcopy(model))
    for name, mask in masks.items():
        bank.add(name, mask)
    names = ["half", None, "dense", "half", "sparse", None]
    mixed = bank.embed(images(), names)
    for on in {*names}:
        rows = [row for row, given in enumerate(names) if given == on]
        alone = embedded_alone(model, masks.get(on or ""), images()[rows], tmp_path)
        assert torch.equal(mixed[rows], alone), on
    with pytest.raises(ValueError, match="6 images came with 2 names"):
        bank.embed(images(), ["half", "half"])
    with pytest.raises(ValueError, match="no mask 'cats'; it has sparse, half, dense"):
        bank.embed(images(2), ["half", "cats"])


def test_the_cache_keeps_to_its_bound_and_changes_no_result() -> None:
    model, preset = make("timm_vit", dtype=torch.float32)
    masks = random_masks(model, preset)
    roomy = MaskBank(copy.deepcopy(model))
    for name, mask in masks.items():
        roomy.add(name, mask)
    expected = {name: roomy.embed(images(), name) for name in masks}
    assert roomy.cached_bytes > 2000
    for bound in (0, roomy.cached_bytes * 0.7):
        tight = MaskBank(copy.deepcopy(model), cache_mib=bound / 2**20)
        for name, mask in masks.items():
            tight.add(name, mask)
        for name in [*masks, *reversed(masks)]:
            assert torch.equal(tight.embed(images(), name), expected[name])
            assert tight.cached_bytes <= bound


def test_a_mask_gives_up_no_more_layers_than_are_in_the_way() -> None:
    model, preset = make("timm_vit", dtype=torch.float32)
    masks = random_masks(model, preset)
    num_layers = len(masks["half"].bits)
    roomy = MaskBank(copy.deepcopy(model))
    for name in ("half", "other"):
        roomy.add(name, masks["half"])
        roomy.embed(images(), name)
    assert roomy.layers_decoded == 2 * num_layers
    size = roomy.cached_bytes // 2
    tight = MaskBank(model, cache_mib=1.5 * size / 2**20)
    tight.add("half", masks["half"])
    tight.add("other", masks["half"])
    for turn in range(6):
        name = ("half", "other")[turn % 2]
        before = tight.layers_decoded
        assert torch.equal(tight.embed(images(), name), roomy.embed(images(), name))
        again = tight.layers_decoded - before
        assert again == num_layers if turn < 2 else 0 < again < num_layers, turn
        assert size < tight.cached_bytes <= 1.5 * size or turn == 0
    tight.remove("half")
    tight.embed(images(), "other")
    assert tight.cached_bytes == size
    tight.forget_decoded()
    assert tight.cached_bytes == 0
    assert torch.equal(tight.embed(images(), None), roomy.embed(images(), None))
    assert torch.equal(tight.embed(images(), "other"), roomy.embed(images(), "other"))


def test_memory_of_a_mask_is_that_of_its_file(tmp_path: Path) -> None:
    model, preset = make("timm_vit", dtype=torch.float32)
    mask = random_masks(model, preset)["dense"]
    bank = MaskBank(model)
    bank.add("a", mask)
    assert bank.num_bytes < write_mask_file(tmp_path / "a.mask", MaskFile({"default": mask}))


def test_masks_come_from_files_and_go(tmp_path: Path) -> None:
    model, preset = make("timm_vit", dtype=torch.float32)
    masks = random_masks(model, preset)
    write_mask_file(tmp_path / "half.mask", MaskFile({"default": masks["half"]}))
    write_mask_file(tmp_path / "two.mask", MaskFile({"a": masks["half"], "b": masks["sparse"]}))
    bank = MaskBank(model)
    bank.add("half", tmp_path / "half.mask")
    on = bank.embed(images(), "half")
    bank.add("again", tmp_path / "half.mask")  # while one is on: the frozen weights are what is fingerprinted
    assert torch.equal(bank.embed(images(), "again"), on)
    with pytest.raises(ValueError, match="holds a mask 'half' already"):
        bank.add("half", masks["sparse"])
    with pytest.raises(MaskFileError, match=r"holds the masks \['a', 'b'\], not one"):
        bank.add("two", tmp_path / "two.mask")
    with pytest.raises(MaskFileError, match="wrong backbone"):  # known by the fingerprint of the first
        bank.add("other", replace(masks["half"], weights_fingerprint="0" * 64))
    bank.remove("again")
    assert bank.names == ["half"]
    with pytest.raises(ValueError, match="no mask 'again'"):
        bank.embed(images(), "again")


def test_a_swap_that_fails_leaves_nothing_behind() -> None:
    model, preset = make("timm_vit", dtype=torch.float32)
    bank = MaskBank(model)
    for name, mask in random_masks(model, preset).items():
        bank.add(name, mask)
    expected = {name: bank.embed(images(), name) for name in (None, "half", "sparse")}
    bank.forget_decoded()
    sections = bank._coded["dense"].sections
    whole, last = dict(sections), list(sections)[-1]
    sections[last] = b"rotten"
    for before in ("half", None):
        bank.embed(images(), before)
        with pytest.raises(ValueError, match="mask bits"):
            bank.embed(images(), "dense")
        for on, embeddings in expected.items():
            assert torch.equal(bank.embed(images(), on), embeddings), on
    sections |= whole
    bank.embed(images(), "dense")
    scales = bank._coded["half"].scales
    right, scales[last] = scales[last], ("a",)  # type: ignore[assignment]
    with pytest.raises(TypeError, match="mul"):  # all the others are written by the time that this fails
        bank.embed(images(), "half")
    scales[last] = right
    for on, embeddings in expected.items():
        assert torch.equal(bank.embed(images(), on), embeddings), on


def test_threads_do_not_see_each_others_masks() -> None:
    model, preset = make("timm_vit", dtype=torch.float32)
    bank = MaskBank(model)
    for name, mask in random_masks(model, preset).items():
        bank.add(name, mask)
    expected = {name: bank.embed(images(), name) for name in bank.names}
    wrong: list[str] = []

    def work(offset: int) -> None:
        for turn in range(20):
            name = bank.names[(turn + offset) % len(bank)]
            if not torch.equal(bank.embed(images(), name), expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def write_cascade(model: nn.Module, preset: str, folder: Path) -> Path:
    """A cascade of a dispatcher and two experts, fitted to random pictures."""
    names = [DISPATCHER, expert(0), expert(1)]
    masks = dict(zip(names, random_masks(model, preset).values(), strict=True))
    pictures = images(60, seed=1)
    features = {name: embedded_alone(model, mask, pictures, folder) for name, mask in masks.items()}
    router = Router.fit(features[DISPATCHER], torch.arange(60), num_clusters=2, num_components=4, seed=0)
    parts = (
        features[DISPATCHER],
        [features[name] for name in names[1:]],
        router.assign(features[DISPATCHER]),
    )
    combinations = {
        mode: Combination.fit(iter([parts]), mode=mode, num_experts=2)
        for mode in ("conditional", "unconditional")
    }
    save_cascade(folder / "cascade.mask", masks, router, combinations)
    return folder / "cascade.mask"


def test_a_cascade_is_served_from_a_bank(tmp_path: Path) -> None:
    model, preset = make("timm_vit", dtype=torch.float32)
    path = write_cascade(model, preset, tmp_path)
    expected = load_cascade(path, copy.deepcopy(model))
    bank = MaskBank(model)
    cascade = load_cascade(path, bank, name="birds")
    assert bank.names == ["birds/dispatcher", "birds/expert-0", "birds/expert-1"]
    for mode in ("conditional", "unconditional", "dispatcher"):
        assert torch.equal(cascade.embed(images(), mode=mode), expected.embed(images(), mode=mode)), mode
    with pytest.raises(ValueError, match="holds a mask 'birds/dispatcher' already"):
        load_cascade(path, bank, name="birds")
    assert len(bank) == 3, "what is there stays"
    bank.remove("birds/dispatcher")
    with pytest.raises(ValueError, match="holds a mask 'birds/expert-0' already"):
        load_cascade(path, bank, name="birds")
    assert bank.names == ["birds/expert-0", "birds/expert-1"], "what was added goes again"
