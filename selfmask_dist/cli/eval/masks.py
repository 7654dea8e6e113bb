"""The kind `masks`: what the masks themselves say, without images."""

from selfmask_dist.cli.eval.results import Results, Row, UnavailableError
from selfmask_dist.cli.eval.subject import EvalSubject
from selfmask_dist.maskfile.tools.comparison import MaskResults, as_dict, masks, read_subjects
from selfmask_dist.maskfile.tools.pictures import draw_similarity, draw_sparsity


def measure_masks(subject: EvalSubject, _options: object) -> Results:
    """Measure the share of weights switched off, in all and by kind of layer, and how alike masks are.

    The main process alone decodes masks. Collective: every rank must call.
    """
    if not subject.masks:
        raise UnavailableError("there is no mask")
    found = subject.world.from_main(lambda: masks(read_subjects(subject.mask_paths)))
    kinds = list(dict.fromkeys(kind.name for mask in found.masks for kind in mask.kinds))
    rows = []
    for mask in found.masks:
        by_kind = {kind.name: kind.share for kind in mask.kinds}
        rows.append(
            Row(mask.label, {"pruned": mask.pruned.share, **{kind: by_kind.get(kind) for kind in kinds}})
        )
    draw = draw_sparsity if found.tree is None else draw_similarity
    return Results(
        "masks",
        ["pruned", *kinds],
        rows,
        details=as_dict(found),
        notes=_pairs(found),
        plot=lambda path: draw(found, path),
    )


def _pairs(found: MaskResults) -> list[str]:
    """Return a sentence on each two masks, the most alike first."""
    ordered = sorted(found.pairs, key=lambda pair: -(pair.similarity.phi or 0.0))
    return [
        f"{pair.a} and {pair.b}: phi {_text(pair.similarity.phi)} (by chance "
        f"{_text(pair.similarity.phi_chance)}), IoU of what they prune {_text(pair.similarity.iou_pruned)} "
        f"(by chance {_text(pair.similarity.iou_pruned_chance)})"
        for pair in ordered
    ]


def _text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
