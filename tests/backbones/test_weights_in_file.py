"""Backbones that stay in their file until an engine takes its share: same values, less memory."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from selfmask_dist.backbones import load_backbone
from selfmask_dist.config.backbone import BackboneConfig
from selfmask_dist.config.sections import EngineConfig
from selfmask_dist.masking import attach
from selfmask_dist.parallel import EngineState, build_engine
from tests.backbones.test_backbones import CLIP_KWARGS, VIT_KWARGS
from tests.support.distributed import run_distributed
from tests.support.engine_cases import Step, batch_of, world_here

FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "timm_vit": ("timm:vit_tiny_patch16_224", {**VIT_KWARGS, "embed_dim": 26}, "vit"),
    "resnet": ("timm:test_resnet", {}, "resnet"),
    "open_clip": ("open_clip:ViT-B-32", CLIP_KWARGS, "vit"),
    "swin": (
        "timm:swin_tiny_patch4_window7_224",
        {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2]},
        "vit",
    ),
}


def load(family: str, path: Path | str, image_size: int = 32, **options: Any) -> Any:
    name, kwargs, _ = FAMILIES[family]
    if family == "swin":
        kwargs = {**kwargs, "window_size": 4}
    size = None if family == "open_clip" else image_size
    section = BackboneConfig(name=name, weights=str(path), image_size=size, kwargs=kwargs)
    return load_backbone(section, **options)


def write_files(folder: Path) -> dict[str, Path]:
    """A weights file of each family; the ViT's is of another image size, half precision and torch.save's."""
    paths = {}
    for family, (name, kwargs, _) in FAMILIES.items():
        options: dict[str, Any] = {"image_size": None if family == "open_clip" else 32}
        if family == "timm_vit":
            options = {"image_size": 64}
        if family == "swin":
            kwargs = {**kwargs, "window_size": 4}
        section = BackboneConfig(name=name, pretrained=False, kwargs=kwargs, **options)
        encoder = load_backbone(section, seed=3).encoder
        for index, value in enumerate(encoder.state_dict().values()):
            if value.is_floating_point():  # running statistics and biases are not all alike
                noise = torch.rand(value.shape, generator=torch.Generator().manual_seed(index))
                value.add_(0.02 * noise)
        state = {key: value.clone() for key, value in encoder.state_dict().items()}
        paths[family] = folder / f"{family}.safetensors"
        if family == "timm_vit":
            paths[family] = folder / f"{family}.pth"
            torch.save({key: value.half() for key, value in state.items()}, paths[family])
        else:
            save_file(state, paths[family])
    return paths


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_files(tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_backbone_in_its_file_is_the_same_backbone(family: str, files: dict[str, Path]) -> None:
    whole, in_file = (load(family, files[family], in_file=is_in_file) for is_in_file in (False, True))
    assert in_file.spec == whole.spec
    ours, theirs = in_file.encoder.state_dict(), whole.encoder.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name].to(value.dtype), value), name
    others = dict(whole.encoder.named_buffers())  # those too that no file holds
    for name, buffer in in_file.encoder.named_buffers():
        assert torch.equal(buffer, others[name]), name
        assert buffer.dtype == others[name].dtype
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    # not bit for bit: some kernels sum in another order where a tensor is not aligned, as in a file
    torch.testing.assert_close(in_file.encoder.float()(images), whole.encoder(images), rtol=1e-5, atol=1e-5)


def mapped_bytes(encoder: nn.Module, path: Path) -> int:
    """Bytes of parameters that lie in pages of a file."""
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            start, _, stop = line.split()[0].partition("-")
            spans.append((int(start, 16), int(stop, 16)))
    return sum(
        p.nbytes for p in encoder.parameters() if any(low <= p.data_ptr() < high for low, high in spans)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_pages_of_the_file(family: str, files: dict[str, Path]) -> None:
    encoder = load(family, files[family], in_file=True).encoder
    changed = ("pos_embed",) if family == "timm_vit" else ()  # resampled, so it has memory of its own
    expected = sum(p.nbytes for name, p in encoder.named_parameters() if name not in changed)
    assert mapped_bytes(encoder, files[family]) == expected
    assert mapped_bytes(load(family, files[family]).encoder, files[family]) == 0


def test_building_leaves_torch_as_it_was(files: dict[str, Path]) -> None:
    load_state_dict = nn.Module.load_state_dict
    with pytest.raises(ValueError, match="does not fit"):
        load("resnet", files["timm_vit"], in_file=True)
    assert nn.Module.load_state_dict is load_state_dict
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_file_is_held_to_the_same_rules(files: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(files["resnet"])
    state["layer1.0.conv1.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match=r"not finite \(1\): layer1\.0\.conv1\.weight"):
        load("resnet", tmp_path / "nan.safetensors", in_file=True)
    del state["layer1.0.conv1.weight"]
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"only in the model \(1\): layer1\.0\.conv1\.weight"):
        load("resnet", tmp_path / "short.safetensors", in_file=True)


def test_random_weights_are_those_of_the_seed(files: dict[str, Path]) -> None:
    """There is no file; they are drawn as ever."""
    name, kwargs, _ = FAMILIES["timm_vit"]
    section = BackboneConfig(name=name, pretrained=False, image_size=32, kwargs=kwargs)
    assert load_backbone(section, seed=7, in_file=True).spec == load_backbone(section, seed=7).spec


def test_hub_weights_stay_in_their_file_too(tmp_path: Path) -> None:
    """timm's own way to its files, the download replaced by one that is here."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7, **VIT_KWARGS)
    path = tmp_path / "hub.safetensors"
    save_file(model.state_dict(), path)
    kwargs = {**VIT_KWARGS, "pretrained_cfg_overlay": {"file": str(path), "num_classes": 7}}
    whole, in_file = (
        load_backbone(
            BackboneConfig(name="timm:vit_tiny_patch16_224", image_size=32, kwargs=kwargs), in_file=is_in_file
        )
        for is_in_file in (False, True)
    )
    assert in_file.spec == whole.spec
    assert mapped_bytes(in_file.encoder, path) == sum(p.nbytes for p in in_file.encoder.parameters())


def train(family: str, path: str, in_file: bool) -> tuple[list[float], EngineState, dict[str, Tensor]]:
    backbone = load(family, path, in_file=in_file)
    step = Step(backbone.encoder, backbone.spec.dim, torch.float32, "frozen")
    backbone.encoder.train(family == "resnet")
    engine = build_engine(
        step,
        encoder=backbone.encoder,
        blocks=backbone.spec.blocks,
        world=world_here(),
        config=EngineConfig(name="fsdp"),
    )
    assert mapped_bytes(backbone.encoder, Path(path)) == 0, "nothing of it is left when it is cut"
    masks = engine.attach(backbone.encoder, attach, include=FAMILIES[family][2])
    engine.start(torch.optim.SGD([*masks.parameters(), *step.head.parameters()], lr=20.0, momentum=0.9))
    losses = []
    for index in range(3):
        batch = batch_of(index, engine.world.rank, engine.world.size, dtype=torch.float32, sides=(32,))
        losses.append(engine.world.sum(engine.forward_backward(batch)["loss"].clone()).item())
        engine.step()
    return losses, engine.state(), engine.whole_weights()


def train_both(paths: dict[str, str]) -> list[Any]:
    return [[train(family, path, in_file) for in_file in (False, True)] for family, path in paths.items()]


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_training_from_the_file_is_bit_identical(world_size: int, files: dict[str, Path]) -> None:
    paths = {family: str(path) for family, path in files.items() if family != "swin"}
    for whole, in_file in run_distributed(train_both, world_size, paths, timeout=120)[-1]:
        assert in_file[0] == whole[0]
        assert len(set(whole[0])) == 3
        for ours, theirs in (
            (in_file[1].parameters, whole[1].parameters),
            (in_file[1].momentum, whole[1].momentum),
            (in_file[1].statistics, whole[1].statistics),
            (in_file[2], whole[2]),
        ):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], value) for name, value in theirs.items())
