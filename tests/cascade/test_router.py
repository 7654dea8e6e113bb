"""PCA, k-means, mixture and router against scikit-learn and numpy, and under several ranks."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn import cluster, decomposition
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_info, threadpool_limits

from selfmask_dist.cascade import PCA, Mixture, Router, clusters, fit_kmeans, fit_mixture, fit_pca
from tests.support.distributed import run_distributed


def blobs(num_samples=600, dim=6, num_clusters=4, spread=1.0, seed=0, shares=None):
    """Overlapping clouds of different shapes, with a mean far from zero."""
    rng = np.random.default_rng(seed)
    which = rng.choice(num_clusters, num_samples, p=shares)
    centers = rng.normal(size=(num_clusters, dim)) * 3
    shapes = rng.normal(size=(num_clusters, dim, dim)) * 0.5
    noise = np.einsum("nd,nde->ne", rng.normal(size=(num_samples, dim)), shapes[which])
    return torch.from_numpy(centers[which] + spread * noise + 50.0)


def dist_sum(tensor):
    dist.all_reduce(tensor)
    return tensor


def my_part(num_samples):
    """Uneven and not contiguous: rank 0 has every third sample, the others share the rest."""
    ids = torch.arange(num_samples)
    rank, size = dist.get_rank(), dist.get_world_size()
    owner = torch.where(ids % 3 == 0, 0, ids % size)
    return ids[owner == rank]


# --- PCA


@pytest.mark.parametrize("num_components", [1, 5, 12])
def test_pca_equals_scikit_learn(num_components):
    samples = blobs(dim=12, num_clusters=3)
    pca = fit_pca(samples.split(97), num_components=num_components)
    for whiten in (False, True):
        theirs = decomposition.PCA(num_components, whiten=whiten, svd_solver="full").fit(samples.numpy())
        assert np.allclose(pca.components, theirs.components_, rtol=0, atol=1e-10)
        assert np.allclose(pca.explained_variance, theirs.explained_variance_, rtol=1e-11, atol=0)
        mine = pca.transform(samples, whiten=whiten)
        assert np.allclose(mine, theirs.transform(samples.numpy()), rtol=0, atol=1e-9)


def test_a_mean_much_larger_than_the_deviation_costs_no_digits():
    samples = blobs(dim=4)
    near, far = (fit_pca((samples + shift).split(50), num_components=4) for shift in (0.0, 2.0**26))
    rounding = 2.0**26 * torch.finfo(torch.float64).eps  # of the shifted samples themselves
    assert torch.allclose(far.explained_variance, near.explained_variance, rtol=20 * rounding, atol=0)


def test_pca_does_not_depend_on_the_chunks_and_keeps_half_precision_inputs_exact():
    samples = blobs().half()
    whole = fit_pca([samples], num_components=6)
    chunked = fit_pca(samples.double().split(7), num_components=6)
    assert torch.allclose(whole.components, chunked.components, rtol=0, atol=1e-9)
    assert whole.transform(samples, whiten=True).dtype == torch.float32


def _pca_peak(num_chunks):
    """Growth of this process's largest resident size while it fits `num_chunks` chunks of 2 MiB."""
    Path("/proc/self/clear_refs").write_text("5")

    def high_water():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    generator = torch.Generator().manual_seed(0)
    fit_pca([torch.randn(4096, 128, generator=generator)], num_components=8)  # libraries load here
    before = high_water()
    fit_pca((torch.randn(4096, 128, generator=generator) for _ in range(num_chunks)), num_components=8)
    return high_water() - before


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_memory_of_pca_does_not_grow_with_the_samples():
    growth_kib = run_distributed(_pca_peak, 1, 200)[0]
    assert growth_kib < 64 * 1024, f"{growth_kib} KiB for 400 MiB of embeddings"


@pytest.mark.parametrize(
    ("samples", "num_components", "message"),
    [
        (torch.randn(13, 30), 20, "got 13 samples of 30 dimensions; take at most 13"),
        (torch.randn(40, 8), 20, "take at most 8"),
        (torch.full((9, 3), 0.1), 2, "all 9 embeddings are the same vector"),
        (torch.cat([torch.randn(9, 3), torch.full((1, 3), torch.nan)]), 2, "1 of 10 embeddings hold NaN"),
        (torch.randn(1, 3), 1, "at least two samples"),
        (torch.randn(9, 3), 0, "at least 1"),
    ],
)
def test_what_pca_cannot_take_is_said(samples, num_components, message):
    with pytest.raises(ValueError, match=message):
        fit_pca([samples], num_components=num_components)


def test_whitening_a_component_without_variance_is_refused():
    flat = torch.randn(50, 3) @ torch.randn(3, 8)
    pca = fit_pca([flat.double()], num_components=5)
    assert pca.rank == 3
    with pytest.raises(ValueError, match="span only 3 dimensions"):
        pca.transform(flat, whiten=True)
    assert len(fit_pca([flat.double()], num_components=5, at_most=True).components) == 3


# --- clusters


def test_samples_go_to_the_clusters_that_scikit_learn_predicts():
    samples = blobs(900, spread=1.5)
    centers = fit_kmeans(samples, torch.arange(900), num_clusters=4)
    theirs = cluster.KMeans(4, init=centers.means.numpy(), n_init=1, max_iter=1).fit(samples.numpy())
    assert (
        centers.assign(samples).numpy() == theirs.predict(samples.numpy())
    ).mean() > 0.995  # they moved once
    assert centers.inertia * 900 == pytest.approx(theirs.inertia_, rel=1e-3)

    mixture = fit_mixture(samples, torch.arange(900), num_clusters=4)
    theirs = GaussianMixture(4)
    theirs.weights_, theirs.means_ = mixture.weights.numpy(), mixture.means.numpy()
    theirs.precisions_cholesky_ = np.linalg.cholesky(np.linalg.inv(mixture.covariances.numpy()))
    assert np.allclose(mixture.probabilities(samples), theirs.predict_proba(samples.numpy()), atol=1e-7)
    assert (mixture.assign(samples).numpy() == theirs.predict(samples.numpy())).all()
    likelihood = mixture.log_densities(samples).logsumexp(dim=1).mean()
    assert likelihood == pytest.approx(theirs.score(samples.numpy()), rel=1e-10)
    assert mixture.lower_bound == pytest.approx(float(likelihood), abs=1e-3)  # EM stopped there
    assert mixture.is_converged


def test_restarts_never_make_it_worse():
    samples, ids = blobs(800, num_clusters=8, spread=2.0), torch.arange(800)
    inertias = [fit_kmeans(samples, ids, num_clusters=8, restarts=count).inertia for count in (1, 3, 10)]
    assert inertias == sorted(inertias, reverse=True)
    bounds = [fit_mixture(samples, ids, num_clusters=8, restarts=count).lower_bound for count in (1, 3, 5)]
    assert bounds == sorted(bounds)
    with pytest.raises(ValueError, match="restarts is 0"):
        fit_kmeans(samples, ids, num_clusters=8, restarts=0)


@pytest.mark.parametrize(("method", "before"), [("gmm", -22.510), ("kmeans", -17.032)])
def test_clusters_of_digits_are_as_good_as_our_own_em_found_them(method, before):
    """`before`: the mean over ten seeds of the EM and k-means of this project that scikit-learn replaced."""
    embeddings = torch.from_numpy(load_digits().data).float()
    scores = []
    for seed in range(3):
        router = Router.fit(embeddings, torch.arange(len(embeddings)), method=method, seed=seed)
        if isinstance(router.clusters, Mixture):
            densities = router.clusters.log_densities(router.reduce(embeddings))
            scores.append(float(densities.logsumexp(dim=1).mean()))
        else:
            scores.append(-router.clusters.inertia)
    assert np.mean(scores) == pytest.approx(before, abs=0.15)  # seeds differ by as much


def test_of_too_many_rows_a_fit_sees_some_drawn_by_the_seed(monkeypatch):
    samples, ids = blobs(3000, dim=3, num_clusters=3, spread=0.4, seed=5), torch.arange(3000)
    whole = fit_mixture(samples, ids, num_clusters=3, restarts=3)
    monkeypatch.setattr(clusters, "MAX_FIT_ROWS", 800)
    total, rows = clusters.gather_rows(samples, ids, num_clusters=3, seed=1)
    assert total == 3000
    assert rows.shape == (800, 3)
    assert (rows[0] == samples[0].float().numpy()).all()
    assert (rows == clusters.gather_rows(samples, ids, num_clusters=3, seed=1)[1]).all()
    assert (rows != clusters.gather_rows(samples, ids, num_clusters=3, seed=2)[1]).any()
    part = fit_mixture(samples, ids, num_clusters=3, restarts=3)
    order = [int((part.means - mean).norm(dim=1).argmin()) for mean in whole.means]
    agreement = (part.reordered(torch.tensor(order)).assign(samples) == whole.assign(samples)).double().mean()
    assert agreement > 0.99


def test_a_fit_takes_one_thread_and_gives_the_others_back(monkeypatch):
    def counts():
        return [(library["filepath"], library["num_threads"]) for library in threadpool_info()]

    seen, whole = [], clusters._fit_on_one_thread

    def watched(fit_fn, entropy):
        def fit(random):
            seen.append(counts())
            return fit_fn(random)

        return whole(fit, entropy)

    monkeypatch.setattr(clusters, "_fit_on_one_thread", watched)
    with threadpool_limits(2):
        before = counts()
        fit_kmeans(blobs(100), torch.arange(100), num_clusters=2)
        assert counts()[: len(before)] == before
    assert {number for _, number in before} == {2}
    assert {number for _, number in seen[0]} == {1}


def _cluster_here(num_samples):
    ids = my_part(num_samples)
    samples = blobs(num_samples)[ids]
    centers = fit_kmeans(samples, ids, num_clusters=4, seed=3, restarts=2, all_reduce=dist_sum).centers
    mixture = fit_mixture(samples, ids, num_clusters=[2, 4], seed=3, restarts=2, all_reduce=dist_sum)
    router = Router.fit(
        samples.float(), ids, num_clusters=4, num_components=3, seed=1, restarts=2, all_reduce=dist_sum
    )
    chunks = samples.split(64) or [samples]
    pca = fit_pca(chunks, num_components=5, all_reduce=dist_sum)
    numbers = {
        **pca.tensors(),
        **{f"mixture.{name}": tensor for name, tensor in mixture.tensors().items()},
        **{f"router.{name}": tensor for name, tensor in router.tensors().items()},
        "kmeans": centers,
    }
    everything = blobs(num_samples).float()
    return {name: tensor.numpy() for name, tensor in numbers.items()}, router.assign(everything).numpy()


@pytest.mark.distributed
def test_components_and_clusters_are_the_same_under_any_number_of_ranks():
    (expected, assigned), *_ = run_distributed(_cluster_here, 1, 700)
    for world_size in (2, 4):
        for found, found_assigned in run_distributed(_cluster_here, world_size, 700):
            assert (found_assigned == assigned).all()
            for name, numbers in expected.items():
                assert np.allclose(found[name], numbers, rtol=1e-8, atol=1e-8), (world_size, name)
                if "pca" not in name and name not in ("mean", "components", "explained_variance"):
                    assert (found[name] == numbers).all(), (world_size, name)  # a fit: to the bit


def _bad_part_on_one_rank():
    ids = my_part(60)
    samples = blobs(60)[ids]
    errors = []
    for broken in ("nan", "ids"):
        mine, my_ids = samples.clone(), ids.clone()
        if dist.get_rank() == 1 and broken == "nan":
            mine[0] = torch.nan
        if dist.get_rank() == 1 and broken == "ids":
            my_ids[0] = 0
        with contextlib.suppress(ValueError):
            Router.fit(mine, my_ids, num_clusters=2, num_components=2, all_reduce=dist_sum)
        try:
            fit_kmeans(mine, my_ids, num_clusters=2, all_reduce=dist_sum)
        except ValueError as error:
            errors.append(str(error))
    return errors


@pytest.mark.distributed
def test_a_fault_on_one_rank_is_raised_on_all_of_them():
    first, second = run_distributed(_bad_part_on_one_rank, 2)
    assert first == second
    assert "1 of 60 samples to cluster hold NaN" in first[0]
    assert "id 0 is there 2 times" in first[1]


def test_the_information_criterion_finds_the_number_of_clusters_and_is_scikit_learns():
    samples = blobs(2000, dim=3, num_clusters=3, spread=0.4, seed=5)
    ids = torch.arange(len(samples))
    counts = [1, 2, 3, 4, 6]
    found = fit_mixture(samples, ids, num_clusters=counts, restarts=3)
    assert len(found.weights) == 3
    theirs = [GaussianMixture(k, n_init=3, random_state=0).fit(samples.numpy()) for k in counts]
    scores = [mixture.bic(samples.numpy()) for mixture in theirs]
    assert min(zip(scores, counts, strict=True))[1] == 3
    assert found.lower_bound == pytest.approx(theirs[2].lower_bound_, rel=1e-5)


def test_a_collapsed_cluster_says_what_to_do():
    twice = torch.cat([blobs(40, dim=3), torch.full((5, 3), 1e6, dtype=torch.float64)])
    with pytest.raises(ValueError, match=r"collapsed .* larger reg_covar"):
        fit_mixture(twice, torch.arange(45), num_clusters=2, reg_covar=0.0)


# --- router


def test_router_follows_the_definition():
    """Normalise, PCA to whitened components, mixture: step by step with scikit-learn's own predict."""
    embeddings = blobs(900, dim=16).float()
    router = Router.fit(embeddings, torch.arange(900), num_clusters=4, num_components=5)
    unit = embeddings.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    reduced = decomposition.PCA(5, whiten=True, svd_solver="full").fit_transform(unit)
    theirs = GaussianMixture(4, reg_covar=0.05, means_init=router.clusters.means.numpy())
    theirs.fit(reduced)
    agreement = (theirs.predict(reduced) == router.assign(embeddings).numpy()).mean()
    assert agreement > 0.98  # another run of EM from the same place, stopped by the same rule
    assert (router.probabilities(embeddings).argmax(dim=1) == router.assign(embeddings)).all()
    assert torch.allclose(router.probabilities(embeddings).sum(dim=1), torch.ones(900).double())
    assert (router.assign(embeddings * 7) == router.assign(embeddings)).all()  # length means nothing


@pytest.mark.parametrize("method", ["gmm", "kmeans"])
def test_clusters_come_by_size_whatever_the_seed(method):
    embeddings = blobs(1500, dim=8, num_clusters=3, spread=0.3, shares=[0.2, 0.5, 0.3], seed=7)
    embeddings = embeddings - 50
    routers = [
        Router.fit(embeddings, torch.arange(1500), num_clusters=3, num_components=4, method=method, seed=seed)
        for seed in range(3)
    ]
    for router in routers:
        assert router.sizes.tolist() == sorted(router.sizes.tolist(), reverse=True)
        assert router.sizes.tolist() == torch.bincount(router.assign(embeddings), minlength=3).tolist()
        assert (router.assign(embeddings) == routers[0].assign(embeddings)).all()
    assert routers[0].sizes[0] > 650


@pytest.mark.parametrize("method", ["gmm", "kmeans"])
def test_a_router_survives_its_tensors_exactly(method):
    embeddings = blobs(300, dim=10)
    router = Router.fit(embeddings, torch.arange(300), num_clusters=3, num_components=4, method=method)
    again = Router.from_tensors({name: tensor.clone() for name, tensor in router.tensors().items()})
    assert torch.equal(again.probabilities(embeddings), router.probabilities(embeddings))
    assert {name: tensor.tolist() for name, tensor in again.tensors().items()} == {
        name: tensor.tolist() for name, tensor in router.tensors().items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "dbscan"}, "choose from gmm, kmeans"),
        ({"method": "kmeans", "num_clusters": [2, 3]}, "one number of clusters"),
        ({"num_clusters": 301, "num_components": 2}, "ask for at most 300"),
        ({"num_components": 20}, "take at most 10"),
        ({"num_clusters": 0}, "at least 1"),
    ],
)
def test_what_a_router_cannot_do_is_said(change, message):
    arguments = {"num_clusters": 3, "num_components": 4, **change}
    with pytest.raises(ValueError, match=message):
        Router.fit(blobs(300, dim=10), torch.arange(300), **arguments)


def test_a_cluster_that_is_too_small_is_said():
    router = Router.fit(blobs(300, dim=10), torch.arange(300), num_clusters=3, num_components=4)
    with pytest.raises(ValueError, match=r"smallest cluster has \d+ samples, fewer than 200"):
        router.check_sizes(at_least=200)


def test_fewer_different_embeddings_than_clusters_is_said():
    few = torch.randn(3, 10).repeat(30, 1)
    with pytest.raises(ValueError, match="5 clusters need as many different embeddings, found 3"):
        Router.fit(few, torch.arange(90), num_clusters=5, num_components=2)


def test_other_tensors_are_no_router():
    with pytest.raises(ValueError, match="not a router's tensors"):
        Router.from_tensors(PCA(torch.zeros(2), torch.eye(2), torch.ones(2), 3).tensors())
