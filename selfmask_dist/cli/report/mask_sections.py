"""The parts of a report about masks: what they prune, layer by layer, and how alike they are."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from selfmask_dist.cli.report.charts import dendrogram
from selfmask_dist.cli.report.parts import (
    Cell,
    CellTable,
    PageSection,
    Paragraph,
    Part,
    SideBySide,
    Text,
    numeric,
    section,
    table,
)
from selfmask_dist.cli.report.reading import Run
from selfmask_dist.common.text import NONE, count, percent
from selfmask_dist.maskfile.tools.comparison import ComparedMask, MaskGroup, MaskResults, Pair, masks, matrix
from selfmask_dist.maskfile.tools.similarity import Pruned, PrunedLayer, kind_of, kinds_of, layers_of, total

_MAX_COMPARED = 24


@dataclass(frozen=True)
class _Shown:
    """One mask as a report shows it; `is_exact`: from a file, not from what was logged in training."""

    label: str
    colour: int
    layers: list[PrunedLayer]
    is_exact: bool
    everything: Pruned | None  # the whole mask


def sparsity(runs: Sequence[Run]) -> PageSection | None:
    """Return the shares of pruned weights, by kind of layer and by layer."""
    shown = [mask for run in runs for mask in _masks_of(run)]
    if not shown:
        return None
    most = max((layer.share for mask in shown for layer in mask.layers if layer.kind != "bias"), default=0.0)
    note = (
        "Share of a layer's weights that the mask prunes, in percent; colours go up to the largest of them."
    )
    if any(not mask.is_exact for mask in shown):
        note += " Masks in training are shown as they were last logged, kinds as means over their layers."
    return section(
        "Sparsity",
        _kinds_table(shown, most),
        SideBySide("maps", [_layer_map(mask, most) for mask in shown]),
        note=note,
    )


def _masks_of(run: Run) -> list[_Shown]:
    if run.subjects:
        colours = {stage.path.name: stage.colour for stage in run.stages}
        return [
            _Shown(subject.label, colours.get(subject.role, run.colour), layers, True, total(layers, "all"))
            for subject in run.subjects
            for layers in [layers_of(subject.bits)]
        ]
    if run.stages:
        return [mask for stage in run.stages for mask in _masks_of(stage)]
    # of a mask in training only shares are known: each layer counts as one of a million weights
    size, whole = 10**6, run.series("mask/active")
    logged = [
        PrunedLayer(name, size, round(size * (1 - active)), kind_of(name, _shape_by_name(name)), ())
        for name, active in run.active_by_parameter().items()
    ]
    everything = Pruned("all", size, round(size * (1 - whole[-1][1]))) if whole else None
    return [_Shown(run.label, run.colour, logged, False, everything)] if logged else []


def _shape_by_name(name: str) -> tuple[int, ...]:
    return (1, 1, 1, 1) if re.search(r"conv|downsample", name) else (1, 1)


def _kinds_table(shown: Sequence[_Shown], most: float) -> CellTable:
    by_mask = [(mask, {kind.name: kind for kind in kinds_of(mask.layers)}) for mask in shown]
    names = dict.fromkeys(name for _, kinds in by_mask for name in kinds)
    lines: list[list[Text]] = []
    for mask, kinds in by_mask:
        cells: list[Text] = [_heat(mask.everything, most, mask.is_exact)]
        cells += [_heat(kinds.get(name), most, mask.is_exact) for name in names]
        weights = count(mask.everything.weights) if mask.is_exact and mask.everything else NONE
        lines.append([_label(mask), numeric(weights), *cells])
    return table(["mask", "weights", "all", *names], lines)


def _label(mask: _Shown) -> Cell:
    return Cell(mask.label, colour=mask.colour)


def _heat(part: Pruned | None, most: float, is_exact: bool) -> Cell:
    """Return a share in percent on a colour that rises up to the share `most`."""
    if part is None:
        return Cell(NONE, "n heat")
    weights = f"{part.pruned:,} of {part.weights:,} weights" if is_exact else "as logged"
    text = percent(part.share, 1 if most >= 0.05 else 2).removesuffix(" %")
    tip, heat = f"{part.name}: {weights}", 60 * min(part.share / (most or 1), 1)
    return Cell(text, "n heat", tip=tip, heat=heat)


def _layer_map(mask: _Shown, most: float) -> CellTable:
    """Return a map of shares: blocks from top to bottom, the layers of a block from left to right.

    Biases are left to the table by kinds.
    """
    cells: dict[str, dict[str, PrunedLayer]] = {}
    for layer in mask.layers:
        if layer.kind != "bias":
            block, name = split_name(layer.name)
            cells.setdefault(block, {})[name] = layer
    columns = dict.fromkeys(name for row in cells.values() for name in row)
    lines: list[list[Text]] = [
        [block or NONE, *(_heat(row.get(name), most, mask.is_exact) for name in columns)]
        for block, row in cells.items()
    ]
    return table(["", *columns], lines, caption=_label(mask), css="map")


def split_name(name: str) -> tuple[str, str]:
    """Return a layer's block and its name in it: (`blocks.3`, `attn.qkv`) of `blocks.3.attn.qkv.weight`."""
    short = re.sub(r"[._]weight$", "", name)
    found = re.match(r"(.*?\.\d+)\.(.+)", short)
    return (found[1], found[2]) if found else ("", short)


# ---- similarity


def similarity(runs: Sequence[Run]) -> PageSection | None:
    """Return how alike masks of one backbone are; None where no two masks are of one."""
    subjects = [subject for run in runs for subject in run.subjects]
    families: dict[str, list[ComparedMask]] = {}
    for subject in subjects:
        families.setdefault(subject.fingerprint or subject.weights_fingerprint, []).append(subject)
    parts: list[Part] = [
        part for family in families.values() if len(family) > 1 for part in _compared(family)
    ]
    if not parts:
        return None
    if len(families) > 1:
        text = f"These masks are of {len(families)} backbones; masks of different ones are not compared."
        parts.append(Paragraph(text))
    note = (
        "Above the diagonal: correlation (phi) of the bits. Below: IoU of the pruned weights. Under each, in "
        "small type, what chance gives to masks that prune as much in every layer. The dendrogram joins "
        "masks by 1 - phi."
    )
    return section("What the masks say", *parts, note=note)


def _compared(family: Sequence[ComparedMask]) -> list[Part]:
    """Return the dendrogram and the matrix of masks of one backbone, and what groups of them share."""
    found = masks(family[:_MAX_COMPARED])
    assert found.tree is not None
    labels = [mask.label for mask in found.masks]
    left = len(family) - len(found.masks)
    parts: list[Part] = []
    if left:
        parts.append(Paragraph(f"The first {_MAX_COMPARED} masks; {left} more are not compared."))
    drawn = dendrogram(found.tree.linkage, found.tree.order, labels)
    return [*parts, SideBySide("pair", [drawn, _matrix(found, labels)]), *_groups(found.groups)]


def _matrix(found: MaskResults, labels: Sequence[str]) -> CellTable:
    assert found.tree is not None
    order = found.tree.order
    values = {name: matrix(labels, found.pairs, name) for name in _WITH_CHANCE}
    lines: list[list[Text]] = []
    for row, i in enumerate(order):
        cells: list[Text] = []
        for column, j in enumerate(order):
            name = "phi" if column > row else "iou_pruned"
            if i == j:
                cells.append(Cell(css="n self"))
                continue
            value, chance = values[name][i, j], values[f"{name}_chance"][i, j]
            text = NONE if value != value else f"{value:.2f}"
            under = () if chance != chance else ((f"{chance:.2f}", ""),)
            heat = 0.0 if value != value else max(0.0, 60 * value)
            cells.append(Cell(text, "n heat", beside=under, heat=heat))
        lines.append([f"{row + 1}  {labels[i]}", *cells])
    return table(["", *(str(k + 1) for k in range(len(order)))], lines, css="matrix")


_WITH_CHANCE = ("phi", "phi_chance", "iou_pruned", "iou_pruned_chance")


def _groups(groups: Sequence[MaskGroup]) -> list[Part]:
    """Return what masks that belong together share: seeds of one run, experts of one cascade."""
    if not groups:
        return []
    head = [
        "group", "masks", "phi, mean of its pairs", "by chance", "with other tasks",
        "pruned by all / by some", "by chance",
    ]  # fmt: skip
    lines: list[list[Text]] = []
    for group in groups:
        numbers = (group.phi, group.phi_chance, group.phi_outside)
        shares = (group.agreement.unanimous, group.agreement.unanimous_chance)
        texts = [
            str(len(group.masks)),
            *(NONE if value is None else f"{value:.3f}" for value in numbers),
            *(percent(value) for value in shares),
        ]
        lines.append([group.name, *map(numeric, texts)])
    changed = [_changes(group) for group in groups if group.changed]
    return [table(head, lines, caption="Masks that belong together"), *changed]


def _changes(group: MaskGroup) -> CellTable:
    lines: list[list[Text]] = [
        [label, numeric(percent(share, 2)), numeric(_alike(label, group.changes))]
        for label, share in group.changed.items()
    ]
    head = ["expert", "bits that are not the dispatcher's", "IoU of these with the other experts', mean"]
    return table(head, lines, caption=f"What the {group.name} changed")


def _alike(label: str, pairs: Sequence[Pair]) -> str:
    values = [pair.similarity.iou_pruned for pair in pairs if label in (pair.a, pair.b)]
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3f}" if known else NONE
