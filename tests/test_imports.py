"""Who may import whom: reads the imports of every file and holds them against the table of the architecture.

A package imports only what stands above it in `docs/architecture.md`. Imports inside functions and under
TYPE_CHECKING count too: a name that is only needed for a type is still knowledge. No two files import each
other, directly or around a corner.
"""

import ast
import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "selfmask_dist"
TREES = (PACKAGE, "launchers", "data_prep")

# a row may import itself and what is named; a dotted name is one module of a package
_BASE = ("common", "config", "backbones", "data")
_ABOVE_TRAINING = (*_BASE, "masking", "objectives", "parallel", "maskfile", "runs", "evals")
_ABOVE_CLI = (*_ABOVE_TRAINING, "training")
TABLE: dict[str, tuple[str, ...]] = {
    "common": (),
    "config": ("common",),
    "backbones": ("common",),
    "masking": ("common",),
    "data": ("common",),
    "objectives": _BASE,
    "parallel": ("common", "config", "data", "masking"),
    "maskfile": ("common", "config", "backbones", "masking"),
    "runs": ("common", "config", "data", "parallel"),
    "evals": (*_BASE, "objectives", "parallel"),
    "training": _ABOVE_TRAINING,
    "cascade": _ABOVE_CLI,
    "procedures": _ABOVE_CLI,
    "models": (*_ABOVE_CLI, "cascade"),
    "cli": (*_ABOVE_CLI, "cascade", "procedures", "models", "__init__", "launchers", "data_prep"),
    "__init__": (
        "common",
        "maskfile",
        "masking",
        "cascade",
        "models",
    ),  # the public names, each imported when it is asked for
    "launchers": (
        "common",
        "config",
        "runs.folder",
        "runs.ending.device_fault",
        "runs.ending.notes",
        "runs.exit_status",
        "runs.owner",
        "runs.submitted",
        "runs.verdict",
    ),
    "data_prep": ("common", "data"),
}

TRAINING = (
    "torch",
    "torchvision",
    "timm",
    "open_clip",
    "transformers",
    "deepspeed",
)  # what takes seconds to import
MODELS = ("timm", "open_clip", "transformers")
OPTIMIZERS = ("torch.optim.SGD", "torch.optim.Adam", "torch.optim.AdamW", "torch.optim.lr_scheduler")
# what a part must not know of the world outside the project; by package, or by file
NEVER: dict[str, tuple[str, ...]] = {
    "common": ("torch.distributed", "torch.optim", "torchvision", *MODELS),
    "config": TRAINING,
    "backbones": ("torch.distributed", "torch.optim"),
    "masking": ("torch.distributed", *OPTIMIZERS, *MODELS),
    "data": ("torch.distributed", "torch.optim", *MODELS),
    "objectives": ("torch.distributed", "torch.optim", *MODELS),
    "parallel": MODELS,
    "maskfile": ("torch.distributed", "torch.optim", *MODELS),
    "runs": ("torch.optim", "submitit", *MODELS),
    "evals": ("torch.optim", *MODELS),
    "training": ("submitit", *MODELS),
    "training/trainer.py": OPTIMIZERS,
    "training/schedule.py": ("torch.distributed", *OPTIMIZERS),
    "cascade": ("torch.optim", "torchvision", "submitit", *MODELS),
    "procedures": (*OPTIMIZERS, *MODELS),
    "models": ("torch.optim", "torch.distributed", "torchvision", "submitit", *MODELS),
    "cli": ("submitit",),
    "cli/report": ("torch", *MODELS),
    "__init__": TRAINING,
    "launchers": TRAINING,
    "data_prep": tuple(name for name in TRAINING if name != "torchvision"),  # one converter's source
}


@dataclass(frozen=True)
class Import:
    line: int
    name: str  # as it would be written in full: "torch.optim.Optimizer"


def imports_of(source: str, package: str) -> list[Import]:
    """Return every import of a file under its full dotted name.

    Args:
        package: the one that relative imports start from.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found += [Import(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def row_of(dotted: str) -> str | None:
    """Return the row of the table that a dotted name belongs to; None for what is not the project's."""
    first, *rest = dotted.split(".")
    if first == PACKAGE:
        return rest[0] if rest and (rest[0] in TABLE or _is_module(rest[0])) else "__init__"
    return first if first in TREES else None


def _is_module(name: str) -> bool:
    folder = ROOT / PACKAGE
    return (folder / f"{name}.py").exists() or (folder / name / "__init__.py").exists()


def violations(row: str, source: str, package: str, path: str = "") -> list[str]:
    """Return what a file of `row` imports against the table, each as one sentence."""
    if row not in TABLE:
        return [f"{row} is not in the table of tests/test_imports.py: add a row that says what it may import"]
    never = [name for key in NEVER if key == row or path.startswith(key) for name in NEVER[key]]
    complaints = []
    for item in imports_of(source, package):
        target = row_of(item.name)
        if target is None:
            broken = [name for name in never if f"{item.name}.".startswith(f"{name}.")]
            complaints += [
                f"line {item.line}: {row} must not know {name} (imports {item.name})" for name in broken
            ]
        elif target != row and not any(_covers(allowed, item.name) for allowed in TABLE[row]):
            complaints.append(f"line {item.line}: {row} must not know {target} (imports {item.name})")
    return complaints


def _covers(allowed: str, name: str) -> bool:
    inside = name.removeprefix(f"{PACKAGE}.")
    if allowed == "__init__":
        return row_of(name) == "__init__"
    return f"{inside}.".startswith(f"{allowed}.")


def files(root: Path = ROOT) -> list[Path]:
    return sorted(path for tree in TREES for path in (root / tree).rglob("*.py"))


def graph_of(paths: list[Path], root: Path) -> dict[str, set[str]]:
    """Return the modules that each module imports, by dotted name, among the given files."""
    names = {_dotted(path, root): path for path in paths}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        targets = set()
        for item in imports_of(path.read_text(), package):
            # `from package import module` names the module, `from module import thing` its file
            target = item.name if item.name in names else item.name.rpartition(".")[0]
            if target in names and target != name:
                targets.add(target)
        graph[name] = targets
    return graph


def _dotted(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []
    counter = itertools.count()

    def visit(name: str) -> None:
        index[name] = low[name] = next(counter)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in index:
                visit(target)
            if target in stack:
                low[name] = min(low[name], low[target])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def _row(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == PACKAGE else parts[0]


def test_imports_follow_the_table() -> None:
    broken = []
    for path in files():
        name = _dotted(path, ROOT)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        inside = str(path.relative_to(ROOT)).removeprefix(f"{PACKAGE}/")
        found = violations(_row(path), path.read_text(), package, inside)
        broken += [f"{path.relative_to(ROOT)}: {complaint}" for complaint in found]
    assert not broken, "\n".join(broken)


def test_no_row_but_the_command_line_may_import_everything() -> None:
    packages = {row for row in TABLE if row not in ("__init__", "launchers", "data_prep")}
    for row, allowed in TABLE.items():
        assert row == "cli" or not packages <= {*allowed, row}, row


def test_the_table_has_no_circle() -> None:
    inside = {
        row: {name for name in allowed if name in TABLE and row != "cli"} for row, allowed in TABLE.items()
    }
    assert circles(inside) == []


def test_no_two_files_import_each_other() -> None:
    assert circles(graph_of(files(), ROOT)) == []


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    for name, source in {
        "selfmask_dist/__init__.py": "",
        "selfmask_dist/data/__init__.py": "from selfmask_dist.data.order import Order",
        "selfmask_dist/data/order.py": "def f():\n    from selfmask_dist.data.loader import Loader",
        "selfmask_dist/data/loader.py": "if TYPE_CHECKING:\n    from selfmask_dist.data import source",
        "selfmask_dist/data/source.py": "import os",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path


def test_a_planted_circle_is_found(planted: Path) -> None:
    assert circles(graph_of(files(planted), planted)) == []
    # closed by a type-only import at one end and a lazy one at the other
    (planted / "selfmask_dist/data/source.py").write_text(
        "def g():\n    from selfmask_dist.data import order"
    )
    expected = ["selfmask_dist.data.loader", "selfmask_dist.data.order", "selfmask_dist.data.source"]
    assert circles(graph_of(files(planted), planted)) == [expected]


@pytest.mark.parametrize(
    ("row", "source", "complaint"),
    [
        ("masking", "import torch.distributed as dist", "line 1: masking must not know torch.distributed"),
        ("masking", "from torch import distributed", "masking must not know torch.distributed"),
        ("masking", "from torch.optim import SGD", "masking must not know torch.optim.SGD"),
        ("masking", "from ..maskfile import read", "masking must not know maskfile"),
        ("config", "import torch", "config must not know torch"),
        ("data", "from selfmask_dist import objectives", "data must not know objectives"),
        ("data", "from selfmask_dist import attach", "data must not know __init__"),
        ("evals", "def f():\n    from selfmask_dist.runs import life", "line 2: evals must not know runs"),
        (
            "training",
            "if TYPE_CHECKING:\n    import selfmask_dist.cascade.run",
            "training must not know cascade",
        ),
        ("cascade", "from selfmask_dist.procedures import run", "cascade must not know procedures"),
        ("procedures", "import selfmask_dist.cli", "procedures must not know cli"),
        ("launchers", "import torch.multiprocessing", "launchers must not know torch"),
        ("launchers", "from selfmask_dist.runs.checkpoint import load", "launchers must not know runs"),
        ("objectives", "import launchers.submit", "objectives must not know launchers"),
        ("brand_new", "import os", "brand_new is not in the table"),
    ],
)
def test_a_violation_is_caught(row: str, source: str, complaint: str) -> None:
    assert any(complaint in found for found in violations(row, source, package=f"selfmask_dist.{row}"))


def test_what_is_allowed_passes() -> None:
    source = (
        "import torch\nimport torchvision_like_name\nfrom torch.optim import Optimizer\nfrom . import core\n"
        "from .attach import Masks\nfrom selfmask_dist.masking.selection import PRESETS\n"
    )
    assert violations("masking", source, package="selfmask_dist.masking") == []
    launcher = "from selfmask_dist.runs.folder import run_path\nfrom selfmask_dist.config import Config"
    assert violations("launchers", launcher, package="launchers") == []
    assert violations("cli", "import selfmask_dist.training.run, timm", package="selfmask_dist.cli") == []
