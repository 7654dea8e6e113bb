"""Plans carried out: one rank's rows of a global batch read, decoded, augmented and put together.

Lives in the loader's workers. Knows neither ranks nor the order of an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from selfmask_dist.common.pictures import ShapeError
from selfmask_dist.data.batch import Batch, Mixed
from selfmask_dist.data.order import Ids, RankBatch, mixing_generator, sample_generator
from selfmask_dist.data.quarantine import Failure
from selfmask_dist.data.source import READ_TOGETHER, SampleError, Source
from selfmask_dist.data.targets import Targets
from selfmask_dist.data.views.decode import decode
from selfmask_dist.data.views.dense import DenseTransform, read_label_map
from selfmask_dist.data.views.mix import Mixing
from selfmask_dist.data.views.single import Transform

Views = tuple[Tensor, ...]


class PlannedBatches(Dataset["Batch | SampleError"]):
    """Carries out plans; lives in the workers.

    A sample that cannot be read is returned as an error and not raised: the DataLoader would bury its message
    under a traceback.
    is_tolerant: such samples become rows of weight 0 instead.
    """

    def __init__(self, source: Source, transform: Transform, seed: int, *, is_tolerant: bool) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.is_tolerant = is_tolerant
        self.captions = False
        self.mixing: Mixing | None = None
        self.targets: Targets | None = None

    def __getitem__(self, plan: RankBatch) -> Batch | SampleError:
        rows: list[Views | None] = []
        failures: dict[int, Failure] = {}
        captions = self.source.read_captions(plan.ids) if self.captions else []
        texts = tuple("" if isinstance(caption, SampleError) else caption for caption in captions)
        maps = self.targets.maps(self.source, plan.ids) if self._has_maps else []
        for row, (sample, data) in enumerate(self._read(plan.ids)):
            caption = captions[row] if captions else ""
            try:
                usable = caption if isinstance(caption, SampleError) else data
                rows.append(self._load(sample, usable, plan.epoch, maps[row] if maps else None))
            except SampleError as error:
                if not self.is_tolerant:
                    return error
                failures[sample] = Failure(sample, self.source.key(sample), str(error))
                rows.append(None)
        mixed = None if self.mixing is None else self._mix(self.mixing, plan, rows)
        weights = plan.weights * np.array([row is not None for row in rows], dtype=np.float32)
        stand_in = next((row for row in rows if row is not None), None) or self._blank(plan.epoch)
        # a padding row repeats a sample that is another row's, or another rank's, to report
        reported = {i for i, w in zip(plan.ids.tolist(), plan.weights, strict=True) if w}
        stacked = [torch.stack(view) for view in zip(*(row or stand_in for row in rows), strict=True)]
        targets = stacked.pop() if self._has_maps else self._targets_of(plan.ids)
        return Batch(
            views=tuple(stacked),
            labels=torch.from_numpy(self.source.labels_of(plan.ids)),
            weights=torch.from_numpy(weights),
            ids=torch.from_numpy(plan.ids),
            global_count=plan.global_count,
            failures=tuple(failure for i, failure in failures.items() if i in reported),
            finish=getattr(self.transform, "finish", None),
            captions=texts,
            targets=targets,
            mixed=mixed,
        )

    @property
    def _has_maps(self) -> bool:
        return self.targets is not None and self.targets.kind == "dense"

    def _targets_of(self, ids: Ids) -> Tensor | None:
        return None if self.targets is None else self.targets.of(self.source, ids)

    def _mix(self, mixing: Mixing, plan: RankBatch, rows: list[Views | None]) -> Mixed:
        """Mix the one view of each row with its partner's, in place, whichever rank has that one as a row.

        A partner that is no row of this rank is read and augmented here too, by its own generator: the same
        pixels. A row stays as it is where it or its partner cannot be read.
        """
        assert plan.partners is not None, "the plans were made without"
        views = dict(zip(plan.ids.tolist(), rows, strict=True))
        for sample, data in self._read(np.setdiff1d(plan.partners, plan.ids)):
            try:
                views[sample] = self._load(sample, data, plan.epoch, None)
            except SampleError:  # of which the rank says so that has it as a row
                views[sample] = None
        labels, shares = self.source.labels_of(plan.ids).copy(), np.ones(len(rows), dtype=np.float32)
        for row, (sample, partner) in enumerate(zip(plan.ids.tolist(), plan.partners.tolist(), strict=True)):
            own, other = views[sample], views[partner]
            if own is not None and other is not None:
                rng = mixing_generator(seed=self.seed, epoch=plan.epoch, sample=sample)
                view, shares[row] = mixing(own[0], other[0], rng)
                rows[row] = (view,)
                labels[row] = self.source.labels_of(np.array([partner]))[0]
        return Mixed(torch.from_numpy(labels), torch.from_numpy(shares))

    def _blank(self, epoch: int) -> tuple[Tensor, ...]:
        """Return views of the right shapes, for a batch of which no sample can be read."""
        rng = sample_generator(seed=self.seed, epoch=epoch, sample=0)
        return self.transform(Image.new("RGB", (256, 256), (128, 128, 128)), rng)

    def _read(self, ids: Ids) -> Iterator[tuple[int, bytes | SampleError]]:
        """Yield each sample with its bytes, read a few at a time so that they are never all in memory."""
        for start in range(0, len(ids), READ_TOGETHER):
            part = ids[start : start + READ_TOGETHER]
            yield from zip(part.tolist(), self.source.read_many(part), strict=True)

    def _load(
        self, index: int, data: bytes | SampleError, epoch: int, labels: bytes | SampleError | None
    ) -> tuple[Tensor, ...]:
        """Return a sample's views, and its label map behind them where there are `labels`."""
        for part in (data, labels):
            if isinstance(part, SampleError):
                raise part
        assert isinstance(data, bytes)
        try:
            image = decode(data)
            label_map = self._label_map(labels, image.size)
        except ValueError as error:
            raise SampleError(f"{self.source.where(index)}: {error}; remove it or convert again") from error
        rng = sample_generator(seed=self.seed, epoch=epoch, sample=index)
        try:
            if label_map is not None:
                assert isinstance(self.transform, DenseTransform)
                return self.transform.pair(image, label_map, rng)
            return self.transform(image, rng)
        except ShapeError as error:
            raise SampleError(f"{self.source.where(index)}: {error}; remove it or convert again") from error
        except Exception as error:
            error.add_note(f"in the transform of {self.source.where(index)}")
            raise

    def _label_map(self, labels: bytes | SampleError | None, size: tuple[int, int]) -> Image.Image | None:
        if labels is None:
            return None
        assert self.targets is not None
        assert isinstance(labels, bytes)
        return read_label_map(labels, size, len(self.targets.outputs))
