"""Class imbalance: a balanced epoch, and weights of classes in the loss."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from selfmask_dist import data
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.config.objectives import ObjectiveConfig
from selfmask_dist.data.order import balanced_order
from selfmask_dist.objectives import Supervised
from tests.support.tars import picture, write_tar

PRE = Preprocessing(8, (0.5,) * 3, (0.5,) * 3, crop_pct=1.0)
LABELS = np.array([0] * 50 + [1] * 8 + [3] * 2)  # 2 has no sample


def test_each_class_comes_equally_often_and_a_function_of_seed_and_epoch_says_which() -> None:
    order = balanced_order(LABELS, seed=3, epoch=1)
    counts = Counter(LABELS[order].tolist())
    assert counts == {0: 20, 1: 20, 3: 20}
    times = Counter(order.tolist())
    assert max(times[i] for i in range(50)) == 1  # of the common class none twice
    assert sorted(times[i] for i in range(50, 58)) == [2, 2, 2, 2, 3, 3, 3, 3]
    assert [times[i] for i in (58, 59)] == [10, 10]
    assert np.array_equal(order, balanced_order(LABELS, seed=3, epoch=1))
    for other in (balanced_order(LABELS, seed=3, epoch=2), balanced_order(LABELS, seed=4, epoch=1)):
        assert not np.array_equal(order, other)
    assert (Counter(LABELS[order[:30]].tolist())[3]) not in (0, 20)  # classes are mixed
    with pytest.raises(ValueError, match="label of every"):
        balanced_order(np.array([0, -1]), seed=0, epoch=0)


def test_ranks_and_a_resume_see_one_balanced_epoch(tmp_path: Path) -> None:
    members = []
    for number, label in enumerate([0] * 9 + [1] * 3):
        key = f"{number:02d}"
        members += [(f"{key}.jpg", picture(number)), (f"{key}.cls", str(label).encode())]
    write_tar(tmp_path / "a.tar", members)
    source = data.open_source(tmp_path)

    def ids(rank: int, ranks: int, *, first: int = 0) -> list[list[int]]:
        loader = data.train_loader(
            source, data.eval_transform(PRE), global_batch_size=4, seed=0, rank=rank, world_size=ranks
        ).with_balance()
        loader.set_epoch(1, first_step=first)
        return [batch.ids.tolist() for batch in loader]

    whole = ids(0, 1)
    assert Counter(int(i >= 9) for batch in whole for i in batch) == {0: 6, 1: 6}
    halves = [ids(rank, 2) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch) for batch in whole]
    assert ids(0, 1, first=2) == whole[2:]


def test_weights_of_classes(generator: torch.Generator) -> None:
    labels = torch.tensor([0] * 6 + [1] * 2)
    images = torch.randn(8, 3, 2, 2, generator=generator)
    batch = data.Batch((images,), labels, torch.ones(8), torch.arange(8), 8)
    plain, weighted = (
        Supervised(12, 2, ObjectiveConfig.model_validate({"class_weights": kind}), seed=1)
        for kind in ("none", "balanced")
    )
    shares = torch.tensor([0.75, 0.25], dtype=torch.float64)
    for objective in (plain, weighted):
        objective.know(data.TargetSummary(("a", "b"), 8, shares))
        assert objective.head is not None
        nn.init.normal_(objective.head.weight, generator=torch.Generator().manual_seed(2))
    assert plain.state_dict().keys() == weighted.state_dict().keys()
    losses = F.cross_entropy(plain.predict(nn.Flatten(), images), labels, reduction="none")
    torch.testing.assert_close(plain(nn.Flatten(), batch)[0], losses.mean())
    # each class's mean loss counts alike
    expected = (losses[:6].mean() + losses[6:].mean()) / 2
    torch.testing.assert_close(weighted(nn.Flatten(), batch)[0], expected)
    with pytest.raises(ValueError, match="class 'b'"):
        weighted.know(data.TargetSummary(("a", "b"), 8, torch.tensor([1.0, 0.0])))
