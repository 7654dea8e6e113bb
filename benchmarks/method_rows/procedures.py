"""Procedures over masks and weights. A chain of trainings shares the setting's epochs out among them, so
that a row makes about as many steps as the others.
"""

import copy
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.method_rows.row import CONFIGS, Outcome, Row, Setting, outcome_of, step_seconds, train
from selfmask_dist import artifact, objectives
from selfmask_dist.assembly import build_backbone, build_objective, open_data
from selfmask_dist.backbones import Backbone
from selfmask_dist.config import Config, load_config
from selfmask_dist.data import eval_loader, eval_transform
from selfmask_dist.embed import embed
from selfmask_dist.evaluation import Evaluation
from selfmask_dist.parallel import join_world
from selfmask_dist.procedures import ensembles, rebasin, supsup, wise_ft
from selfmask_dist.procedures import permutation as permutations
from selfmask_dist.procedures.permutation_specs import permutation_spec

GROUP = "procedures"
WEIGHTS = ("optim.weight_lr=0.05", "optim.head_lr=0.05", "optim.warmup_epochs=0", "objective.head_norm=l2")
MASK = (
    *("mask.include=auto", "optim.score_lr=100", "optim.head_lr=0.05", "optim.warmup_epochs=0"),
    "objective.head_norm=l2",
)
SCRATCH = ("backbone.weights=null", "backbone.pretrained=false")
QUIET = ("eval.knn_every=0", "eval.frozen_baseline=false")
UNMEASURED = (*QUIET, "eval.final=false")  # the row measures what becomes of it


def _epochs(setting: Setting, share: float) -> str:
    """A share of the setting's epochs, as an override."""
    return f"train.epochs={load_config(None, setting.overrides).train.epochs * share}"


# ---- chains of trainings, as runs


def _chain(stage: str, share: float, *own: str, more: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A procedure that is a run: its configuration's method, with the setting's data and backbone."""

    def measure(setting: Setting, name: str) -> Outcome:
        overrides = (*WEIGHTS, *QUIET, *own, _epochs(setting, share))
        result, folder = train(setting, name, CONFIGS / f"{name}.yaml", overrides)
        outcome = outcome_of(result, folder, setting)
        seconds = step_seconds(folder / stage, setting.batch_size)
        active = result.get("active", 1.0)
        return replace(outcome, active=active, step_seconds=seconds, more=more(result))

    return measure


_packnet = _chain(
    "task-1-train",
    2 / 3,  # tasks have a part of the images, and train one and a half times
    *("procedure.include=auto", "procedure.tasks=2", "procedure.keep=0.5", "procedure.retrain=0.5"),
    more=lambda result: {
        "tasks": result["tasks"],
        "accuracies are": "means over tasks of two or three classes",
    },
)
_lottery = _chain(
    "round-0",
    1 / 4,
    *("procedure.include=auto", "procedure.rounds=3", "procedure.prune=0.5", "procedure.rewind_steps=10"),
    more=lambda result: {"rounds": result["rounds"]},
)
_evolution = _chain(
    "generation-0",
    1 / 3,
    *(
        "procedure.include=auto",
        "procedure.split=wels",
        "procedure.split_rate=0.8",
        "procedure.generations=3",
    ),
    more=lambda result: {"generations": result["generations"], "fit alone": result["fit"]},
)


# ---- a model and what it reaches


@dataclass
class Bench:
    """One configuration's backbone, with its head where it has one, and the setting's data."""

    config: Config
    backbone: Backbone
    objective: objectives.Objective
    evaluation: Evaluation
    train: Any
    test: Any
    world: Any

    @classmethod
    def open(cls, setting: Setting, *own: str, stack: ExitStack) -> "Bench":
        config = load_config(None, [*setting.overrides, *own, f"seed={setting.seed}"])
        section = config.engine
        world = stack.enter_context(join_world(section.device, threads=section.threads, needs_group=False))
        source, test = open_data(config)
        backbone = build_backbone(config)
        objective = build_objective(config, backbone, source.classes, objectives.Context(), steps_per_epoch=1)
        evaluation = Evaluation(config, backbone, source, test, world)
        return cls(config, backbone, objective.eval(), evaluation, source, test, world)

    def full(self) -> dict[str, float]:
        return self.evaluation.full(probe=True)

    def logits(self, images: Tensor) -> Tensor:
        return self.objective.predict(self.backbone.encoder, images)

    def images(self, which: str) -> tuple[Tensor, Tensor]:
        """All images of a split as the encoder wants them, and their labels."""
        source = self.train if which == "train" else self.test
        loader = eval_loader(
            source,
            eval_transform(self.backbone.spec.preprocessing),
            batch_size=len(source),
            rank=0,
            world_size=1,
            num_workers=0,
        )
        batch = next(iter(loader))
        return batch.views[0], batch.labels

    def embeddings(self, which: str) -> tuple[Tensor, Tensor]:
        source = self.train if which == "train" else self.test
        loader = eval_loader(
            source,
            eval_transform(self.backbone.spec.preprocessing),
            batch_size=256,
            rank=0,
            world_size=1,
            num_workers=0,
        )
        found = embed(self.backbone.encoder, loader, world=self.world)
        return found.features, found.labels


class Classifier(nn.Module):
    """Encoder and objective's head as one network: images -> logits."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.encoder, self.objective = bench.backbone.encoder, bench.objective

    def forward(self, images: Tensor) -> Tensor:
        return self.objective.predict(self.encoder, images)


# ---- SupSup


def _supsup(setting: Setting, name: str) -> Outcome:
    """Two tasks, of the first and of the other classes: a mask each; whose images are they, 16 at a time?"""
    tasks, folders = _class_tasks(setting), []
    for index, places in enumerate(tasks):
        own = (*(f"data.{key}={path}" for key, path in places.items()), *QUIET, _epochs(setting, 1.0))
        result, folder = train(setting, f"{name}-task-{index}", CONFIGS / "threshold.yaml", (*own, *MASK))
        folders.append((result, folder))
    with ExitStack() as stack:
        bench = Bench.open(setting, *MASK, stack=stack)
        store = supsup.Supermasks(Classifier(bench))
        for index, (_, folder) in enumerate(folders):
            head = {f"objective.{k}": t for k, t in load_file(folder / "head.safetensors").items()}
            mask = next(iter(artifact.read_mask_file(folder / "final.mask").masks.values()))
            store.add(f"task {index}", mask, own=head)
        images, labels = bench.images("test")
        hits, right, count = 0, 0, 0
        for index, places in enumerate(tasks):
            rows = torch.from_numpy(np.load(places["test_subset"]))
            for part in rows.split(16):
                found = store.infer(images[part])
                hits += found.task == f"task {index}"
                right += int((store.logits(found.task, images[part]).argmax(1) == labels[part]).sum())
                count += 1
        values = [result["adapted"] for result, _ in folders]
    return Outcome(
        knn20=float(np.mean([v["knn20"] for v in values])),
        probe=float(np.mean([v["probe"] for v in values])),
        head=right / len(labels),
        active=float(np.mean([r["mask"]["active"] for r, _ in folders])),
        stored_bytes=sum(r["mask"]["bytes"] for r, _ in folders),
        step_seconds=step_seconds(folders[0][1], setting.batch_size),
        more={
            "tasks inferred from 16 images": hits / count,
            "head is": "accuracy with the inferred task; knn20 and probe: means over both tasks",
            "heads of known tasks": [v["head"] for v in values],
        },
    )


def _class_tasks(setting: Setting) -> list[dict[str, str]]:
    """Files with the places of the first and of the other classes, by split."""
    train_source, test_source = open_data(load_config(None, setting.overrides))
    tasks = []
    for index, classes in enumerate(np.array_split(np.arange(len(train_source.classes)), 2)):
        places = {}
        for key, source in (("subset", train_source), ("test_subset", test_source)):
            path = setting.folder / f"classes-{index}-{key}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.flatnonzero(np.isin(source.labels, classes)))
            places[key] = str(path)
        tasks.append(places)
    return tasks


# ---- WiSE-FT


def _wise_ft(setting: Setting, name: str) -> Outcome:
    """Half-way between the frozen and the fine-tuned encoder; the whole curve is in `more`."""
    own = (*WEIGHTS, *UNMEASURED, "method=finetune")
    _, folder = train(setting, name, None, own)
    with ExitStack() as stack:
        bench = Bench.open(setting, stack=stack)
        encoder = bench.backbone.encoder
        frozen = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
        adapted = load_file(folder / "encoder.safetensors")
        points = wise_ft.curve(
            encoder, frozen, adapted, lambda _: bench.full(), alphas=(0, 0.25, 0.5, 0.75, 1.0)
        )
    middle = next(point for point in points if point.alpha == 0.5)
    return Outcome(
        knn20=middle.values["knn20"],
        probe=middle.values["probe"],
        head=None,
        active=1.0,
        stored_bytes=sum(t.numel() * t.element_size() for t in adapted.values()),
        step_seconds=step_seconds(folder, setting.batch_size),
        more={"alpha": 0.5, "curve": {str(point.alpha): point.values for point in points}},
    )


# ---- Git Re-Basin


def _rebasin(setting: Setting, name: str) -> Outcome:
    """Two networks from other random weights, each trained half as long; one permuted, then both averaged."""
    own = (*WEIGHTS, *UNMEASURED, *SCRATCH, "method=finetune", _epochs(setting, 0.5))
    folders = [
        train(replace(setting, seed=setting.seed + 100 * index), name, None, own)[1] for index in (0, 1)
    ]
    with ExitStack() as stack:
        bench = Bench.open(setting, *SCRATCH, stack=stack)
        model = Classifier(bench)
        first, second = (_whole_state(folder) for folder in folders)
        spec = _with_head(bench.backbone.encoder)
        images, labels = bench.images("train")

        def loss(network: nn.Module) -> float:
            with torch.no_grad():
                return float(F.cross_entropy(network(images), labels))

        networks = (copy.deepcopy(model), copy.deepcopy(model))
        for network, state in zip(networks, (first, second), strict=True):
            wise_ft.write(network, state)
        ways = {
            "weights": rebasin.match_weights(first, second, spec),
            "activations": rebasin.match_activations(*networks, [images], spec),
        }
        moved = {way: permutations.apply(second, spec, found) for way, found in ways.items()}
        barriers = {
            way: rebasin.loss_barrier(model, first, state, loss, alphas=(0.25, 0.5, 0.75))
            for way, state in {"as they are": second, **moved}.items()
        }
        way = min(ways, key=barriers.__getitem__)  # on training images
        reached = {}
        for title, state in (("averaged as they are", second), ("permuted, averaged", moved[way])):
            wise_ft.write(model, wise_ft.interpolate(first, state, 0.5))
            test_images, test_labels = bench.images("test")
            with torch.no_grad():
                right = (model(test_images).argmax(1) == test_labels).double().mean()
            reached[title] = {**bench.full(), "head": float(right)}
    merged = reached["permuted, averaged"]
    return Outcome(
        knn20=merged["knn20"],
        probe=merged["probe"],
        head=merged["head"],
        active=1.0,
        stored_bytes=sum(t.numel() * t.element_size() for t in first.values()),
        step_seconds=step_seconds(folders[0], setting.batch_size),
        more={"barriers": barriers, "matched by": way, **reached},
    )


def _whole_state(folder: Path) -> dict[str, Tensor]:
    encoder = {f"encoder.{k}": t for k, t in load_file(folder / "encoder.safetensors").items()}
    return {**encoder, **{f"objective.{k}": t for k, t in load_file(folder / "head.safetensors").items()}}


def _with_head(encoder: nn.Module) -> permutations.Spec:
    """The groups of an encoder with the linear head behind it, by their names in `Classifier`."""
    with_head = copy.copy(encoder)
    with_head._modules = {**encoder._modules, "head": nn.Linear(encoder.num_features, 2)}  # type: ignore[arg-type]

    def place(tensor: str) -> str:
        return f"objective.{tensor}" if tensor.startswith("head.") else f"encoder.{tensor}"

    return tuple(
        replace(
            group,
            axes=tuple(replace(axis, tensor=place(axis.tensor)) for axis in group.axes),
            probe=replace(group.probe, module=f"encoder.{group.probe.module}"),
        )
        for group in permutation_spec(with_head)
    )


# ---- ensembles


def _ensemble(setting: Setting, name: str) -> Outcome:
    """Three masks of the backbone, against three small networks trained from scratch."""
    masks, small = [], []
    kwargs = load_config(None, setting.overrides).backbone.kwargs
    width, depth = int(str(kwargs.get("embed_dim", 192))), int(str(kwargs.get("depth", 12)))
    small_kwargs = {**kwargs, "embed_dim": width // 4, "depth": depth // 2, "num_heads": 2}
    narrow = (f"backbone.kwargs={json.dumps(small_kwargs)}", *SCRATCH)
    for index in range(3):
        seeded = replace(setting, seed=setting.seed + 100 * index)
        third = _epochs(setting, 1 / 3)
        masks.append(train(seeded, f"{name}-mask", CONFIGS / "threshold.yaml", (*MASK, *UNMEASURED, third)))
        own = ("method=finetune", *WEIGHTS, *UNMEASURED, *narrow, third)
        small.append(train(seeded, f"{name}-small", None, own)[1])
    with ExitStack() as stack:
        bench = Bench.open(setting, stack=stack)
        frozen = {key: tensor.clone() for key, tensor in bench.backbone.encoder.state_dict().items()}
        members = []
        for result, folder in masks:
            wise_ft.write(bench.backbone.encoder, frozen)
            mask = next(iter(artifact.read_mask_file(folder / "final.mask").masks.values()))
            artifact.apply_mask(bench.backbone.encoder, mask)
            members.append(_member(bench, 8 * result["mask"]["bytes"]))
        shared = 32 * sum(tensor.numel() for tensor in frozen.values())
        found, labels = _measure(f"{len(members)} masks", members, bench, shared)
        others = []
        for folder in small:
            own_bench = Bench.open(setting, *narrow, stack=stack)
            state = load_file(folder / "encoder.safetensors")
            wise_ft.write(own_bench.backbone.encoder, state)
            others.append(_member(own_bench, 32 * sum(tensor.numel() for tensor in state.values())))
        against, _ = _measure(f"{len(others)} small models", others, bench, 0)
    return Outcome(
        knn20=found.knn,
        probe=found.probe,
        head=found.logits,
        active=float(np.mean([result["mask"]["active"] for result, _ in masks])),
        stored_bytes=sum(found.bits) // 8,
        step_seconds=step_seconds(masks[0][1], setting.batch_size),
        more={
            "head is": "the mean of the members' probes' logits",
            "table": ensembles.compare([found, against]),
            "small models": {"probe": against.probe, "knn20": against.knn, "bytes": against.total_bits // 8},
            "test images": len(labels),
        },
    )


def _member(bench: Bench, bits: int) -> ensembles.Member:
    return ensembles.Member(bench.embeddings("train")[0], bench.embeddings("test")[0], bits)


def _measure(
    name: str, members: list[ensembles.Member], bench: Bench, shared: int
) -> tuple[ensembles.Ensemble, Tensor]:
    labels, test_labels = bench.embeddings("train")[1], bench.embeddings("test")[1]
    return ensembles.measure(name, members, labels, test_labels, shared_bits=shared), test_labels


def _row(name: str, source: str, measure_fn: Callable[[Setting, str], Outcome]) -> Row:
    return Row(name, GROUP, source, lambda setting: measure_fn(setting, name))


ROWS = [
    _row("packnet", "Mallya and Lazebnik 2018", _packnet),
    _row("supsup", "Wortsman et al. 2020", _supsup),
    _row("lottery", "Frankle and Carbin 2019, Frankle et al. 2020", _lottery),
    _row("evolution", "Taha et al. 2021", _evolution),
    _row("wise_ft", "Wortsman et al. 2022", _wise_ft),
    _row("rebasin", "Ainsworth et al. 2023", _rebasin),
    _row("ensemble", "Lakshminarayanan et al. 2017", _ensemble),
]
