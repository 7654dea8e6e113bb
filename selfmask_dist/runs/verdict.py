"""What is to be said at the end of a run: its numbers in one line, and in plain words where it is of no use.

    result.json + metrics.jsonl -> [{"name": ..., "text": ...}, ...]      empty: nothing speaks against it

A useless result looks like a good one otherwise: it has a mask, an accuracy and the exit status 0. Knows the
files of a run's folder and no more, and so reads runs on any machine, without torch.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfmask_dist.common import names
from selfmask_dist.common.text import NONE, accuracy, count, number, size
from selfmask_dist.config import Config
from selfmask_dist.config.masks import FIXED_FAMILIES, LATENT_FAMILIES, MASK_FAMILIES, RANKING_FAMILIES
from selfmask_dist.runs.decision import decision_text, mark_of

Verdict = list[dict[str, str]]

STANDARD_ERRORS = 2.0  # that an accuracy must be below the frozen one's to be called worse
_NOTHING = 1e-4  # share of the weights: a mask that prunes less is one that prunes nothing
_HEADLINE = "knn20"  # the measure that is shown where there is a choice
_HEADLINE_VIEWS = ("unconditional", "conditional")  # and the row of a cascade
_BETTER = "The frozen backbone is the better choice."
# families for which a share of kept weights of 1 is no mistake: signs, levels, another network's weights
_KEEP_ALL = (*LATENT_FAMILIES, "graft")
# their target moves with the encoder, a queue fills at first, or head and bank were fitted to the frozen
# encoder before the first step: their loss may rise while features improve
_MOVING_TARGETS = {"moco_v2": 1.5, "moco_v3": 1.5, "dino": 1.5, "nbd": 1.5}


def judge(config: Config, result: Mapping[str, Any], folder: Path, *, num_test: int) -> Verdict:
    """Return what speaks against the result of a run of masks or of fine-tuning; nothing of other methods.

    Args:
        result: what `result.json` is to hold.
        folder: the run's, whose `metrics.jsonl` has the losses.
        num_test: test images, which say how far accuracies vary by chance.
    """
    if config.method not in ("mask", "finetune"):
        return []
    found: Verdict = []
    frozen, adapted = result.get("frozen"), result.get("adapted")
    if isinstance(frozen, Mapping) and isinstance(adapted, Mapping):
        found += below_frozen(frozen, adapted, num_test=num_test, keys=_rate_keys(config))
    if mark := mark_of(result.get("retrieval")):
        found.append({"name": "keep the frozen backbone", "text": mark})
    if config.method == "mask" and isinstance(result.get("mask"), Mapping):
        found += _extremes(config, result["mask"])
    return found + _losses(config, losses_of(folder))


def judge_cascade(
    config: Config, views: Mapping[str, Mapping[str, float]], folder: Path, *, num_test: int
) -> Verdict:
    """Return what speaks against a cascade: its best row held against the frozen one, and its stages' own.

    A row is compared with the frozen one that was treated alike, whitened or not.
    """
    found: Verdict = []
    plain = {view: row for view, row in views.items() if not view.endswith("whitened")}
    if frozen := plain.pop("frozen", None):
        measures = [name for name in frozen if any(name in row for row in plain.values())]
        best = {name: max(row[name] for row in plain.values() if name in row) for name in measures}
        found += below_frozen(frozen, best, num_test=num_test, keys=_rate_keys(config), what="its best row")
    for stage in [folder / names.DISPATCHER, *sorted(folder.glob(names.expert("*")))]:
        for entry in verdict_of(stage):
            found.append({"name": f"{stage.name}/{entry['name']}", "text": f"{stage.name}: {entry['text']}"})
    return found


def below_frozen(
    frozen: Mapping[str, Any],
    adapted: Mapping[str, Any],
    *,
    num_test: int,
    keys: str,
    what: str = "the adapted encoder",
) -> Verdict:
    """Return a verdict where k-NN or the probe is below the frozen backbone's by more than two standard
    errors: binomial ones, on `num_test` images at the mean of the two accuracies.
    """
    worse = []
    for name in filter(None, (_headline(frozen, adapted), "probe")):
        before, after = number(frozen.get(name)), number(adapted.get(name))
        if before is None or after is None or num_test < 1:
            continue
        middle = min(max((before + after) / 2, 0.0), 1.0)
        error = math.sqrt(middle * (1 - middle) / num_test)
        if before - after > STANDARD_ERRORS * error:
            worse.append(
                f"{measure_title(name)} {accuracy(after)} against {accuracy(before)} frozen, with a standard "
                f"error of {accuracy(error)} on {count(num_test)} test images"
            )
    if not worse:
        return []
    text = f"{what} is worse than the frozen backbone: {'; '.join(worse)}. Likely {keys}. {_BETTER}"
    return [{"name": "below frozen", "text": text}]


def _extremes(config: Config, mask: Mapping[str, Any]) -> Verdict:
    """Return a verdict on a mask that prunes nothing, or everything."""
    family, active = config.mask.family, number(mask.get("active"))
    if active is None or family in _KEEP_ALL or family not in MASK_FAMILIES:
        return []
    weights = number(mask.get("masked_weights")) or 0
    if 1 - active < _NOTHING:
        if config.optim.score_reach is not None:
            reach = f"optim.score_reach={config.optim.score_reach}"
            cause = f"{reach} is too little for scores to cross the threshold; raise it"
        else:
            cause = "optim.score_lr is too low for scores to cross the threshold, or training too short"
            cause += "; raise optim.score_lr or train.epochs, or set mask.init nearer to mask.threshold"
        if family in RANKING_FAMILIES:
            cause = f"mask.keep={config.mask.keep:g} leaves nothing to prune; lower it"
        pruned = count((1 - active) * weights)
        text = f"the mask prunes nothing ({pruned} of {count(weights)} weights). Likely {cause}. "
        return [{"name": "prunes nothing", "text": f"{text}{_BETTER}"}]
    if active < _NOTHING:
        text = (
            f"the mask prunes everything (it keeps {count(active * weights)} of {count(weights)} weights). "
            f"Likely {_rate_key(config)} is too high, or mask.init below mask.threshold. {_BETTER}"
        )
        return [{"name": "prunes everything", "text": text}]
    return []


def _losses(config: Config, losses: Sequence[float]) -> Verdict:
    """Return a verdict on a loss that was never below where it started."""
    if len(losses) < 2:
        return []
    start, lowest = losses[0], min(losses[1:])
    if lowest < start * _MOVING_TARGETS.get(config.objective.name, 1.0):
        return []
    rate = "optim.weight_lr" if config.method == "finetune" else _rate_key(config)
    text = (
        f"the loss never fell below its start: {start:.4f} at first, {lowest:.4f} at its lowest after that, "
        f"{losses[-1]:.4f} at the end. Likely {rate} or optim.head_lr is too high; lower them, or set "
        f"optim.clip_norm. {_BETTER}"
    )
    return [{"name": "loss never fell", "text": text}]


def _rate_keys(config: Config) -> str:
    if config.method == "finetune":
        return "optim.weight_lr is too high; lower it, or train fewer epochs"
    if config.mask.family in FIXED_FAMILIES:
        return f"mask.keep={config.mask.keep:g} prunes too much; raise it"
    key = _rate_key(config)
    rate = f"{key}={getattr(config.optim, key.partition('.')[2])} does not suit this backbone"
    return f"{rate} (a configuration of another architecture?); try a tenth of it"


def _rate_key(config: Config) -> str:
    return "optim.score_lr" if config.optim.score_reach is None else "optim.score_reach"


def losses_of(folder: Path) -> list[float]:
    """Return the losses of a run's `metrics.jsonl` in the order of steps; none where there are none."""
    try:
        lines = (folder / names.METRICS).read_text().splitlines()
        found = {line["step"]: number(line.get("loss")) for line in map(json.loads, lines) if "loss" in line}
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [loss for _, loss in sorted(found.items()) if loss is not None]


# ---- saying it


def measure_title(name: str) -> str:
    """Return a measure in words, `k-NN 20` of knn20."""
    if name == "instance_retrieval":
        return "instance retrieval"
    return f"k-NN {name.removeprefix('knn')}" if name.startswith("knn") else name


def _headline(*rows: Mapping[str, Any]) -> str | None:
    """Return the k-NN measure that is shown of rows, 20 where it is there; None where they share none."""
    shared = [name for name in rows[0] if name.startswith("knn") and all(name in row for row in rows)]
    return next((name for name in (_HEADLINE, *shared) if name in shared), None)


def verdict_of(folder: Path) -> Verdict:
    """Return the verdict in a run's `result.json`; none where it has not finished, or nothing is wrong."""
    found = _result(folder).get("verdict")
    entries = [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []
    return [{"name": str(entry.get("name", NONE)), "text": str(entry.get("text", ""))} for entry in entries]


def closing(folder: Path, result: Mapping[str, Any] | None = None) -> str:
    """Return what a run ends with: its numbers beside the frozen backbone's, what is stored where, the next
    command, and a line for each verdict.

    Args:
        result: what `result.json` holds; None to read it.
    """
    result = _result(folder) if result is None else result
    parts = [text for text in (_numbers(result), _stored(folder, result)) if text]
    lines = ["; ".join([*parts, f"next: selfmask report {folder}"])]
    if (decision := decision_text(result.get("retrieval"))) and not mark_of(result.get("retrieval")):
        lines.append(f"DECISION: {decision}")  # one against the mask is a verdict
    if kept := kept_text(result.get("kept")):
        lines.append(f"KEPT: {kept}")
    entries = result.get("verdict")
    lines += [f"VERDICT: {entry['text']}" for entry in entries] if isinstance(entries, list) else []
    return "\n".join(lines)


def kept_text(kept: Any) -> str:
    """Return which state was kept by which measure, and when training ended; empty where the last one was.

    Args:
        kept: what `result.json` holds under that name.
    """
    if not isinstance(kept, Mapping) or number(kept.get("value")) is None:
        return ""
    by = {"accuracy": "validation accuracy", "loss": "validation loss"}.get(str(kept.get("by")))
    made, planned, patience = (count(kept.get(key)) for key in ("made", "planned", "patience"))
    ended = (
        ""
        if made == planned
        else f"; training stopped after step {made}, as {patience} measurements brought nothing better"
    )
    return (
        f"the state of step {count(kept.get('step'))} of {planned}, by {by or 'instance retrieval'} "
        f"{kept['value']:.4f}{ended}"
    )


def _numbers(result: Mapping[str, Any]) -> str:
    """Return `frozen .533 -> masked .667 (k-NN 20)` as far as it was measured."""
    own = {"finetune": "fine-tuned", "mask": "masked"}.get(str(result.get("method")), "adapted")
    frozen, adapted = result.get("frozen"), result.get("adapted")
    if isinstance(views := result.get("views"), Mapping):
        frozen = views.get("frozen")
        rows = [view for view in views if view != "frozen" and not str(view).endswith("whitened")]
        own = next((view for view in _HEADLINE_VIEWS if view in rows), rows[-1] if rows else "")
        adapted = views.get(own)
    rows_there = [row for row in (frozen, adapted) if isinstance(row, Mapping) and row]
    if not rows_there:
        return "nothing was measured (eval.final=false)"
    name = _headline(*rows_there) or next(iter(rows_there[-1]))
    shown = [
        f"{title} {accuracy(row[name])}"
        for title, row in (("frozen", frozen), (own, adapted))
        if isinstance(row, Mapping) and name in row
    ]
    alone = "; frozen was not measured" if not frozen else ""
    return f"{' -> '.join(shown)} ({measure_title(name)}{alone})"


def _stored(folder: Path, result: Mapping[str, Any]) -> str:
    """Return how many bytes the task takes, and in which file."""
    weights, mask = result.get("weights"), result.get("mask")
    if isinstance(weights, Mapping) and weights.get("file"):
        return f"{size(weights.get('bytes'))} in {folder / str(weights['file'])}"
    if isinstance(mask, Mapping):
        name = names.CASCADE_MASK if "views" in result else names.MASK
        return f"{size(mask.get('bytes'))} in {folder / name}"
    return ""


def _result(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / names.RESULT).read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
