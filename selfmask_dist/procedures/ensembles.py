"""Several masks of one backbone against several small models of the same stored size.

    embedding = mean of unit embeddings        logits = mean of the members' probes' log probabilities

A mask costs about a bit per weight and a model of its own 32, so that many masks take the place of one model;
which of the two ensembles is better at the same stored bits is to be measured. (Ensembles of networks:
Lakshminarayanan, Pritzel, Blundell, NeurIPS 2017, arXiv 1612.01474.) Knows embeddings and bits
alone, no models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from selfmask_dist.evals import knn_accuracy, linear_probe, mean_embedding, mean_logits_accuracy


@dataclass(frozen=True)
class Member:
    """One mask or model: its embeddings (n, dim) of both splits, and what it takes to store it."""

    train: Tensor
    test: Tensor
    stored_bits: int


@dataclass(frozen=True)
class Ensemble:
    """What an ensemble reaches, and what each of it takes.

    single: mean accuracy of the members' probes alone. probe, knn: of the mean embedding. logits: of the mean
    of the members' probes. bits: of each member, beside what all members share.
    """

    name: str
    single: float
    probe: float
    knn: float
    logits: float
    bits: tuple[int, ...]
    shared_bits: int

    @property
    def total_bits(self) -> int:
        return sum(self.bits) + self.shared_bits


def measure(
    name: str,
    members: Sequence[Member],
    train_labels: Tensor,
    test_labels: Tensor,
    *,
    shared_bits: int = 0,
    k: int = 20,
    seed: int = 0,
) -> Ensemble:
    """Probe and k-NN accuracies in [0, 1] of one ensemble.

    Args:
        members: of one embedding dimension, of the same samples.
        train_labels, test_labels: int64.
        shared_bits: what is stored once for all members, such as the backbone under masks.
        k: neighbours.

    Raises:
        ValueError: no members, or members that differ in shape.
    """
    if not members:
        raise ValueError(f"ensemble {name!r} has no members")
    train = mean_embedding([member.train for member in members])
    test = mean_embedding([member.test for member in members])
    probes = [linear_probe(m.train, train_labels, m.test, test_labels, seed=seed) for m in members]
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    found = knn_accuracy(train, train_labels, test, test_labels, ks=(k,), num_classes=num_classes)
    return Ensemble(
        name=name,
        single=sum(probe.accuracy for probe in probes) / len(probes),
        probe=linear_probe(train, train_labels, test, test_labels, seed=seed).accuracy,
        knn=next(iter(found.values())),
        logits=mean_logits_accuracy(probes, test_labels),
        bits=tuple(member.stored_bits for member in members),
        shared_bits=shared_bits,
    )


def compare(ensembles: Sequence[Ensemble]) -> str:
    """Ensembles by accuracy and stored bits, as text."""
    head = "".join(f"{word:>8s}" for word in ("single", "probe", "k-NN", "logits"))
    lines = [f"{'':24s}{head}{'members':>9s}{'bits each':>14s}{'bits':>14s}"]
    lines += [
        f"{e.name:24s}{e.single:8.3f}{e.probe:8.3f}{e.knn:8.3f}{e.logits:8.3f}{len(e.bits):9d}"
        f"{sum(e.bits) // len(e.bits):14,d}{e.total_bits:14,d}"
        for e in ensembles
    ]
    return "\n".join(lines)
