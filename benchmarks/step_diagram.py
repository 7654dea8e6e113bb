"""Draws docs/images/step.png: the way of one training step, from tars to rewritten weights.

    python -m benchmarks.step_diagram [FILE]

Boxes are what one rank does, with the package that does it; red is what ranks exchange.
"""

import sys
from pathlib import Path
from typing import Any

DEFAULT = Path(__file__).resolve().parents[1] / "docs" / "images" / "step.png"

# column, row, package, what it does
BOXES = {
    "tars": (0, 0, "data", "tars + index\nthis rank's streams"),
    "views": (1, 0, "data.views", "pixels: one view\nor several crops"),
    "loss": (2, 0, "objectives", "forward through theta\nloss"),
    "gradient": (3, 0, "torch", "backward\nG = dL/dtheta"),
    "reduce": (3, 1, "parallel", "engine: average G\nover ranks"),
    "pullback": (2, 1, "masking", "dL/dS = a G W\n– <G, theta> / (2 sum M)"),  # noqa: RUF001
    "step": (1, 1, "training", "optimizer.step()\non the scores S"),
    "rewrite": (0, 1, "masking", "M = 1[S > mu]\ntheta = a W M, in place"),
}
ARROWS = (
    ("tars", "views"),
    ("views", "loss"),
    ("loss", "gradient"),
    ("gradient", "reduce"),
    ("reduce", "pullback"),
    ("pullback", "step"),
    ("step", "rewrite"),
)
WIDTH, HEIGHT, COLUMN, ROW = 2.6, 1.1, 3.35, 2.3


def draw(path: Path = DEFAULT) -> Path:
    """Draw the picture and return its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    figure, axes = plt.subplots(figsize=(12, 4.6), layout="constrained")
    axes.set_xlim(-0.2, 3 * COLUMN + WIDTH + 0.2)
    axes.set_ylim(-ROW - 1.05, HEIGHT + 0.35)
    axes.axis("off")
    corners = {name: (column * COLUMN, -row * ROW) for name, (column, row, _, _) in BOXES.items()}
    for name, (_, _, package, text) in BOXES.items():
        x, y = corners[name]
        box = FancyBboxPatch(
            (x, y), WIDTH, HEIGHT, boxstyle="round,pad=0.02,rounding_size=0.1", fc="#eef3fa", ec="#34507a"
        )
        axes.add_patch(box)
        axes.text(x + WIDTH / 2, y + 0.44, text, ha="center", va="center", fontsize=11)
        axes.text(x + 0.08, y + HEIGHT - 0.06, package, ha="left", va="top", fontsize=9, color="#34507a")
    for start, end in ARROWS:
        axes.add_patch(_arrow(FancyArrowPatch, corners[start], corners[end]))
    x, y = corners["loss"]
    back = FancyArrowPatch(
        (WIDTH / 2, -ROW + HEIGHT + 0.05),
        (x + 0.3, y - 0.05),
        connectionstyle="arc3,rad=0.0",
        arrowstyle="-|>",
        mutation_scale=14,
        color="#888888",
        linestyle="--",
    )
    axes.add_patch(back)
    axes.text(COLUMN + 1.1, -0.82, "the next step's theta", fontsize=10, color="#666666")
    red: dict[str, Any] = {"color": "#b03030", "fontsize": 10, "va": "top"}
    x, y = corners["reduce"]
    axes.text(
        x + WIDTH / 2, y - 0.12, "ranks exchange: gradients,\nas in full fine-tuning", ha="center", **red
    )
    x, y = corners["pullback"]
    numbers = "ranks exchange: two numbers\nper tensor, sum M and <G, theta>"
    axes.text(x + WIDTH / 2, y - 0.12, numbers, ha="center", **red)
    x, y = corners["step"]
    axes.text(
        x + WIDTH / 2, y - 0.12, "S and momentum stay\non their shard", ha="center", va="top", fontsize=10
    )
    x, y = corners["rewrite"]
    axes.text(x + WIDTH / 2, y - 0.12, "`bits` sends packed\nmask bits here", ha="center", **red)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path


def _arrow(kind, start, end):
    (x0, y0), (x1, y1) = start, end
    if y0 != y1:
        points = (x0 + WIDTH / 2, y0 - 0.04), (x1 + WIDTH / 2, y1 + HEIGHT + 0.04)
    elif x1 > x0:
        points = (x0 + WIDTH + 0.04, y0 + HEIGHT / 2), (x1 - 0.04, y1 + HEIGHT / 2)
    else:
        points = (x0 - 0.04, y0 + HEIGHT / 2), (x1 + WIDTH + 0.04, y1 + HEIGHT / 2)
    return kind(*points, arrowstyle="-|>", mutation_scale=16, color="#34507a")


if __name__ == "__main__":
    print(draw(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT))
