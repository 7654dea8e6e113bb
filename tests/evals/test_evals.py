"""k-NN equals brute force, ties included; the probe solves the same problem as scikit-learn."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from selfmask_dist import evals
from selfmask_dist.data import Batch
from selfmask_dist.evals import probe as probe_module
from selfmask_dist.evals.embed import embed
from selfmask_dist.parallel import World
from tests.support.evals import knn_predict, linear_probe


def brute_force(bank, queries, k):
    """Similarities and ids by a full sort in numpy: by similarity, then by id."""
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    sims = queries @ bank.T
    ids = np.stack([np.lexsort((np.arange(len(bank)), -row))[:k] for row in sims])
    return np.take_along_axis(sims, ids, axis=1), ids


def brute_force_vote(sims, labels, temperature, num_classes):
    votes = [
        np.bincount(row, np.exp(s / temperature), minlength=num_classes)
        for row, s in zip(labels, sims, strict=True)
    ]
    return np.argmax(votes, axis=1)


def test_embedding_in_bf16_computes_in_it_and_returns_float32(generator):
    encoder, seen = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5)), []
    encoder[1].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    images, ones = torch.randn(6, 3, 2, 2, generator=generator), torch.ones(6)
    batch = Batch((images,), torch.zeros(6, dtype=torch.int64), ones, torch.arange(6), 6)
    default = embed(encoder, [batch], world=World()).features
    plain = embed(encoder, [batch], world=World(), precision="float32").features
    in_bf16 = embed(encoder, [batch], world=World(), precision="bf16").features
    assert torch.equal(plain, default)
    assert in_bf16.dtype == torch.float32
    assert torch.equal(in_bf16, in_bf16.bfloat16().float()), "rounded once, where it was computed"
    assert torch.allclose(in_bf16, plain, rtol=0.02, atol=0.02)
    assert seen == [torch.float32, torch.float32, torch.bfloat16]
    assert torch.equal(plain, encoder(images))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that every search crosses several of them, with a remainder."""
    make = evals.Plan.make
    small = lambda *args, **kwargs: replace(make(*args, **kwargs), queries=13, block=64)  # noqa: E731
    monkeypatch.setattr(evals.Plan, "make", staticmethod(small))


@pytest.mark.parametrize("k", [1, 20, 63, 64, 65, 200])
def test_search_and_vote_equal_brute_force(small_blocks, generator, k):
    bank = torch.randn(300, 16, generator=generator)
    queries = torch.randn(50, 16, generator=generator)
    labels = torch.randint(0, 7, (300,), generator=generator)
    sims, ids = evals.search(bank, queries, k=k)
    expected_sims, expected_ids = brute_force(bank.double().numpy(), queries.double().numpy(), k)
    np.testing.assert_array_equal(ids.numpy(), expected_ids)
    np.testing.assert_allclose(sims.numpy(), expected_sims, atol=1e-6)
    predicted = knn_predict(bank, labels, queries, k=k, temperature=0.1, num_classes=7)
    expected = brute_force_vote(expected_sims, labels.numpy()[expected_ids], 0.1, 7)
    np.testing.assert_array_equal(predicted.numpy(), expected)


@pytest.mark.parametrize("k", [1, 5, 64, 100, 200])
def test_equal_similarities_are_ordered_by_bank_id(small_blocks, generator, k):
    # corners of a cube in 4 dimensions: all norms are 2, so similarities are exact and most of them tie
    bank = torch.randint(0, 2, (200, 4), generator=generator).float() * 2 - 1
    queries = torch.randint(0, 2, (40, 4), generator=generator).float() * 2 - 1
    sims, ids = evals.search(bank, queries, k=k)
    expected_sims, expected_ids = brute_force(bank.numpy(), queries.numpy(), k)
    np.testing.assert_array_equal(ids.numpy(), expected_ids)
    np.testing.assert_array_equal(sims.numpy(), expected_sims)


def test_a_collapsed_bank_gives_the_first_ids():
    _, ids = evals.search(torch.ones(500, 3), torch.ones(2, 3), k=4)
    assert ids.tolist() == [[0, 1, 2, 3]] * 2


def test_vote_by_hand():
    sims = torch.tensor([[0.9, 0.5, 0.5]])
    labels = torch.tensor([[2, 1, 1]])
    # T = 1: exp(0.9) = 2.46 against 2 exp(0.5) = 3.30;   T = 0.1: exp(9) = 8103 against 2 exp(5) = 297
    assert evals.knn_vote(sims, labels, temperature=1.0, num_classes=3).tolist() == [1]
    assert evals.knn_vote(sims, labels, temperature=0.1, num_classes=3).tolist() == [2]
    assert evals.knn_vote(sims, labels, temperature=1e-4, num_classes=3).tolist() == [
        2
    ]  # exp(9000) would overflow


def test_equal_votes_go_to_the_smaller_class():
    sims = torch.tensor([[0.5, 0.5, 0.25, 0.25]])
    labels = torch.tensor([[3, 1, 1, 3]])
    assert evals.knn_vote(sims, labels, temperature=0.1, num_classes=4).tolist() == [1]


def test_many_k_and_temperatures_agree_with_one_at_a_time(generator):
    bank, queries = torch.randn(120, 8, generator=generator), torch.randn(30, 8, generator=generator)
    bank_labels = torch.randint(0, 3, (120,), generator=generator)
    query_labels = torch.randint(0, 3, (30,), generator=generator)
    ks, temperatures = (1, 10, 120), (0.05, 1.0)
    together = evals.global_knn(
        evals.Embeddings.of(bank, bank_labels),
        evals.Embeddings.of(queries, query_labels),
        ks=ks,
        temperatures=temperatures,
        num_classes=3,
    ).accuracy
    assert set(together) == {(k, t) for k in ks for t in temperatures}
    for (k, temperature), accuracy in together.items():
        predicted = knn_predict(bank, bank_labels, queries, k=k, temperature=temperature, num_classes=3)
        assert accuracy == (predicted == query_labels).double().mean().item()
    assert len(set(together.values())) > 1


def test_search_does_not_depend_on_scale_or_float_type(generator):
    bank, queries = torch.randn(90, 8, generator=generator), torch.randn(9, 8, generator=generator)
    _, ids = evals.search(bank, queries, k=5)
    _, scaled = evals.search(bank.double() * 100, queries.double() * 0.01, k=5)
    assert torch.equal(ids, scaled)
    assert evals.search(bank.bfloat16(), queries.bfloat16(), k=5)[0].dtype == torch.float32


@pytest.mark.parametrize("k", [0, 11, -1])
def test_k_outside_of_the_bank_is_refused(k):
    with pytest.raises(ValueError, match=f"k is {k}, but the bank holds 10 samples; choose k from 1 to 10"):
        evals.search(torch.ones(10, 2), torch.ones(1, 2), k=k)


def test_knn_names_bad_input():
    bank, labels = torch.ones(10, 2), torch.zeros(10, dtype=torch.int64)
    broken = bank.clone()
    broken[3, 1] = torch.nan
    settings: dict[str, Any] = {"ks": (1,), "num_classes": 2}

    def knn(bank=bank, labels=labels, queries=bank, **changes):
        query_labels = torch.zeros(len(queries), dtype=torch.int64)
        parts = (evals.Embeddings.of(bank, labels), evals.Embeddings.of(queries, query_labels))
        evals.global_knn(*parts, **{**settings, **changes})

    with pytest.raises(ValueError, match="bank: 1 of 10 rows hold NaN or infinity, the first at 3"):
        knn(bank=broken)
    with pytest.raises(ValueError, match="queries must be a non-empty matrix"):
        knn(queries=bank[:0])
    with pytest.raises(ValueError, match="bank has 2 dimensions and queries have 1"):
        knn(queries=bank[:, :1])
    with pytest.raises(ValueError, match="bank_labels hold 2, but num_classes is 2"):
        knn(labels=labels + 2)
    with pytest.raises(ValueError, match="bank_labels hold -1: leave out the samples without a label"):
        knn(labels=labels - 1)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        knn(temperatures=(0.0,))


def digits():
    features, labels = load_digits(return_X_y=True)
    features, labels = torch.tensor(features), torch.tensor(labels)
    return features[:600], labels[:600], features[600:], labels[600:]


@pytest.mark.parametrize("l2", [1e-2, 1.0])
def test_the_probe_solves_scikit_learns_problem(l2):
    train, train_labels, test, _ = digits()
    train, test = probe_module.prepare(train, test, True, evals.Alone())
    reference = LogisticRegression(C=1 / (len(train) * l2), tol=1e-10, solver="newton-cholesky").fit(
        train.numpy(), train_labels.numpy()
    )
    solution, is_converged = probe_module._fit(
        probe_module.Rows(train), train_labels, 10, l2, max_iterations=500
    )
    assert is_converged
    np.testing.assert_allclose(solution[:-1].T.numpy(), reference.coef_, atol=1e-3)
    probabilities = probe_module.logits_of(test, solution).softmax(dim=1)
    np.testing.assert_allclose(probabilities.numpy(), reference.predict_proba(test.numpy()), atol=1e-3)


def test_the_whole_probe_agrees_with_scikit_learn_and_is_deterministic():
    train, train_labels, test, test_labels = digits()
    result = linear_probe(
        train, train_labels, test, test_labels, l2=(1e-3,), standardize=False, max_iterations=2000
    )
    reference = LogisticRegression(C=1 / (len(train) * 1e-3), tol=1e-10, solver="newton-cholesky").fit(
        train.numpy(), train_labels.numpy()
    )
    agreement = np.mean(result.predictions.numpy() == reference.predict(test.numpy()))
    assert agreement > 0.999
    assert result.accuracy == pytest.approx(reference.score(test.numpy(), test_labels.numpy()), abs=1e-3)
    chosen = [linear_probe(train, train_labels, test, test_labels, seed=1) for _ in range(2)]
    assert chosen[0].validation == chosen[1].validation
    assert torch.equal(chosen[0].predictions, chosen[1].predictions)
    assert chosen[0].accuracy > 0.9


def test_the_strength_with_the_best_validation_accuracy_is_used(generator):
    # one dimension of 200 matters, and there are fewer samples than dimensions: the two strengths differ much
    train, test = torch.randn(120, 200, generator=generator), torch.randn(400, 200, generator=generator)
    train[:, 0] *= 3
    test[:, 0] *= 3
    train_labels, test_labels = (train[:, 0] > 0).long(), (test[:, 0] > 0).long()
    result = linear_probe(train, train_labels, test, test_labels, l2=(1e-6, 3.0), standardize=False)
    assert set(result.validation) == {1e-6, 3.0}
    assert result.validation[result.l2] == max(result.validation.values())
    alone = linear_probe(train, train_labels, test, test_labels, l2=(result.l2,), standardize=False)
    assert alone.validation == {}
    assert alone.accuracy == result.accuracy
    assert torch.equal(alone.predictions, result.predictions)


def test_standardising_is_scikit_learns():
    train, _, test, _ = digits()
    scaler = StandardScaler().fit(train.numpy())
    for mine, theirs in zip(
        probe_module.prepare(train, test, True, evals.Alone()), (train, test), strict=True
    ):
        np.testing.assert_allclose(mine.numpy(), scaler.transform(theirs.numpy()), atol=1e-12)


def test_standardising_makes_the_probe_independent_of_scale_and_offset():
    train, train_labels, test, test_labels = digits()
    scale = torch.linspace(0.01, 100, train.shape[1], dtype=train.dtype)
    plain = linear_probe(train, train_labels, test, test_labels, l2=(1e-2,))
    moved = linear_probe(train * scale + 5, train_labels, test * scale + 5, test_labels, l2=(1e-2,))
    assert torch.equal(plain.predictions, moved.predictions)


def test_class_ids_need_not_be_consecutive_and_a_class_unseen_in_training_is_wrong():
    train = torch.tensor([[0.0], [0.1], [1.0], [1.1]])
    test = torch.tensor([[0.0], [1.0], [1.0]])
    result = linear_probe(train, torch.tensor([7, 7, 40, 40]), test, torch.tensor([7, 40, 3]), l2=(1e-3,))
    assert result.predictions.tolist() == [7, 40, 40]
    assert result.accuracy == pytest.approx(2 / 3)


def test_validation_holds_out_of_each_class_never_all():
    targets = torch.tensor([0] * 10 + [1] * 2 + [2])
    is_held_out = probe_module.held_out(targets, torch.arange(13), 0, evals.Alone())
    assert [int(is_held_out[targets == target].sum()) for target in range(3)] == [2, 1, 0]
    assert not torch.equal(is_held_out, probe_module.held_out(targets, torch.arange(13), 1, evals.Alone()))


def test_the_probe_says_when_it_did_not_converge():
    train, train_labels, test, test_labels = digits()
    assert not linear_probe(train, train_labels, test, test_labels, l2=(1e-5,), max_iterations=2).is_converged


def test_the_probe_works_inside_no_grad_and_inference_mode():
    train, train_labels, test, test_labels = (part[:100] for part in digits())
    expected = linear_probe(train, train_labels, test, test_labels, l2=(1e-2,))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            inside = linear_probe(train, train_labels, test, test_labels, l2=(1e-2,))
        assert torch.equal(inside.predictions, expected.predictions)


def test_the_probe_names_bad_input():
    features, labels = torch.randn(8, 3), torch.tensor([0, 1] * 4)
    with pytest.raises(ValueError, match="at least two classes; every training label is 0"):
        linear_probe(features, labels * 0, features, labels)
    with pytest.raises(ValueError, match="test: 8 of 8 rows hold NaN or infinity"):
        linear_probe(features, labels, features * torch.nan, labels)
    with pytest.raises(ValueError, match="train_labels must have shape"):
        linear_probe(features, labels[:-1], features, labels)
    with pytest.raises(ValueError, match="give a probe a single l2"):
        linear_probe(features[:2], labels[:2], features, labels)
    with pytest.raises(ValueError, match="l2 must be strengths above 0"):
        linear_probe(features, labels, features, labels, l2=(0.0, 1.0))


@pytest.mark.parametrize("copies", [0, 2**30])
def test_the_probe_in_chunks_is_the_probe(monkeypatch, copies):
    """Sums in another order: the solution to rounding, every prediction and accuracy to the image."""
    train, train_labels, test, test_labels = digits()
    whole = linear_probe(train, train_labels, test, test_labels)
    monkeypatch.setattr(probe_module, "_CHUNK", 64 * 37)  # 37 rows, the last chunk of 8
    monkeypatch.setattr(probe_module, "_COPY_BYTES", copies)
    found = linear_probe(train, train_labels, test, test_labels)
    assert [part.stop - part.start for part in probe_module.Rows(train).parts(10)][:2] == [37, 37]
    assert (found.accuracy, found.l2, found.validation) == (whole.accuracy, whole.l2, whole.validation)
    assert torch.equal(found.predictions, whole.predictions)
    assert torch.allclose(found.solution, whole.solution, atol=1e-4)
    both = [
        torch.cat([result.log_probabilities(part) for part in result.queries.parts(10)])
        for result in (found, whole)
    ]
    assert (both[0] - both[1]).abs().max() < 1e-4
    members = [whole, linear_probe(train, train_labels, test, test_labels, l2=(1.0,))]
    mean = torch.stack([member.log_probabilities(slice(None)) for member in members]).mean(dim=0)
    expected = float((mean.argmax(dim=1) == test_labels).double().mean())
    assert evals.mean_logits_accuracy(members, test_labels) == expected


def test_the_held_out_samples_are_those_of_a_loop_over_classes():
    generator = torch.Generator().manual_seed(2)
    targets, ids = torch.randint(0, 9, (200,), generator=generator), torch.arange(200) * 2  # ids with gaps
    targets[targets == 4] = 5
    targets[7] = 4  # a single one, that stays
    found = probe_module.held_out(targets, ids, 3, evals.Alone())
    everyone = torch.full((399,), -1)
    everyone[ids] = targets
    order = torch.randperm(399, generator=torch.Generator().manual_seed(3))
    for target in range(9):
        members = order[everyone[order] == target]
        count = min(max(1, round(0.2 * len(members))), len(members) - 1)
        chosen = torch.zeros(399, dtype=torch.bool)
        chosen[members[: max(count, 0)]] = True
        assert torch.equal(found[targets == target], chosen[ids][targets == target])


def test_the_probe_beats_in_every_step_and_says_what_does_not_fit():
    train, train_labels, test, test_labels = digits()
    beats = []
    linear_probe(train, train_labels, test, test_labels, l2=(1e-2,), on_step=lambda: beats.append(1))
    assert len(beats) > 20
    assert probe_module._complaint(10**6, 6144, 10**4, free=2**35) is None
    said = probe_module._complaint(10**6, 6144, 10**5, free=2**35)
    assert said is not None
    assert "6144 dimensions and 100000 classes needs 220.5 GiB" in said
    assert "(48 float64 matrices of 6145 x 100000, and 0.8 GiB for a chunk of rows), and 32.0 GiB" in said
    assert probe_module._complaint(100, 24, 5, free=2**20) is None, "a small one needs little"
