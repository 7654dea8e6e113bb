"""`selfmask predict`, `onnx` and `hub`: classes of pictures, and models and masks for elsewhere."""

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from selfmask_dist.cli.serve import device_of
from selfmask_dist.common.text import positive

_STDIN = Path("-")


def add_commands(commands: Any) -> None:
    """Add `predict`, `onnx` and `hub` to the command line."""
    predict = commands.add_parser(
        "predict",
        help="classes of pictures, by a run, a mask file or a name on a hub",
        description="Write the most likely classes of pictures, by a run's folder, a mask file or a name on "
        "a hub.",
    )
    _add_model(predict)
    predict.add_argument(
        "pictures", nargs="+", type=Path, metavar="PICTURE", help="files, folders, or - for a list on stdin"
    )
    predict.add_argument("--top", type=positive, default=1, metavar="K", help="classes of each picture (1)")
    predict.add_argument("--format", choices=("csv", "json"), default="csv", help="(csv)")
    predict.add_argument("--out", "-o", type=Path, metavar="FILE", help="in place of standard output")
    predict.add_argument("--batch-size", type=positive, default=32, metavar="N", help="at a time (32)")
    predict.add_argument("--device", metavar="NAME", help="cuda where there is one, else cpu")
    predict.set_defaults(command=_predict)

    onnx = commands.add_parser(
        "onnx",
        help="backbone, mask and head as one ONNX file, checked against PyTorch",
        description="Write backbone, mask and head as one ONNX file, for any number of pictures at once, and "
        "check it against PyTorch.",
    )
    _add_model(onnx)
    onnx.add_argument("out", type=Path, metavar="OUT.onnx")
    onnx.add_argument("--opset", type=positive, metavar="N", help="of ONNX's operators (20)")
    onnx.add_argument(
        "--shrink", action="store_true", help="without the heads and hidden units that the mask switched off"
    )
    onnx.set_defaults(command=_onnx)

    hub = commands.add_parser("hub", help="push masks to a hub, pull them, list them")
    actions: Any = hub.add_subparsers(required=True, metavar="ACTION")
    push = actions.add_parser("push", help="a run's mask with a model card")
    push.add_argument("source", type=Path, metavar="RUN", help="a run's folder, or a mask file")
    push.add_argument("repo", metavar="OWNER/NAME")
    push.add_argument("--private", action="store_true", help="for its owner alone")
    push.add_argument("--message", default="A mask of selfmask_dist", metavar="TEXT", help="of the commit")
    _add_hub(push)
    push.set_defaults(command=_push)
    pull = actions.add_parser("pull", help="a repository into a folder, every file checked")
    pull.add_argument("repo", metavar="OWNER/NAME")
    pull.add_argument("--out", "-o", type=Path, metavar="FOLDER", help="new or empty; else the user's cache")
    _add_hub(pull)
    pull.set_defaults(command=_pull)
    listing = actions.add_parser("list", help="the repositories with masks")
    listing.add_argument("owner", nargs="?", metavar="OWNER")
    _add_hub(listing)
    listing.set_defaults(command=_list)


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Which model: what `load` takes."""
    parser.add_argument("source", metavar="MODEL", help="a run's folder, a mask file, or owner/name")
    parser.add_argument("--mask", metavar="NAME", help="which one, where the file holds several")
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.yaml of a run on the backbone")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="the backbone's weights")
    _add_hub(parser)


def _add_hub(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hub",
        metavar="WHERE",
        help="a folder that serves as hub, or a server's address; else SELFMASK_HUB, else Hugging Face's",
    )


def _predict(options: argparse.Namespace) -> None:
    from selfmask_dist.models.load import load
    from selfmask_dist.models.pictures import find_pictures

    pictures = list(find_pictures(_named(options.pictures)))
    loaded = load(
        options.source,
        mask=options.mask,
        config=options.config,
        weights=options.weights,
        device=device_of(options.device),
        hub=options.hub,
    )
    found = loaded.predict_each(pictures, top=options.top, batch_size=options.batch_size)
    with _output(options.out) as stream:
        if options.format == "json":
            json.dump([prediction.to_dict() for prediction in found], stream, indent=1, ensure_ascii=False)
            stream.write("\n")
            return
        rows = csv.writer(stream, lineterminator="\n")
        is_numbers = loaded.model.head is not None and loaded.model.head.target == "regression"
        of_classes = ("picture", "rank", "class", "probability", "logit")
        rows.writerow(("picture", "name", "value") if is_numbers else of_classes)
        for one in found:
            if is_numbers:
                for name, value in zip(one.classes, one.logits, strict=True):
                    rows.writerow((one.picture, name, f"{value:.6g}"))
                continue
            parts = zip(one.classes, one.probabilities, one.logits, strict=True)
            for rank, (name, probability, logit) in enumerate(parts, start=1):
                rows.writerow((one.picture, rank, name, f"{probability:.6f}", f"{logit:.6f}"))


def _onnx(options: argparse.Namespace) -> None:
    from selfmask_dist.models.load import load
    from selfmask_dist.models.onnx import OPSET, export_onnx

    loaded = load(
        options.source, mask=options.mask, config=options.config, weights=options.weights, hub=options.hub
    )
    made = export_onnx(loaded, options.out, opset=options.opset or OPSET, smaller=options.shrink)
    print(
        f"{made.path}: {made.size / 2**20:.1f} MiB, opset {made.opset}; differs from PyTorch by "
        f"{made.difference:.1g} of the largest number"
    )


def _named(paths: list[Path]) -> Iterator[Path]:
    """Yield the paths, and in place of - those that standard input lists, one a line."""
    for path in paths:
        if path == _STDIN:
            yield from (Path(line) for text in sys.stdin if (line := text.rstrip("\r\n")))
        else:
            yield path


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
    else:
        with open(path, "w", encoding="utf-8", newline="") as stream:
            yield stream


def _push(options: argparse.Namespace) -> None:
    from selfmask_dist.models.hub import push_to_hub

    place = push_to_hub(
        options.source, options.repo, hub=options.hub, private=options.private, message=options.message
    )
    print(f"{options.repo}: {place}")


def _pull(options: argparse.Namespace) -> None:
    from selfmask_dist.models.hub import pull

    print(pull(options.repo, hub=options.hub, out=options.out))


def _list(options: argparse.Namespace) -> None:
    from selfmask_dist.models.hub import open_hub

    for repo in open_hub(options.hub).repositories(options.owner):
        print(repo)
