"""An ensemble of masks as a run: members of one backbone with other seeds, against as many small models."""

from functools import partial
from typing import Any

from safetensors.torch import load_file

from selfmask_dist.config import Config
from selfmask_dist.procedures import ensembles_math as ensembles
from selfmask_dist.procedures.classifier import HEAD, adapted_encoder, embeddings, logits, open_classifier
from selfmask_dist.runs.life import Life
from selfmask_dist.training.build import open_data
from selfmask_dist.training.chain import Chain, other_seed


def run_ensemble(chain: Chain) -> dict[str, Any]:
    """Learn the masks, train the small models where `procedure.small_backbone` has one, measure both."""
    config, section = chain.config, chain.config.procedure
    small: dict[str, Any] = {"pretrained": False, "weights": None, **section.small_backbone}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {"masks": ("mask", chain.frozen_backbone())}
    if section.small_backbone:
        kinds["small_models"] = ("finetune", small)
    found, results = {}, {}
    for kind, (method, backbone) in kinds.items():
        names = [f"member-{kind}-{index}" for index in range(section.members)]
        results[kind] = [
            chain.train(
                name,
                method=method,
                seed=other_seed(config.seed, index),
                backbone=backbone,
                eval={"frozen_baseline": False, "final": False},
            )
            for index, name in enumerate(names)
        ]
        sizes = [run["mask"]["bytes"] if "mask" in run else run["stored_bytes"] for run in results[kind]]
        found[kind] = chain.measure(f"{kind}.json", partial(_measure, config, backbone, names, sizes, chain))
    masks = found["masks"]
    return {
        **found,
        "adapted": {name: value for name, value in masks.items() if name != "bits"},
        "active": sum(run["mask"]["active"] for run in results["masks"]) / section.members,
        "stored_bytes": masks["bits"] // 8,
    }


def _measure(
    config: Config, backbone: dict[str, Any], names: list[str], sizes: list[int], chain: Chain, life: Life
) -> dict[str, Any]:
    """The ensemble's measures, and the bits of all members."""
    values = config.model_dump(mode="json")
    values["backbone"] = {**values["backbone"], **backbone}
    of_member = type(config).model_validate(values)
    sources = open_data(config)
    members, splits = [], []
    for name in names:
        network = open_classifier(of_member, sources[0].classes)
        network.encoder.load_state_dict(adapted_encoder(of_member, chain.folder / name))
        network.objective.load_state_dict(load_file(chain.folder / name / HEAD))
        network.to(life.world.device)
        train, test = (embeddings(config, network, source, life) for source in sources)
        heads = logits(config, network, sources[1], life)
        members.append(ensembles.Member(train.features, test.features, heads.features))
        splits = [ensembles.Split(part.labels, part.ids) for part in (train, test)]
    section = config.eval
    accuracies = ensembles.measure(
        members,
        *splits,
        ks=sorted({min(k, len(sources[0])) for k in section.knn_k}),
        temperature=section.knn_temperature,
        probe=section.probe,
        seed=config.seed,
        ranks=life.world,
    )
    return {**accuracies, "bits": 8 * sum(sizes)}
