"""Tars in, batches out. Knows neither models, masks nor process groups.

The main path, in reading order:

    source   sample i -> its bytes          by an `index`, from a `storage` (or a `remote` one)
    order    (seed, epoch) -> which samples a rank's batch holds
    decode   bytes -> picture
    views    picture -> tensors             `multicrop` and `distortion` for SwAV's
    loader   all of it in `workers`         -> `batch`; what cannot be read goes to `quarantine`

Before it, once for each data set: `build` makes the index (`tar` -> `table` -> `index`, `labels`,
`manifest`).
"""

from selfmask_dist.data.batch import Batch, Mixed
from selfmask_dist.data.loader import BatchLoader, eval_loader, train_loader
from selfmask_dist.data.quarantine import Failure, Quarantine, QuarantineError
from selfmask_dist.data.remote import NetworkLostError
from selfmask_dist.data.source import Sample, SampleError, Source, TarSource, check_same_classes, open_source
from selfmask_dist.data.splits import count_labels, notes_on_splits, shared_samples, untrained_classes
from selfmask_dist.data.subset import Subset, evenly_spaced, hold_out
from selfmask_dist.data.targets import TargetKind, Targets, TargetSummary, open_targets
from selfmask_dist.data.views.decode import decode
from selfmask_dist.data.views.dense import DenseTransform
from selfmask_dist.data.views.mix import Mixing
from selfmask_dist.data.views.multicrop import Crops, Distortion, Joined, MultiCrop, multicrop_transform
from selfmask_dist.data.views.single import Transform, eval_transform, train_transform
from selfmask_dist.data.views.stronger import Stronger
from selfmask_dist.data.workers import WorkerLostError, Workers

__all__ = [
    "Batch",
    "BatchLoader",
    "Crops",
    "DenseTransform",
    "Distortion",
    "Failure",
    "Joined",
    "Mixed",
    "Mixing",
    "MultiCrop",
    "NetworkLostError",
    "Quarantine",
    "QuarantineError",
    "Sample",
    "SampleError",
    "Source",
    "Stronger",
    "Subset",
    "TarSource",
    "TargetKind",
    "TargetSummary",
    "Targets",
    "Transform",
    "WorkerLostError",
    "Workers",
    "check_same_classes",
    "count_labels",
    "decode",
    "eval_loader",
    "eval_transform",
    "evenly_spaced",
    "hold_out",
    "multicrop_transform",
    "notes_on_splits",
    "open_source",
    "open_targets",
    "shared_samples",
    "train_loader",
    "train_transform",
    "untrained_classes",
]
