"""Do masks go on any backbone? Architectures of four libraries, each from attaching to a fresh process.

Of each, with random weights and small images: the rule that `auto` takes, the share of its matrices' weights
under a mask and what is left out by name; a supervised and a label-free step (SimCLR) that change masks; a
mask file; the same embeddings, bit for bit, in another process that builds the backbone and applies the file;
detaching gives every tensor back, bit for bit. A model whose layers derive their weights is refused by name.

    python -m benchmarks.backbones.coverage --json          an architecture that has a row is not run again
    python -m benchmarks.backbones.coverage --only timm:resnet18 --out PART.json
    python -m benchmarks.backbones.coverage --markdown      the table of docs/backbones.md, from the rows
"""

import json
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.backbones.cases import CASES, build
from benchmarks.harness import RESULTS, Benchmark

_AT_ONCE = 10  # architectures a process: importing the libraries takes seconds
_BATCH, _LR = 4, 0.7  # of scores, by their gradient's root mean square
_ENOUGH = 0.95
Row = dict[str, Any]


def images(size: int) -> Tensor:
    return torch.randn(_BATCH, 3, size, size, generator=torch.Generator().manual_seed(1))


def file_of(name: str) -> str:
    return name.replace(":", "-").replace(" ", "-")


# ---- in a process of its own


def learn(name: str, folder: Path) -> Row:
    """Attach, train two steps, save, detach; embeddings stay in the folder."""
    from selfmask_dist import attach
    from selfmask_dist.backbones import set_train_mode
    from selfmask_dist.masking.selection import find_parts, measure_coverage, rule_of, select

    encoder, size = build(CASES[name], folder)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    names = select(encoder)
    coverage = measure_coverage(encoder, names)
    parts = find_parts(encoder)
    row: Row = {
        "rule": rule_of(encoder),
        "size": size,
        "share": coverage.share,
        "share_in_blocks": _share(encoder, parts.body, names),
        "tensors": len(names),
        "weights": coverage.num_weights,
        "left_out": list(coverage.left_out),
    }
    try:
        masks = attach(encoder)
    except ValueError as error:
        return row | {"refused": str(error)}
    said = masks.summary()
    row["said"] = all(left in said for left in coverage.left_out[:3])
    pixels = images(size)
    with torch.no_grad():
        first, frozen = encoder(pixels[:2]), encoder(pixels)
    head = nn.Linear(first.shape[1], 3)
    optimizer = torch.optim.SGD(
        [{"params": masks.parameters(), "lr": _LR}, {"params": head.parameters(), "lr": 0.1}]
    )
    masks.bind(optimizer, score_step="rms")
    set_train_mode(encoder)
    pruned = []
    for loss_of in (_supervised, _label_free):
        optimizer.zero_grad()
        loss = loss_of(encoder, head, pixels)
        loss.backward()
        optimizer.step()
        pruned.append(sum(masks.sparsity().values()) / len(names))
        if not loss.isfinite():
            return row | {"failed": f"the loss of {loss_of.__name__} is {float(loss)}"}
    encoder.eval()
    with torch.no_grad():
        after = encoder(pixels)
    row |= {"pruned": pruned, "changes": bool(0 < pruned[0] != pruned[1]) and not torch.equal(after, frozen)}
    masks.save(folder / f"{file_of(name)}.mask")
    torch.save(after, folder / f"{file_of(name)}.pt")
    row["bytes"] = (folder / f"{file_of(name)}.mask").stat().st_size
    masks.detach()
    state = encoder.state_dict()
    return row | {"detached": all(torch.equal(state[key], value) for key, value in before.items())}


def _share(model: nn.Module, layers: Any, names: list[str]) -> float:
    sizes = {key: model.get_parameter(key).numel() for layer in layers for key in layer.matrices}
    return sum(size for key, size in sizes.items() if key in names) / max(sum(sizes.values()), 1)


def _supervised(encoder: nn.Module, head: nn.Module, pixels: Tensor) -> Tensor:
    return F.cross_entropy(head(encoder(pixels)), torch.arange(_BATCH) % 3)


def _label_free(encoder: nn.Module, head: nn.Linear, pixels: Tensor) -> Tensor:
    from selfmask_dist.config.objectives import SimclrConfig
    from selfmask_dist.data import Batch
    from selfmask_dist.objectives.base import Context
    from selfmask_dist.objectives.simclr import Simclr

    objective = Simclr(head.in_features, SimclrConfig(dim=16, hidden=32), Context(global_batch_size=_BATCH))
    ids = torch.arange(_BATCH)
    views = (pixels, pixels.flip(3) * 0.9)
    loss: Tensor = objective(encoder, Batch(views, -torch.ones_like(ids), torch.ones(_BATCH), ids, _BATCH))[0]
    return loss


def apply(name: str, folder: Path) -> Row:
    """Build the backbone anew, apply the file, and compare embeddings."""
    from selfmask_dist import apply_masks

    encoder, size = build(CASES[name], folder)
    apply_masks(encoder, folder / f"{file_of(name)}.mask")
    with torch.no_grad():
        found = encoder.eval()(images(size))
    return {"equal": torch.equal(found, torch.load(folder / f"{file_of(name)}.pt"))}


def work(what: str, folder: Path, names: list[str]) -> None:
    """Print a line for each architecture."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in names:
        try:
            row = {"learn": learn, "apply": apply}[what](name, folder)
        except Exception as error:
            row = {"failed": f"{what}: {type(error).__name__}: {error}"}
        print(json.dumps([name, row]), flush=True)


# ---- over all


def run(what: str, folder: Path, names: list[str]) -> dict[str, Row]:
    command = [sys.executable, "-m", "benchmarks.backbones.coverage", "--work", what, str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith('["'))
    died = {"failed": f"{what}: the process ended with {done.returncode}: {done.stderr[-300:]}"}
    return {name: found.get(name, died) for name in names}


def is_silent(row: Row) -> bool:
    """Whether matrices are without a mask and nobody is told: neither masked, nor named, nor refused."""
    return "failed" in row or not (
        "refused" in row or row["share"] >= _ENOUGH or (row["left_out"] and row["said"])
    )


def is_right(row: Row) -> bool:
    return "refused" in row or all(row.get(key) is True for key in ("changes", "equal", "detached"))


def table(rows: dict[str, Row]) -> str:
    """The rows as markdown."""
    lines = [
        "| architecture | rule | of all matrices | of those in blocks | left out |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if "share" not in row:
            lines.append(f"| `{name}` | failed | | | {row['failed'][:80]} |")
            continue
        owners = dict.fromkeys(_short(left) for left in row["left_out"])
        left = ", ".join(f"`{owner}`" for owner in list(owners)[:3]) + (" ..." if len(owners) > 3 else "")
        left = "refused: its layers derive their weights" if "refused" in row else left
        lines.append(
            f"| `{name}` | {row['rule']} | {100 * row['share']:.1f} % | "
            f"{100 * row['share_in_blocks']:.1f} % | {left} |"
        )
    return "\n".join(lines)


def _short(name: str) -> str:
    return name.rpartition(".")[0] or name


def main() -> int:
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
        return 0
    bench = Benchmark("coverage", __doc__)
    bench.parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME", help="these alone")
    bench.parser.add_argument("--markdown", action="store_true", help="print the table of what is known")
    args = bench.parse()
    path = args.out or RESULTS / "coverage.json"
    known = json.loads(path.read_text())["figures"].get("rows", {}) if path.exists() else {}
    if args.markdown:
        print(table(known))
        return 0
    wanted = args.only or (list(CASES)[::12] if args.quick else list(CASES))
    rows = {name: row for name, row in known.items() if name in CASES and "failed" not in row}
    partial = path.with_suffix(".partial.jsonl")
    if partial.exists():
        rows |= dict(json.loads(line) for line in partial.read_text().splitlines())
    todo = [name for name in wanted if name not in rows]
    with tempfile.TemporaryDirectory() as temporary:
        for start in range(0, len(todo), _AT_ONCE):
            folder, names = Path(temporary), todo[start : start + _AT_ONCE]
            found = run("learn", folder, names)
            trained = [name for name in names if "bytes" in found[name]]
            for name, more in (run("apply", folder, trained) if trained else {}).items():
                found[name] |= more
            rows |= found
            with partial.open("a") as file:
                file.writelines(
                    f"{json.dumps([name, found[name]])}\n" for name in names if "failed" not in found[name]
                )
            for name in names:
                print(table({name: found[name]}).splitlines()[-1], file=sys.stderr, flush=True)
                for mask in folder.glob(f"{file_of(name)}.*"):
                    mask.unlink()
    rows = {name: rows[name] for name in CASES if name in rows}
    partial.unlink(missing_ok=True)
    libraries = Counter(name.partition(":")[0] for name in rows)
    for library, number in (("timm", 40), ("open_clip", 8), ("transformers", 10), ("torchvision", 4)):
        bench.figure(library, libraries[library], min=number, quick=False)
    bench.figure("silent", sum(map(is_silent, rows.values())), max=0)
    bench.figure("refused by name", sum("refused" in row for row in rows.values()))
    bench.figure("not as it should be", [name for name, row in rows.items() if not is_right(row)])
    bench.figure("wrong", sum(not is_right(row) for row in rows.values()), max=0)
    covered = sum(row.get("share", 0) >= _ENOUGH and "refused" not in row for row in rows.values())
    bench.figure("95 % of all matrices or more", covered)
    bench.figure("rows", rows)
    return bench.finish()


if __name__ == "__main__":
    raise SystemExit(main())
