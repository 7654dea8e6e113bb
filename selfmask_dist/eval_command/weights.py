"""What a run left that has no mask file: the weights that fine-tuning changed, or a whole encoder."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from selfmask_dist.finetune import load_changed

CHANGED, WHOLE = "finetuned.safetensors", "encoder.safetensors"


@dataclass(frozen=True)
class Weights:
    """A file of weights. method: of its run. backbone_fingerprint: of the weights that it started from."""

    path: Path
    method: str
    backbone_fingerprint: str

    def load(self, encoder: nn.Module) -> None:
        """Put them onto the pretrained encoder, in place.

        Raises:
            ValueError: the file is of another network.
        """
        if self.path.name == CHANGED:
            load_changed(encoder, self.path)
            return
        tensors, own = load_file(self.path), encoder.state_dict()
        odd = sorted(tensors.keys() ^ own.keys()) or [n for n in own if own[n].shape != tensors[n].shape]
        if odd:
            raise ValueError(f"{self.path} is of another network: {', '.join(odd[:5])} do not fit")
        encoder.load_state_dict(tensors)


def find_weights(run: Path) -> Weights | None:
    """Those of a finished run.

    Raises:
        ValueError: the run has not finished.
    """
    for name in (CHANGED, WHOLE):
        if (run / name).exists():
            if not (run / "result.json").exists():
                raise ValueError(f"{run} is not finished: it has {name} and no result.json yet")
            result = json.loads((run / "result.json").read_text())
            return Weights(run / name, result["method"], result["fingerprint"])
    return None
