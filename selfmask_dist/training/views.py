"""The views of training that a configuration describes. Knows neither models nor loaders."""

from selfmask_dist import data
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.config import Config
from selfmask_dist.config.objectives import VIEWS, WITH_CAPTIONS


def crop_sizes(config: Config, preprocessing: Preprocessing) -> tuple[data.Crops, ...]:
    section = config.crops
    large = data.Crops(
        section.global_count, section.global_size or preprocessing.image_size, section.global_scale
    )
    if not section.local_count:
        return (large,)
    return large, data.Crops(section.local_count, section.local_size, section.local_scale)


def train_transform(config: Config, preprocessing: Preprocessing) -> data.Transform:
    """The views of training: crops for objectives without labels, else one crop, or the evaluation's where
    `data.augment` is off.
    """
    section = config.data
    if config.objective.name in VIEWS and config.objective.name not in WITH_CAPTIONS:
        return _multicrop(config, preprocessing)
    one = data.train_transform(preprocessing, crop_scale=section.crop_scale, flip=section.flip)
    if not section.augment:
        one = data.eval_transform(preprocessing)
    return data.Joined(one, _multicrop(config, preprocessing)) if config.objective.name == "slip" else one


def _multicrop(config: Config, preprocessing: Preprocessing) -> data.Transform:
    section, color = config.crops, config.crops.color
    distortion = data.Distortion(
        flip=0.5 if config.data.flip else 0.0,
        brightness=0.8 * color,
        contrast=0.8 * color,
        saturation=0.8 * color,
        hue=0.2 * color,
        gray=section.gray,
        blur=section.blur,
    )
    return data.multicrop_transform(
        preprocessing,
        crops=crop_sizes(config, preprocessing),
        distortion=distortion,
        interpolation="bicubic" if preprocessing.interpolation == "bicubic" else "bilinear",
        on_device=section.on_device,
    )
