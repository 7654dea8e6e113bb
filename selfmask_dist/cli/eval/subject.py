"""What is evaluated: runs, mask files of one backbone, or a cascade; its views and their embeddings.

    DIR/embeddings/<view>/{train,test}     stores: made once, found again by where they come from

A store is reused where encoder, mask, preprocessing and data are those it was made with; otherwise the
difference is named. A chunk that is missing or damaged is made again. The backbone is built only where
something has to be embedded: a second evaluation takes no model at all. A cascade's run has its stores.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selfmask_dist import data, evals, maskfile
from selfmask_dist.backbones import Backbone
from selfmask_dist.cascade import Combination, Router, fit_pca
from selfmask_dist.cascade.model import Cascade, load_cascade, read_router
from selfmask_dist.cascade.parts import Parts, combine_to_store
from selfmask_dist.cli.eval.results import UnavailableError
from selfmask_dist.cli.eval.views import (
    SPLITS,
    AnyMask,
    TunedWeights,
    View,
    cascade_views,
    find_weights,
    mask_path,
    mask_views,
    open_files,
    part_views,
)
from selfmask_dist.common import names
from selfmask_dist.config import Config
from selfmask_dist.evals import Embeddings
from selfmask_dist.evals.embed import in_precision, made_in
from selfmask_dist.evals.store import EmbeddingStore, chunk_size_for, embed_to_store
from selfmask_dist.maskfile.bank import MaskBank
from selfmask_dist.maskfile.rows import StoredMask
from selfmask_dist.parallel import World, shards_weights
from selfmask_dist.training.build import build_backbone, open_data, shard_backbone
from selfmask_dist.training.finetune import load_trained

if TYPE_CHECKING:
    from selfmask_dist.parallel.fsdp import ShardedEncoder


@dataclass(eq=False)
class EvalSubject:
    """Made by `open_subject`. What embeds or reads embeddings is collective: every rank must call.

    Attributes:
        paths: as given. kind: run, cascade or mask. directory: where embeddings/ and eval/ go.
        files: mask files by path, without their masks; reading them builds no backbone.
        masks_of: the masks of each, by name; where weights are cut over ranks they stay in their file.
        views: the frozen one first.
        report: gets a sentence on what is made, or made again.
        trusts_files: whether a mask file's word on the backbone's fingerprint is taken; else it is built.
    """

    paths: Sequence[Path]
    kind: str
    config: Config
    world: World
    directory: Path
    files: dict[str, maskfile.MaskFile]
    masks_of: dict[str, dict[str, AnyMask]]
    views: list[View]
    report: Callable[[str], None]
    trusts_files: bool
    _ready: set[str] = field(default_factory=set)
    _on: View | None = None  # whose theta the sharded encoder holds

    @property
    def masks(self) -> dict[str, AnyMask]:
        """The masks of all files, by the names of their views."""
        return {view.name: view.mask for view in self.views if view.mask is not None}

    @property
    def mask_paths(self) -> list[Path]:
        """The paths that hold a mask."""
        return [path for path in self.paths if str(mask_path(path)) in self.files]

    def about(self) -> dict[str, Any]:
        """Return what a result's file says of the subject: paths, backbone and data."""
        name, fingerprint = self.config.backbone.name, ""
        for file in self.files.values():
            name, fingerprint = file.backbone or name, file.backbone_fingerprint
        for weights in self._weights:
            fingerprint = weights.backbone_fingerprint
        sections = self.config.data
        return {
            "subjects": [str(path) for path in self.paths],
            "subject_kind": self.kind,
            "backbone": {"name": name, "fingerprint": fingerprint or self.backbone.spec.fingerprint},
            "data": {
                split: {
                    "path": getattr(sections, split) or f"{sections.held_out:g} of {sections.train}",
                    "samples": len(source),
                    "classes": len(source.classes),
                }
                for split, source in (self.sources.items() if sections.train is not None else ())
            },
        }

    @property
    def _weights(self) -> list[TunedWeights]:
        return [view.weights for view in self.views if view.weights is not None]

    # ---- data and labels

    @cached_property
    def sources(self) -> dict[str, data.Source]:
        """The images by split; those without a label are among them."""
        return dict(zip(SPLITS, open_data(self.config, require_labels=False), strict=True))

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names in the order of their numbers; empty where the data has none."""
        return self.sources["train"].classes

    @cached_property
    def num_classes(self) -> int:
        """How many classes there are, named or not."""
        return max(
            len(self.classes), *(len(data.count_labels(source)) - 1 for source in self.sources.values())
        )

    def require_labels(self, what: str) -> list[str]:
        """Notes on images that are left out for want of a label.

        Raises:
            UnavailableError: a split has no labels at all, or the run is not trained towards them.
        """
        if (target := self.config.objective.target) != "class":
            raise UnavailableError(
                f"{what} is of one class an image, which objective.target={target} is not; its kind is "
                "targets"
            )
        notes = []
        for split, source in self.sources.items():
            missing = int(data.count_labels(source)[0])
            if missing == len(source):
                raise UnavailableError(
                    f"data.{split} has no labels, which {what} needs; labelfree gives what can be told "
                    "without"
                )
            if missing:
                notes.append(
                    f"{missing} of {len(source)} images of data.{split} have no label and are left out"
                )
        return notes

    # ---- embeddings

    def rows(self, view: View, split: str, *, labelled: bool = True) -> Embeddings:
        """This rank's samples of a view on its device, ids ascending; with `labelled`, those with a label."""
        if view.members:
            parts = [self.rows(member, split, labelled=labelled) for member in view.members]
            return replace(parts[0], features=evals.mean_embedding([part.features for part in parts]))
        rows = self._read(view, split)
        if view.whiten:
            bank = rows if split == "train" else self._read(view, "train")
            pca = fit_pca(
                [bank.features],
                num_components=bank.features.shape[1],
                all_reduce=self._sum,
                at_most=True,
            )
            rows = replace(rows, features=pca.transform(rows.features, whiten=True))
        if labelled:
            rows = rows.where(rows.labels >= 0)
        return rows

    def _read(self, view: View, split: str) -> Embeddings:
        self.embed(view)
        store = EmbeddingStore.open(self._path(view, split))
        rows = store.read_slice(self.world.rank, self.world.size)
        # the class list is this evaluation's, not that of the day of embedding
        labels = torch.from_numpy(self.sources[split].labels_of(rows.ids.numpy()))
        return Embeddings(rows.features, labels, rows.ids).to(self.world.device)

    def embed(self, view: View) -> None:
        """Make what the view's stores lack."""
        if view.folder in self._ready:
            return
        for split in SPLITS:
            store = self._store(view, split)
            lacking = torch.tensor([len(store.missing(self.world.rank, self.world.size))])
            if self._sum(lacking.to(self.world.device)).item():
                self.report(f"embedding data.{split}, {view.name}")
                self._fill(store, view, split)
        self.world.barrier()
        self._ready.add(view.folder)

    def _fill(self, store: EmbeddingStore, view: View, split: str) -> None:
        """Make the chunks that a view's store lacks."""
        if view.mode is not None and (self._is_sharded or self.config.eval.precision != "float32"):
            # ranks would choose experts for their images, and gather weights, each at its own time; and
            # router and combination are float32
            (path,), (router, combinations) = self.files, self._in_bundle
            parts = part_views(Path(path), self.masks_of[path])
            for part in parts:
                self.embed(part)
            stores = [EmbeddingStore.open(self._path(part, split)) for part in parts]
            combined = Parts(stores, router, self.world.device)
            combine_to_store(
                combinations[view.mode],
                combined,
                store,
                rank=self.world.rank,
                world_size=self.world.size,
                report=self.report,
            )
            return
        embed_to_store(
            in_precision(self._encoder(view), self.config.eval.precision, self.world.device),
            self.sources[split],
            data.eval_transform(self.backbone.spec.preprocessing),
            store,
            batch_size=self.config.eval.batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
            num_workers=self.config.engine.workers,
            device=self.world.device,
            all_reduce=self._sum,
            report=self.report,
        )

    def _store(self, view: View, split: str) -> EmbeddingStore:
        path, source, batch = self._path(view, split), self.sources[split], self.config.eval.batch_size
        there = EmbeddingStore.describe(path)
        fingerprint, preprocessing = self._encoder_identity()
        return EmbeddingStore.create(
            path,
            num_samples=len(source),
            dim=self._dim(view) if there is None else there.dim,
            provenance={
                "backbone": fingerprint,
                "preprocessing": json.dumps(preprocessing, sort_keys=True),
                "data": json.dumps(source.identity, sort_keys=True),
                "made with": view.made_with,
                **made_in(self.config.eval.precision),
            },
            dtype=self.config.cascade.store_dtype if there is None else there.dtype,
            chunk_size=chunk_size_for(len(source), batch) if there is None else there.chunk_size,
        )

    def _path(self, view: View, split: str) -> Path:
        return self.directory / names.EMBEDDINGS / view.folder / split

    def _encoder_identity(self) -> tuple[str, dict[str, Any]]:
        """Fingerprint and preprocessing: the mask file's, unless the backbone's settings were changed."""
        if self.trusts_files and self.files:
            file = next(iter(self.files.values()))
            if file.backbone_fingerprint and file.preprocessing:
                return file.backbone_fingerprint, file.preprocessing
        spec = self.backbone.spec
        return spec.fingerprint, spec.preprocessing.to_dict()

    def _dim(self, view: View) -> int:
        if view.mode is not None:
            return self._in_bundle[1][view.mode].output_dim
        return self.backbone.spec.dim

    @cached_property
    def backbone(self) -> Backbone:
        """The backbone, built when it is first asked for.

        Raises:
            ValueError: it is another one than masks or weights were made for.
        """
        backbone = build_backbone(self.config, in_file=self._is_sharded)
        made_for = [(path, file.backbone_fingerprint, file.backbone) for path, file in self.files.items()]
        made_for += [(str(each.path), each.backbone_fingerprint, "") for each in self._weights]
        for path, fingerprint, name in made_for:
            if fingerprint and fingerprint != backbone.spec.fingerprint:
                raise ValueError(
                    f"{path} is of a backbone with fingerprint {fingerprint[:12]} "
                    f"({name or 'not named'}), and {backbone.spec.name} as configured has "
                    f"{backbone.spec.fingerprint[:12]}; give its settings with --config or backbone.*=..."
                )
        if not self._is_sharded:  # what cuts it moves it, too
            backbone.encoder.to(self.world.device)
        return backbone

    @property
    def _is_sharded(self) -> bool:
        return shards_weights(self.config.engine, self.world)

    @cached_property
    def _sharded(self) -> ShardedEncoder:
        return shard_backbone(self.backbone, self.config, self.world)

    @cached_property
    def _in_bundle(self) -> tuple[Router, dict[str, Combination]]:
        ((path, file),) = self.files.items()
        return read_router(file, self.masks_of[path], path)

    @cached_property
    def _cascade(self) -> Cascade:
        (path,) = self.files
        return load_cascade(path, self._bank)

    @cached_property
    def _bank(self) -> MaskBank:
        return MaskBank(self.backbone.encoder)

    def _encoder(self, view: View) -> Callable[[Tensor], Tensor]:
        if view.mode is not None:
            return partial(self._cascade.embed, mode=view.mode)
        if view.weights is not None:
            _ = self.backbone  # which tells whether they are of it
            changed = build_backbone(self.config)
            load_trained(changed.encoder, view.weights.path)
            if self._is_sharded:
                return shard_backbone(changed, self.config, self.world, keeps_frozen=False).encode
            return partial(MaskBank(changed.encoder.to(self.world.device)).embed, names=None)
        if self._is_sharded:
            return self._sharded_under(view)
        name = None if view.mask is None else view.name
        if view.mask is not None and view.name not in self._bank:
            assert isinstance(view.mask, maskfile.Mask), "the bank holds decoded masks"
            self._bank.add(view.name, view.mask)
        return lambda images: self._bank.embed(images, name)

    def _sharded_under(self, view: View) -> Callable[[Tensor], Tensor]:
        """Return the sharded encoder under a view's mask, or frozen, until the next view."""
        if view is not self._on:
            self._on = None  # were it cut off here, nothing must be taken for what is on
            self._sharded.restore()
            if view.mask is not None:
                assert isinstance(view.mask, StoredMask), "no rank holds a whole mask"
                is_known = all(file.backbone_fingerprint for file in self.files.values())
                view.mask.put_on(self._sharded, is_checked=is_known)
            self._on = view
        return self._sharded.encode

    def _sum(self, tensor: Tensor) -> Tensor:
        return self.world.sum(tensor.clone())


def open_subject(
    paths: Sequence[Path],
    config: Config,
    world: World,
    *,
    out: Path | None,
    report: Callable[[str], None],
    trusts_files: bool,
) -> EvalSubject:
    """Return what the paths name: one run, one cascade, or masks and fine-tuned weights of one backbone.

    Raises:
        ValueError: a folder that is no run, different backbones, or several subjects and no `out`.
    """
    if len(paths) > 1 and out is None:
        raise ValueError("several subjects have no folder in common: give one with --out")
    directory = out or (paths[0] if paths[0].is_dir() else paths[0].parent)
    files, masks_of = open_files(paths, decodes=not shards_weights(config.engine, world))
    weights = {p: there for p in paths if mask_path(p) is None and (there := find_weights(p))}
    fingerprints = {file.backbone_fingerprint for file in files.values()}
    if len(fingerprints | {each.backbone_fingerprint for each in weights.values()}) > 1:
        raise ValueError(f"these are of different backbones: {', '.join([*files, *map(str, weights)])}")
    kind = "run" if paths[0].is_dir() else "mask"
    views = [View("frozen", "frozen")]
    first = next(iter(files.values()), None)
    if len(files) == 1 and first is not None and any(name.startswith("router.") for name in first.tensors):
        kind = "cascade"
        views += cascade_views(Path(next(iter(files))), first, next(iter(masks_of.values())))
    else:
        views += mask_views(paths, masks_of, weights, config)
    if not files and not weights:
        report(f"{paths[0]} holds no mask: only the frozen backbone is measured")
    return EvalSubject(paths, kind, config, world, directory, files, masks_of, views, report, trusts_files)
