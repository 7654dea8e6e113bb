"""SupSup on permuted digits: which of twenty tasks images are of, from one random network."""

import copy

import pytest
import torch
from torch import nn

from selfmask_dist import artifact
from selfmask_dist.masking import attach
from selfmask_dist.procedures import supsup
from tests.procedure_cases import accuracy, digits, mlp, train

NUM_TASKS = 20


def permuted(pixels: torch.Tensor, task: int) -> torch.Tensor:
    return pixels[:, torch.randperm(64, generator=torch.Generator().manual_seed(task))]


@pytest.fixture(scope="module")
def store() -> supsup.Supermasks:
    """Twenty masks, each learned in a few steps on the same random weights."""
    pixels, labels, *_ = digits()
    network = mlp(64, 128, 128, 10, bias=False)
    found = supsup.Supermasks(copy.deepcopy(network))
    for task in range(NUM_TASKS):
        model = copy.deepcopy(network)
        masks = attach(model, include="*.weight")
        train(
            model, masks.parameters(), permuted(pixels, task), labels, steps=60, lr=20.0, bind=masks.bind
        )
        found.add(f"task {task}", artifact.from_masks(masks))
    return found


@pytest.mark.parametrize("method", ["one-shot", "binary"])
def test_the_task_is_inferred(store: supsup.Supermasks, method: supsup.Method) -> None:
    *_, pixels, labels = digits()
    hits = 0
    for task in range(NUM_TASKS):
        images = permuted(pixels, task)[task : task + 32]
        found = store.infer(images, method=method)
        hits += found.task == f"task {task}"
        assert found.steps == (1 if method == "one-shot" else 5)  # ceil(log2 20)
    assert hits >= 0.9 * NUM_TASKS
    right = [
        float((store.logits(f"task {task}", permuted(pixels, task)).argmax(1) == labels).double().mean())
        for task in (0, 19)
    ]
    assert min(right) > 0.85
