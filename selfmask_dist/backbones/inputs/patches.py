"""Patches must cover an image: sizes that leave a border are refused. Knows modules, no library by name."""

from torch import nn

from selfmask_dist.backbones.spec import Backbone


def check_patches(backbone: Backbone, sizes: dict[str, int]) -> None:
    """Do nothing where patches cover images of all these sizes.

    Libraries cut off what is left at the right and the lower edge, without a word.

    Args:
        sizes: pixels, by the key that sets them.

    Raises:
        ValueError: a size is no multiple of the patch's.
    """
    patch = _patch_size(backbone.encoder)
    for key, size in sizes.items():
        if patch > 1 and size % patch:
            near = [n for n in (size // patch * patch, (size // patch + 1) * patch) if n]
            raise ValueError(
                f"{key}={size} is not a multiple of {patch}, the patch size of {backbone.spec.name}: the "
                f"last {size % patch} pixels of each side would never be seen. Set {key} to "
                f"{' or '.join(map(str, near))}"
            )


def _patch_size(encoder: nn.Module) -> int:
    """Return the side of the patches that a transformer cuts images into; 1 where it cuts into none."""
    for module in encoder.modules():
        size = getattr(module, "patch_size", None)
        size = size[0] if isinstance(size, tuple | list) and size else size
        is_covering = getattr(module, "dynamic_img_pad", False)  # images are filled up to whole patches
        if (
            isinstance(size, int)
            and not is_covering
            and any(isinstance(m, nn.Conv2d) for m in module.children())
        ):
            return size
    return 1
