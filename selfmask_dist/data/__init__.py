"""Tars in, batches out: `source` (bytes), `order` (which sample when), `views` (pixels), `loader` (batches).

Knows neither models, masks nor process groups.
"""

from selfmask_dist.data.batch import Batch
from selfmask_dist.data.decode import decode
from selfmask_dist.data.loader import BatchLoader, eval_loader, train_loader
from selfmask_dist.data.multicrop import Crops, Distortion, multicrop_transform
from selfmask_dist.data.quarantine import Failure, Quarantine, QuarantineError
from selfmask_dist.data.source import Sample, SampleError, Source, check_same_classes, open_source
from selfmask_dist.data.subset import Subset, evenly_spaced
from selfmask_dist.data.views import Transform, eval_transform, train_transform
from selfmask_dist.data.workers import WorkerLostError

__all__ = [
    "Batch",
    "BatchLoader",
    "Crops",
    "Distortion",
    "Failure",
    "Quarantine",
    "QuarantineError",
    "Sample",
    "SampleError",
    "Source",
    "Subset",
    "Transform",
    "WorkerLostError",
    "check_same_classes",
    "decode",
    "eval_loader",
    "eval_transform",
    "evenly_spaced",
    "multicrop_transform",
    "open_source",
    "train_loader",
    "train_transform",
]
