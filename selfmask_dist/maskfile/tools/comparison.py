"""Masks from files, compared: mask files, cascades' bundles and runs' folders of one backbone.

    results = masks(read_subjects(["runs/flowers", "runs/pets", "runs/cascade/cascade.mask"]))
    print(table(results))
    json.dumps(as_dict(results))

What is measured is in `similarity`. Groups are found by themselves: the experts of a cascade, and
runs whose configurations differ in the seed alone.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from selfmask_dist.common import text
from selfmask_dist.common.names import CASCADE_MASK, DISPATCHER, MASK
from selfmask_dist.config import flat_science, load_config
from selfmask_dist.maskfile import read_mask_file
from selfmask_dist.maskfile.tools.similarity import (
    Agreement,
    Pruned,
    PrunedLayer,
    Similarity,
    Tree,
    agreement,
    changes,
    compare,
    kinds_of,
    layers_of,
    total,
    tree_of,
)

_EXPERT = "expert-"  # what `names.expert` begins with
_FILES = (MASK, CASCADE_MASK)


@dataclass(frozen=True)
class ComparedMask:
    """A mask to compare: bits by parameter, and where it is from."""

    label: str
    bits: Mapping[str, Tensor] = field(repr=False)
    path: Path
    fingerprint: str = ""  # of the whole backbone, where the file says it
    weights_fingerprint: str = ""  # of the weights under the mask
    task: str | None = None  # equal for masks that differ in the seed alone
    cascade: str | None = None  # equal for the masks of one cascade
    role: str = ""  # in a cascade: dispatcher, expert-0, ...


@dataclass(frozen=True)
class Sparsity:
    """What one mask prunes, in all, by kind of layer and by layer."""

    label: str
    task: str | None
    pruned: Pruned
    kinds: list[Pruned]
    layers: list[PrunedLayer]


@dataclass(frozen=True)
class Pair:
    """Two masks, by label."""

    a: str
    b: str
    similarity: Similarity


@dataclass(frozen=True)
class MaskGroup:
    """Masks that belong together: `kind` is `seeds` (of one task) or `experts` (of one cascade).

    Attributes:
        phi, phi_chance: means over the group's pairs; None where no pair has one.
        phi_outside: of seeds: mean over the pairs of one of them and a mask of another task.
        changes: of experts: how alike what they changed of the dispatcher's mask is.
        changed: of experts: share of the weights whose bit is not the dispatcher's, by label.
    """

    name: str
    kind: str
    masks: list[str]
    agreement: Agreement
    phi: float | None
    phi_chance: float | None
    phi_outside: float | None = None
    changes: list[Pair] = field(default_factory=list)
    changed: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MaskResults:
    """Everything that `masks` found. `left_out`: parameters that not all of the masks have."""

    masks: list[Sparsity]
    pairs: list[Pair]
    groups: list[MaskGroup]
    tree: Tree | None
    left_out: list[str]


# ---- reading


def read_subjects(paths: Sequence[str | Path]) -> list[ComparedMask]:
    """Return the masks of mask files, bundles and runs' folders, labelled apart.

    Raises:
        MaskFileError: a file is damaged, or no mask.
        FileNotFoundError: no such file, or a folder without a mask.
    """
    labels = labels_of([Path(path) for path in paths])
    return [
        subject for path, label in zip(paths, labels, strict=True) for subject in _read(Path(path), label)
    ]


def labels_of(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that tell them apart; a run's folder stands for the mask in it."""
    folders = [(path.parent if path.name in _FILES else path).absolute() for path in paths]
    named = [path.parent / path.stem if path.suffix == ".mask" else path for path in folders]
    for length in range(1, max((len(path.parts) for path in named), default=1) + 1):
        labels = ["/".join(path.parts[-length:]) for path in named]
        if len(set(labels)) == len(set(named)):
            break
    # the same path twice is the same mask twice
    return [
        label if labels.index(label) == i else f"{label} ({labels[: i + 1].count(label)})"
        for i, label in enumerate(labels)
    ]


def _read(path: Path, label: str) -> Iterator[ComparedMask]:
    folder, path = (path, find_mask(path)) if path.is_dir() else (path.parent, path)
    file = read_mask_file(path)
    task = _task(folder) if path.name in _FILES else None
    is_cascade = DISPATCHER in file.masks and len(file.masks) > 1
    for name, mask in file.masks.items():
        yield ComparedMask(
            label=label if len(file.masks) == 1 else f"{label}: {name}",
            bits=mask.bits,
            path=path,
            fingerprint=file.backbone_fingerprint,
            weights_fingerprint=mask.weights_fingerprint,
            # experts of one number have other images under another seed
            task=None if task is None or name.startswith(_EXPERT) else f"{task} {name}",
            cascade=label if is_cascade else None,
            role=name if is_cascade else "",
        )


def find_mask(folder: Path) -> Path:
    """Return the path of the mask file in a run's folder.

    Raises:
        FileNotFoundError: it holds none.
    """
    for name in _FILES:
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder} holds no {' and no '.join(_FILES)}: the run has not come to its end")


def _task(folder: Path) -> str | None:
    """Return a text of all that decides what a run learns but the seed; None without a readable config."""
    try:
        science = flat_science(load_config(folder / "config.yaml"))
    except (OSError, ValueError):
        return None
    return json.dumps({key: value for key, value in science.items() if key != "seed"}, default=str)


# ---- comparing


def masks(subjects: Sequence[ComparedMask]) -> MaskResults:
    """Return the sparsity of each mask, the similarity of each pair, and what groups agree on.

    Masks over different parameters are compared on those that all of them have.

    Raises:
        ValueError: there are none, two are of different backbones, or they share no parameter.
    """
    if not subjects:
        raise ValueError("there are no masks to compare")
    for other in subjects[1:]:
        check_one_backbone(subjects[0], other)
    shared = [name for name in subjects[0].bits if all(name in subject.bits for subject in subjects)]
    if not shared:
        raise ValueError(f"{subjects[0].path} and {subjects[-1].path} mask no parameter in common")
    every = dict.fromkeys(name for subject in subjects for name in subject.bits)
    bits = {subject.label: {name: subject.bits[name] for name in shared} for subject in subjects}
    pairs = [
        Pair(a.label, b.label, compare(bits[a.label], bits[b.label]))
        for a, b in itertools.combinations(subjects, 2)
    ]
    return MaskResults(
        masks=[_sparsity(subject) for subject in subjects],
        pairs=pairs,
        groups=[*_seeds(subjects, bits, pairs), *_experts(subjects, bits, pairs)],
        tree=tree_of(matrix([subject.label for subject in subjects], pairs, "phi")),
        left_out=[name for name in every if name not in shared],
    )


def check_one_backbone(a: ComparedMask, b: ComparedMask) -> None:
    """Raise a ValueError, naming both, where two masks are of different frozen weights."""
    key = "fingerprint" if a.fingerprint and b.fingerprint else "weights_fingerprint"
    left, right = getattr(a, key), getattr(b, key)
    if left != right:
        what = "backbones" if key == "fingerprint" else "weights under the masks"
        raise ValueError(
            f"{a.path} and {b.path} are masks of different {what} (fingerprints {left[:12]} and "
            f"{right[:12]}); compare masks of one backbone"
        )


def matrix(labels: Sequence[str], pairs: Sequence[Pair], measure: str) -> np.ndarray:
    """Return a measure of `Similarity` for every two masks, (n, n); 1 on the diagonal, NaN: undefined."""
    values = np.eye(len(labels))
    place = {label: i for i, label in enumerate(labels)}
    for pair in pairs:
        value = getattr(pair.similarity, measure)
        i, j = place[pair.a], place[pair.b]
        values[i, j] = values[j, i] = np.nan if value is None else value
    return values


def _sparsity(subject: ComparedMask) -> Sparsity:
    layers = layers_of(subject.bits)
    return Sparsity(subject.label, subject.task, total(layers, subject.label), kinds_of(layers), layers)


def _seeds(
    subjects: Sequence[ComparedMask], bits: Mapping[str, Mapping[str, Tensor]], pairs: Sequence[Pair]
) -> Iterator[MaskGroup]:
    tasks = dict.fromkeys(subject.task for subject in subjects if subject.task is not None)
    for task in tasks:
        labels = [subject.label for subject in subjects if subject.task == task]
        if len(labels) > 1:
            inside = [pair for pair in pairs if pair.a in labels and pair.b in labels]
            others = [one.label for one in subjects if one.task not in (None, task) and one.cascade is None]
            outside = [
                pair
                for pair in pairs
                for a, b in ((pair.a, pair.b), (pair.b, pair.a))
                if a in labels and b in others
            ]
            yield MaskGroup(
                name=f"seeds of {labels[0]}",
                kind="seeds",
                masks=labels,
                agreement=agreement([bits[label] for label in labels]),
                phi=_mean(inside, "phi"),
                phi_chance=_mean(inside, "phi_chance"),
                phi_outside=_mean(outside, "phi"),
            )


def _experts(
    subjects: Sequence[ComparedMask], bits: Mapping[str, Mapping[str, Tensor]], pairs: Sequence[Pair]
) -> Iterator[MaskGroup]:
    for cascade in dict.fromkeys(subject.cascade for subject in subjects if subject.cascade is not None):
        family = [subject for subject in subjects if subject.cascade == cascade]
        first = next(subject.label for subject in family if subject.role == DISPATCHER)
        labels = [subject.label for subject in family if subject.role != DISPATCHER]
        if not labels:
            continue
        inside = [pair for pair in pairs if pair.a in labels and pair.b in labels]
        changed = {label: changes(bits[label], bits[first]) for label in labels}
        yield MaskGroup(
            name=f"experts of {cascade}",
            kind="experts",
            masks=labels,
            agreement=agreement([bits[label] for label in labels]),
            changes=[
                Pair(a, b, compare(changed[a], changed[b])) for a, b in itertools.combinations(labels, 2)
            ],
            changed={label: total(layers_of(flips)).share for label, flips in changed.items()},
            phi=_mean(inside, "phi"),
            phi_chance=_mean(inside, "phi_chance"),
        )


def _mean(pairs: Sequence[Pair], measure: str) -> float | None:
    values = [getattr(pair.similarity, measure) for pair in pairs]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# ---- showing


def as_dict(results: MaskResults) -> dict[str, Any]:
    """Return the results as plain values, for JSON."""
    return asdict(results)


def table(results: MaskResults) -> str:
    """Return text for a terminal: what each mask prunes, and the pairs, the most alike first."""
    kinds = list(dict.fromkeys(kind.name for mask in results.masks for kind in mask.kinds))
    rows = [["pruned", "weights", "all", *kinds]]
    for mask in results.masks:
        shares = {kind.name: f"{kind.share:.2%}" for kind in mask.kinds}
        cells = [shares.get(kind, "-") for kind in kinds]
        rows.append([mask.label, f"{mask.pruned.weights:,}", f"{mask.pruned.share:.2%}", *cells])
    parts = [text.table(rows)]
    if results.left_out:
        parts[0] += f"\ncompared without {len(results.left_out)} parameters that not all of them mask"
    if results.pairs:
        rows = [["two masks", "(by chance)", "IoU of pruned", "IoU of kept", "phi"]]
        for pair in sorted(results.pairs, key=lambda pair: -(pair.similarity.phi or 0.0)):
            measures = ("iou_pruned", "iou_kept", "phi")
            rows.append([pair.a, pair.b, *(_beside_chance(pair.similarity, name) for name in measures)])
        parts.append(text.table(rows, right=(False, False, True, True, True)))
    parts += ["\n".join(_describe_group(group)) for group in results.groups]
    return "\n\n".join(parts)


def _describe_group(group: MaskGroup) -> list[str]:
    agree = group.agreement
    lines = [
        f"{group.name} ({len(group.masks)}): phi {_number(group.phi)}, by chance {_number(group.phi_chance)}"
        + ("" if group.phi_outside is None else f", with other tasks {_number(group.phi_outside)}"),
        f"  of the weights that some prune, all prune {_number(agree.unanimous)}, "
        f"by chance {_number(agree.unanimous_chance)}",
    ]
    if group.changed:
        shares = ", ".join(f"{share:.2%}" for share in group.changed.values())
        lines.append(f"  bits that are not the dispatcher's: {shares}")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _beside_chance(similarity: Similarity, name: str) -> str:
    return f"{_number(getattr(similarity, name))} ({_number(getattr(similarity, f'{name}_chance'))})"
