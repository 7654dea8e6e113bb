"""The stages of a cascade between its trainings: embed, route, combine, evaluate, bundle, draw.

Each leaves files in the run's folder and does nothing where they are there already:

    embeddings/<view>/<split>/   stores of frozen, dispatcher, expert-k, conditional, unconditional
    router/                      router.safetensors, sizes.json, train.npy, test.npy (clusters), expert-k.npy
    combination/                 conditional.safetensors, unconditional.safetensors, ...
    cascade.mask  cascade.png  result.json

No process holds the embeddings of all images.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfmask_dist import data
from selfmask_dist.backbones import Backbone
from selfmask_dist.cascade import Combination, Router, fit_pca
from selfmask_dist.cascade.model import save_cascade
from selfmask_dist.cascade.parts import Parts, combine_to_store, gather_slices, members, write_table
from selfmask_dist.cascade.plot import draw_cascade
from selfmask_dist.common import names, text
from selfmask_dist.common.files import replacing, sha256, write_json
from selfmask_dist.common.plots import why_no_pictures
from selfmask_dist.config import Config, load_config
from selfmask_dist.evals.embed import in_precision, made_in
from selfmask_dist.evals.embeddings import Embeddings
from selfmask_dist.evals.measure import measure_knn, measure_probe
from selfmask_dist.evals.store import EmbeddingStore, chunk_size_for, embed_to_store
from selfmask_dist.maskfile.bank import MaskBank
from selfmask_dist.maskfile.rows import put_file, stored_masks
from selfmask_dist.parallel import shards_weights
from selfmask_dist.runs.context import RunContext
from selfmask_dist.training.build import build_backbone, check_run, open_data, shard_backbone

if TYPE_CHECKING:
    from selfmask_dist.parallel.fsdp import ShardedEncoder

SPLITS = ("train", "test")
_ROUTER = "router.safetensors"  # in the router's folder
TITLES = {"frozen": "frozen", names.DISPATCHER: "self-masked"}  # a combination's is its mode


class Stages:
    """The stages of one cascade, in one world. Every method is a collective: every rank must call."""

    def __init__(self, config: Config, context: RunContext) -> None:
        self._config = config
        self._context = context
        self._world = context.world
        self._directory = context.directory
        self._modes = config.cascade.combinations
        self._sources = dict(zip(SPLITS, open_data(config), strict=True))

    @cached_property
    def _backbone(self) -> Backbone:
        backbone = build_backbone(self._config, in_file=self._is_sharded, world=self._world)
        if not self._is_sharded:  # what cuts it moves it, too
            backbone.encoder.to(self._world.device)
        return backbone

    @cached_property
    def _bank(self) -> MaskBank:
        return MaskBank(self._backbone.encoder)

    @property
    def _is_sharded(self) -> bool:
        return shards_weights(self._config.engine, self._world)

    @cached_property
    def _sharded(self) -> "ShardedEncoder":
        return shard_backbone(self._backbone, self._config, self._world)

    @property
    def num_test_images(self) -> int:
        """How many images accuracies are of."""
        return len(self._sources["test"])

    def check(self) -> None:
        """Check what would otherwise fail only after the dispatcher has been trained.

        Raises:
            ValueError: the message names it, and the way out.
        """
        config, count = self._config, len(self._sources["train"])
        check_run(config, self._backbone, *self._sources.values())  # the dispatcher says its notes
        if config.cascade.components > self._backbone.spec.dim:
            raise ValueError(
                f"cascade.components is {config.cascade.components}; {self._backbone.spec.name} has "
                f"embeddings of {self._backbone.spec.dim} dimensions"
            )
        if config.cascade.router == "kmeans" and len(config.cascade.clusters) > 1:
            raise ValueError(
                "cascade.clusters has several numbers, among which only cascade.router=gmm can choose"
            )
        if count < max(config.cascade.clusters) * 2 or count <= config.cascade.components:
            raise ValueError(
                f"data.train has {count} images: too few for {max(config.cascade.clusters)} clusters in "
                f"{config.cascade.components} components; lower cascade.clusters and cascade.components"
            )

    # ---- embeddings

    def embed(self, view: str) -> None:
        """Write the embeddings of both splits: `frozen`, or under the mask of the run `view`."""
        mask_path = None if view == "frozen" else self._directory / view / names.MASK
        precision, device = self._config.eval.precision, self._world.device
        encode_fn = in_precision(self._encoder_under(view, mask_path), precision, device)
        for split in SPLITS:
            store = self._create(view, split, mask_path)
            embed_to_store(
                encode_fn,
                self._sources[split],
                data.eval_transform(self._backbone.spec.preprocessing),
                store,
                batch_size=self._config.eval.batch_size,
                rank=self._world.rank,
                world_size=self._world.size,
                num_workers=self._config.engine.workers,
                device=self._world.device,
                all_reduce=self._sum,
                on_batch=self._context.paced_check(),
                report=self._context.writer.message,
            )
        self._world.barrier()
        self._say("embedded", view)

    def _encoder_under(self, view: str, mask_path: Path | None) -> Callable[[Tensor], Tensor]:
        """Return the encoder under a mask, or frozen; where it is cut over ranks, until the next view."""
        if self._is_sharded:
            self._sharded.restore()
            if mask_path is not None:
                put_file(mask_path, self._sharded, fingerprint=self._backbone.spec.fingerprint)
            return self._sharded.encode
        if mask_path is not None and view not in self._bank:
            self._bank.add(view, mask_path)
        name = None if mask_path is None else view
        return lambda images: self._bank.embed(images, name)

    def _create(
        self, view: str, split: str, made_with: Path | None, *, dim: int | None = None
    ) -> EmbeddingStore:
        source = self._sources[split]
        provenance = {
            "backbone": self._backbone.spec.fingerprint,
            "preprocessing": json.dumps(self._backbone.spec.preprocessing.to_dict(), sort_keys=True),
            "data": json.dumps(source.identity, sort_keys=True),
            "made with": self._world.from_main(lambda: "" if made_with is None else sha256(made_with)),
            **made_in(self._config.eval.precision),
        }

        def create() -> EmbeddingStore:
            # that of the first start: a smaller one after a restart goes on with the chunks that are there
            batch = load_config(self._directory / names.CONFIG).eval.batch_size
            return EmbeddingStore.create(
                self._store_path(view, split),
                num_samples=len(source),
                dim=dim or self._backbone.spec.dim,
                provenance=provenance,
                dtype=self._config.cascade.store_dtype,
                chunk_size=chunk_size_for(len(source), batch),
            )

        return self._world.from_main(create)

    def _store_path(self, view: str, split: str) -> Path:
        return self._directory / names.EMBEDDINGS / view / split

    def _open(self, view: str, split: str) -> EmbeddingStore:
        return EmbeddingStore.open(self._store_path(view, split))

    # ---- router

    def route(self) -> None:
        """Fit the router on the dispatcher's embeddings, and list each expert's images."""
        folder, section = self._directory / names.ROUTER, self._config.cascade
        if self._world.from_main((folder / names.CLUSTER_SIZES).exists):
            return
        rows = self._open(names.DISPATCHER, "train").read_slice(self._world.rank, self._world.size)
        clusters = section.clusters if len(section.clusters) > 1 else section.clusters[0]
        router = Router.fit(
            rows.features.to(self._world.device),
            rows.ids.to(self._world.device),
            num_clusters=clusters,
            num_components=section.components,
            method=section.router,
            seed=self._config.seed,
            restarts=section.restarts,
            all_reduce=self._sum,
        )
        router.check_sizes(at_least=2)  # a batch of one image has no statistics
        self._context.check()
        if self._world.is_main:
            folder.mkdir(exist_ok=True)
            with replacing(folder / _ROUTER) as partial:
                save_file(_plain(router.tensors()), partial)
        for split in SPLITS:
            assigned = self._assign(router, split)
            if assigned is not None:
                write_table(folder / f"{split}.npy", assigned)
                for k, images in enumerate(
                    members(assigned, router.num_clusters) if split == "train" else ()
                ):
                    np.save(folder / f"{names.expert(k)}.npy", images)
        if self._world.is_main:
            write_json(folder / names.CLUSTER_SIZES, router.sizes.tolist())  # last: the stage is done
        self._world.barrier()
        sizes = ", ".join(map(str, router.sizes.tolist()))
        self._say(names.ROUTER, f"{router.num_clusters} clusters of {sizes}")

    def _assign(self, router: Router, split: str) -> npt.NDArray[np.int16] | None:
        """Return the cluster of every image of a split on the main rank, None on the others."""
        store = self._open(names.DISPATCHER, split)
        own = [
            router.assign(rows.features.to(self._world.device)).to("cpu", torch.int16)
            for rows in store.chunks(self._world.rank, self._world.size)
        ]
        self._context.check()
        return gather_slices(torch.cat(own or [torch.empty(0, dtype=torch.int16)]), len(store), self._world)

    # ---- combination

    def combine(self) -> None:
        """Write one embedding out of dispatcher and experts for each mode, to stores like any view's."""
        folder, num_experts = self._directory / names.COMBINATION, len(read_sizes(self._directory))
        parts = {split: self._parts(split) for split in SPLITS}
        for mode in self._modes:
            path = folder / f"{mode}.safetensors"
            if not self._world.from_main(path.exists):
                chunks = parts["train"].slices(self._world.rank, self._world.size)
                fitted = Combination.fit(
                    chunks, mode=mode, num_experts=num_experts, all_reduce=self._sum
                ).rounded()  # as the bundle holds it: both then give the same embeddings
                self._context.check()
                if self._world.is_main:
                    folder.mkdir(exist_ok=True)
                    with replacing(path) as partial:
                        save_file(_plain(fitted.tensors()), partial)
                self._world.barrier()
            combination = Combination.from_tensors(load_file(path))
            for split in SPLITS:
                combine_to_store(
                    combination,
                    parts[split],
                    self._create(mode, split, path, dim=combination.output_dim),
                    rank=self._world.rank,
                    world_size=self._world.size,
                    report=self._context.writer.message,
                    on_chunk=self._context.watchdog.beat,
                )
                self._context.check()
        self._world.barrier()
        self._say("combined", ", ".join(self._modes))

    def _parts(self, split: str) -> Parts:
        folders = [names.DISPATCHER, *map(names.expert, range(len(read_sizes(self._directory))))]
        return Parts.open(
            [self._store_path(view, split) for view in folders],
            self._directory / names.ROUTER / f"{split}.npy",
            device=self._world.device,
        )

    # ---- results

    def evaluate(self) -> dict[str, Any]:
        """Return k-NN and probe of every view, from the stores alone; each rank searches its part."""
        path = self._directory / names.VIEWS
        values = self._world.from_main(lambda: json.loads(path.read_text()) if path.exists() else None)
        if values is None:
            views = ["frozen"] if self._config.eval.frozen_baseline else []
            shown = (*views, names.DISPATCHER, *self._modes)
            values = {TITLES.get(view, view): self._measure(view) for view in shown}
            # the combinations end in a whitened PCA: the same without experts, to compare them with
            values |= {
                f"{TITLES[v]}, whitened": self._measure(v, whiten=True) for v in (*views, names.DISPATCHER)
            }
            if self._world.is_main:
                write_json(path, values)
        self._context.writer.message(f"\n{table(values)}\n")
        return {"views": values}

    def _measure(self, view: str, *, whiten: bool = False) -> dict[str, float]:
        bank, queries = (self._part(view, split) for split in SPLITS)
        if whiten:
            num_components = bank.features.shape[1]
            pca = fit_pca([bank.features], num_components=num_components, all_reduce=self._sum, at_most=True)
            bank, queries = (
                replace(rows, features=pca.transform(rows.features, whiten=True)) for rows in (bank, queries)
            )
        self._context.watchdog.beat()
        section, num_classes = self._config.eval, len(self._sources["train"].classes)
        values = measure_knn(
            bank,
            queries,
            section.knn_k,
            section.knn_temperature,
            num_classes=num_classes,
            world=self._world,
            memory_mib=section.search_mib,
        )
        if section.probe:
            check, seed = self._context.paced_check(), self._config.seed
            values["probe"] = measure_probe(bank, queries, seed=seed, world=self._world, on_step=check)
        return values

    def _part(self, view: str, split: str) -> Embeddings:
        """Return this rank's samples, on its device."""
        return self._open(view, split).read_slice(self._world.rank, self._world.size).to(self._world.device)

    def bundle(self, views: dict[str, dict[str, float]]) -> dict[str, Any]:
        """Write `cascade.mask` and return its sizes; the main rank alone reads the masks, by parameter."""
        return self._world.from_main(lambda: self._bundle(views))

    def _bundle(self, views: dict[str, dict[str, float]]) -> dict[str, Any]:
        folders = [names.DISPATCHER, *map(names.expert, range(len(read_sizes(self._directory))))]
        paths = {name: self._directory / name / names.MASK for name in folders}
        masks = {name: next(iter(stored_masks(path).values())) for name, path in paths.items()}
        spec = self._backbone.spec
        size = save_cascade(
            self._directory / names.CASCADE_MASK,
            masks,
            Router.from_tensors(load_file(self._directory / names.ROUTER / _ROUTER)),
            {mode: self._combination(mode) for mode in self._modes},
            backbone=spec.name,
            backbone_fingerprint=spec.fingerprint,
            preprocessing=spec.preprocessing.to_dict(),
            metrics={f"{view} {name}": value for view, row in views.items() for name, value in row.items()},
        )
        alone = sum(path.stat().st_size for path in paths.values())
        return {"bytes": size, "bytes_of_masks_apart": alone, "masks": len(paths)}

    def _combination(self, mode: str) -> Combination:
        path = self._directory / names.COMBINATION / f"{mode}.safetensors"
        return Combination.from_tensors(load_file(path))

    def draw(self) -> None:
        """Draw the map of the test images by cluster, and what the masks prune, if pictures can be drawn."""
        if reason := why_no_pictures():
            self._say("picture", f"is left out: {reason}")
        elif self._world.is_main:
            router = Router.from_tensors(load_file(self._directory / names.ROUTER / _ROUTER))
            draw_cascade(
                router.reduce(self._open(names.DISPATCHER, "test").read_slice().features).numpy(),
                np.load(self._directory / names.ROUTER / "test.npy"),
                stored_masks(self._directory / names.CASCADE_MASK),
                self._directory / names.CASCADE_PICTURE,
                self._config.seed,
            )
        self._world.barrier()

    def write_result(self, result: dict[str, Any]) -> None:
        """Write `result.json`, by which the run is finished."""
        if self._world.is_main:
            write_json(self._directory / names.RESULT, result)

    def _sum(self, tensor: Tensor) -> Tensor:
        self._context.watchdog.beat()  # a fit of minutes sums again and again
        return self._world.sum(tensor.clone())

    def _say(self, stage: str, what: str) -> None:
        self._context.writer.event("stage", stage=stage, what=what)
        self._context.writer.message(f"{stage:9s}{what}")


def read_sizes(directory: Path) -> list[int]:
    """Return the training images of each cluster, as the router found them."""
    sizes: list[int] = json.loads((directory / names.ROUTER / names.CLUSTER_SIZES).read_text())
    return sizes


def table(values: dict[str, dict[str, float]]) -> str:
    """Return the measures of each view, as text."""
    measures = list(next(iter(values.values())))
    rows = [[view, *(f"{row[name]:.4f}" for name in measures)] for view, row in values.items()]
    return text.table([["", *measures], *rows])


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
