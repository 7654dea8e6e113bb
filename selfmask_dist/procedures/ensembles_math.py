"""Several masks of one backbone against several small models of the same stored size.

    embedding = mean of unit embeddings        logits = mean of the members' log probabilities

A mask costs about a bit per weight and a model of its own 32, so that many masks take the place of one model;
which of the two ensembles is better at the same stored bits is to be measured. (Ensembles of networks:
Lakshminarayanan, Pritzel, Blundell, NeurIPS 2017, arXiv 1612.01474.) Knows embeddings and logits alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfmask_dist.evals import (
    Alone,
    ProbeResult,
    Ranks,
    global_knn,
    linear_probe,
    mean_embedding,
    mean_logits_accuracy,
)
from selfmask_dist.evals.ranks import share


@dataclass(frozen=True)
class Member:
    """One mask or model: embeddings (n, dim) of both splits, its own head's logits (m, classes) of test."""

    train: Tensor
    test: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Split:
    """The samples that all members embed: labels and, over ranks, places (n,) int64 in the whole."""

    labels: Tensor
    ids: Tensor


def measure(
    members: Sequence[Member],
    train: Split,
    test: Split,
    *,
    ks: Sequence[int] = (20,),
    temperature: float = 0.1,
    probe: bool = True,
    seed: int = 0,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Accuracies in [0, 1] of one ensemble. Collective if `ranks` is.

    knn<k>: of the mean embedding. head: of the mean of the members' heads; head_alone: the mean of their own
    accuracies. probe: of the mean embedding; probe_logits: of the mean of the members' probes; probe_alone:
    the mean of theirs.

    Args:
        members: of one embedding dimension, of the same samples: this rank's.
        probe: whether to train probes.

    Raises:
        ValueError: no members, or members that differ in shape.
    """
    if not members:
        raise ValueError("an ensemble has one member or more")
    ranks = ranks or Alone()
    mean_train = mean_embedding([member.train for member in members])
    mean_test = mean_embedding([member.test for member in members])
    num_classes = members[0].logits.shape[1]
    found = global_knn(
        *(mean_train, train.labels, train.ids, mean_test, test.labels),
        num_classes=num_classes,
        ks=ks,
        temperatures=(temperature,),
        ranks=ranks,
    )
    values = {f"knn{k}": accuracy for (k, _), accuracy in found.accuracy.items()}
    heads = torch.stack([member.logits.double().log_softmax(dim=1) for member in members])
    alone = [share(head.argmax(dim=1) == test.labels, ranks) for head in heads]
    values["head"] = share(heads.mean(dim=0).argmax(dim=1) == test.labels, ranks)
    values["head_alone"] = sum(alone) / len(alone)
    if probe:

        def fit(features: Tensor, queries: Tensor) -> ProbeResult:
            return linear_probe(
                *(features, train.labels, queries, test.labels), seed=seed, ranks=ranks, train_ids=train.ids
            )

        probes = [fit(member.train, member.test) for member in members]
        values["probe"] = fit(mean_train, mean_test).accuracy
        values["probe_logits"] = mean_logits_accuracy(probes, test.labels, ranks)
        values["probe_alone"] = sum(result.accuracy for result in probes) / len(probes)
    return values
