"""The kind `targets`: linear probes of what a run is trained towards where that is not one class an image."""

from typing import TYPE_CHECKING, Any

from selfmask_dist import data
from selfmask_dist.cli.eval.results import Results, Row, UnavailableError
from selfmask_dist.cli.eval.subject import EvalSubject
from selfmask_dist.evals.targets.probe import probe_targets

if TYPE_CHECKING:
    from selfmask_dist.config import Config

_COLUMNS = {"multilabel": ("map",), "regression": ("r2", "mae")}


def refuse_dense(config: "Config") -> None:
    """Raise ValueError for label maps, which `selfmask eval` does not measure."""
    if config.objective.target == "dense":
        raise ValueError(
            "selfmask eval works on one embedding an image, and objective.target=dense has one a patch: the "
            "run's result.json has head_miou, and probe_miou with eval.probe=true. Give "
            "objective.target=class where the data has labels too"
        )


def measure_targets(subject: EvalSubject, _options: Any) -> Results:
    """Fit a linear probe of several labels or of numbers on each view, and test it."""
    kind = subject.config.objective.target
    if kind not in ("multilabel", "regression"):
        raise UnavailableError("targets is of objective.target=multilabel and regression; give one of them")
    targets = data.open_targets(subject.sources["train"], kind)
    targets.check(subject.sources["test"], "data.test")
    rows, details = [], {}
    for view in subject.views:
        parts = []
        for split in ("train", "test"):
            found = subject.rows(view, split, labelled=False)
            wanted = targets.of(subject.sources[split], found.ids.cpu().numpy())
            parts.append((found, wanted.to(found.features.device)))
        bank, queries = parts
        probe = probe_targets(kind, bank, queries, seed=subject.config.seed, ranks=subject.world)
        rows.append(Row(view.name, dict(probe.scores)))
        details[view.name] = {"l2": probe.l2, "validation": probe.validation}
    return Results(
        "targets",
        list(_COLUMNS[kind]),
        rows,
        baseline="frozen",
        settings={"target": kind, "seed": subject.config.seed},
        details={"outputs": list(targets.outputs), "views": details},
    )
