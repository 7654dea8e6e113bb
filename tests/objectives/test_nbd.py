"""The objective nbd against plain formulas in float64: start, loss, gradients, steps, sampled softmax."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from selfmask_dist.config.objectives import NbdConfig
from selfmask_dist.data import Batch
from selfmask_dist.objectives import Context, Nbd
from selfmask_dist.objectives.bank import AdamW, ShardedBank, draw_candidates
from selfmask_dist.objectives.nbd import WarmupViews, Whitening
from tests.objectives.test_objectives import IN_DIM, Encoder, unit
from tests.support.state import load_whole_buffers, whole_buffers

NUM, K, DIM = 14, 3, 5
CONFIG = NbdConfig(dim=DIM, neighbours=K, warmup_steps=0, rate=1e-2, weight_decay=1e-2, own_share=0.6)


def nearest_others(rows: Tensor, present: Tensor, k: int) -> tuple[Tensor, Tensor]:
    similar = F.normalize(rows) @ F.normalize(rows).T
    similar.fill_diagonal_(-2)
    similar[:, ~present] = -2
    found = similar.topk(k, dim=1)
    return found.values, found.indices


def frozen(num: int = NUM, views: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(num, views, IN_DIM, generator=generator, dtype=torch.float64)


def started(config: NbdConfig = CONFIG, *, broken: tuple[int, ...] = ()) -> Nbd:
    objective = Nbd(IN_DIM, config, Context(global_batch_size=6, num_samples=NUM)).double()
    views = frozen()
    projection = torch.linalg.qr(torch.randn(IN_DIM, DIM, generator=torch.Generator().manual_seed(4))).Q
    means = views.mean(1)
    present = torch.ones(NUM, dtype=torch.bool)
    present[list(broken)] = False
    whitening = Whitening(means.mean(0), projection.double())
    objective.begin(means, whitening, WarmupViews(torch.arange(NUM), views), present, nearest_others)
    return objective


def batch_of(ids: list[int], *, views: int = 1, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = tuple(
        torch.randn(len(ids), IN_DIM, 1, 1, generator=generator, dtype=torch.float64) for _ in range(views)
    )
    return Batch(images, torch.full((len(ids),), -1), torch.ones(len(ids)), torch.tensor(ids), len(ids))


def plain_loss(objective: Nbd, weights: dict[str, Tensor], encoder: Tensor, batch: Batch) -> Tensor:
    """The module's equations, a picture and a view at a time."""
    bank, section = objective.bank, objective.config
    total = torch.zeros((), dtype=torch.float64)
    for row, i in enumerate(batch.ids.tolist()):
        for view in batch.views:
            z = unit((view[row].flatten() @ encoder) @ weights["weight"] + weights["bias"])
            logits = torch.stack([z @ unit(a) / section.temperature for a in weights["bank"]])
            q = torch.zeros(NUM, dtype=torch.float64)
            for j, share in zip(bank.neighbours[i].tolist(), bank.shares[i], strict=True):
                q[j] += share
            q[i] += section.own_share
            total = total - (q * (logits - logits.exp().sum().log())).sum() / len(batch.views)
    return total / len(batch.ids)


def trained(objective: Nbd) -> dict[str, Tensor]:
    state = {"weight": objective.weight, "bias": objective.bias, "bank": objective.bank.rows}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def test_the_start_is_whitened_and_the_targets_are_the_frozen_neighbours() -> None:
    objective = started()
    means = frozen().mean(1)
    rows = unit((means - means.mean(0)) @ objective.weight)
    assert torch.allclose(objective.bank.rows, rows, atol=1e-12)
    for i in range(NUM):
        similar = rows @ rows[i]
        similar[i] = -2
        order = similar.argsort(descending=True)[:K]
        assert objective.bank.neighbours[i].tolist() == order.tolist()
        expected = (1 - 0.6) * (similar[order] / 0.05).softmax(0)
        assert torch.allclose(objective.bank.shares[i], expected, atol=1e-12)


def test_targets_are_found_anew_where_the_bank_has_moved_to() -> None:
    objective = started(CONFIG.model_copy(update={"renew_every": 0.5}))
    objective.context = replace(objective.context, steps_per_epoch=4)
    objective.search = nearest_others
    objective.bank.rows = torch.randn(
        NUM, DIM, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    )
    before, rows = objective.bank.neighbours.clone(), unit(objective.bank.rows)
    for step in (0, 1, 3):
        objective.start_step(step)
        assert torch.equal(objective.bank.neighbours, before), step
    objective.start_step(2)
    similar = (rows @ rows.T).fill_diagonal_(-2)
    order = similar.argsort(dim=1, descending=True)[:, :K]
    assert torch.equal(objective.bank.neighbours, order)
    assert torch.allclose(objective.bank.shares, 0.4 * (similar.gather(1, order) / 0.05).softmax(1))


@pytest.mark.parametrize("views", [1, 3])
def test_steps_are_those_of_the_plain_formula(views: int) -> None:
    objective, encoder = started(), Encoder()
    weights = trained(objective)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=CONFIG.rate, weight_decay=CONFIG.weight_decay)
    for step, ids in enumerate(([0, 5, 13, 2, 7, 9], [1, 4, 13, 3, 8, 11], [0, 1, 2, 3, 4, 5])):
        batch = batch_of(ids, views=views, seed=step)
        expected = plain_loss(objective, leaves, encoder.weight.detach(), batch)
        at = encoder.weight.detach().clone().requires_grad_()
        plain_loss(objective, {k: v.detach() for k, v in leaves.items()}, at, batch).backward()
        optimizer.zero_grad()
        expected.backward()
        with torch.no_grad():  # what the step's embeddings were, before head and bank move
            features = torch.stack([view.flatten(1) @ encoder.weight for view in batch.views], dim=1)
            z = unit(unit(features @ leaves["weight"] + leaves["bias"]).mean(1))
        optimizer.step()
        with torch.no_grad():
            for row, i in enumerate(ids):
                leaves["bank"][i] = unit(0.5 * unit(leaves["bank"][i]) + 0.5 * z[row])

        encoder.zero_grad()
        objective.start_step(step)
        loss, metrics = objective(encoder, batch)
        (7 * loss).backward()  # as an engine may multiply it
        objective.loss_factor = 7.0
        objective.after_step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        assert metrics["loss"].item() == loss.item()
        assert encoder.weight.grad is not None
        assert at.grad is not None
        assert torch.allclose(encoder.weight.grad / 7, at.grad, rtol=1e-9, atol=1e-12)
        for name, tensor in trained(objective).items():
            assert torch.allclose(tensor, leaves[name], rtol=1e-9, atol=1e-11), (step, name)


def test_micro_steps_add_up_to_the_step_of_the_whole_batch() -> None:
    whole, halves, encoder = started(), started(), Encoder()
    batch = batch_of([0, 5, 13, 2, 7, 9])
    loss, _ = whole(encoder, batch)
    loss.backward()
    assert encoder.weight.grad is not None
    expected = encoder.weight.grad.clone()
    encoder.zero_grad()
    for part in batch.split(3):
        loss, _ = halves(encoder, part)
        loss.backward()
    assert torch.allclose(encoder.weight.grad, expected, rtol=1e-10, atol=1e-13)
    for objective in (whole, halves):
        objective.after_step()
    for name, tensor in trained(halves).items():
        assert torch.allclose(tensor, trained(whole)[name], rtol=1e-10, atol=1e-12), name


def test_adamw_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = {"a": torch.randn(4, 3, generator=generator), "b": torch.randn(5, generator=generator)}
    theirs = {name: tensor.clone().requires_grad_() for name, tensor in ours.items()}
    reference, mine = torch.optim.AdamW(theirs.values(), lr=0.1, weight_decay=0.3), AdamW(ours)
    for _ in range(5):
        grads = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in ours.items()}
        for name, tensor in theirs.items():
            tensor.grad = grads[name]
        reference.step()
        mine.step(ours, grads, rate=0.1, decay=0.3)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name].detach(), rtol=1e-6, atol=1e-6)


def test_rows_without_weight_and_broken_pictures_change_nothing() -> None:
    encoder = Encoder()
    first, again = started(broken=(6,)), started(broken=(6,))
    assert not (first.bank.neighbours == 6).any()
    batch = batch_of([0, 5, 13, 2])
    loss, _ = first(encoder, batch)
    first.after_step()
    # picture 6 is no negative of anyone: its row may be what it likes
    again.bank.rows[6] = unit(torch.ones(DIM, dtype=torch.float64))
    padded = replace(
        batch,
        views=(torch.cat([batch.views[0], 50 * torch.ones(2, IN_DIM, 1, 1, dtype=torch.float64)]),),
        ids=torch.tensor([0, 5, 13, 2, 0, 6]),
        weights=torch.tensor([1.0, 1, 1, 1, 0, 0]),
        labels=torch.full((6,), -1),
    )
    more, _ = again(encoder, padded)
    again.after_step()
    assert more.item() == pytest.approx(loss.item(), rel=1e-12)
    others = [i for i in range(NUM) if i != 6]
    assert torch.allclose(again.bank.rows[others], first.bank.rows[others], atol=1e-12)
    assert torch.allclose(again.weight, first.weight, atol=1e-12)


def test_warm_up_lowers_the_loss_of_frozen_views_and_moves_nothing_else() -> None:
    before, after = started(), started(CONFIG.model_copy(update={"warmup_steps": 60, "warmup_batch": 8}))
    identity = torch.eye(IN_DIM, dtype=torch.float64)
    views = frozen()[:, 1]

    def loss_of(objective: Nbd) -> float:
        batch = replace(batch_of(list(range(NUM))), views=(views.view(NUM, IN_DIM, 1, 1),))
        return plain_loss(objective, trained(objective), identity, batch).item()

    assert loss_of(after) < 0.9 * loss_of(before)
    assert torch.equal(after.bank.neighbours, before.bank.neighbours), "targets are fixed"
    again = started(CONFIG.model_copy(update={"warmup_steps": 60, "warmup_batch": 8}))
    assert torch.equal(after.bank.rows, again.bank.rows)


def bank_for_sampling() -> tuple[ShardedBank, Tensor, Tensor, Tensor]:
    bank = ShardedBank(40, DIM, K, Context(num_samples=40))
    generator = torch.Generator().manual_seed(1)
    bank.rows = torch.randn(40, DIM, generator=generator, dtype=torch.float64)
    others = [(i + 1 + torch.randperm(39, generator=generator)[:K]) % 40 for i in range(40)]
    bank.neighbours = torch.stack(others)
    bank.shares = torch.full((40, K), 0.4 / K, dtype=torch.float64)
    bank.present[17] = False
    embeddings = unit(torch.randn(6, 2, DIM, generator=generator, dtype=torch.float64))
    targets, shares = bank.targets_of(torch.tensor([0, 9, 38, 2, 25, 11]))
    return bank, embeddings, targets, shares


def test_the_sampled_softmax_is_equal_in_expectation_and_exact_with_all_pictures() -> None:
    bank, embeddings, targets, shares = bank_for_sampling()
    exact = bank.sums(embeddings, targets, shares, temperature=0.3)
    whole = bank.sums(embeddings, targets, shares, temperature=0.3, candidates=torch.arange(40))
    assert torch.allclose(whole, exact, rtol=1e-12)
    generator = torch.Generator().manual_seed(2)
    draws = torch.stack(
        [
            bank.sums(
                embeddings, targets, shares, temperature=0.3, candidates=draw_candidates(40, 10, generator)
            )
            for _ in range(1500)
        ]
    )
    error = draws[:, 0].std(0) / math.sqrt(len(draws))
    assert ((draws[:, 0].mean(0) - exact[0]).abs() < 4.5 * error).all()
    assert (error > 0).all(), "they do differ"
    assert torch.allclose(draws[:, 1], exact[1].expand(1500, -1, -1), rtol=1e-12), "targets are never drawn"


def test_above_its_limit_the_objective_samples_anew_in_each_step() -> None:
    config = CONFIG.model_copy(update={"exact_up_to": NUM - 1, "sampled": 6})
    objective, encoder, batch = started(config), Encoder(), batch_of([0, 5, 13, 2])
    losses = []
    for step in (0, 1, 0):
        objective.start_step(step)
        losses.append(objective(encoder, batch)[0].item())
        objective._batches = []
    assert losses[0] == losses[2] != losses[1]


def test_a_state_goes_to_another_objective_whole() -> None:
    objective, encoder = started(), Encoder()
    loss, _ = objective(encoder, batch_of([0, 5, 13, 2]))
    loss.backward()
    objective.after_step()
    other = Nbd(IN_DIM, CONFIG, Context(global_batch_size=6, num_samples=NUM)).double()
    load_whole_buffers(other, whole_buffers(objective))
    for step in (1, 2):
        results = []
        for each in (objective, other):
            each.start_step(step)
            loss, _ = each(encoder, batch_of([1, 4, 6], seed=step))
            loss.backward()
            each.after_step()
            results.append(loss.item())
        assert results[0] == results[1]
    assert torch.equal(objective.bank.rows, other.bank.rows)


def test_a_collapse_and_a_flat_loss_are_said() -> None:
    objective = started()
    fine = {"loss": 1.0, "concentration": 0.2}
    assert objective.remarks(fine) == []
    assert "collapsed" in objective.remarks(fine | {"concentration": 0.9999})[0]
    said = [objective.remarks(fine | {"loss": math.log(NUM)}) for _ in range(3)]
    assert "learns nothing" in said[2][0]
