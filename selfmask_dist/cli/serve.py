"""`selfmask embed` and `selfmask serve`: pictures through one backbone under any of several masks."""

import argparse
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from selfmask_dist.cli.service import Limits
from selfmask_dist.common import names
from selfmask_dist.common.text import positive

_LAST_PORT = 65535


def add_commands(commands: Any) -> None:
    """Add `embed` and `serve` to the command line."""
    embed = commands.add_parser("embed", help="embeddings of pictures under each of several masks")
    embed.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    embed.add_argument("--out", type=Path, required=True, metavar="FILE", help=".npz: an array for each mask")
    embed.add_argument("--batch-size", type=positive, default=32, metavar="N", help="pictures at a time (32)")
    _add_common(embed)
    embed.set_defaults(command=_embed)

    serve = commands.add_parser("serve", help="a small HTTP service: a picture in, its embedding out")
    serve.add_argument("--host", default="127.0.0.1", metavar="NAME", help="address to listen on (127.0.0.1)")
    serve.add_argument("--port", type=_port, default=8000, metavar="N", help="port to listen on (8000)")
    _add_common(serve)
    limits = serve.add_argument_group("limits")
    for limit in fields(Limits):
        limits.add_argument(
            f"--{limit.name.replace('_', '-')}",
            type=type(limit.default),
            default=limit.default,
            metavar="N",
            help=f"{limit.metadata['help']} ({limit.default})",
        )
    serve.set_defaults(command=_serve)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="config.yaml of a run on the backbone; without it, the one beside the first mask, or the "
        "backbone that the mask names, pretrained",
    )
    parser.add_argument("--masks", type=Path, nargs="+", default=[], metavar="FILE", help="mask files")
    parser.add_argument("--device", default=None, metavar="NAME", help="cuda where there is one, else cpu")


def _port(text: str) -> int:
    """Return a port's number, 0 for any free one. Raises ArgumentTypeError for what is none."""
    if not text.isdecimal() or int(text) > _LAST_PORT:
        raise argparse.ArgumentTypeError(
            f"{text} is no port; they go from 1 to {_LAST_PORT} (0: any free one)"
        )
    return int(text)


def device_of(name: str | None) -> Any:
    """Return the device of that name. Raises ValueError where there is none here."""
    import torch

    has_cuda = torch.cuda.is_available()
    name = name or ("cuda" if has_cuda else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    count = torch.cuda.device_count() if has_cuda else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"--device {name}: there are {count} usable GPUs here; take cpu, or cuda:N with N below that"
        )
    return device


def _bank(options: argparse.Namespace) -> tuple[Any, Any]:
    """Return (bank, preprocessing). Masks are named after their files, `runs/pets/final.mask` after its
    folder.
    """

    from selfmask_dist.maskfile.bank import MaskBank
    from selfmask_dist.training.build import build_backbone

    device = device_of(options.device)
    backbone = build_backbone(_config(options))
    bank = MaskBank(backbone.encoder.to(device))
    for path in options.masks:
        if not _is_cascade(path):
            bank.add(_name_of(path), path)
    return bank, backbone.spec.preprocessing


def _name_of(path: Path) -> str:
    return path.parent.name if path.name in (names.MASK, names.CASCADE_MASK) else path.stem


def _is_cascade(path: Path) -> bool:
    from selfmask_dist.maskfile.file import read_about

    return any(name.startswith(f"{names.ROUTER}.") for name in read_about(path, with_tensors=True).tensors)


def _cascades(options: argparse.Namespace, bank: Any) -> dict[str, Any]:
    """Load the cascades among the files into the bank; return them by the names they are served under."""
    from selfmask_dist.cli.service.routes import add_cascade

    found: dict[str, Any] = {}
    for path in filter(_is_cascade, options.masks):
        found |= add_cascade(bank, path, _name_of(path))
    return found


def _models(options: argparse.Namespace) -> dict[str, Any]:
    """Return heads and class names that came with masks and cascades, by the names these are served under."""
    from selfmask_dist.cli.service.routes import heads_of
    from selfmask_dist.maskfile.file import read_about

    found: dict[str, Any] = {}
    for path in options.masks:
        models = read_about(path).models
        if _is_cascade(path):
            found |= heads_of(_name_of(path), models)
            continue
        for model in models.values():
            if model.head is not None:  # a file in a bank holds one mask
                found[_name_of(path)] = model
    return found


def _config(options: argparse.Namespace) -> Any:
    """Return the settings of the backbone; the masks' fingerprints tell later whether it is theirs."""
    from selfmask_dist.config import load_config

    if options.config is not None:
        return load_config(options.config)
    if not options.masks:
        raise ValueError("which backbone? give masks with --masks, or a run's config.yaml with --config")
    first: Path = options.masks[0]
    if (first.parent / names.CONFIG).exists():
        return load_config(first.parent / names.CONFIG)
    from selfmask_dist.maskfile.file import read_about
    from selfmask_dist.models.building import settings_for

    about = read_about(first)
    if not about.backbone:
        raise ValueError(f"{first} does not name its backbone; give a run's config.yaml with --config")
    model = next(iter(about.models.values()), None)
    settings = settings_for(first, about, model, config=None, weights=None)
    config = load_config(None)
    return config.model_copy(update={"backbone": settings.section, "seed": settings.seed})


def _embed(options: argparse.Namespace) -> None:
    import numpy as np
    import torch

    from selfmask_dist.data import eval_transform
    from selfmask_dist.data.views.decode import decode

    bank, preprocessing = _bank(options)
    transform = eval_transform(preprocessing)
    device = next(bank.encoder.parameters()).device
    names = bank.names or [None]
    parts: dict[str, list[Any]] = {name or "frozen": [] for name in names}
    for start in range(0, len(options.images), options.batch_size):
        views = []
        for path in options.images[start : start + options.batch_size]:
            try:
                views.append(transform(decode(path.read_bytes()), np.random.default_rng(0))[0])
            except ValueError as error:
                raise ValueError(f"{path} {error}") from error
        images = torch.stack(views).to(device)
        for name in names:
            parts[name or "frozen"].append(bank.embed(images, name).float().cpu().numpy())
    arrays = {name: np.concatenate(found) for name, found in parts.items()}
    with open(options.out, "wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)
    print(f"{options.out}: {len(options.images)} pictures under {', '.join(arrays)}")


def _serve(options: argparse.Namespace) -> None:
    limits = Limits(**{limit.name: getattr(options, limit.name) for limit in fields(Limits)})
    try:
        from selfmask_dist.cli.service.app import create_app
        from selfmask_dist.cli.service.server import make_server
    except ImportError as error:
        raise ValueError(
            f"the service needs starlette and uvicorn ({error}): pip install -e '.[serve]'"
        ) from error
    bank, preprocessing = _bank(options)
    cascades, models = _cascades(options, bank), _models(options)
    app = create_app(bank, preprocessing, limits, models, cascades)
    server = make_server(app, limits, host=options.host, port=options.port)
    # what PIL finds odd in a client's picture is the client's to know
    warnings.filterwarnings("ignore", module=r"PIL\.")
    heads = f", {len(models)} of them with classes," if models else ""
    routed = f" and {len(cascades)} modes of cascades" if cascades else ""
    print(f"serving {len(bank)} masks{routed}{heads} on {options.host}:{options.port}", flush=True)
    server.run()
