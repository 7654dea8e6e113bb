"""`selfmask data get | convert | index | verify | stats`: from pictures to indexed tars."""

import argparse
from pathlib import Path

from selfmask_dist.common.shipped import shipped_module
from selfmask_dist.common.text import positive

# what `selfmask data convert` takes first: the module of data_prep that converts it, and what it is
_SOURCES = {
    "folder": ("image_folder", "a folder of CLASS/PICTURE, or of SPLIT/CLASS/PICTURE"),
    "csv": (
        "csv_manifest",
        "a CSV list of pictures and their classes, with the pictures in a folder or a tar",
    ),
    "coco": ("targets.coco", "several labels a picture: COCO's JSON, with the pictures in a folder"),
    "values": ("targets.values", "numbers of pictures: a CSV list, with the pictures in a folder"),
    "maps": ("targets.maps", "label maps: a folder of pictures, and one of PNG maps of the same names"),
    "inaturalist": ("inaturalist", "iNaturalist 2017, 2018, 2021: its JSON files and pictures"),
    "sun397": ("sun397", "SUN397 and its partition lists"),
    "torchvision": ("torchvision_dataset", "a data set of torchvision, for example Flowers102"),
}


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `selfmask data` to the command line."""
    help = "convert pictures to tars; index, verify or describe a folder of tars"
    actions = commands.add_parser("data", help=help).add_subparsers(required=True, metavar="ACTION")
    _add_convert(actions)
    get = actions.add_parser("get", help="bring a data set of the paper into the data root, as indexed tars")
    get.add_argument("name", metavar="NAME", help="cifar10, inat21, ...; a name that is none lists them all")
    get.add_argument("--root", type=Path, metavar="DIR", help="data root ($SELFMASK_DATA, or the site's)")
    get.add_argument("--workers", type=positive, default=1, metavar="N", help="processes (1)")
    get.set_defaults(command=_get)
    index = actions.add_parser("index", help="check every picture and write the index beside the tars")
    index.add_argument("--no-decode", dest="decode", action="store_false", help="do not decode the pictures")
    index.add_argument(
        "--budget", type=_share, default=0.001, help="share of samples that may be unusable (0.001)"
    )
    index.add_argument("--classes", metavar="A,B,...", help="class names in the order of their numbers")
    index.add_argument("--unlabelled", action="store_true", help="take samples without a label")
    index.add_argument(
        "--similar-classes",
        choices=("refuse", "merge", "keep"),
        default="refuse",
        help="what folders are whose names differ only by case or the like: an error, one class, or several",
    )
    index.set_defaults(command=_index)
    verify = actions.add_parser("verify", help="read every picture and compare it with the index")
    verify.set_defaults(command=_verify)
    stats = actions.add_parser("stats", help="counts, sizes and classes")
    stats.set_defaults(command=_stats)
    for action in (index, verify, stats):
        action.add_argument("path", metavar="PATH", help="folder of tars, or one tar")
    for action in (index, verify):
        action.add_argument("--workers", type=positive, default=1, metavar="N", help="processes (1)")


def _share(text: str) -> float:
    """Return a number from 0 to 1. Raises ValueError, of which argparse makes a message."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to 1 (0.05 is five percent)")
    return float(text)


def _add_convert(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    width = max(map(len, _SOURCES))
    convert = actions.add_parser(
        "convert",
        help="write pictures as WebDataset tars",
        description="Write pictures as WebDataset tars. SOURCE is one of:\n\n"
        + "\n".join(f"  {name:{width}}  {what}" for name, (_, what) in _SOURCES.items())
        + "\n\nWhat follows it differs: selfmask data convert SOURCE --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s SOURCE ... [options]",
    )
    convert.add_argument("source", choices=_SOURCES, metavar="SOURCE", help="what is converted")
    # the rest is the converter's own command line: its module is imported only when it runs
    convert.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="of that source")
    convert.set_defaults(command=_convert)


def _convert(options: argparse.Namespace) -> int:
    module, _ = _SOURCES[options.source]
    converter = shipped_module(f"data_prep.{module}")
    status: int = converter.main(options.arguments, prog=f"selfmask data convert {options.source}")
    return status


def _get(options: argparse.Namespace) -> int:
    from selfmask_dist.config.site import data_root, find_site

    named = shipped_module("data_prep.prepared.named")
    root = options.root or data_root(find_site())
    status: int = named.bring(options.name, root, num_workers=options.workers)
    return status


def _index(options: argparse.Namespace) -> None:
    from selfmask_dist.data.build import build_index

    built = build_index(
        options.path,
        decode_check=options.decode,
        budget=options.budget,
        num_workers=options.workers,
        classes=options.classes.split(",") if options.classes else None,
        require_labels=not options.unlabelled,
        similar=options.similar_classes,
    )
    for reject in built.rejects:
        where = ": ".join(part for part in (reject.shard, reject.key and repr(reject.key)) if part)
        print(f"{'left out' if reject.is_lost else 'note'}: {where or options.path} {reject.reason}")
    print(f"{built.path}: {len(built.index)} samples, {built.index.num_rejected} left out")


def _verify(options: argparse.Namespace) -> int:
    from selfmask_dist.data.build import verify

    found = verify(options.path, num_workers=options.workers)
    print("\n".join(found) if found else f"{options.path}: every picture is as it was indexed")
    return 1 if found else 0


def _stats(options: argparse.Namespace) -> None:
    from selfmask_dist.data.build import describe

    print(describe(options.path))
