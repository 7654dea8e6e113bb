"""Numbers of networks that a procedure made: an encoder with its head, on one split or another.

    network = open_classifier(config, classes)             images -> logits, by the names of `whole_state`
    logits = embed(network, batches(...), world=world)     this rank's

Every function that takes a `RunContext` is a collective: every rank must call.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from selfmask_dist import data
from selfmask_dist.backbones import Backbone
from selfmask_dist.config import Config
from selfmask_dist.evals.embed import Embeddings, embed
from selfmask_dist.evals.measure import measure_knn, measure_probe
from selfmask_dist.evals.ranks import share
from selfmask_dist.objectives import Context, Objective
from selfmask_dist.runs.context import RunContext
from selfmask_dist.training.build import build_backbone, build_objective
from selfmask_dist.training.chain import Tensors
from selfmask_dist.training.saving import read_outcome


class Classifier(nn.Module):
    """An encoder and an objective's head as one network: images (n, 3, H, W) -> logits (n, classes)."""

    def __init__(self, backbone: Backbone, objective: Objective) -> None:
        super().__init__()
        self.encoder, self.objective = backbone.encoder, objective
        self.preprocessing = backbone.spec.preprocessing

    def forward(self, images: Tensor) -> Tensor:
        return self.objective.predict(self.encoder, images)


def open_classifier(config: Config, classes: tuple[str, ...]) -> Classifier:
    """Return the configuration's backbone with a new head for `classes`, in eval mode, on the CPU."""
    backbone = build_backbone(config)
    objective = build_objective(config, backbone, classes, Context(), steps_per_epoch=1)
    return Classifier(backbone, objective).eval()


def whole_state(run: Path) -> Tensors:
    """Return encoder and head of a finished finetune run, by their names in `Classifier`."""
    outcome = read_outcome(run)
    assert outcome.weights is not None
    return name_parts(load_file(outcome.weights), outcome.head_state())


def name_parts(encoder: Tensors, head: Tensors) -> Tensors:
    """Return the tensors of both by their names in `Classifier`."""
    return {f"encoder.{name}": tensor for name, tensor in encoder.items()} | {
        f"objective.{name}": tensor for name, tensor in head.items()
    }


def part_of(state: Tensors, name: str) -> Tensors:
    """Return the tensors of `encoder` or `objective`, by their names in it."""
    return {key.removeprefix(f"{name}."): t for key, t in state.items() if key.startswith(f"{name}.")}


def adapted_encoder(config: Config, run: Path) -> Tensors:
    """Return the whole state of the encoder that a finished run of method=mask or finetune ended with."""
    encoder = build_backbone(config).encoder
    read_outcome(run).put_on(encoder)
    return dict(encoder.state_dict())


def batches(
    config: Config, network: Classifier, source: data.Source, context: RunContext
) -> Iterator[data.Batch]:
    """Yield this rank's part of a source, as the encoder sees images in evaluations."""
    loader = data.eval_loader(
        source,
        data.eval_transform(network.preprocessing),
        batch_size=config.eval.batch_size,
        rank=context.world.rank,
        world_size=context.world.size,
        workers=data.Workers(config.engine.workers, config.engine.worker_kind),
    )
    check = context.paced_check()
    for batch in loader:
        yield batch
        check()


def embeddings(config: Config, network: Classifier, source: data.Source, context: RunContext) -> Embeddings:
    """Return this rank's embeddings of a source, with labels and ids."""
    loader, precision = batches(config, network, source, context), config.eval.precision
    return embed(network.encoder, loader, world=context.world, precision=precision)


def logits(config: Config, network: Classifier, source: data.Source, context: RunContext) -> Embeddings:
    """Return this rank's class logits of a source, with labels and ids."""
    loader, precision = batches(config, network, source, context), config.eval.precision
    return embed(network, loader, world=context.world, precision=precision)


def accuracy(found: Embeddings, context: RunContext) -> float:
    """Return the share of logits that are largest at the label."""
    return share(found.features.argmax(dim=1) == found.labels, context.world)


def mean_loss(found: Embeddings, context: RunContext) -> float:
    """Return the mean cross-entropy of logits, in nats."""
    total = F.cross_entropy(found.features.double(), found.labels, reduction="sum")
    sums = torch.stack([total, total.new_tensor(len(found.labels))])
    loss, count = context.world.sum(sums).tolist()
    return float(loss / count)


def measure_all(
    config: Config, network: Classifier, bank: data.Source, queries: data.Source, context: RunContext
) -> dict[str, float]:
    """Return k-NN and probe by the `bank`, and the network's own head, on the `queries`."""
    return measure_encoder(config, network, embeddings(config, network, bank, context), queries, context) | {
        "head": accuracy(logits(config, network, queries, context), context)
    }


def measure_encoder(
    config: Config, network: Classifier, bank: Embeddings, queries: data.Source, context: RunContext
) -> dict[str, float]:
    """Return k-NN and, where `eval.probe` asks for it, the probe by embeddings of a bank."""
    found, section = embeddings(config, network, queries, context), config.eval
    values = measure_knn(
        bank,
        found,
        section.knn_k,
        section.knn_temperature,
        num_classes=len(queries.classes),
        world=context.world,
        memory_mib=section.search_mib,
    )
    if section.probe:
        world, check = context.world, context.paced_check()
        values["probe"] = measure_probe(bank, found, seed=config.seed, world=world, on_step=check)
    return values


def load_images(
    network: Classifier, source: data.Source, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and labels of a whole source in batches, the same on every rank. No collective."""
    loader = data.eval_loader(source, data.eval_transform(network.preprocessing), batch_size=batch_size)
    for batch in loader:
        rows = batch.weights > 0
        yield batch.views[0][rows].to(device), batch.labels[rows].to(device)
