"""What one rank's search passes over is no neighbour: its guesses, its bounds on rounding, and its order."""

from itertools import pairwise, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from selfmask_dist import evals
from selfmask_dist.evals.search import local as local_search
from selfmask_dist.evals.search.local import NO_ID, NO_KEY, Precision, decode, encode, nearest, sort_rows

PRECISIONS: tuple[Precision, ...] = ("float32", "bf16")


def everything(bank, ids, queries, k):
    """Similarities and ids (m, k) by a full sort in float64, equal ones by id."""
    sims = F.normalize(queries.double()) @ F.normalize(bank.double()).T
    order = np.stack([np.lexsort((ids.numpy(), -row)) for row in sims.round(decimals=12).numpy()])[:, :k]
    return np.take_along_axis(sims.numpy(), order, axis=1), ids.numpy()[order]


# ---- keys


def test_keys_sort_by_similarity_and_then_by_id(generator):
    values = [1.0, 0.25, 1e-30, 0.0, -1e-30, -0.5, -1.0, -torch.inf]
    sims, ids = torch.tensor(values).repeat_interleave(3), torch.tensor([0, 7, NO_ID - 1]).repeat(len(values))
    keys = encode(sims, ids)
    assert (keys.diff() > 0).all()
    assert int(keys[-1]) < NO_KEY
    assert torch.equal(torch.stack(decode(keys)), torch.stack([sims, ids]))
    assert torch.equal(encode(-torch.zeros(1), ids[:1]), encode(torch.zeros(1), ids[:1]))
    shuffled = keys[torch.randperm(len(keys), generator=generator)].view(4, -1)
    expected = shuffled.sort(dim=1).values
    sort_rows(shuffled)
    assert torch.equal(shuffled, expected)


# ---- neighbours


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("order", ["random", "rising", "falling", "tied", "crowded", "grouped"])
@pytest.mark.parametrize("k", [1, 7, 40])
def test_what_is_passed_over_is_no_neighbour(order, k, precision):
    generator = torch.Generator().manual_seed(k)
    bank, queries = (torch.randn(n, 16, generator=generator) for n in (1203, 9))
    if order == "tied":  # corners of a cube: all similarities are exact, in bf16 too
        bank, queries = bank.sign(), queries.sign()
    elif order == "crowded":  # all within the rounding of bf16
        bank = queries[:1] + 1e-3 * bank
    elif order == "grouped":  # one place in four holds the first query's neighbours, next to each other
        bank[::4] = queries[0] + 0.3 * bank[::4]
    elif order in ("rising", "falling"):
        bank = bank[(F.normalize(bank) @ queries[0]).argsort(descending=order == "falling")]
    ids = torch.arange(0, 2 * len(bank), 2)
    keys = nearest(bank, ids, F.normalize(queries), k, block=64, precision=precision)
    sims, found = decode(keys)
    expected_sims, expected = everything(bank, ids, queries, k)
    np.testing.assert_allclose(sims, expected_sims, atol=2e-6)
    if order == "crowded":  # float32 rounds some of them to one number, or to the other order
        assert (found.numpy() == expected).mean() > 0.5
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_guess_that_is_too_high_is_made_good(monkeypatch, generator, precision):
    bank, queries = torch.randn(800, 16, generator=generator), torch.randn(9, 16, generator=generator)
    ids = torch.arange(len(bank))
    guesses = []

    def guess(k, share):
        guesses.append(share)
        return 1  # nothing but the best so far is good enough

    monkeypatch.setattr(local_search, "_guess", guess)
    keys = nearest(bank, ids, F.normalize(queries), 30, block=64, precision=precision)
    assert guesses, "the guess was asked"
    np.testing.assert_array_equal(decode(keys)[1], everything(bank, ids, queries, 30)[1])


def test_a_guess_is_made_for_nearly_all_queries(generator):
    for k, share in product((1, 5, 20, 200), (0.01, 0.1, 0.5, 1.0)):
        ranks = torch.binomial(torch.full((100_000,), float(k - 1)), torch.tensor(share), generator=generator)
        rank = local_search._guess(k, share)
        assert 1 <= rank <= k
        assert (ranks >= rank).double().mean() < 1e-4, (k, share)
    assert local_search._guess(200, 0.01) < 20, "a guess of 200 would be none"


@pytest.mark.parametrize("length", [1, 2, 7, 64, 1000, 1024])
def test_blocks_have_each_row_once_and_are_fair_samples(length):
    edges = [*range(0, length, 64), length]
    blocks = [local_search._spread(a, b, length, torch.device("cpu")) for a, b in pairwise(edges)]
    assert torch.cat(blocks).sort().values.tolist() == list(range(length))
    if length >= 1000:  # sorted by class or dealt out by class, each has its share of a block
        for classes in (torch.arange(length) * 8 // length, torch.arange(length) % 8):
            counts = torch.bincount(classes[blocks[0]], minlength=8)
            assert counts.min() >= 6
            assert counts.max() <= 10


def test_neighbours_are_the_same_bit_for_bit_whatever_the_blocks_and_the_precision(generator):
    bank = F.normalize(torch.randn(900, 48, generator=generator))
    bank[450:] = bank[:450]  # twice the same: only ids tell them apart
    queries, ids = F.normalize(torch.randn(21, 48, generator=generator)), torch.arange(900)
    found = [
        nearest(bank, ids, queries, 50, block=block, precision=precision)
        for block, precision in product((33, 128, 900), PRECISIONS)
    ]
    assert all(torch.equal(keys, found[0]) for keys in found)
    parts = [
        nearest(bank[part], ids[part], queries, 50, block=64, precision="bf16")
        for part in (ids < 300, ids >= 300)
    ]
    merged = torch.cat(parts, dim=1)
    sort_rows(merged)
    assert torch.equal(merged[:, :50], found[0]), "as two ranks would have it"
    pairs = decode(found[0])[1] % 450
    assert (pairs[:, ::2] == pairs[:, 1::2]).all(), "of each pair both, next to each other"


def test_the_bound_on_bf16_products_holds_and_is_not_loose(generator):
    for dim in (3, 64, 700):
        rows, queries = (F.normalize(torch.randn(400, dim, generator=generator)) for _ in range(2))
        products, error = local_search._rounded_products(
            local_search._Rounded(queries), local_search._Rounded(rows), torch.empty(400 * 400)
        )
        bar = (queries.double() @ rows.double().T).float()
        # each similarity as a bar of its own: it is never passed over
        assert (products >= (bar - error).bfloat16()).all()
        assert float(error.max()) < 2.0**-7
        assert not (products >= (bar + 2 * error).bfloat16()).all()


def test_a_part_with_fewer_rows_than_k(generator):
    bank, queries = (
        torch.randn(3, 4, generator=generator),
        F.normalize(torch.randn(2, 4, generator=generator)),
    )
    for length in (0, 3):
        keys = nearest(bank[:length], torch.arange(length), queries, 5, block=64, precision="bf16")
        assert keys.shape == (2, 5)
        assert (keys[:, length:] == NO_KEY).all()
        assert keys[:, :length].sort(dim=1).values.tolist() == keys[:, :length].tolist()


def test_memory_of_a_search_is_bounded_where_everything_ties():
    """A collapsed model's embeddings: all rows reach every bar."""
    _, ids = evals.search(torch.ones(5000, 8), torch.ones(3, 8), k=4, precision="bf16")
    assert ids.tolist() == [[0, 1, 2, 3]] * 3


def test_rounds_of_a_plan_are_equally_long():
    plan = evals.Plan.make(50_000, 10_000, 512, k=200, num_ranks=2)
    assert plan.rounds * plan.queries < 5000 + plan.rounds, "queries of zeros are sent to nobody"
