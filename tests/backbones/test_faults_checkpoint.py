"""Checkpoints as training codes write them: the encoder in it is found, and a choice is said."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from selfmask_dist.backbones import load_backbone
from selfmask_dist.backbones.load import _measure_dim
from selfmask_dist.backbones.weights import read_state_dict
from selfmask_dist.config.backbone import BackboneConfig

KWARGS: dict[str, Any] = {"channels": [8, 8, 8, 16], "stem_width": 8}


def network(seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return timm.create_model("resnet18", num_classes=0, **KWARGS).state_dict()


FIRST, SECOND = network(1), network(2)


def below(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in state.items()}


HEAD = {"fc.0.weight": torch.zeros(2, 2), "fc.0.bias": torch.zeros(2)}
MOCO = {
    "epoch": 3,
    "state_dict": below(
        "module.",
        below("encoder_q.", {**FIRST, **HEAD})
        | below("encoder_k.", {**SECOND, **HEAD})
        | {"queue": torch.zeros(2)},
    ),
    "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
}
DINO = {
    "student": below("module.backbone.", SECOND) | below("module.head.", {"mlp.0.weight": torch.zeros(2)}),
    "teacher": below("backbone.", FIRST) | below("head.", {"mlp.0.weight": torch.zeros(2)}),
    "epoch": 1,
}
ONE = {
    "lightning": {"state_dict": below("model.net.", FIRST), "hyper_parameters": {"lr": 1.0}},
    "simsiam": {
        "state_dict": below("module.encoder.", {**FIRST, **HEAD})
        | {"module.predictor.0.weight": torch.zeros(2)}
    },
    "mmpretrain": {"meta": {}, "state_dict": below("backbone.", FIRST) | {"head.fc.weight": torch.zeros(2)}},
    "vissl": {"classy_state_dict": {"base_model": {"model": {"trunk": below("_feature_blocks.", FIRST)}}}},
    "compiled and parallel": below("module._orig_mod.", FIRST),
    "without counters": {
        "net": below("net.", {n: t for n, t in FIRST.items() if not n.endswith("num_batches_tracked")})
    },
    "wrapped layers": {
        name.replace("layer1.0", "layer1._fsdp_wrapped_module.0"): t for name, t in FIRST.items()
    },
}
TWO = {
    "moco": (MOCO, "encoder_q", "encoder_k"),
    "moco v3": (
        {"state_dict": below("module.base_encoder.", FIRST) | below("module.momentum_encoder.", SECOND)},
        "base_encoder",
        "momentum_encoder",
    ),
    "dino": (DINO, "teacher", "student"),
    "dino in one dict": (
        below("teacher.backbone.", FIRST) | below("student.backbone.", SECOND),
        "teacher",
        "student",
    ),
    "averaged": ({"state_dict": FIRST, "state_dict_ema": SECOND}, "state_dict", "state_dict_ema"),
}


def load(content: Any, folder: Path, **keys: Any) -> dict[str, Tensor]:
    torch.save(content, folder / "x.pth")
    section = BackboneConfig(
        name="timm:resnet18", weights=str(folder / "x.pth"), kwargs=KWARGS, image_size=32, **keys
    )
    return load_backbone(section).encoder.state_dict()


def equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize("name", ONE)
def test_the_one_network_of_a_file_is_found_without_a_word(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert equal(load(ONE[name], tmp_path), FIRST)
    assert not caplog.messages


@pytest.mark.parametrize("name", TWO)
def test_of_two_networks_one_is_taken_and_said_and_a_key_takes_either(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content, first, second = TWO[name]
    assert equal(load(content, tmp_path), FIRST)
    (message,) = caplog.messages
    assert f"taken is {first}" in message.replace("state_dict.module.", "")
    assert "backbone.weights_key takes another" in message
    assert second in message
    caplog.clear()
    assert equal(load(content, tmp_path, weights_key=first), FIRST)
    assert equal(load(content, tmp_path, weights_key=second), SECOND)
    assert not caplog.messages


def test_a_key_that_is_not_there_and_a_choice_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"nothing of this model below backbone\.weights_key=teacher; it has .*encoder_k"
    ):
        load(MOCO, tmp_path, weights_key="teacher")
    two = {"left": FIRST, "right": SECOND}
    with pytest.raises(
        ValueError, match=r"more than one network that fits: left, right; choose .*weights_key=left"
    ):
        load(two, tmp_path)
    assert equal(load(two, tmp_path, weights_key="right"), SECOND)


def test_what_is_no_tensor_beside_the_network_is_refused_as_before(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"1 of its \d+ entries are not a name with a tensor: 'epoch' \(int\)"
    ):
        load({**FIRST, "epoch": 3}, tmp_path)
    other = below("encoder_q.", network(1) | {"layer9.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"only in the file \(1\): layer9\.weight"):
        load(other, tmp_path)


def test_without_a_model_known_keys_are_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"student": SECOND, "teacher": FIRST}, tmp_path / "x.pth")
    assert equal(read_state_dict(tmp_path / "x.pth"), FIRST)
    assert "taken is teacher" in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "cause"),
    [
        (
            {},
            r"a tuple of 2: \(2, 3\) and \(2, 5, 3\)\. The model's own configuration .*output_tokens: false",
        ),
        ({"vision_cfg": {"output_tokens": True}}, r"Take out backbone\.kwargs\.vision_cfg\.output_tokens"),
        ({"global_pool": ""}, r"own configuration"),
    ],
)
def test_two_outputs_have_the_true_cause(kwargs: dict[str, Any], cause: str) -> None:
    class Tower(nn.Module):
        output_tokens = True

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return torch.zeros(len(images), 3), torch.zeros(len(images), 5, 3)

    with pytest.raises(ValueError, match=cause):
        _measure_dim(Tower(), "open_clip:coca", 8, kwargs=kwargs)
