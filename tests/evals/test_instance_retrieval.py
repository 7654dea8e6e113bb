"""Instance retrieval against hand-made embeddings, over ranks, and its paired standard error."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data.order import sample_generator
from selfmask_dist.evals.embeddings import Embeddings
from selfmask_dist.evals.instance_retrieval import VIEW_SEED, compare, find_own, mild_view
from selfmask_dist.parallel import World
from tests.support.distributed import run_distributed

PRE = Preprocessing(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 1.0)


def made_up(number: int = 37, dim: int = 6, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(number, dim, generator=generator)
    return clean, clean + noise * torch.randn(number, dim, generator=generator)


def of(features: Tensor) -> Embeddings:
    return Embeddings.of(features, torch.full((len(features),), -1))


def own(clean: Tensor, views: Tensor) -> list[bool]:
    return find_own(of(clean), of(views))


def test_hits_are_those_of_the_definition() -> None:
    clean, views = made_up()
    unit = [torch.nn.functional.normalize(one.double()) for one in (views, clean)]
    similarities = unit[0] @ unit[1].T
    expected = [int(row.argmax()) == place for place, row in enumerate(similarities)]
    assert own(clean, views) == expected
    assert 0.2 < np.mean(expected) < 0.95, "some are found and some are not"
    assert all(own(clean, 3 * clean)), "lengths do not matter"


def test_a_collapsed_encoder_finds_nothing() -> None:
    clean, _ = made_up()
    constant = clean[:1].expand(37, -1).contiguous()
    assert not any(own(constant, constant))
    assert not any(own(torch.zeros(37, 6), torch.zeros(37, 6)))
    rounded = constant * (1 + 1e-7 * torch.randn(37, 6, generator=torch.Generator().manual_seed(1)))
    assert not any(own(rounded, rounded)), "differences that rounding makes are none"


def test_a_tie_is_a_miss_for_both_pictures() -> None:
    clean, _ = made_up()
    clean[5] = clean[4]
    assert [place for place, hit in enumerate(own(clean, clean)) if not hit] == [4, 5]


def of_rank(number: int) -> list[list[bool]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    clean, views = made_up(number)
    mine = torch.arange(rank, number, size)
    parts = (Embeddings(one[mine], torch.full((len(mine),), -1), mine) for one in (clean, views))
    return [find_own(next(parts), next(parts), World(rank, size))]


@pytest.mark.distributed
def test_every_rank_gets_the_hits_of_one_process() -> None:
    expected = own(*made_up(37))
    for hits in run_distributed(of_rank, 2, 37):
        assert hits == [expected]


def test_the_standard_error_is_paired() -> None:
    before = [True] * 30 + [False] * 70
    after = [True] * 25 + [False] * 5 + [True] * 20 + [False] * 50
    found = compare(before, after)
    differences = np.array(after, dtype=int) - np.array(before, dtype=int)
    assert found.before == 0.3
    assert found.after == 0.45
    assert found.difference == pytest.approx(0.15)
    assert found.standard_error == pytest.approx(differences.std(ddof=1) / 10)
    unpaired = math.sqrt((0.3 * 0.7 + 0.45 * 0.55) / 100)
    assert found.standard_error < 0.8 * unpaired
    assert compare(before, before).standard_error == 0
    with pytest.raises(ValueError, match="same pictures"):
        compare(before, after[1:])


def test_the_view_is_mild_and_the_same_each_time() -> None:
    colours = np.random.default_rng(0).integers(100, 156, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(np.kron(colours, np.ones((5, 5, 1), dtype=np.uint8)))

    def view(sample: int, *, flip: bool = True) -> Tensor:
        rng = sample_generator(seed=VIEW_SEED, epoch=0, sample=sample)
        return mild_view(PRE, flip=flip)(image, rng)[0]

    assert view(3).shape == (3, 16, 16)
    assert torch.equal(view(3), view(3))
    assert not torch.equal(view(3), view(4))
    views = torch.stack([view(sample) for sample in range(40)]) / 2 + 0.5
    means = views.mean(dim=(1, 2, 3)) / 0.5
    assert 0.65 < float(means.min()) < 0.85, "brightness by 30 %, and no more"
    assert 1.15 < float(means.max()) < 1.35
    assert float(views.std(dim=1).mean(dim=(1, 2)).min()) > 0.01, "none is grey"
    mirrored = [not torch.equal(view(sample), view(sample, flip=False)) for sample in range(40)]
    assert 10 < sum(mirrored) < 30
