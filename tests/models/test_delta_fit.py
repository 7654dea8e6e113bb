"""A fine-tuning run as a fitted delta: nearer to the fine-tuned network than a plain one, in as many bits."""

from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import Tensor

import selfmask_dist
from selfmask_dist import MaskBank
from selfmask_dist.cli import main
from selfmask_dist.maskfile import Mask, read_mask_file
from selfmask_dist.maskfile.tools.deltas import delta_mask, halve_vectors
from selfmask_dist.models.deltas import import_delta
from selfmask_dist.training.whole.calibrate import Calibration
from tests.models.cases import train
from tests.support.models import make


@pytest.fixture(scope="module")
def finetuned(hard_data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    return train(folder, hard_data, "tuned", "method=finetune", "optim.weight_lr=0.3", "train.epochs=3")


def mask_of(path: Path) -> Mask:
    return next(iter(read_mask_file(path).masks.values()))


def error(path: Path, run: Path, images: Tensor) -> float:
    delta, tuned = selfmask_dist.load(path, config=run / "config.yaml"), selfmask_dist.load(run)
    return (delta(images) - tuned(images)).square().mean().item()


def test_a_fitted_delta_is_nearer_in_as_many_bits(
    finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain, fitted = tmp_path / "plain.mask", tmp_path / "fitted.mask"
    sizes = [import_delta(finetuned, plain, half=True).num_bytes]
    found = import_delta(
        finetuned, fitted, half=True, pictures=48, settings=Calibration(epochs=12, sign_lr=0.1)
    )
    sizes.append(found.num_bytes)
    assert found.errors[-1] < 0.5 * found.errors[0]
    assert error(fitted, finetuned, images) < 0.8 * error(plain, finetuned, images)
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0]
    before, after = mask_of(plain), mask_of(fitted)
    assert all(value.dtype == torch.float16 for value in after.statistics.values())
    turned = sum(int((before.signs[name] != sign).sum()) for name, sign in after.signs.items())
    assert 0 < turned < 0.5 * before.num_weights()
    again = tmp_path / "again.mask"
    assert main(["mask", "delta", str(finetuned), "--out", str(again), "--half", "--calibrate", "48"]) == 0
    assert "error by epoch of calibration" in capsys.readouterr().out
    too_many = ["mask", "delta", str(finetuned), "--out", str(again), "--calibrate", "49"]
    assert main(too_many) == 2
    assert "49 pictures to calibrate on, and data.train of the run has 48" in capsys.readouterr().err


def test_what_is_not_fitted_stays(finetuned: Path, tmp_path: Path) -> None:
    plain, sizes = tmp_path / "plain.mask", tmp_path / "sizes.mask"
    import_delta(finetuned, plain)
    import_delta(finetuned, sizes, pictures=16, settings=Calibration(epochs=1, vector_lr=0, sign_lr=0))
    before, after = mask_of(plain), mask_of(sizes)
    for name, sign in before.signs.items():
        assert torch.equal(sign, after.signs[name])
        assert not torch.equal(before.scales[name], after.scales[name])
    for name, value in before.statistics.items():
        assert torch.equal(value, after.statistics[name])


def test_what_half_precision_does_not_hold_stays() -> None:
    large = torch.tensor([1e6, 2.0])
    found = halve_vectors(
        {"large": large, "count": torch.tensor(3), "bias": torch.tensor([0.1, -0.2]), "none": torch.zeros(0)}
    )
    assert torch.equal(found["large"], large)
    assert found["count"].dtype == torch.int64
    assert found["bias"].dtype == torch.float16


def test_swaps_of_deltas_compile_nothing_again() -> None:
    frozen, _ = make("timm_vit", dtype=torch.float32)
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    bank = MaskBank(frozen.eval())
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        moved = {k: v + 0.01 * torch.randn(v.shape, generator=draw) for k, v in before.items()}
        bank.add(f"d{seed}", delta_mask(before, moved))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(frozen, backend="eager")
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    seen = []
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("d0", "d1", None, "d2", "d0"):
            with bank.under(name) as encoder:
                seen.append(compiled(images))
                assert torch.equal(seen[-1], encoder(images))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(seen[0], seen[-1])
    assert not torch.equal(seen[0], seen[1])
