"""Knowledge Evolution as a run: generations of trainings, each from its parent's fit half."""

from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file

from selfmask_dist.config import Config
from selfmask_dist.evals.measure import Evaluation
from selfmask_dist.procedures import knowledge_evolution, slim
from selfmask_dist.procedures import packnet_math as packnet
from selfmask_dist.procedures import wise_ft_math as wise_ft
from selfmask_dist.runs.life import Life
from selfmask_dist.training.build import build_backbone, open_data
from selfmask_dist.training.chain import Chain, Tensors, other_seed
from selfmask_dist.training.finetune import WHOLE


def run_evolution(chain: Chain) -> dict[str, Any]:
    """Train every generation; `fit.safetensors` holds the last one's fit half (kels: a slim network)."""
    section, config = chain.config.procedure, chain.config
    encoder = build_backbone(config).encoder
    if section.split == "kels":
        split = knowledge_evolution.kels(encoder, section.split_rate)
    else:
        names = packnet.packable(encoder, section.include)
        weights = {name: encoder.get_parameter(name) for name in names}
        split = knowledge_evolution.wels(weights, section.split_rate, seed=config.seed)
    weights_path, generations = config.backbone.weights, []
    last: Tensors = {}
    for index in range(section.generations):
        if index:
            path = chain.once(
                f"generation-{index}-start.safetensors",
                knowledge_evolution.evolve,
                last,
                _fresh(config, index),
                split,
            )
            weights_path = str(path)
        result = chain.train(f"generation-{index}", backbone={"weights": weights_path})
        last = load_file(chain.folder / f"generation-{index}" / WHOLE)
        generations.append(result["adapted"])
    wise_ft.write(encoder, last)
    fit = encoder
    if section.split == "kels":
        fit = slim.extract(encoder, section.split_rate)
    else:
        wise_ft.write(fit, knowledge_evolution.fit(last, split))
    chain.once("fit.safetensors", fit.state_dict)
    size = build_backbone(config).spec.preprocessing.image_size
    values = chain.measure("fit.json", lambda life: _measure_fit(config, life, fit))
    costs = {
        name: {"parameters": found.parameters, "operations": found.operations}
        for name, found in (("dense", slim.cost(encoder, size)), ("fit", slim.cost(fit, size)))
        if section.split == "kels"
    }
    return {
        "generations": generations,
        "adapted": generations[-1],
        "fit": values,
        "costs": costs,
        "stored_bytes": sum(4 * p.numel() for p in encoder.parameters()),
    }


def _fresh(config: Config, generation: int) -> Tensors:
    """Random weights of the same architecture, other ones for each generation."""
    values = config.model_dump(mode="json")
    values["backbone"] = {**values["backbone"], "pretrained": False, "weights": None}
    values["seed"] = other_seed(config.seed, generation)
    return dict(build_backbone(type(config).model_validate(values)).encoder.state_dict())


def _measure_fit(config: Config, life: Life, fit: torch.nn.Module) -> dict[str, float]:
    backbone = build_backbone(config)
    backbone.encoder = fit.to(life.world.device).eval()
    with torch.no_grad():
        size = backbone.spec.preprocessing.image_size
        dim = backbone.encoder(torch.zeros(1, 3, size, size, device=life.world.device)).shape[1]
    backbone.spec = replace(backbone.spec, dim=dim)
    train, test = open_data(config)
    evaluation = Evaluation(config, backbone, train, test, life.world, on_batch=life.check)
    return evaluation.full(probe=config.eval.probe)
