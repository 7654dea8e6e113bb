"""Probes, low-shot and label-free numbers: the same under any number of ranks, and what they promise."""

import itertools
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from selfmask_dist import evals
from selfmask_dist.evals.low_shot import balanced_subset, labels_per_class
from selfmask_dist.evals.probe import L2_GRID, held_out, prepare
from selfmask_dist.parallel import World
from tests.support.distributed import run_distributed
from tests.support.evals import linear_probe, probe_heads


def digits(train=400, test=200):
    features, labels = load_digits(return_X_y=True)
    features, labels = torch.tensor(features).float(), torch.tensor(labels)
    end = train + test
    return features[:train], labels[:train], features[train:end], labels[train:end]


def _both(train, train_labels, test, test_labels):
    return evals.Embeddings.of(train, train_labels), evals.Embeddings.of(test, test_labels)


FEW: dict[str, Any] = {"grid": ((0.1, 1.0), (1e-3, 1e-1)), "epochs": 40}


def ill_conditioned():
    """Most of what tells the classes apart is in directions of little variance, as in real embeddings."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1000) % 5
    centers = 0.5 * torch.randn(5, 32, generator=generator)
    turned = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    hidden = (torch.randn(1000, 32, generator=generator) + centers[labels]) * torch.logspace(0, -3, 32)
    features = hidden @ turned + 5
    return features[:500], labels[:500], features[500:], labels[500:]


def optimum(train, train_labels, test, l2):
    """scikit-learn's predictions, by Newton's method."""
    train, test = prepare(train.double(), test.double(), True, evals.Alone())
    model = LogisticRegression(C=1 / (len(train) * l2), tol=1e-8, max_iter=200, solver="newton-cholesky")
    return torch.from_numpy(model.fit(train.numpy(), train_labels.numpy()).predict(test.numpy()))


def test_heads_reach_the_optimum_of_ill_conditioned_embeddings():
    train, train_labels, test, test_labels = ill_conditioned()
    for l2 in (1e-5, 1e-3, 1e-1):
        pair: dict[str, Any] = {"grid": ((1.0,), (l2,))}
        found = probe_heads(train, train_labels, test, test_labels, **pair)
        assert (found.predictions == optimum(train, train_labels, test, l2)).double().mean() >= 0.998
    chosen = probe_heads(train, train_labels, test, test_labels)
    held = held_out(train_labels, torch.arange(len(train)), 0, evals.Alone())
    fit = (train[~held], train_labels[~held], train[held])
    right = {l2: int((optimum(*fit, l2) == train_labels[held]).sum()) for l2 in L2_GRID}
    assert chosen.weight_decay == max(right, key=lambda l2: (right[l2], l2)), "the choice of `linear_probe`"
    best = optimum(train, train_labels, test, chosen.weight_decay)
    assert chosen.accuracy == pytest.approx(float((best == test_labels).double().mean()), abs=0.003)


def test_in_small_batches_they_come_near_it():
    train, train_labels, test, test_labels = digits()
    pair: dict[str, Any] = {"grid": ((0.25,), (1e-2,)), "batch_size": 100}
    found = probe_heads(train, train_labels, test, test_labels, epochs=100, **pair)
    assert (found.predictions == optimum(train, train_labels, test, 1e-2)).double().mean() > 0.97


def test_many_heads_at_once_are_the_heads_one_by_one():
    parts = digits()
    together = probe_heads(*parts, **FEW)
    for lr, decay in itertools.product(*FEW["grid"]):
        # beside one that learns nothing and so does not go on
        pair = {**FEW, "grid": ((lr, 1e-9), (decay,))}
        alone = probe_heads(*parts, **pair)
        if together.epochs[lr, decay] == alone.epochs[lr, decay]:
            assert together.validation[lr, decay] == alone.validation[lr, decay]
        assert alone.epochs[lr, decay] > alone.epochs[1e-9, decay]
    assert len(set(together.validation.values())) > 1
    best = {**FEW, "grid": ((together.lr,), (together.weight_decay,))}
    final = probe_heads(*parts, **best)
    assert final.validation == {}
    assert torch.equal(final.predictions, together.predictions)
    assert final.accuracy == together.accuracy


def test_rates_are_judged_by_their_loss_decays_by_held_out_samples_and_the_test_part_has_no_say():
    train, train_labels, test, test_labels = digits()
    rates, decays = (1e-5, 0.3, 1.0, 1e4), (1e-2, 1e3)
    choice: dict[str, Any] = {"grid": (rates, decays), "lengths": (0.1, 0.5), "epochs": 20}
    result = probe_heads(train, train_labels, test, test_labels, **choice)
    for decay in decays:
        epochs = [result.epochs[lr, decay] for lr in rates]
        assert sorted(epochs) == [2, 2, 2, 12], "one of each decay goes on"
        assert epochs[0] == epochs[3] == 2, "neither the rate that learns nothing nor the one that diverges"
    assert result.weight_decay == 1e-2, "the other one leaves no weights"
    assert result.epochs[result.lr, result.weight_decay] == 12
    wrong = (test_labels + 1) % 10
    again = probe_heads(train, train_labels, test, wrong, **choice)
    assert (again.validation, again.lr) == (result.validation, result.lr)
    assert torch.equal(again.predictions, result.predictions)


def test_parts_of_a_batch_are_the_whole(monkeypatch):
    parts = digits()
    whole = probe_heads(*parts, **FEW)
    monkeypatch.setattr(sys.modules["selfmask_dist.evals.probe_heads"], "_LOGITS", 1000)
    assert probe_heads(*parts, **FEW).validation == whole.validation


def test_fifty_heads_find_what_scikit_learn_finds():
    train, train_labels, test, test_labels = digits(1200, 597)
    result = probe_heads(train, train_labels, test, test_labels, epochs=60)
    assert len(result.validation) >= 50
    best = max(
        LogisticRegression(C=c, max_iter=3000).fit(train / 16, train_labels).score(test / 16, test_labels)
        for c in (0.1, 1.0)
    )
    assert result.accuracy > best - 0.01


def _everything_here():
    world = World(dist.get_rank(), dist.get_world_size())
    train, train_labels, test, test_labels = digits()
    # uneven and interleaved; the last of four has no test sample, and one no training sample
    shares = {1: ([0], [0]), 2: ([0, 1, 1], [1, 0]), 4: ([0, 1, 3, 3, 1], [0, 1, 2])}[world.size]
    ids, places = torch.arange(len(train)), torch.arange(len(test))
    mine = torch.tensor(shares[0])[ids % len(shares[0])] == world.rank
    my_tests = torch.tensor(shares[1])[places % len(shares[1])] == world.rank
    bank = evals.Embeddings(train[mine], train_labels[mine], ids[mine])
    queries = evals.Embeddings(test[my_tests], test_labels[my_tests], places[my_tests])
    probe = evals.linear_probe(bank, queries, l2=(1e-3, 1e-1), ranks=world)
    heads = evals.probe_heads(bank, queries, **FEW, batch_size=100, ranks=world)
    shots = evals.low_shot(
        bank,
        queries,
        shares=(0.1, 0.03, 0.001),
        tries=2,
        ranks=world,
    )
    shape = evals.measure_shape(train[mine], world)
    near = evals.neighbours(train[mine], test[my_tests], k=7, bank_ids=ids[mine], ranks=world)
    far = evals.neighbours(train[mine].flip(1), test[my_tests], k=7, bank_ids=ids[mine], ranks=world)
    ensemble = evals.mean_logits_accuracy([probe, probe], queries.labels, world)
    return {
        "probe": (probe.accuracy, probe.l2, probe.validation),
        "heads": (heads.accuracy, heads.lr, heads.weight_decay, heads.validation),
        "shots": {share: (found.per_class, found.accuracies) for share, found in shots.items()},
        "shape": (shape.effective_rank, shape.mean_cosine),
        "kept": (evals.kept(near, near, world), evals.kept(far, near, world)),
        "ensemble": ensemble,
    }


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_every_number_is_the_same_under_any_number_of_ranks(world_size):
    (alone,) = run_distributed(_everything_here, 1)
    assert alone["ensemble"] == alone["probe"][0], "the mean of one probe's logits with itself is that probe"
    assert alone["kept"][0] == 1
    assert 0 <= alone["kept"][1] < 0.5
    assert list(alone["shots"]) == [0.1, 0.03], "0.1 % of 400 is less than one per class"
    assert alone["shots"][0.1][0] == 4
    for found in run_distributed(_everything_here, world_size):
        assert found["shape"] == pytest.approx(alone["shape"])
        # sums in another order: at most a sample on a boundary may fall on the other side
        assert found["heads"][0] == pytest.approx(alone["heads"][0], abs=0.006)
        for name in ("probe", "shots", "kept", "ensemble"):
            assert found[name] == alone[name], name


def test_low_shot_draws_are_balanced_and_differ():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 3 + [-1] * 7)
    assert labels_per_class(labels, 0.2) == 6  # 93 have a label
    draws = [balanced_subset(labels, 6, torch.Generator().manual_seed(seed)) for seed in (0, 1, 0)]
    for chosen in draws:
        assert [int(chosen[labels == label].sum()) for label in (0, 1, 2, -1)] == [6, 6, 3, 0]
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_low_shot_is_scikit_learn_on_the_draw():
    train, train_labels, test, test_labels = digits()
    found = evals.low_shot(*_both(train, train_labels, test, test_labels), shares=(0.1,), tries=3)[0.1]
    chosen = balanced_subset(train_labels, 4, torch.Generator().manual_seed(0))
    deviation, mean = torch.std_mean(train, dim=0, correction=0)
    scaled = [((part - mean) / deviation.where(deviation > 0, 1)).numpy() for part in (train, test)]
    reference = LogisticRegression(C=1.0, max_iter=5000, tol=1e-8).fit(
        scaled[0][chosen.numpy()], train_labels[chosen].numpy()
    )
    assert found.accuracies[0] == pytest.approx(reference.score(scaled[1], test_labels.numpy()), abs=1e-6)
    assert found.spread > 0


def test_shapes_of_known_embeddings():
    line = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]])
    assert evals.measure_shape(line).effective_rank == pytest.approx(1)
    assert evals.measure_shape(line).mean_cosine == pytest.approx(0)
    cross = torch.cat([torch.eye(4), -torch.eye(4)])
    assert evals.measure_shape(cross).effective_rank == pytest.approx(4)
    assert evals.measure_shape(torch.ones(5, 3)).mean_cosine == pytest.approx(1)


def test_zero_shot_by_hand():
    text = torch.eye(3)
    features = torch.tensor([[5.0, 1, 0], [0, 2, 1], [3, 2, 1]])
    assert evals.zero_shot(features, torch.tensor([0, 1, 1]), text, top=2) == (2 / 3, 1.0)
    with pytest.raises(ValueError, match="images have 3 dimensions and texts have 4"):
        evals.zero_shot(features, torch.tensor([0, 1, 1]), torch.eye(4))


def test_the_mean_embedding_is_of_unit_vectors():
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.5]])
    assert torch.equal(evals.mean_embedding([a, b]), torch.tensor([[0.5, 0.5]]))
    with pytest.raises(ValueError, match="of one shape"):
        evals.mean_embedding([a, torch.ones(1, 3)])


def test_bad_input_is_named():
    train, train_labels, test, test_labels = digits(100, 50)
    broken = train.clone()
    broken[7, 3] = torch.nan
    for probe in (linear_probe, probe_heads):
        with pytest.raises(ValueError, match="train: 1 of 100 rows hold NaN or infinity, the first at 7"):
            probe(broken, train_labels, test, test_labels)
        with pytest.raises(ValueError, match="at least two classes; every training label is 3"):
            probe(train, train_labels * 0 + 3, test, test_labels)
        with pytest.raises(ValueError, match="train has 64 dimensions and test has 60"):
            probe(train, train_labels, test[:, :60], test_labels)
        with pytest.raises(ValueError, match="train_labels hold -1: leave out the samples without a label"):
            probe(train, train_labels * 0 - 1, test, test_labels)
    with pytest.raises(ValueError, match="learning rates must be above 0"):
        probe_heads(train, train_labels, test, test_labels, grid=((0.0,), (1.0,)))
    with pytest.raises(ValueError, match="shares above 0 and up to 1"):
        evals.low_shot(*_both(train, train_labels, test, test_labels), shares=(1.5,))
    with pytest.raises(ValueError, match="strength C above 0, got 0"):
        evals.low_shot(*_both(train, train_labels, test, test_labels), c=0)
    with pytest.raises(ValueError, match="embeddings hold NaN"):
        evals.measure_shape(broken)
