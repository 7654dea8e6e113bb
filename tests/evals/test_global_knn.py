"""k-NN with bank and queries on several ranks: brute force's neighbours, within a bound on memory."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from selfmask_dist import evals
from selfmask_dist.evals.search import search as search_fn
from selfmask_dist.parallel import World
from tests.evals.test_evals import brute_force, brute_force_vote
from tests.support.distributed import run_distributed
from tests.support.evals import knn_accuracy

NUM_BANK, NUM_QUERIES, CLASSES = 300, 47, 5
KS, TEMPERATURES = (1, 20, 120), (0.07, 0.1, math.inf)


def corners(seed, rows, dim=16):
    """Corners of a cube: all norms are 4, so similarities are exact and most of them tie."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (rows, dim), generator=generator).float() * 2 - 1


def problem(kind):
    if kind == "tied":
        bank, queries = corners(1, NUM_BANK, dim=4).repeat(1, 4), corners(2, NUM_QUERIES, dim=4).repeat(1, 4)
    else:
        generator = torch.Generator().manual_seed(3)
        bank = torch.randn(NUM_BANK, 16, generator=generator)
        queries = torch.randn(NUM_QUERIES, 16, generator=generator)
    return bank, torch.arange(NUM_BANK) * 7 % CLASSES, queries, torch.arange(NUM_QUERIES) % CLASSES


def with_small_blocks():
    make = evals.Plan.make
    return lambda *args, **kwargs: replace(make(*args, **kwargs), queries=5, block=32)


def my_parts(world):
    """Ids of this rank's bank and queries: uneven, interleaved; of four, one has no bank and one no query."""
    bank = {1: [0], 2: [0, 0, 1], 4: [0, 3, 3, 1, 3]}[world.size]
    queries = {1: [0], 2: [1, 0, 1, 1], 4: [0, 1, 2, 1]}[world.size]
    bank_ids, query_ids = torch.arange(NUM_BANK), torch.arange(NUM_QUERIES)
    mine = torch.tensor(bank)[bank_ids % len(bank)] == world.rank
    my_queries = torch.tensor(queries)[query_ids % len(queries)] == world.rank
    return bank_ids[mine], query_ids[my_queries]


def _search_here(kind):
    world = World(dist.get_rank(), dist.get_world_size())
    # the process is ours alone
    evals.Plan.make = staticmethod(with_small_blocks())  # type: ignore[method-assign]
    bank, labels, queries, query_labels = problem(kind)
    mine, my_queries = my_parts(world)
    sims, ids = search_fn(bank[mine], queries[my_queries], k=120, bank_ids=mine, ranks=world)
    result = evals.global_knn(
        evals.Embeddings(bank[mine], labels[mine], mine),
        evals.Embeddings(queries[my_queries], query_labels[my_queries], my_queries),
        num_classes=CLASSES,
        ks=KS,
        temperatures=TEMPERATURES,
        ranks=world,
    )
    one_out = search_fn(bank[mine], bank[mine], k=9, bank_ids=mine, query_ids=mine, ranks=world)[1]
    return my_queries.numpy(), sims.numpy(), ids.numpy(), vars(result), mine.numpy(), one_out.numpy()


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_neighbours_and_accuracies_equal_brute_force(world_size):
    for kind in ("tied", "random"):
        bank, labels, queries, query_labels = problem(kind)
        expected_sims, expected_ids = brute_force(bank.double().numpy(), queries.double().numpy(), 120)
        alone = {
            (k, t): knn_accuracy(bank, labels, queries, query_labels, k=k, temperature=t, num_classes=CLASSES)
            for k in KS
            for t in TEMPERATURES
        }
        itself = np.arange(NUM_BANK)[:, None]
        _, everyone = brute_force(bank.double().numpy(), bank.double().numpy(), NUM_BANK)
        others = everyone[everyone != itself].reshape(NUM_BANK, NUM_BANK - 1)[:, :9]
        seen = 0
        for my_queries, sims, ids, result, mine, one_out in run_distributed(_search_here, world_size, kind):
            np.testing.assert_array_equal(ids, expected_ids[my_queries])
            np.testing.assert_allclose(sims, expected_sims[my_queries], atol=1e-6)
            np.testing.assert_array_equal(one_out, others[mine])
            assert result["accuracy"] == alone
            for (k, temperature), accuracies in result["per_class"].items():
                neighbours = labels.numpy()[expected_ids[:, :k]]
                predicted = brute_force_vote(expected_sims[:, :k], neighbours, temperature, CLASSES)
                hits = predicted == query_labels.numpy()
                if kind == "random":  # numpy adds up tied votes in another order
                    for c in range(CLASSES):
                        assert accuracies[c] == hits[query_labels.numpy() == c].mean()
                assert result["balanced"][k, temperature] == pytest.approx(float(accuracies.mean()))
            seen += len(my_queries)
        assert seen == NUM_QUERIES


def _wrong_here(which):
    world = World(dist.get_rank(), dist.get_world_size())
    bank, labels, queries, query_labels = problem("random")
    mine, my_queries = my_parts(world)
    part, part_labels, k = bank[mine], labels[mine].clone(), 5
    if which == "k":
        k = 301
    elif which == "ids":
        mine = mine.flip(0) if world.rank == 1 else mine
    elif world.rank == 1:
        part[3] = torch.nan if which == "nan" else part[3]
        part_labels[2] = -1 if which == "label" else part_labels[2]
    if which == "dim" and world.rank == 0:
        queries = queries[:, :3]
    try:
        evals.global_knn(
            evals.Embeddings(part, part_labels, mine),
            evals.Embeddings(queries[my_queries], query_labels[my_queries], my_queries),
            num_classes=CLASSES,
            ks=(k,),
            ranks=world,
        )
    except ValueError as error:
        return str(error)
    return "nothing was wrong"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("k", "k is 301, but the bank holds 300 samples; choose k from 1 to 300"),
        ("nan", "bank: 1 of 100 rows hold NaN"),
        ("label", "bank_labels hold -1: leave out the samples without a label"),
        ("ids", "bank_ids must be 100 ids in ascending order"),
        ("dim", "bank has 16 dimensions and queries have 3"),
    ],
)
def test_what_is_wrong_on_one_rank_stops_all_and_is_named(which, message):
    errors = run_distributed(_wrong_here, 2, which)
    assert any(message in error for error in errors), errors
    assert all(message in error or "its own error says why" in error for error in errors), errors


def test_a_class_without_queries_does_not_count_into_the_balanced_accuracy():
    bank = torch.eye(3)
    result = evals.global_knn(
        evals.Embeddings.of(bank, torch.tensor([0, 1, 2])),
        evals.Embeddings.of(bank[[0, 0, 0, 1]], torch.tensor([0, 0, 0, 2])),
        num_classes=3,
        ks=(1,),
        temperatures=(0.1,),
    )
    assert result.accuracy == {(1, 0.1): 0.75}
    assert result.balanced == {(1, 0.1): 0.5}
    assert result.per_class[1, 0.1].isnan().tolist() == [False, True, False]


def test_leaving_one_out_needs_a_neighbour_more():
    bank = torch.randn(10, 4)
    with pytest.raises(ValueError, match="holds 9 samples beside the query itself; choose k from 1 to 9"):
        search_fn(bank, bank, k=10, query_ids=torch.arange(10))


@pytest.mark.parametrize("memory_mib", [4, 16, 64])
def test_a_plan_keeps_to_its_memory(memory_mib):
    for num_ranks in (1, 4, 8):
        plan = evals.Plan.make(10**6, 10**5, 128, k=20, num_ranks=num_ranks, memory_mib=memory_mib)
        assert plan.work_bytes <= memory_mib * 2**20
        assert plan.rounds * plan.queries * num_ranks >= 10**5
    with pytest.raises(ValueError, match=r"memory_mib is 1; .* need at least \d+") as error:
        evals.Plan.make(10**6, 10**5, 1024, k=200, num_ranks=8, memory_mib=1)
    least = int(str(error.value).rsplit(" ", 1)[1])
    plan = evals.Plan.make(10**6, 10**5, 1024, k=200, num_ranks=8, free_mib=8192)
    assert plan.work_bytes <= 256 * 2**20, "what was enough stays enough"
    assert evals.Plan.make(10**6, 10**5, 1024, k=200, num_ranks=8, memory_mib=least).queries >= 1


def test_a_plan_for_a_thousand_ranks_takes_what_it_needs_of_what_is_free():
    case = {"dim": 6144, "k": 200, "num_ranks": 1024}
    with pytest.raises(ValueError, match=r"memory_mib is 256; 6144 dimensions, .* need at least 274"):
        evals.Plan.make(2_700_000, 100_000, **case, memory_mib=256)
    plan = evals.Plan.make(2_700_000, 100_000, **case, free_mib=60_000)
    assert 274 * 2**20 < plan.work_bytes < 1100 * 2**20
    assert plan.rounds * plan.queries * 1024 >= 100_000
    few = evals.Plan.make(2_700_000, 100_000, **case, free_mib=600)
    assert few.work_bytes <= 300 * 2**20, "half of what is free"
    with pytest.raises(ValueError, match=r"400 MiB are free on a rank, .* half; 6144 .* at least 274"):
        evals.Plan.make(2_700_000, 100_000, **case, free_mib=400)


def test_neighbours_do_not_depend_on_the_memory(generator):
    bank, queries = torch.randn(700, 24, generator=generator), torch.randn(90, 24, generator=generator)
    expected = search_fn(bank, queries, k=7)
    for memory_mib in (1, 5.5, 2000):
        found = search_fn(bank, queries, k=7, memory_mib=memory_mib)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
