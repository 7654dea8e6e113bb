"""What a run left that has no mask file: the weights that fine-tuning changed, or a whole encoder."""

import json
from dataclasses import dataclass
from pathlib import Path

from selfmask_dist.common.names import ENCODER, FINETUNED


@dataclass(frozen=True)
class Weights:
    """A file of weights. method: of its run. backbone_fingerprint: of the weights that it started from."""

    path: Path
    method: str
    backbone_fingerprint: str


def find_weights(run: Path) -> Weights | None:
    """Those of a finished run.

    Raises:
        ValueError: the run has not finished.
    """
    for name in (FINETUNED, ENCODER):
        if (run / name).exists():
            if not (run / "result.json").exists():
                raise ValueError(f"{run} is not finished: it has {name} and no result.json yet")
            result = json.loads((run / "result.json").read_text())
            return Weights(run / name, result["method"], result["fingerprint"])
    return None
