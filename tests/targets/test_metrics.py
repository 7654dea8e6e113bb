"""Metrics and probes of targets, held against scikit-learn's and torchmetrics'."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, r2_score
from torch.nn import functional as F
from torchmetrics.classification import MultilabelAveragePrecision
from torchmetrics.regression import MeanAbsoluteError, R2Score
from torchmetrics.segmentation import MeanIoU

from selfmask_dist.data.targets import IGNORED
from selfmask_dist.evals.embeddings import Embeddings
from selfmask_dist.evals.targets.metrics import (
    confusion,
    mean_average_precision,
    mean_iou,
    regression_scores,
)
from selfmask_dist.evals.targets.patches import class_shares
from selfmask_dist.evals.targets.probe import probe_targets

ROWS, CLASSES, DIM = 60, 4, 6


def test_mean_average_precision(generator: torch.Generator) -> None:
    scores = torch.randn(ROWS, CLASSES, generator=generator)
    targets = (torch.rand(ROWS, CLASSES, generator=generator) < 0.3).long()
    found = mean_average_precision(scores, targets)
    assert found == pytest.approx(average_precision_score(targets.numpy(), scores.numpy(), average="macro"))
    theirs = MultilabelAveragePrecision(num_labels=CLASSES, average="macro")
    assert found == pytest.approx(float(theirs(scores, targets)), abs=1e-6)
    targets[:, 2] = 0  # a class that nothing is of is left out
    others = [0, 1, 3]
    expected = average_precision_score(targets[:, others].numpy(), scores[:, others].numpy())
    assert mean_average_precision(scores, targets) == pytest.approx(expected)
    with pytest.raises(ValueError, match="no test image has any label"):
        mean_average_precision(scores, torch.zeros_like(targets))


def test_regression_scores(generator: torch.Generator) -> None:
    truth = torch.randn(ROWS, 3, generator=generator) * torch.tensor([1.0, 100.0, 0.1])
    found = truth + 0.3 * truth.std(dim=0) * torch.randn(ROWS, 3, generator=generator)
    scores = regression_scores(found, truth)
    assert scores["r2"] == pytest.approx(r2_score(truth.numpy(), found.numpy()))
    assert scores["r2"] == pytest.approx(float(R2Score()(found, truth)), abs=1e-5)
    assert scores["mae"] == pytest.approx(float(MeanAbsoluteError()(found, truth)), rel=1e-5)
    with pytest.raises(ValueError, match="two test images"):
        regression_scores(found[:1], truth[:1])


def test_mean_iou(generator: torch.Generator) -> None:
    found = torch.randint(CLASSES, (5, 8, 8), generator=generator)
    truth = torch.randint(CLASSES, (5, 8, 8), generator=generator)
    counts = sum(confusion(found[i], truth[i], CLASSES) for i in range(5))
    # torchmetrics' is a mean over pictures; one picture of all pixels is ours
    theirs = MeanIoU(num_classes=CLASSES, input_format="index")
    theirs.update(found.reshape(1, -1, 8), truth.reshape(1, -1, 8))
    assert isinstance(counts, torch.Tensor)
    assert mean_iou(counts) == pytest.approx(float(theirs.compute()), abs=1e-6)
    truth[0] = IGNORED
    assert torch.equal(confusion(found, truth, CLASSES), confusion(found[1:], truth[1:], CLASSES))
    with pytest.raises(ValueError, match="no pixel"):
        mean_iou(confusion(found[:1], truth[:1], CLASSES))


def embeddings(generator: torch.Generator) -> tuple[Embeddings, Embeddings]:
    rows = torch.randn(2 * ROWS, DIM, generator=generator)
    labels = torch.zeros(ROWS, dtype=torch.int64)
    return Embeddings.of(rows[:ROWS], labels), Embeddings.of(rows[ROWS:], labels)


def standardised(train: Embeddings, test: Embeddings) -> tuple[np.ndarray, np.ndarray]:
    rows = train.features.double()
    mean, deviation = rows.mean(dim=0), rows.std(dim=0, correction=0)
    return ((rows - mean) / deviation).numpy(), ((test.features.double() - mean) / deviation).numpy()


def test_the_probe_of_labels_is_logistic_regression(generator: torch.Generator) -> None:
    train, test = embeddings(generator)
    wanted = (train.features[:, :CLASSES] + 0.5 * train.features[:, 1:2] > 0.3).float()
    truth = (test.features[:, :CLASSES] + 0.5 * test.features[:, 1:2] > 0.3).float()
    found = probe_targets("multilabel", (train, wanted), (test, truth), l2=[1e-2])
    ours, others = standardised(train, test)
    for c in range(CLASSES):
        model = LogisticRegression(C=1 / (ROWS * 1e-2), tol=1e-10, max_iter=10_000)
        model.fit(ours, wanted[:, c].numpy())
        np.testing.assert_allclose(found.outputs[:, c].numpy(), model.decision_function(others), atol=1e-4)
    assert found.scores["map"] == pytest.approx(mean_average_precision(found.outputs, truth))
    chosen = probe_targets("multilabel", (train, wanted), (test, truth))
    assert chosen.l2 == max(chosen.validation, key=lambda one: (chosen.validation[one], one))


def test_the_probe_of_numbers_is_a_ridge_regression(generator: torch.Generator) -> None:
    train, test = embeddings(generator)
    weight = torch.randn(DIM, 2, generator=generator) * torch.tensor([1.0, 50.0])
    wanted, truth = train.features @ weight + 7, test.features @ weight + 7
    found = probe_targets("regression", (train, wanted), (test, truth), l2=[0.1])
    ours, others = standardised(train, test)
    for k in range(2):
        y = wanted[:, k].double().numpy()
        model = Ridge(alpha=0.1 * ROWS).fit(ours, y)
        np.testing.assert_allclose(found.outputs[:, k].numpy(), model.predict(others), rtol=1e-6, atol=1e-6)
    assert probe_targets("regression", (train, wanted), (test, truth)).scores["r2"] > 0.999
    train.features[3, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        probe_targets("regression", (train, wanted), (test, truth))


def test_the_shares_of_classes_in_patches(generator: torch.Generator) -> None:
    labels = torch.randint(CLASSES, (3, 8, 6), generator=generator)
    labels[0, :4, :3] = IGNORED
    labels[1, 0, 0] = IGNORED
    shares = class_shares(labels, (2, 2), CLASSES)
    assert shares.shape == (3, 2, 2, CLASSES)
    assert not shares[0, 0, 0].any()
    patch = labels[1, :4, :3].flatten()
    expected = F.one_hot(patch[1:], CLASSES).float().mean(dim=0)
    torch.testing.assert_close(shares[1, 0, 0], expected)
