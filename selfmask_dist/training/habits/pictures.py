"""What the section augment does to training pictures, one by one and with one another."""

from selfmask_dist import data
from selfmask_dist.config import Config


def stronger_of(config: Config) -> data.Stronger | None:
    """Return RandAugment and erasing as the configuration has them; None without."""
    section = config.augment
    if not section.changes_pictures:
        return None
    return data.Stronger(section.randaugment, section.randaugment_magnitude, section.erase)


def with_mixing(config: Config, loader: data.BatchLoader) -> data.BatchLoader:
    """Return the loader, mixing pictures where the configuration says so."""
    section = config.augment
    if not section.mixes:
        return loader
    return loader.with_mixing(
        data.Mixing(section.mixup, section.cutmix, section.mix_probability, section.mix_switch)
    )
