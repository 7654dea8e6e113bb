"""The cascade's combined embedding against numpy and the definition, and under several ranks."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn import decomposition

from selfmask_dist.cascade import MODES, Combination
from selfmask_dist.parallel import pca as pca_module
from tests.support.distributed import run_distributed

K, DIM = 3, 8


def views(num_samples=240, seed=0):
    """Dispatcher, K experts that resemble it, and the router's choice."""
    generator = torch.Generator().manual_seed(seed)
    dispatcher = torch.randn(num_samples, DIM, generator=generator).double().relu() + 2
    experts = [
        dispatcher @ torch.randn(DIM, DIM, generator=generator).double()
        + 0.1 * torch.randn(num_samples, DIM, generator=generator).double()
        for _ in range(K)
    ]
    return dispatcher, experts, torch.randint(K, (num_samples,), generator=generator)


def chunks_of(dispatcher, experts, clusters, rows=50):
    for start in range(0, max(1, len(dispatcher)), rows):
        part = slice(start, start + rows)
        yield dispatcher[part], [expert[part] for expert in experts], clusters[part]


def by_hand(mode, dispatcher, experts, clusters):
    """What the mode joins, sample by sample."""
    rows = []
    for i, cluster in enumerate(clusters.tolist()):
        mine = [expert[i] for expert in experts]
        chosen = [expert if k == cluster else expert * 0 for k, expert in enumerate(mine)]
        parts = mine if mode.startswith("unconditional") else chosen
        if mode == "replace":
            rows.append(mine[cluster])
        elif mode.endswith("add"):
            rows.append(sum(parts, dispatcher[i]))
        else:
            rows.append(torch.cat([dispatcher[i], *parts]))
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("mode", list(MODES))
def test_each_mode_is_its_definition(mode, monkeypatch):
    monkeypatch.setattr(pca_module, "_BLOCK_BYTES", 8 * DIM * (1 + K) * 11)  # blocks of 11 rows
    train, test = views(), views(57, seed=1)
    combination = Combination.fit(chunks_of(*train), mode=mode, num_experts=K)
    expected, expected_test = by_hand(mode, *train), by_hand(mode, *test)
    if mode in ("conditional", "unconditional") or mode.endswith("_pca"):
        whiten = not mode.endswith("_pca")
        theirs = decomposition.PCA(DIM, whiten=whiten, svd_solver="full").fit(expected)
        expected, expected_test = theirs.transform(expected), theirs.transform(expected_test)
    assert combination.output_dim == expected.shape[1]
    for inputs, numbers in ((train, expected), (test, expected_test)):
        assert np.allclose(combination.transform(*inputs), numbers, rtol=0, atol=1e-8)


@pytest.mark.parametrize("mode", ["conditional", "unconditional"])
def test_the_result_is_the_authors_up_to_one_factor(mode):
    """Their code divides by the singular values: U of the centred matrix; cosines are the same."""
    train = views()
    joined = by_hand(mode, *train)
    left, _, _ = np.linalg.svd(joined - joined.mean(axis=0), full_matrices=False)
    theirs = left[:, :DIM]
    mine = Combination.fit(chunks_of(*train), mode=mode, num_experts=K).transform(*train).numpy()
    mine = mine / np.sqrt(len(mine) - 1)
    signs = np.sign((mine * theirs).sum(axis=0))
    assert np.allclose(mine, theirs * signs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.startswith("unconditional")])
def test_the_chosen_expert_is_enough_for_the_conditional_modes(mode):
    dispatcher, experts, clusters = views()
    combination = Combination.fit(chunks_of(dispatcher, experts, clusters), mode=mode, num_experts=K)
    assert not combination.needs_all_experts
    chosen = torch.stack(experts)[clusters, torch.arange(len(clusters))]
    expected = combination.transform(dispatcher, experts, clusters)
    assert torch.equal(combination.transform(dispatcher, chosen, clusters), expected)
    again = Combination.fit([(dispatcher, chosen, clusters)], mode=mode, num_experts=K)
    assert torch.allclose(again.transform(dispatcher, chosen, clusters), expected, atol=1e-9)


def _fit_here(mode):
    rank, size = dist.get_rank(), dist.get_world_size()
    dispatcher, experts, clusters = views()
    mine = slice(rank, None, 2)
    if size == 4:  # rank 1 has nothing
        mine = (slice(0, 100), slice(0, 0), slice(100, 110), slice(110, None))[rank]
    part = (dispatcher[mine], [expert[mine] for expert in experts], clusters[mine])

    def dist_sum(tensor):
        dist.all_reduce(tensor)
        return tensor

    combination = Combination.fit(chunks_of(*part, rows=17), mode=mode, num_experts=K, all_reduce=dist_sum)
    return combination.transform(dispatcher, experts, clusters).numpy()


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_combination_is_the_same_under_any_number_of_ranks(world_size):
    train = views()
    alone = Combination.fit(chunks_of(*train), mode="conditional", num_experts=K).transform(*train)
    for found in run_distributed(_fit_here, world_size, "conditional"):
        assert np.allclose(found, alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", list(MODES))
def test_a_combination_survives_its_tensors_exactly(mode):
    train = views()
    combination = Combination.fit(chunks_of(*train), mode=mode, num_experts=K)
    again = Combination.from_tensors(combination.tensors())
    assert again.mode == mode
    assert torch.equal(again.transform(*train), combination.transform(*train))


def test_fewer_samples_than_dimensions_give_what_they_span():
    few = views(6)
    combination = Combination.fit(chunks_of(*few), mode="unconditional", num_experts=K)
    assert combination.output_dim == 5  # centred
    assert combination.transform(*few).isfinite().all()


def test_single_precision_stays_single():
    dispatcher, experts, clusters = views()
    single = (dispatcher.float(), [expert.float() for expert in experts], clusters)
    for mode in MODES:
        combination = Combination.fit([single], mode=mode, num_experts=K)
        assert combination.transform(*single).dtype == torch.float32


def test_what_cannot_be_combined_is_said():
    dispatcher, experts, clusters = views()
    combination = Combination.fit([(dispatcher, experts, clusters)], mode="unconditional", num_experts=K)
    cases = [
        ((dispatcher, experts[0], clusters), "needs the embeddings of all 3 experts"),
        ((dispatcher, experts[:2], clusters), "of 3 experts, got embeddings of 2"),
        ((dispatcher, [*experts[:2], experts[2][:, :4]], clusters), r"got \(240, 4\)"),
        ((dispatcher[:, :4], experts, clusters), r"got \(240, 4\)"),
        ((dispatcher, experts, clusters + 1), "clusters go from 1 to 3, experts from 0 to 2"),
        ((dispatcher, experts, clusters[:9]), "clusters must be"),
    ]
    for inputs, message in cases:
        with pytest.raises(ValueError, match=message):
            combination.transform(*inputs)
    with pytest.raises(ValueError, match="'mean' is unknown; choose from conditional"):
        Combination.fit([(dispatcher, experts, clusters)], mode="mean", num_experts=K)
    with pytest.raises(ValueError, match="no chunk of embeddings"):
        Combination.fit([], mode="replace", num_experts=K)
    experts[1][7, 3] = torch.nan
    with pytest.raises(ValueError, match="1 of 240 embeddings hold NaN"):
        Combination.fit([(dispatcher, experts, clusters)], mode="unconditional", num_experts=K)
