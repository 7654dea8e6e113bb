"""Instance retrieval over a run: of the frozen encoder, of the adapted one, and what they decide.

    retrieval.json   {"frozen": [0, 1, ...], "adapted": [0, 1, ...]}    one entry for each picture
    result.json      "retrieval": {"pictures", "frozen", "adapted", "difference", "standard_error",
                                   "decision"}

The hits of each picture are kept, so that two encoders, and two runs on the same data, can be held against
each other in pairs. A restart finds the frozen encoder's there.
"""

import json
from pathlib import Path
from typing import Any

import torch

from selfmask_dist.common import names
from selfmask_dist.common.files import write_json
from selfmask_dist.evals.instance_retrieval import MEASURE, compare
from selfmask_dist.evals.measure import Evaluation
from selfmask_dist.parallel import World
from selfmask_dist.runs.decision import decide


class RetrievalRecord:
    """The hits of one run's encoders, in its folder. Every method is a collective: every rank must call.

    Args:
        evaluation: measures the encoder as it stands; where it measures no instance retrieval, nothing is
            kept and all that is returned is empty.
    """

    def __init__(self, evaluation: Evaluation, directory: Path, world: World) -> None:
        self._evaluation = evaluation
        self._path = directory / names.RETRIEVAL
        self._world = world
        self._hits: dict[str, list[int]] = {}

    def measure(self, what: str) -> dict[str, float]:
        """Measure the encoder as it stands, as `frozen` or `adapted`, and return the share of hits by name.

        The frozen encoder's is not measured again where the file has it, of a run that was stopped.
        """
        if not self._evaluation.measures_retrieval:
            return {}
        if what == "frozen":
            self._hits = self._read()
        if what not in self._hits or what != "frozen":
            self._hits = {**self._hits, what: [int(hit) for hit in self._evaluation.retrieve()]}
            if self._world.is_main:
                write_json(self._path, self._hits)
        hits = self._hits[what]
        return {MEASURE: sum(hits) / len(hits)}

    def result(self) -> dict[str, Any]:
        """Return the entry of `result.json`, with a decision where both encoders were measured."""
        frozen, adapted = self._hits.get("frozen"), self._hits.get("adapted")
        if frozen is None or adapted is None:
            shares = {what: sum(hits) / len(hits) for what, hits in self._hits.items()}
            return (
                {"retrieval": {"pictures": len(next(iter(self._hits.values()))), **shares}} if shares else {}
            )
        found = compare([bool(hit) for hit in frozen], [bool(hit) for hit in adapted])
        return {
            "retrieval": {
                "pictures": len(frozen),
                "frozen": found.before,
                "adapted": found.after,
                "difference": found.difference,
                "standard_error": found.standard_error,
                "decision": decide(found.difference, found.standard_error),
            }
        }

    def _read(self) -> dict[str, list[int]]:
        exists = torch.tensor([float(self._world.is_main and self._path.exists())], device=self._world.device)
        if not self._world.sum(exists).item():
            return {}
        return {"frozen": hits} if (hits := read_hits(self._path.parent).get("frozen")) else {}


def read_hits(folder: Path) -> dict[str, list[int]]:
    """Return the hits of a run's encoders by name, `frozen` and `adapted`, one entry for each picture."""
    found: dict[str, list[int]] = json.loads((folder / names.RETRIEVAL).read_text())
    return found
