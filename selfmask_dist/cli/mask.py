"""`selfmask inspect`, and `selfmask mask diff | merge | interpolate | convert | verify | export | import |
shrink`.

Work on mask files. Only `convert --against-weights`, `export`, `import` and `shrink` build the backbone, from
the configuration of a run on it.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

HOW = ("majority", "intersection", "union", "collect")


def add_inspect(commands: Any) -> None:
    """Add `inspect` to the command line."""
    inspect = commands.add_parser(
        "inspect", help="show what a mask file holds, or how alike several masks are"
    )
    inspect.add_argument(
        "paths", nargs="+", metavar="FILE", help="mask files; of several, also runs' folders"
    )
    inspect.set_defaults(command=_inspect)


def _inspect(options: argparse.Namespace) -> None:
    from selfmask_dist.maskfile import describe_file

    if len(options.paths) == 1:
        print(describe_file(options.paths[0]))
        return
    from selfmask_dist.maskfile.tools.comparison import masks, read_subjects, table

    print(table(masks(read_subjects(options.paths))))


def add_command(commands: Any) -> None:
    """Add `mask` to the command line."""
    actions = commands.add_parser(
        "mask", help="compare, combine, convert, verify, export and import mask files"
    )
    actions = actions.add_subparsers(required=True, metavar="ACTION")

    diff = actions.add_parser("diff", help="where two masks of one backbone differ, by parameter")
    diff.add_argument("first", metavar="FILE[:MASK]", help="MASK where the file holds several")
    diff.add_argument("second", metavar="FILE[:MASK]")
    diff.set_defaults(command=_diff)

    merge = actions.add_parser("merge", help="one mask out of several, or several in one file")
    merge.add_argument("files", nargs="+", metavar="FILE[:MASK]")
    merge.add_argument("--out", type=Path, required=True, metavar="FILE")
    merge.add_argument(
        "--how",
        choices=HOW,
        default="majority",
        help="keep what at least half, all, or any of them keep; or collect them side by side",
    )
    merge.set_defaults(command=_merge)

    between = actions.add_parser("interpolate", help="masks between two runs', by the scores in checkpoints")
    between.add_argument("first", type=Path, metavar="RUN", help="folder of a finished run; at 0 its mask")
    between.add_argument("second", type=Path, metavar="RUN", help="at 1 this one's")
    between.add_argument("--at", type=float, nargs="+", default=[0.5], metavar="T", help="from 0 to 1 (0.5)")
    between.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="masks of several T: by them"
    )
    between.set_defaults(command=_interpolate)

    convert = actions.add_parser("convert", help="write a mask file with another coding")
    convert.add_argument("file", type=Path, metavar="FILE")
    convert.add_argument("out", type=Path, metavar="OUT")
    convert.add_argument("--codec", choices=("entropy", "packbits-zstd"), default="entropy")
    convert.add_argument(
        "--against-weights",
        action="store_true",
        help="smaller; the file is then read only together with its backbone (needs --config)",
    )
    _add_config(convert, "of the run, for the backbone's weights")
    convert.set_defaults(command=_convert)

    verify = actions.add_parser("verify", help="check every byte of mask files; status 1 if one is bad")
    verify.add_argument("files", nargs="+", type=Path, metavar="FILE")
    verify.set_defaults(command=_verify)

    _add_with_backbone(actions)


def _add_with_backbone(actions: Any) -> None:
    """Add the commands that write or read whole networks."""
    export = actions.add_parser(
        "export", help="weights, mask, model card and picture in a folder, ready for a model hub"
    )
    export.add_argument("file", metavar="FILE[:MASK]")
    export.add_argument("out", type=Path, metavar="FOLDER")
    _add_config(export, "of the run that trained the mask")
    export.set_defaults(command=_export)

    importing = actions.add_parser("import", help="a mask out of scores that Piggyback's code trained")
    importing.add_argument("scores", type=Path, metavar="SCORES", help="state dict, .pt or .safetensors")
    importing.add_argument("--out", "-o", type=Path, required=True, metavar="FILE")
    importing.add_argument("--backbone", metavar="NAME", help="as backbone.name: timm:resnet50")
    importing.add_argument("--weights", metavar="PATH", help="as backbone.weights; else pretrained ones")
    importing.add_argument("--threshold", type=float, default=5e-3, metavar="MU", help="(0.005)")
    importing.add_argument(
        "--key", default="mask_real", metavar="NAME", help="of a module's scores (mask_real)"
    )
    importing.add_argument("--scaled", action="store_true", help="theta = a W M in place of Piggyback's W M")
    _add_config(importing, "of a run on the backbone, in place of --backbone")
    importing.set_defaults(command=_import)

    delta = actions.add_parser("delta", help="a fine-tuned network as one bit a weight on its frozen one")
    delta.add_argument("source", type=Path, metavar="RUN", help="a fine-tuning run's folder, or weights")
    delta.add_argument("--out", "-o", type=Path, required=True, metavar="FILE")
    _add_config(delta, "of a run on the frozen network; else the one in RUN")
    delta.add_argument("--half", action="store_true", help="keep biases and gains in float16")
    delta.add_argument(
        "--calibrate",
        type=int,
        default=0,
        metavar="PICTURES",
        help="fit sizes, biases and gains on so many of the run's training pictures (default: none)",
    )
    delta.set_defaults(command=_delta)

    shrink = actions.add_parser(
        "shrink",
        help="a smaller dense network: heads and hidden units that the mask leaves without effect go",
    )
    shrink.add_argument("file", metavar="FILE[:MASK]")
    shrink.add_argument("out", type=Path, metavar="FOLDER", help="gets model.safetensors and sizes.json")
    _add_config(shrink, "of the run that trained the mask")
    shrink.set_defaults(command=_shrink)


def _add_config(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"config.yaml {what}")


def _load(name: str) -> tuple[str, Any, Any]:
    """Return (a name for the mask, the mask, its file) of `FILE` or `FILE:MASK`."""
    from selfmask_dist.maskfile import MaskFileError, read_mask_file

    path, _, wanted = name.rpartition(":") if not Path(name).exists() and ":" in name else (name, "", "")
    file = read_mask_file(path)
    if not wanted and len(file.masks) > 1:
        raise MaskFileError(f"{path} holds the masks {sorted(file.masks)}; name one: {path}:NAME")
    if wanted and wanted not in file.masks:
        raise MaskFileError(f"{path} holds no mask {wanted!r}; it has {sorted(file.masks)}")
    key = wanted or next(iter(file.masks))
    whole = Path(path)
    return wanted or (whole.parent.name if whole.stem == "final" else whole.stem), file.masks[key], file


def _config(options: argparse.Namespace) -> Any:
    from selfmask_dist.config import load_config

    if options.config is None:
        raise ValueError(
            "the backbone is needed: give the configuration of its run, --config RUN/config.yaml"
        )
    return load_config(options.config)


def _diff(options: argparse.Namespace) -> None:
    from selfmask_dist.maskfile.tools.arithmetic import check_same_backbone

    (first_name, first, _), (second_name, second, _) = _load(options.first), _load(options.second)
    if first.kind != second.kind:
        raise ValueError(f"{first_name} is of kind {first.kind}, {second_name} of kind {second.kind}")
    check_same_backbone([first, second])
    ours, theirs = ({**mask.bits, **_positive(mask)} for mask in (first, second))
    print(
        f"{'parameter':40s} {'weights':>12s} {'only first':>12s} {'only second':>12s} {'pruned alike':>13s}"
    )
    totals = [0, 0, 0, 0, 0]
    for name, bits in ours.items():
        other = theirs[name]
        only_first, only_second = int((bits & ~other).sum()), int((other & ~bits).sum())
        both, either = int((~bits & ~other).sum()), int((~bits | ~other).sum())
        row = [bits.numel(), only_first, only_second, both, either]
        totals = [total + value for total, value in zip(totals, row, strict=True)]
        if only_first or only_second:
            print(_row(name, row))
    print(_row("all", totals))
    print(
        f"\nfirst: {first_name}, second: {second_name}. only first: weights that only it keeps. pruned "
        "alike: of the weights that either prunes, the share that both do."
    )
    if first.kind != "threshold":
        print(_NOTES.get(first.kind, "What the kept weights are worth is not compared."))


_NOTES = {
    "sign": "A sign mask keeps every weight: here, kept stands for positive and pruned for negative.",
    "delta": "A delta keeps every weight: here, kept stands for a size added and pruned for one taken away.",
    "ternary": "Signs of weights that both keep, and scales, are not compared.",
}


def _positive(mask: Any) -> dict[str, Any]:
    """Return where a sign mask or a delta is positive; both keep every weight: their bits say nothing."""
    return {name: ~signs for name, signs in mask.signs.items()} if mask.kind in ("sign", "delta") else {}


def _row(name: str, row: list[int]) -> str:
    numel, only_first, only_second, both, either = row
    alike = f"{both / either:.1%}" if either else "-"
    return f"{name:40s} {numel:12,d} {only_first:12,d} {only_second:12,d} {alike:>13s}"


def _merge(options: argparse.Namespace) -> None:
    from selfmask_dist.maskfile import MaskFile, write_mask_file
    from selfmask_dist.maskfile.tools.arithmetic import OPERATIONS

    loaded = [_load(name) for name in options.files]
    if any(
        options.out.resolve() == Path(name.rpartition(":")[0] or name).resolve() for name in options.files
    ):
        raise ValueError(
            f"--out {options.out} is one of the masks to merge, which would be lost; name another"
        )
    about = {key: getattr(loaded[0][2], key) for key in ("backbone", "backbone_fingerprint", "preprocessing")}
    # a mark against one of them stays with what is made of it
    about["verdict"] = "; ".join(sorted({file.verdict for _, _, file in loaded if file.verdict}))
    if options.how == "collect":
        masks = {name: replace(mask, against=None) for name, mask, _ in loaded}
        heads = [
            (name, next(iter(file.models.values()), None)) for name, _, file in loaded if len(file.masks) == 1
        ]
        about["models"] = {name: model for name, model in heads if model is not None}
        if len(masks) < len(loaded):
            raise ValueError(f"two masks have one name: {[name for name, _, _ in loaded]}; rename a file")
    else:
        masks = {"default": OPERATIONS[options.how]([mask for _, mask, _ in loaded])}
    size = write_mask_file(options.out, MaskFile(masks, **about))
    kept = ", ".join(
        f"{name} keeps {mask.num_kept() / mask.num_weights():.2%}" for name, mask in masks.items()
    )
    print(f"{options.out}: {size:,} bytes; {kept}")


def _interpolate(options: argparse.Namespace) -> None:
    from selfmask_dist.maskfile import MaskFile, write_mask_file
    from selfmask_dist.procedures.interpolation import interpolate, read_scored_mask

    first, second = read_scored_mask(options.first), read_scored_mask(options.second)
    masks = {f"{at:g}": interpolate(first, second, at) for at in options.at}
    if len(masks) == 1:
        masks = {"default": next(iter(masks.values()))}
    about = {key: getattr(first.file, key) for key in ("backbone", "backbone_fingerprint", "preprocessing")}
    size = write_mask_file(options.out, MaskFile(masks, **about))
    print(f"{options.out}: {size:,} bytes")
    for name, mask in masks.items():
        far = [_share_apart(mask, end.mask) for end in (first, second)]
        kept = mask.num_kept() / mask.num_weights()
        print(
            f"{name}: keeps {kept:.2%}; {far[0]:.2%} of its bits are not the first's, {far[1]:.2%} not the "
            "second's"
        )


def _share_apart(mask: Any, other: Any) -> float:
    apart = sum(int((bits ^ other.bits[name]).sum()) for name, bits in mask.bits.items())
    return float(apart / mask.num_weights())


def _convert(options: argparse.Namespace) -> None:
    from selfmask_dist.maskfile import read_mask_file, weights_of, write_mask_file
    from selfmask_dist.training.build import build_backbone

    needs_weights = options.config is not None or options.against_weights
    weights = weights_of(build_backbone(_config(options)).encoder) if needs_weights else None
    file = read_mask_file(options.file, weights=weights)
    size = write_mask_file(
        options.out,
        file,
        codec_name=options.codec,
        weights=weights if options.against_weights else None,
    )
    before = options.file.stat().st_size
    print(f"{options.out}: {size:,} bytes, {size / before:.3f} times those of {options.file}")


def _verify(options: argparse.Namespace) -> int:
    from selfmask_dist.maskfile import MaskFileError, verify_mask_file

    bad = 0
    for path in options.files:
        try:
            print(f"{path}: {verify_mask_file(path)}")
        except (MaskFileError, OSError) as error:
            bad = 1
            print(f"bad: {error}")
    return bad


def _export(options: argparse.Namespace) -> None:
    from selfmask_dist.maskfile.tools.export import export
    from selfmask_dist.training.build import build_backbone

    config = _config(options)
    name, mask, file = _load(options.file)
    size = {} if config.backbone.image_size is None else {"img_size": config.backbone.image_size}
    takes_size = config.backbone.name.startswith("timm:vit")
    kwargs = {**(size if takes_size else {}), **config.backbone.kwargs}
    for path in export(
        options.out,
        name,
        mask,
        file,
        build_backbone(config),
        kwargs=kwargs,
        is_whole=not config.backbone.remove and config.backbone.activations == "library",
    ):
        print(path)


def _import(options: argparse.Namespace) -> None:
    from selfmask_dist.backbones.weights import read_state_dict
    from selfmask_dist.config import load_config
    from selfmask_dist.maskfile import MaskFile, write_mask_file
    from selfmask_dist.maskfile.tools.score_import import import_scores
    from selfmask_dist.training.build import build_backbone

    if (options.config is None) == (options.backbone is None):
        raise ValueError("the backbone is needed: give either --backbone NAME or --config RUN/config.yaml")
    given = {"backbone.name": options.backbone, "backbone.weights": options.weights}
    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
    state = read_state_dict(options.scores, setting="the first argument", skip_others=True)
    backbone = build_backbone(load_config(options.config, overrides))
    found = import_scores(
        state, backbone.encoder, key=options.key, threshold=options.threshold, scaled=options.scaled
    )
    file = MaskFile(
        {"default": found.mask},
        backbone=backbone.spec.name,
        backbone_fingerprint=backbone.spec.fingerprint,
        preprocessing=backbone.spec.preprocessing.to_dict(),
    )
    size, kept = write_mask_file(options.out, file), found.mask.num_kept() / found.mask.num_weights()
    print(f"{options.out}: {size:,} bytes; {len(found.mask.bits)} parameters, {kept:.2%} kept")
    if found.mask.statistics:
        print(f"with {len(found.mask.statistics)} running statistics that moved")
    if found.left_out:
        print(f"left out, as the backbone has none of these names: {', '.join(found.left_out)}")


def _delta(options: argparse.Namespace) -> None:
    from selfmask_dist.models.deltas import import_delta

    found = import_delta(
        options.source, options.out, config=options.config, half=options.half, pictures=options.calibrate
    )
    print(found.describe())


def _shrink(options: argparse.Namespace) -> None:
    from selfmask_dist.maskfile import apply_mask
    from selfmask_dist.maskfile.tools.shrink import save_smaller, shrink
    from selfmask_dist.training.build import build_backbone

    _, mask, _ = _load(options.file)
    encoder = build_backbone(_config(options)).encoder
    before = sum(parameter.numel() for parameter in encoder.parameters())
    apply_mask(encoder, mask)
    left = shrink(encoder)
    after = sum(parameter.numel() for parameter in encoder.parameters())
    for name, number in left.items():
        print(f"{name:40s} {number:8,d} left")
    print(f"{after:,} of {before:,} weights are left ({after / before:.1%})")
    for path in save_smaller(encoder, left, options.out):
        print(path)
