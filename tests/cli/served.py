"""`selfmask serve` as a process of its own, over a small backbone, with two mask files beside it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from selfmask_dist.backbones import fingerprint
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.config import load_config
from selfmask_dist.maskfile import Mask, MaskFile, write_mask_file
from selfmask_dist.maskfile.bank import MaskBank
from selfmask_dist.training.build import build_backbone
from tests.support.tiny_run import child_environment

MASKS = ("pets", "birds")


def write_service(folder: Path, backbone: str = "timm:test_vit") -> tuple[MaskBank, Preprocessing]:
    """Write config.yaml and a file for each of `MASKS`; returns what answers are to be held against."""
    config = folder / "config.yaml"
    config.write_text(f"backbone:\n  name: {backbone}\n  pretrained: false\nengine:\n  device: cpu\n")
    built = build_backbone(load_config(config))
    weights = {name: value for name, value in built.encoder.named_parameters() if value.ndim == 2}
    for seed, name in enumerate(MASKS):
        generator = torch.Generator().manual_seed(seed)
        bits = {key: torch.rand(value.shape, generator=generator) > 0.3 for key, value in weights.items()}
        mask = Mask(bits, fingerprint(weights.items()))
        write_mask_file(folder / f"{name}.mask", MaskFile({"default": mask}))
    bank = MaskBank(built.encoder)
    for name in MASKS:
        bank.add(name, folder / f"{name}.mask")
    return bank, built.spec.preprocessing


class Served:
    """The process, from its first answer to its end. `options` are those of `selfmask serve`."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        masks = [str(folder / f"{name}.mask") for name in MASKS]
        command = [
            sys.executable,
            "-m",
            "selfmask_dist.cli",
            "serve",
            "--config",
            str(folder / "config.yaml"),
        ]
        command += ["--masks", *masks, "--port", str(self.port), "--device", "cpu", *options]
        self._errors = folder / "stderr.txt"
        with open(self._errors, "wb") as stream:
            self.process = subprocess.Popen(
                command, env=child_environment(), stdout=subprocess.DEVNULL, stderr=stream
            )

    def __enter__(self) -> "Served":
        deadline = time.monotonic() + 120
        while not self.is_open():
            assert self.process.poll() is None, self.errors
            assert time.monotonic() < deadline, "it does not start"
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def is_open(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port)).close()
        except OSError:
            return False
        return True

    @property
    def errors(self) -> str:
        """What it wrote to stderr so far."""
        return self._errors.read_text()

    def memory(self, kind: str = "VmRSS") -> int:
        """Bytes of memory, by their name in /proc/PID/status."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"{kind}:\s+(\d+) kB", text)
        assert found is not None, text
        return int(found[1]) * 1024

    def num_files(self) -> int:
        """How many files and connections it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self) -> float:
        """Send SIGTERM; returns the seconds until it has ended by that signal."""
        start = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == -signal.SIGTERM
        return time.monotonic() - start
