"""An error planted in one rank of a real run: `selfmask train` itself is started, and finds it at a step.

A folder with a `sitecustomize.py` on PYTHONPATH does it, which every Python reads as it starts.
"""

from pathlib import Path

from tests.support.tiny_run import ROOT

BUG = 'RuntimeError("planted: the shapes do not match")'
# the type and the text as torch 2.13 gives them on a GPU whose memory fails
DEVICE_FAULT = (
    'torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\\n'
    'CUDA kernel errors might be asynchronously reported at some other API call.")'
)

_CODE = """\
import importlib.abc
import importlib.util
import os
import sys
import time

RANK, STEP, ONCE_ON = {rank}, {step}, {once_on!r}


class Planter(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "selfmask_dist.training.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            plant(module)

        spec.loader.exec_module = exec_module
        return spec


def plant(module):
    import torch

    agree, seen = module.Trainer._agree, []

    def fail(self, loss, step, epoch, batch):
        seen.append(step)
        if len(seen) > STEP and (not ONCE_ON or os.environ.get("SELFMASK_RESTARTS", "0") == "0"):
            print("planted", time.time(), file=sys.stderr, flush=True)
            raise {error}
        return agree(self, loss, step, epoch, batch)

    module.Trainer._agree = fail


if os.environ.get("RANK") == str(RANK):
    sys.meta_path.insert(0, Planter())
"""


def plant(folder: Path, error: str, *, rank: int, step: int = 3, once: bool = False) -> str:
    """Write what makes `rank` raise `error` (an expression) at its step `step`; returns the PYTHONPATH that
    plants it.

    once: only at the first start of the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    code = _CODE.format(rank=rank, step=step, error=error, once_on=once)
    (folder / "sitecustomize.py").write_text(code)
    return f"{folder}:{ROOT}"
