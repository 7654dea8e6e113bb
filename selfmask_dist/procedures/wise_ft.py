"""WiSE-FT: the straight line in weight space between a frozen model and what it was adapted to.

    theta(alpha) = (1 - alpha) theta_0 + alpha theta_1        theta(0) = theta_0,  theta(1) = theta_1 exactly

Some alpha in between is often better under a shift than both ends, and as good on the new data (Wortsman et
al., "Robust fine-tuning of zero-shot models", CVPR 2022, arXiv 2109.01903, eq. 1). With a mask the line is
W (1 - alpha + alpha a M): still one bit for each weight, and one number. The same line between the scores of
two masks is `procedures.interpolation`.

The equations come first, as pure functions on state dicts. The run below them adapts once, chooses alpha on
training images that were held out, and measures the whole curve on the test images besides.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from selfmask_dist import data
from selfmask_dist.backbones.weights import interpolate, write
from selfmask_dist.common.names import HEAD
from selfmask_dist.common.plots import pyplot
from selfmask_dist.config import Config
from selfmask_dist.evals import Alone
from selfmask_dist.evals.probe import held_out
from selfmask_dist.procedures.classifier import (
    accuracy,
    adapted_encoder,
    embeddings,
    logits,
    measure_encoder,
    open_classifier,
)
from selfmask_dist.runs.context import RunContext
from selfmask_dist.training.build import build_backbone, open_data
from selfmask_dist.training.chain import Chain, Tensors

ALPHAS = tuple(step / 10 for step in range(11))


@dataclass(frozen=True)
class Point:
    """What was measured at one alpha."""

    alpha: float
    values: dict[str, float]


def measure_curve(
    model: nn.Module,
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    measure_fn: Callable[[nn.Module], Mapping[str, float]],
    *,
    alphas: Sequence[float] = ALPHAS,
) -> list[Point]:
    """Return `measure_fn(model)` all along the line. The model's own state is put back at the end.

    Args:
        first, second: tensors of `model` by name: all of its state, or the part that differs.

    Raises:
        ValueError: a name that the model does not have, or as `interpolate`.
    """
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    points = []
    try:
        for alpha in alphas:
            write(model, interpolate(first, second, alpha))
            points.append(Point(alpha, dict(measure_fn(model))))
    finally:
        write(model, before)
    return points


def best_point(points: Sequence[Point], key: str) -> Point:
    """Return the point with the largest value of `key`; of equal ones the one nearest to alpha = 0."""
    if not points or any(key not in point.values for point in points):
        raise ValueError(f"not every point of the curve has a value {key!r}")
    return max(points, key=lambda point: (point.values[key], -point.alpha))


# ---- the run

_STAGE = "adapted"


def run_wise_ft(chain: Chain) -> dict[str, Any]:
    """Adapt, measure the curve, choose; `chosen.safetensors` is the encoder at the alpha that was chosen."""
    config, section = chain.config, chain.config.procedure
    train, _ = open_data(config)
    labels = torch.from_numpy(np.asarray(train.labels, dtype=np.int64))
    is_held_out = held_out(
        labels, torch.arange(len(labels)), config.seed, Alone(), share=section.held_out
    ).numpy()
    fit = chain.write_subset("fit.npy", ~is_held_out, within=config.data.subset)
    run = chain.train(
        _STAGE, method=section.adapt, data={"subset": fit}, eval={"frozen_baseline": False, "final": False}
    )
    first = dict(build_backbone(config).encoder.state_dict())
    second = adapted_encoder(config, chain.folder / _STAGE)
    curve = []
    for alpha in section.alphas:
        theta = interpolate(first, second, alpha)
        measure = partial(_measure, config, theta, is_held_out, chain.folder / _STAGE)
        values = chain.measure(f"alpha-{alpha:g}.json", measure)
        curve.append({"alpha": alpha, **values})
    key = choose_by(config, num_neighbours=int((~is_held_out).sum()))
    points = [Point(point["alpha"], point["held_out"]) for point in curve]
    alpha = best_point(points, key).alpha
    path = chain.once("chosen.safetensors", interpolate, first, second, alpha)
    chain.picture("curve.png", lambda file: draw_curve(curve, key, alpha, file))
    return {
        "alpha": alpha,
        "chosen_by": key,
        "adapted": next(point["test"] for point in curve if point["alpha"] == alpha),
        "curve": curve,
        "active": run["mask"]["active"] if section.adapt == "mask" else 1.0,
        # a mask and a number say all of the line's point
        "stored_bytes": run["mask"]["bytes"] + 8 if section.adapt == "mask" else path.stat().st_size,
    }


def choose_by(config: Config, *, num_neighbours: int) -> str:
    """Return the measure that alpha is chosen by.

    A linear head is trained for one end of the line alone, so neighbours are asked; CLIP's text head fits
    both ends.
    """
    return (
        "head" if config.objective.head == "clip_text" else f"knn{min(config.eval.knn_k[0], num_neighbours)}"
    )


def _measure(
    config: Config, theta: Tensors, is_held_out: npt.NDArray[np.bool_], run: Path, context: RunContext
) -> dict[str, Any]:
    train, test = open_data(config)
    network = open_classifier(config, train.classes)
    if (run / HEAD).exists():
        network.objective.load_state_dict(load_file(run / HEAD))
    write(network.encoder, theta)
    network.to(context.world.device)
    bank = embeddings(config, network, data.Subset(train, np.flatnonzero(~is_held_out)), context)
    return {
        name: measure_encoder(config, network, bank, queries, context)
        | {"head": accuracy(logits(config, network, queries, context), context)}
        for name, queries in (("held_out", data.Subset(train, np.flatnonzero(is_held_out))), ("test", test))
    }


def draw_curve(curve: list[dict[str, Any]], key: str, chosen: float, path: Path) -> None:
    """Write the picture: every measure along the line, of held-out images dashed, of test images whole."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    alphas = [point["alpha"] for point in curve]
    for number, name in enumerate(curve[0]["test"]):
        for split, style in (("test", "-"), ("held_out", "--")):
            label = name if split == "test" else None
            values = [100 * point[split][name] for point in curve]
            axes.plot(alphas, values, style, color=f"C{number}", label=label, marker=".")
    axes.axvline(chosen, color="0.6", linewidth=1)
    axes.set(xlabel="alpha: 0 frozen, 1 adapted", ylabel="accuracy, %")
    axes.set(title=f"Test images; held out (dashed); chosen by {key}: {chosen:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)
