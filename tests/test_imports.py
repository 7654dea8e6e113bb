"""Who may know what: reads the imports of every file and holds them against the table of the design.

The direction is `cli -> run -> trainer | embed | evals | artifact -> objectives | parallel | data ->
masking | backbones -> torch`. Imports inside functions and under TYPE_CHECKING count too: a name that is only
needed for a type is still knowledge.
"""

import ast
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TREES = ("selfmask_dist", "launchers", "data_prep")
ALL = "*"

TRAINING = ("torch", "torchvision", "timm", "open_clip", "deepspeed")  # what takes seconds to import
MODELS = ("timm", "open_clip")
OPTIMIZER_KINDS = ("torch.optim.SGD", "torch.optim.Adam", "torch.optim.AdamW", "torch.optim.lr_scheduler")


@dataclass(frozen=True)
class Rule:
    """What one module may import of the project (itself always), and what it must not import of the world."""

    project: tuple[str, ...] = ()
    never: tuple[str, ...] = field(default=())


TABLE = {
    # module            may import of the project                             must not know
    "__init__": Rule(("api",), TRAINING),
    "config": Rule(
        (
            "config_backbone",
            "config_help",
            "config_loading",
            "config_masks",
            "config_objectives",
            "config_procedures",
            "config_sections",
            "config_selfsupervised",
            "config_training",
            "config_yaml",
        ),
        TRAINING,
    ),
    "config_loading": Rule(("config_help", "config_yaml"), TRAINING),
    "config_help": Rule(("config_yaml",), TRAINING),
    "config_masks": Rule(("config_loading", "config_sections"), TRAINING),
    "config_backbone": Rule(("config_sections",), TRAINING),
    "config_sections": Rule((), TRAINING),
    "config_procedures": Rule(("config_backbone", "config_loading", "config_sections"), TRAINING),
    "config_selfsupervised": Rule(("config_sections",), TRAINING),
    "config_objectives": Rule(("config_sections",), TRAINING),
    "config_training": Rule(("config_sections",), TRAINING),
    "config_yaml": Rule((), TRAINING),
    "preprocessing": Rule((), TRAINING),
    "backbones": Rule(("preprocessing", "seeding"), ("torch.distributed", "torch.optim")),
    "seeding": Rule((), ("torch.distributed", *OPTIMIZER_KINDS, *MODELS)),
    "masking": Rule(("seeding",), ("torch.distributed", *OPTIMIZER_KINDS, *MODELS)),
    "data": Rule(("preprocessing",), ("torch.distributed", "torch.optim", *MODELS)),
    "objectives": Rule(("backbones", "data", "seeding"), ("torch.distributed", "torch.optim", *MODELS)),
    "objective_options": Rule(("config", "objectives"), ("torch.distributed", "torch.optim", *MODELS)),
    "training_views": Rule(
        ("config", "config_objectives", "data", "preprocessing"),
        ("torch.distributed", "torch.optim", *MODELS),
    ),
    "planner": Rule(("backbones", "config", "masking"), ("torch.distributed", "torch.optim")),
    "schedule": Rule((), ("torch.distributed", *OPTIMIZER_KINDS, *MODELS)),
    "finetune": Rule(("masking",), ("torch.distributed", "torch.optim", *MODELS)),
    "parallel": Rule(("data", "masking"), MODELS),
    "artifact": Rule(("backbones", "masking"), ("torch.distributed", "torch.optim", *MODELS)),
    "api": Rule(("artifact", "masking"), ("torch.distributed", "torch.optim", *MODELS)),
    "metrics": Rule((), MODELS),
    "trainer": Rule(
        ("config", "data", "meter", "metrics", "parallel", "preempt", "schedule", "state"),
        ("submitit", *OPTIMIZER_KINDS, *MODELS),
    ),
    "embed": Rule(("data", "parallel"), ("torch.optim", *MODELS)),
    "store": Rule(("data",), ("torch.distributed", "torch.optim", *MODELS)),
    "cascade": Rule((), ("torch.distributed", "torch.optim", "torchvision", "submitit", *MODELS)),
    "evals": Rule((), ("torch.distributed", "torchvision", *MODELS)),
    "evaluation": Rule(
        ("backbones", "config", "data", "embed", "evals", "objectives", "parallel"), ("torch.optim", *MODELS)
    ),
    "run_directory": Rule(("config",), TRAINING),
    "checkpoint": Rule((), ("torch.optim", "submitit", *MODELS)),
    "preempt": Rule(("exit_status",), TRAINING),
    "watchdog": Rule(("exit_status", "preempt"), TRAINING),
    "status": Rule(("checkpoint",), TRAINING),
    "meter": Rule(("data", "parallel"), ("submitit", "torch.optim", *MODELS)),
    "state": Rule(
        ("checkpoint", "objectives", "parallel", "preempt"), ("submitit", *OPTIMIZER_KINDS, *MODELS)
    ),
    "exit_status": Rule((), TRAINING),
    "life": Rule(
        ("config", "data", "metrics", "parallel", "preempt", "status", "watchdog"),
        ("submitit", "torch.optim", *MODELS),
    ),
    "rewrite": Rule((), ("torch.distributed", "torch.optim", *MODELS)),
    "bank": Rule(("artifact", "masking", "rewrite"), ("torch.distributed", "torch.optim", *MODELS)),
    "cascade_model": Rule(("artifact", "bank", "cascade"), ("torch.distributed", "torch.optim", *MODELS)),
    "service": Rule(("bank", "data", "preprocessing"), ("torch.distributed", "torch.optim", *MODELS)),
    "interpolation": Rule(
        ("artifact", "checkpoint", "masking", "procedures"), ("torch.distributed", "torch.optim", *MODELS)
    ),
    "score_import": Rule(("artifact", "backbones", "masking"), ("torch.distributed", "torch.optim", *MODELS)),
    "export": Rule(("__init__", "artifact", "backbones"), ("torch.distributed", "torch.optim", *MODELS)),
    "shrink": Rule((), ("torch.distributed", "torch.optim", *MODELS)),
    "mask_groups": Rule(
        ("api", "backbones", "config", "masking"), ("torch.distributed", "torch.optim", *MODELS)
    ),
    "mask_comparison": Rule(
        ("artifact", "config", "evals", "run_directory"), ("torch.distributed", "torch.optim", *MODELS)
    ),
    "mask_plot": Rule(("evals", "mask_comparison"), ("torch.distributed", "torch.optim", *MODELS)),
    # what trains, and from where data come, is handed in
    "procedures": Rule(("artifact", "evals", "masking"), ("torch.distributed", *OPTIMIZER_KINDS, *MODELS)),
    # reads files alone: a run's folder looks the same wherever it was trained
    "report": Rule(
        ("config_yaml", "evals", "mask_comparison", "status"), ("torch", "torch.distributed", *MODELS)
    ),
    "cascade_plot": Rule(("artifact",), ("torch.distributed", "torch.optim", *MODELS)),
    # what wires the parts together
    "cascade_run": Rule((ALL,)),
    "cascade_stages": Rule((ALL,)),
    "procedure_runs": Rule((ALL,)),
    "adapt": Rule((ALL,)),
    "assembly": Rule((ALL,)),
    "saving": Rule((ALL,)),
    "run": Rule((ALL,)),
    "teacher": Rule((ALL,)),
    "eval_command": Rule((ALL,)),
    "cli": Rule((ALL,)),
    "mask_command": Rule((ALL,)),
    "serve_command": Rule((ALL,)),
    "demo": Rule((ALL,)),
    # outside the package
    "launchers": Rule(("config", "exit_status", "run_directory"), TRAINING),
    # torchvision is one converter's source of pictures, imported when that one runs
    "data_prep": Rule(("data",), tuple(name for name in TRAINING if name != "torchvision")),
}


@dataclass(frozen=True)
class Import:
    line: int
    name: str  # as written: "torch.optim.Optimizer"


def imports_of(source: str, package: str) -> list[Import]:
    """Every import of a file, as full dotted names; `package` is the one that relative imports start from."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found += [Import(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def module_of(dotted: str) -> str | None:
    """The row of the table that a dotted name belongs to; None for what is not the project's."""
    first, _, rest = dotted.partition(".")
    if first == "selfmask_dist":
        row = rest.partition(".")[0]
        return row if row in TABLE or is_module(row) else "__init__"  # `from selfmask_dist import attach`
    return first if first in TREES else None


def is_module(name: str) -> bool:
    return (ROOT / "selfmask_dist" / f"{name}.py").exists() or (
        ROOT / "selfmask_dist" / name / "__init__.py"
    ).exists()


def violations(module: str, source: str, package: str) -> list[str]:
    """What a file of `module` imports against the table, each as one sentence."""
    if module not in TABLE:
        return [
            f"{module} is not in the table of tests/test_imports.py: add a row that says what it may import"
        ]
    rule = TABLE[module]
    complaints = []
    for item in imports_of(source, package):
        target = module_of(item.name)
        if target is None:
            broken = [name for name in rule.never if f"{item.name}.".startswith(f"{name}.")]
            complaints += [
                f"line {item.line}: {module} must not know {name} (imports {item.name})" for name in broken
            ]
        elif target != module and target not in rule.project and ALL not in rule.project:
            complaints.append(f"line {item.line}: {module} must not know {target} (imports {item.name})")
    return complaints


def files() -> list[Path]:
    return sorted(path for tree in TREES for path in (ROOT / tree).rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = parts[1] if parts[0] == "selfmask_dist" else parts[0]
    broken = violations(module, path.read_text(), package=".".join(parts[:-1]))
    assert not broken, f"{path.relative_to(ROOT)}:\n" + "\n".join(broken)


def test_the_table_has_no_circle() -> None:
    def below(module: str, above: tuple[str, ...] = ()) -> None:
        assert module not in above, f"circle: {' -> '.join([*above, module])}"
        for lower in TABLE[module].project:
            if lower != ALL:
                below(lower, (*above, module))

    for module in TABLE:
        below(module)


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("masking", "import torch.distributed as dist", "line 1: masking must not know torch.distributed"),
        ("masking", "from torch import distributed", "masking must not know torch.distributed"),
        ("masking", "from torch.optim import SGD", "masking must not know torch.optim.SGD"),
        ("masking", "from ..artifact import read", "masking must not know artifact"),
        ("config", "import torch", "config must not know torch"),
        ("data", "from selfmask_dist import objectives", "data must not know objectives"),
        ("data", "from selfmask_dist import attach", "data must not know __init__"),
        (
            "evals",
            "def f():\n    from selfmask_dist.evals.embed import embed",
            "line 2: evals must not know embed",
        ),
        ("trainer", "if TYPE_CHECKING:\n    import selfmask_dist.evals.knn", "trainer must not know evals"),
        ("launchers", "import torch.multiprocessing", "launchers must not know torch"),
        ("launchers", "from selfmask_dist.training.trainer import train", "launchers must not know trainer"),
        ("objectives", "import launchers.submit", "objectives must not know launchers"),
        ("brand_new", "import os", "brand_new is not in the table"),
    ],
)
def test_a_violation_is_caught(module: str, source: str, complaint: str) -> None:
    assert any(complaint in found for found in violations(module, source, package=f"selfmask_dist.{module}"))


def test_what_is_allowed_passes() -> None:
    source = textwrap.dedent("""
        import torch
        import torchvision_like_name
        from torch.optim import Optimizer
        from . import core
        from .attach import Masks
        from selfmask_dist.masking.selection import PRESETS
    """)
    assert violations("masking", source, package="selfmask_dist.masking") == []
    assert (
        violations(
            "cli", "import submitit\nfrom selfmask_dist import trainer, evals", package="selfmask_dist"
        )
        == []
    )
