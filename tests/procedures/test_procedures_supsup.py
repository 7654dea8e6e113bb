"""SupSup on permuted digits: which of twenty tasks images are of, from one random network."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfmask_dist import maskfile
from selfmask_dist.masking import attach
from selfmask_dist.procedures import supsup
from tests.support.procedure_cases import digits, mlp, train

NUM_TASKS, SIDE = 20, 32


def large_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits on 32 x 32 pixels with each pixel's mean taken off, as rows."""
    pixels, labels, test_pixels, test_labels = digits()
    rows = [
        F.interpolate(part.view(-1, 1, 8, 8), size=(SIDE, SIDE), mode="bilinear").flatten(1)
        for part in (pixels, test_pixels)
    ]
    mean, deviation = rows[0].mean(dim=0), rows[0].std()
    train_rows, test_rows = ((part - mean) / deviation for part in rows)
    return train_rows, labels, test_rows, test_labels


def permuted(pixels: Tensor, task: int) -> Tensor:
    return pixels[:, torch.randperm(SIDE**2, generator=torch.Generator().manual_seed(task))]


def random_network() -> nn.Sequential:
    """Weights of one size and random signs, as in the paper."""
    network = mlp(SIDE**2, 128, 10, bias=False)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(weight.sign() * (2 / weight.shape[1]) ** 0.5)
    return network


@pytest.fixture(scope="module")
def store() -> supsup.Supermasks:
    """Twenty masks, each learned in a few steps on the same random weights."""
    pixels, labels, *_ = large_digits()
    network = random_network()
    found = supsup.Supermasks(copy.deepcopy(network))
    for task in range(NUM_TASKS):
        model = copy.deepcopy(network)
        generator = torch.Generator().manual_seed(1000 + task)
        start = {n: 0.01 * torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
        masks = attach(model, include="*.weight", init=start)
        x = permuted(pixels, task)
        train(model, masks.parameters(), x, labels, steps=60, lr=0.3, bind=masks.bind)
        found.add(f"task {task}", maskfile.from_masks(masks))
    return found


@pytest.mark.parametrize(("method", "steps"), [("one-shot", 1), ("binary", 5)])  # ceil(log2 20) steps
def test_the_task_is_inferred(store: supsup.Supermasks, method: supsup.Method, steps: int) -> None:
    *_, pixels, _ = large_digits()
    hits = 0
    for task in range(NUM_TASKS):
        found = store.infer(permuted(pixels, task)[task : task + 100], method=method)
        hits += found.task == f"task {task}"
        assert found.steps == steps
    assert hits >= 0.9 * NUM_TASKS


def test_every_task_is_learned_at_a_bit_for_each_weight(store: supsup.Supermasks) -> None:
    *_, pixels, labels = large_digits()
    for task in (0, 7, 19):
        predicted = store.logits(f"task {task}", permuted(pixels, task)).argmax(dim=1)
        assert (predicted == labels).double().mean() > 0.9
        assert store.stored_bytes(f"task {task}") == (SIDE**2 * 128 + 128 * 10) // 8


def test_the_superposition_and_its_gradient_are_the_formula(store: supsup.Supermasks) -> None:
    """Against autograd through the sum over alphas, on a part of the tasks."""
    images = permuted(large_digits()[2], 3)[:16]
    alphas = {"task 1": 0.2, "task 3": 0.5, "task 8": 0.3}
    leaf = torch.tensor(list(alphas.values()), requires_grad=True)
    thetas = [store.theta(task) for task in alphas]
    mixed = {name: sum(a * t[name] for a, t in zip(leaf, thetas, strict=True)) for name in thetas[0]}
    logits = torch.func.functional_call(random_network(), mixed, (images,))
    shares = logits.softmax(dim=1)
    value = -(shares * shares.log()).sum(dim=1).mean()
    value.backward()
    assert leaf.grad is not None
    found = store.entropy_gradient(images, alphas)
    assert list(found.values()) == pytest.approx(leaf.grad.tolist(), rel=1e-4, abs=1e-6)
    torch.testing.assert_close(supsup.entropy(logits).mean(), value)


def test_each_is_the_lowest_entropy_under_a_mask_alone(store: supsup.Supermasks) -> None:
    images = permuted(large_digits()[2], 3)[:16]
    found = store.infer(images, method="each")
    for task in ("task 3", "task 8"):
        shares = store.logits(task, images).softmax(dim=1)
        expected = (shares * shares.log()).sum(dim=1).mean()
        assert found.scores[task] == pytest.approx(float(expected), rel=1e-4)
    assert (found.task, found.steps) == ("task 3", NUM_TASKS)


def with_heads(reference: list[Tensor]) -> supsup.Supermasks:
    """Two tasks with a masked first layer, and a second one of their own."""
    network = random_network()
    found = supsup.Supermasks(network, reference=reference)
    for task in (0, 1):
        generator = torch.Generator().manual_seed(task)
        start = {"0.weight": torch.randn(128, SIDE**2, generator=generator)}
        masks = attach(copy.deepcopy(network), include="0.weight", init=start)
        head = torch.randn(10, 128, generator=generator) * (1 + 9 * task)
        found.add(f"task {task}", maskfile.from_masks(masks), own={"2.weight": head})
    return found


def test_heads_are_superposed_and_have_no_part_in_the_gradient() -> None:
    images = permuted(large_digits()[2], 3)[:16]
    store = with_heads([])
    thetas = [store.theta(task) for task in store.names]
    leaf = torch.tensor([0.4, 0.6], requires_grad=True)
    mixed = {"0.weight": sum(a * t["0.weight"] for a, t in zip(leaf, thetas, strict=True))}
    mixed["2.weight"] = 0.4 * thetas[0]["2.weight"] + 0.6 * thetas[1]["2.weight"]
    supsup.entropy(torch.func.functional_call(random_network(), mixed, (images,))).mean().backward()
    assert leaf.grad is not None
    found = store.entropy_gradient(images, {"task 0": 0.4, "task 1": 0.6})
    assert list(found.values()) == pytest.approx(leaf.grad.tolist(), rel=1e-4, abs=1e-6)


def test_scores_are_held_against_the_reference() -> None:
    pixels = permuted(large_digits()[2], 3)
    batches = [pixels[:10], pixels[10:16]]
    alphas = {"task 0": 0.5, "task 1": 0.5}
    store, plain = with_heads(batches), with_heads([])
    reference = plain.entropy_gradient(pixels[:16], alphas)
    gradient = plain.entropy_gradient(pixels[50:], alphas)
    for method in ("one-shot", "binary"):
        scores = store.infer(pixels[50:], method=method).scores
        expected = {task: reference[task] - gradient[task] for task in alphas}
        assert scores == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert plain.infer(pixels[50:], method=method).scores == pytest.approx(
            {task: -value for task, value in gradient.items()}
        )


def test_masks_that_do_not_belong_are_refused(store: supsup.Supermasks) -> None:
    network = random_network()
    masks = attach(copy.deepcopy(network), include="*.weight")
    few = attach(copy.deepcopy(network), include="0.weight")
    fresh = supsup.Supermasks(network)
    with pytest.raises(ValueError, match="no tasks"):
        fresh.infer(torch.zeros(1, SIDE**2))
    fresh.add("a", maskfile.from_masks(masks), own={})
    with pytest.raises(ValueError, match="already"):
        fresh.add("a", maskfile.from_masks(masks))
    with pytest.raises(ValueError, match="other parameters"):
        fresh.add("b", maskfile.from_masks(few))
    with pytest.raises(ValueError, match="one of one-shot, binary, each"):
        fresh.infer(torch.zeros(1, SIDE**2), method="guess")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="wrong backbone"):
        supsup.Supermasks(mlp(SIDE**2, 128, 10, bias=False)).add("a", maskfile.from_masks(masks))
