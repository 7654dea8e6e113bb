"""A fine-tuning run, or weights, into a mask file of about a bit a weight; see `maskfile.tools.deltas`."""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from selfmask_dist.backbones import Backbone
from selfmask_dist.backbones.weights import read_state_dict
from selfmask_dist.common import names
from selfmask_dist.config import Config, load_config
from selfmask_dist.data import eval_transform, evenly_spaced, train_loader
from selfmask_dist.maskfile import Mask, MaskFile, Model, write_mask_file
from selfmask_dist.maskfile.tools.deltas import delta_mask, halve_vectors
from selfmask_dist.training.build import build_backbone, open_train
from selfmask_dist.training.saving import read_outcome
from selfmask_dist.training.whole.calibrate import Calibration, calibrate
from selfmask_dist.training.whole.keep import MODEL_NAME, read_model

_BATCH = 64  # pictures in a step of the calibration


@dataclass(frozen=True)
class ImportedDelta:
    """What `import_delta` wrote. num_weights: under a bit. num_bytes: of the file without its head.

    errors: of the calibration, by epoch; none without.
    """

    path: Path
    num_weights: int
    num_bytes: int
    num_others: int
    errors: tuple[float, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Return the bits of the file, head aside, for each weight that is under one."""
        return 8 * self.num_bytes / self.num_weights

    def describe(self) -> str:
        """Return what was written, in one line."""
        fitted = f"; error by epoch of calibration {_list(self.errors)}" if self.errors else ""
        return (
            f"{self.path}: {self.num_weights:,} weights in {self.num_bytes:,} bytes without the head "
            f"({self.bits_per_weight:.3f} bits a weight), {self.num_others} tensors beside them{fitted}"
        )


def import_delta(
    source: Path,
    out: Path,
    *,
    config: Path | None = None,
    half: bool = False,
    pictures: int = 0,
    settings: Calibration | None = None,
) -> ImportedDelta:
    """Write a fine-tuned network as a mask of kind `delta` on its frozen one.

    Args:
        source: the folder of a run of method=finetune, whose head and classes go along; or a file of weights.
        config: of a run on the frozen network; None: the one in the run's folder.
        half: keep biases and gains in float16, half the bytes.
        pictures: training pictures of that configuration to fit sizes on, at equal distances; 0: none.
        settings: of that fit; None: the defaults.

    Raises:
        ValueError: there is no configuration, the two are not of one network, or there are fewer pictures.
    """
    chosen = config or source / names.CONFIG
    if not chosen.exists():
        raise ValueError(
            f"the frozen network is needed, and there is no {chosen}: give the configuration of a run on it "
            "(--config)"
        )
    whole = load_config(chosen)
    backbone = build_backbone(whole)
    frozen = {name: tensor.clone() for name, tensor in _tensors(backbone.encoder).items()}
    model: Model | None = None
    if source.is_dir():
        model = read_model(source)
        read_outcome(source).put_on(backbone.encoder)
        tuned = _tensors(backbone.encoder)
    else:
        tuned = dict(read_state_dict(source, setting="the first argument", skip_others=True))
    mask = delta_mask(frozen, tuned)
    errors: list[float] = []
    if pictures:
        fit = _Fit(whole, backbone, model, pictures, settings or Calibration())
        mask, errors = fit.run(mask, frozen, tuned)
    if half:
        mask = replace(mask, statistics=halve_vectors(mask.statistics))
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
    return ImportedDelta(out, mask.num_weights(), num_bytes, len(mask.statistics), tuple(errors))


@dataclass(frozen=True)
class _Fit:
    """The pictures and answers that a delta's sizes are fitted to."""

    config: Config
    backbone: Backbone
    model: Model | None
    pictures: int
    settings: Calibration

    def run(
        self, mask: Mask, frozen: dict[str, Tensor], tuned: dict[str, Tensor]
    ) -> tuple[Mask, list[float]]:
        train = open_train(self.config, require_labels=False)
        if not 1 <= self.pictures <= len(train):
            raise ValueError(
                f"{self.pictures} pictures to calibrate on, and data.train of the run has {len(train)}; ask "
                "for so many at most (--calibrate)"
            )
        batches = train_loader(
            evenly_spaced(train, self.pictures),
            eval_transform(self.backbone.spec.preprocessing),
            global_batch_size=min(_BATCH, self.pictures),
            seed=self.config.seed,
        )
        head = None if self.model is None else self.model.head
        encoder = self.backbone.encoder.requires_grad_(False).eval()
        return calibrate(
            mask,
            encoder,
            frozen=frozen,
            tuned=tuned,
            batches=batches,
            answer=(lambda features: features) if head is None else head.logits,
            settings=self.settings,
        )


def _tensors(encoder: nn.Module) -> dict[str, Tensor]:
    return dict(encoder.state_dict())


def _list(numbers: tuple[float, ...]) -> str:
    return ", ".join(f"{number:.3g}" for number in numbers)
