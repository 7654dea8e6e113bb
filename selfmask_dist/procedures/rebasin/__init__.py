"""Git Re-Basin as a run: two trainings from other seeds, one of them permuted next to the other, averaged.

Loss barriers along the line are measured before and after, on training images; of the ways to match, the one
with the lower barrier makes the merged network. Statistics of batch normalisation are measured anew wherever
networks are mixed.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from selfmask_dist import data
from selfmask_dist.backbones import weights
from selfmask_dist.config import Config
from selfmask_dist.procedures.classifier import (
    Classifier,
    load_images,
    logits,
    mean_loss,
    measure_all,
    open_classifier,
    part_of,
    whole_state,
)
from selfmask_dist.procedures.rebasin import match as rebasin
from selfmask_dist.procedures.rebasin import permutation
from selfmask_dist.procedures.rebasin.specs import classifier_spec
from selfmask_dist.runs.context import RunContext
from selfmask_dist.training.build import open_data
from selfmask_dist.training.chain import Chain, Tensors, other_seed

_AS_THEY_ARE, _WAYS = "as they are", ("weights", "activations")


def run_rebasin(chain: Chain) -> dict[str, Any]:
    """Train twice, match, measure; `merged.safetensors` and `merged_head.safetensors` are the average."""
    config = chain.config
    train, _ = open_data(config)
    spec = _spec(open_classifier(config, train.classes))  # what cannot be permuted is refused before training
    results = [
        chain.train(name, seed=other_seed(config.seed, index))
        for index, name in enumerate(("first", "second"))
    ]
    first, second = (whole_state(chain.folder / name) for name in ("first", "second"))
    moved = {_AS_THEY_ARE: second}
    for way in _WAYS:
        path = chain.once(f"matched-by-{way}.safetensors", _match, config, way, first, second, spec)
        moved[way] = load_file(path)
    barriers = {
        way: chain.measure(
            f"barrier-{way.replace(' ', '-')}.json", partial(_measure_barrier, config, first, state)
        )["barrier"]
        for way, state in moved.items()
    }
    best = min(_WAYS, key=barriers.__getitem__)
    merged = {
        way: chain.once(f"average-{way.replace(' ', '-')}.safetensors", _average, config, first, moved[way])
        for way in (_AS_THEY_ARE, best)
    }
    reached = {
        way: chain.measure(f"reached-{way.replace(' ', '-')}.json", partial(_measure_merged, config, path))
        for way, path in merged.items()
    }
    encoder = chain.once("merged.safetensors", lambda: part_of(load_file(merged[best]), "encoder"))
    chain.once("merged_head.safetensors", lambda: part_of(load_file(merged[best]), "objective"))
    return {
        "networks": [result["adapted"] for result in results],
        "barriers": barriers,
        "matched_by": best,
        "averaged_as_they_are": reached[_AS_THEY_ARE],
        "adapted": reached[best],
        "stored_bytes": encoder.stat().st_size,
    }


def _spec(network: Classifier) -> permutation.Spec:
    head = network.objective.get_submodule("head")
    assert isinstance(head, nn.Linear)
    return classifier_spec(network.encoder, head, encoder_name="encoder", head_name="objective.head")


def _samples(config: Config, train: data.Source) -> data.Source:
    return data.evenly_spaced(train, config.procedure.match_images)


def _match(config: Config, way: str, first: Tensors, second: Tensors, spec: permutation.Spec) -> Tensors:
    """Return the second network's state, permuted."""
    if way == "weights":
        return permutation.apply(second, spec, rebasin.match_weights(first, second, spec, seed=config.seed))
    train, _ = open_data(config)
    one, other = (open_classifier(config, train.classes) for _ in range(2))
    weights.write(one, first)
    weights.write(other, second)
    device = torch.device("cpu")
    images = load_images(one, _samples(config, train), config.eval.batch_size, device)
    found = rebasin.match_activations(one, other, (batch for batch, _ in images), spec)
    return permutation.apply(second, spec, found)


def _measure_barrier(
    config: Config, first: Tensors, second: Tensors, context: RunContext
) -> dict[str, float]:
    train, _ = open_data(config)
    network = open_classifier(config, train.classes).to(context.world.device)
    samples = _samples(config, train)

    def loss(model: nn.Module) -> float:
        _reset(config, network, samples, context.world.device)
        return mean_loss(logits(config, network, samples, context), context)

    return {"barrier": rebasin.loss_barrier(network, first, second, loss, alphas=config.procedure.alphas)}


def _average(config: Config, first: Tensors, second: Tensors) -> Tensors:
    train, _ = open_data(config)
    network = open_classifier(config, train.classes)
    weights.write(network, weights.interpolate(first, second, 0.5))
    _reset(config, network, _samples(config, train), torch.device("cpu"))
    return dict(network.state_dict())


def _reset(config: Config, network: Classifier, samples: data.Source, device: torch.device) -> None:
    """Measure batch normalisation's statistics on the samples; every rank sees all, and gets the same."""
    if rebasin.has_batchnorm(network):
        images = load_images(network, samples, config.eval.batch_size, device)
        rebasin.reset_batchnorm(network, (batch for batch, _ in images))


def _measure_merged(config: Config, path: Path, context: RunContext) -> dict[str, float]:
    train, test = open_data(config)
    network = open_classifier(config, train.classes)
    weights.write(network, load_file(path))
    return measure_all(config, network.to(context.world.device), train, test, context)
