"""A fine-tuning run, or weights, into a mask file of about a bit a weight; see `maskfile.tools.deltas`."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from selfmask_dist.backbones.weights import read_state_dict
from selfmask_dist.common import names
from selfmask_dist.config import load_config
from selfmask_dist.maskfile import MaskFile, Model, write_mask_file
from selfmask_dist.maskfile.tools.deltas import delta_mask
from selfmask_dist.training.build import build_backbone
from selfmask_dist.training.saving import read_outcome
from selfmask_dist.training.whole.keep import MODEL_NAME, read_model


@dataclass(frozen=True)
class ImportedDelta:
    """What `import_delta` wrote. num_weights: under a bit. num_bytes: of the file without its head."""

    path: Path
    num_weights: int
    num_bytes: int
    num_others: int

    @property
    def bits_per_weight(self) -> float:
        """Return the bits of the file, head aside, for each weight that is under one."""
        return 8 * self.num_bytes / self.num_weights

    def describe(self) -> str:
        """Return what was written, in one line."""
        return (
            f"{self.path}: {self.num_weights:,} weights in {self.num_bytes:,} bytes without the head "
            f"({self.bits_per_weight:.3f} bits a weight), {self.num_others} tensors kept as they are"
        )


def import_delta(source: Path, out: Path, *, config: Path | None = None) -> ImportedDelta:
    """Write a fine-tuned network as a mask of kind `delta` on its frozen one.

    Args:
        source: the folder of a run of method=finetune, whose head and classes go along; or a file of weights.
        config: of a run on the frozen network; None: the one in the run's folder.

    Raises:
        ValueError: there is no configuration, or the two are not of one network.
    """
    chosen = config or source / names.CONFIG
    if not chosen.exists():
        raise ValueError(
            f"the frozen network is needed, and there is no {chosen}: give the configuration of a run on it "
            "(--config)"
        )
    backbone = build_backbone(load_config(chosen))
    frozen = {name: tensor.clone() for name, tensor in _tensors(backbone.encoder).items()}
    model: Model | None = None
    if source.is_dir():
        model = read_model(source)
        read_outcome(source).put_on(backbone.encoder)
        tuned = _tensors(backbone.encoder)
    else:
        tuned = dict(read_state_dict(source, setting="the first argument", skip_others=True))
    mask = delta_mask(frozen, tuned)
    file = MaskFile(
        {MODEL_NAME: mask},
        backbone=backbone.spec.name,
        backbone_fingerprint=backbone.spec.fingerprint,
        preprocessing=backbone.spec.preprocessing.to_dict(),
    )
    num_bytes = write_mask_file(out, file)
    if model is not None:
        file.models[MODEL_NAME] = model
        write_mask_file(out, file)
    return ImportedDelta(out, mask.num_weights(), num_bytes, len(mask.statistics))


def _tensors(encoder: nn.Module) -> dict[str, Tensor]:
    return dict(encoder.state_dict())
