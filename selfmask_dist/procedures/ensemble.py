"""Several masks of one backbone against several small models of the same stored size.

    embedding = mean of unit embeddings        logits = mean of the members' log probabilities

A mask costs about a bit per weight and a model of its own 32, so that many masks take the place of one model;
which of the two ensembles is better at the same stored bits is to be measured. (Ensembles of networks:
Lakshminarayanan, Pritzel, Blundell, NeurIPS 2017, arXiv 1612.01474.) The measures come first and know
embeddings and logits alone; the run, which trains the members, is below them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from selfmask_dist.common.names import HEAD
from selfmask_dist.config import Config
from selfmask_dist.evals import (
    Alone,
    Embeddings,
    ProbeResult,
    Ranks,
    global_knn,
    linear_probe,
    mean_embedding,
    mean_logits_accuracy,
)
from selfmask_dist.evals.ranks import share
from selfmask_dist.procedures.classifier import adapted_encoder, embeddings, logits, open_classifier
from selfmask_dist.runs.context import RunContext
from selfmask_dist.training.build import open_data
from selfmask_dist.training.chain import Chain, other_seed


@dataclass(frozen=True)
class Member:
    """What one mask or model gives: embeddings (n, dim) of both splits, and logits (m, classes) of the test
    split by its own head.
    """

    train: Tensor
    test: Tensor
    logits: Tensor


@dataclass(frozen=True)
class SplitLabels:
    """The samples of a split, which all members embed: labels (n,) and, where ranks share the split, the
    samples' numbers in the whole, (n,) int64.
    """

    labels: Tensor
    ids: Tensor


def measure_ensemble(
    members: Sequence[Member],
    train: SplitLabels,
    test: SplitLabels,
    *,
    ks: Sequence[int] = (20,),
    temperature: float = 0.1,
    probe: bool = True,
    seed: int = 0,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Return the accuracies in [0, 1] of one ensemble. Collective if `ranks` is.

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
        Embeddings(mean_train, train.labels, train.ids),
        Embeddings(mean_test, test.labels, test.ids),
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
            parts = (
                Embeddings(features, train.labels, train.ids),
                Embeddings(queries, test.labels, test.ids),
            )
            return linear_probe(*parts, seed=seed, ranks=ranks)

        probes = [fit(member.train, member.test) for member in members]
        values["probe"] = fit(mean_train, mean_test).accuracy
        values["probe_logits"] = mean_logits_accuracy(probes, test.labels, ranks)
        values["probe_alone"] = sum(result.accuracy for result in probes) / len(probes)
    return values


# ---- the run


def run_ensemble(chain: Chain) -> dict[str, Any]:
    """Learn the masks, train the small models where `procedure.small_backbone` has one, measure both."""
    config, section = chain.config, chain.config.procedure
    small: dict[str, Any] = {"pretrained": False, "weights": None, **section.small_backbone}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {"masks": ("mask", chain.frozen_backbone())}
    if section.small_backbone:
        kinds["small_models"] = ("finetune", small)
    found, results = {}, {}
    for kind, (method, backbone) in kinds.items():
        stages = [f"member-{kind}-{index}" for index in range(section.members)]
        results[kind] = [
            chain.train(
                stage,
                method=method,
                seed=other_seed(config.seed, index),
                backbone=backbone,
                eval={"frozen_baseline": False, "final": False},
            )
            for index, stage in enumerate(stages)
        ]
        sizes = [run["mask"]["bytes"] if "mask" in run else run["stored_bytes"] for run in results[kind]]
        measure = partial(_measure_kind, config, backbone, stages, sizes, chain)
        found[kind] = chain.measure(f"{kind}.json", measure)
    masks = found["masks"]
    return {
        **found,
        "adapted": {name: value for name, value in masks.items() if name != "bits"},
        "active": sum(run["mask"]["active"] for run in results["masks"]) / section.members,
        "stored_bytes": masks["bits"] // 8,
    }


def _measure_kind(
    config: Config,
    backbone: dict[str, Any],
    stages: list[str],
    sizes: list[int],
    chain: Chain,
    context: RunContext,
) -> dict[str, Any]:
    """Return the ensemble's measures, and the bits of all members."""
    values = config.model_dump(mode="json")
    values["backbone"] = {**values["backbone"], **backbone}
    of_member = type(config).model_validate(values)
    sources = open_data(config)
    members, splits = [], []
    for stage in stages:
        network = open_classifier(of_member, sources[0].classes)
        network.encoder.load_state_dict(adapted_encoder(of_member, chain.folder / stage))
        network.objective.load_state_dict(load_file(chain.folder / stage / HEAD))
        network.to(context.world.device)
        train, test = (embeddings(config, network, source, context) for source in sources)
        heads = logits(config, network, sources[1], context)
        members.append(Member(train.features, test.features, heads.features))
        splits = [SplitLabels(part.labels, part.ids) for part in (train, test)]
    section = config.eval
    accuracies = measure_ensemble(
        members,
        *splits,
        ks=sorted(set(section.knn_k)),
        temperature=section.knn_temperature,
        probe=section.probe,
        seed=config.seed,
        ranks=context.world,
    )
    return {**accuracies, "bits": 8 * sum(sizes)}
