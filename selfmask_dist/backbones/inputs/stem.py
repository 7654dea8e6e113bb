"""A network for images of other than three channels: the layers that read them get inflated weights.

By timm's rule (`adapt_input_conv`): for one channel the sum of the three, for others the three repeated and
scaled by 3 / channels, so that what a layer gives stays of about the same size. Knows modules; no library's
models by name.
"""

from torch import nn

_RGB = 3


def inflate_stem(encoder: nn.Module, channels: int, *, name: str) -> None:
    """Make an encoder of RGB images take `channels` channels, in place.

    Args:
        name: of the encoder, for messages.

    Raises:
        ValueError: no convolution of it reads three channels, or pretraining makes some of them derived.
    """
    from timm.models import adapt_input_conv  # takes seconds

    if channels == _RGB:
        return
    stems = [m for m in encoder.modules() if isinstance(m, nn.Conv2d) and m.in_channels == _RGB]
    if not stems or any(stem.groups != 1 for stem in stems):
        raise ValueError(
            f"{name} cannot take {channels} channels: no plain convolution of it reads three (SigLIP 2 reads "
            "flattened patches)"
        )
    for stem in stems:
        weight = adapt_input_conv(channels, stem.weight.detach())
        stem.weight = nn.Parameter(weight.contiguous(), requires_grad=stem.weight.requires_grad)
        stem.in_channels = channels
    for module in encoder.modules():  # transformers checks images against its configuration
        if getattr(module, "num_channels", None) == _RGB:
            module.num_channels = channels  # type: ignore[assignment]
