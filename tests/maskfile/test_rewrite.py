"""Theta rewritten from decoded bits: bit for bit what `core.materialize` makes, by passes and by kernel."""

import copy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from selfmask_dist.maskfile import MaskFile, apply_mask, write_mask_file
from selfmask_dist.maskfile.bank import MaskBank
from selfmask_dist.maskfile.layers import Change, decoded
from selfmask_dist.maskfile.rewrite import rewrite
from tests.maskfile.test_bank import images, random_masks
from tests.support.models import make
from tests.support.rewrite_cases import DTYPES, INTEGERS, cases
from tests.support.tiny_run import ROOT, child_environment

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_passes_make_what_training_had(dtype: torch.dtype) -> None:
    changes, expected = cases(dtype)
    assert {change.layer.packed is None for change in changes} == {True, False}
    rewrite(changes)
    for change, theta in zip(changes, expected, strict=True):
        assert torch.equal(change.theta, theta), tuple(theta.shape)


def test_a_layer_takes_a_bit_for_each_weight_at_most() -> None:
    bits = np.random.default_rng(0).random(80_000)
    weight = torch.zeros(80_000)
    assert decoded(bits < 0.5, weight).num_bytes == 10_000
    assert decoded(bits < 0.99, weight).num_bytes == 4 * np.count_nonzero(bits >= 0.99)
    assert decoded(bits < 0.01, weight).num_bytes == 4 * np.count_nonzero(bits < 0.01)
    assert decoded(bits < 2.0, weight).num_bytes == 0


def test_a_theta_in_another_order_of_memory_is_rewritten_too() -> None:
    changes, expected = cases(torch.float32)
    at = next(place for place, theta in enumerate(expected) if theta.ndim == 4)
    theta = torch.zeros_like(expected[at]).to(memory_format=torch.channels_last)
    assert not theta.is_contiguous()
    old = changes[at]
    rewrite([Change(theta, old.weight, old.layer, old.scales)])
    assert torch.equal(theta, expected[at])


INTERPRETED = """
import numpy as np, torch
from selfmask_dist.masking import core
from selfmask_dist.maskfile.layers import Change, Layer
from selfmask_dist.maskfile.kernel import BLOCK, rewrite_fused
from tests.support.rewrite_cases import DTYPES, INTEGERS, cases

everything, thetas = [], []
for dtype in DTYPES:
    changes, expected = cases(dtype)
    weight = torch.tensor([float("inf"), float("-inf"), float("nan"), -1.5, 2.0], dtype=dtype)
    kept = torch.tensor([True, True, True, False, True])
    scale = core.scale_factor(core.count_kept(kept), 5, dtype)
    changes.append(Change(torch.zeros(5, dtype=dtype), weight, changes[0].layer, (float(scale),)))
    expected.append(core.materialize(weight, kept))
    masks = [theta.isnan() | (theta != 0) for theta in expected[:-1]] + [kept]
    for change, theta, mask in zip(changes, expected, masks, strict=True):
        packed = torch.from_numpy(np.packbits(mask.numpy()))
        everything.append(Change(change.theta, change.weight, Layer(None, False, packed), change.scales))
        thetas.append(theta)
other_order = torch.zeros(12, 3, 3, 3).to(memory_format=torch.channels_last)
place = next(i for i, theta in enumerate(thetas) if theta.ndim == 4)
old = everything[place]
everything.append(Change(other_order, old.weight, old.layer, old.scales))
thetas.append(thetas[place])
assert max(theta.numel() for theta in thetas) > 2 * BLOCK
versions = [change.theta._version for change in everything]
rewrite_fused(everything)
for change, theta, version in zip(everything, thetas, versions, strict=True):
    integers = INTEGERS[theta.element_size()]
    found, wanted = change.theta.contiguous().view(integers), theta.view(integers)
    same = (found == wanted) | (change.theta.isnan() & theta.isnan())
    assert same.all(), (theta.dtype, tuple(theta.shape), found[~same][:5], wanted[~same][:5])
    assert change.theta._version > version
print(len(thetas), "parameters")
"""


def run_with_triton(script: str, folder: Path, **environment: str) -> str:
    given = child_environment(TRITON_CACHE_DIR=str(folder), **environment)
    done = subprocess.run(
        [sys.executable, "-c", script], env=given, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_triton
def test_the_kernel_makes_what_training_had(tmp_path: Path) -> None:
    """In Triton's interpreter on a CPU: every bit, signs of zeros too."""
    assert run_with_triton(INTERPRETED, tmp_path, TRITON_INTERPRET="1") == "37 parameters\n"


COMPILED = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from selfmask_dist.maskfile import kernel

for kind in ("fp32", "fp16", "bf16", "fp64"):
    signature = {"table": "*i64", "COLUMNS": "constexpr", "KIND": "constexpr", "BLOCK": "constexpr"}
    constants = {"COLUMNS": kernel._COLUMNS, "KIND": kind, "BLOCK": kernel.BLOCK}
    source = ASTSource(fn=kernel._kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    assert compiled.asm["cubin"]
    operations = re.findall("(?:mul|fma|cvt)[.a-z0-9]*[.](?:f16|bf16|f32|f64)[.a-z0-9]*", compiled.asm["ptx"])
    print(kind, *sorted({*operations}))
"""


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles for NVIDIA's devices on Linux")
def test_the_kernel_compiles_and_no_product_is_fused_or_flushed(tmp_path: Path) -> None:
    """No GPU is needed to compile; rounding is what bit-equality hangs on."""
    lines = run_with_triton(COMPILED, tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == ["fp32", "fp16", "bf16", "fp64"]
    for line in lines:
        assert "mul.f64" in line if line.startswith("fp64") else "mul.f32" in line
        assert "fma" not in line
        assert "ftz" not in line


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_theta_is_what_training_had(dtype: torch.dtype) -> None:
    changes, expected = cases(dtype, "cuda")
    rewrite(changes)
    for change, theta in zip(changes, expected, strict=True):
        integers = INTEGERS[theta.element_size()]
        assert torch.equal(change.theta.view(integers), theta.view(integers)), tuple(theta.shape)


@pytest.mark.gpu
def test_on_a_gpu_a_bank_is_every_mask_alone(tmp_path: Path) -> None:
    model, preset = make("timm_vit", dtype=torch.float32)
    masks = random_masks(model, preset, split_qkv=True)
    bank, pictures = MaskBank(copy.deepcopy(model).cuda()), images().cuda()
    for name, mask in masks.items():
        write_mask_file(tmp_path / f"{name}.mask", MaskFile({"default": mask}))
        bank.add(name, tmp_path / f"{name}.mask")
    for name in ("half", "sparse", "dense", "half"):
        alone = copy.deepcopy(model).cuda().eval()
        apply_mask(alone, masks[name])
        with torch.no_grad():
            assert torch.equal(bank.embed(pictures, name), alone(pictures)), name
