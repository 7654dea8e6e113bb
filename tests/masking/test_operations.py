"""What masks start on a device outside of forward and backward, counted on the path of a GPU."""

from typing import Any

import timm

from benchmarks.masking.operations import count


def test_operations_outside_forward_and_backward_do_not_grow() -> None:
    kwargs: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs)
    operations, tensors = count(model, side=32)  # a look at a value would be an error on the meta device
    assert tensors == 16
    # compare, sum, two products; inner product, shift (2), three of formula (*)
    assert operations.total("pull back") <= 7 * tensors
    assert operations.total("optimizer and rewriting") <= 4 * tensors + 12
    assert operations.total("clear") <= 2
    assert operations.counts["forward and backward"]["addmm"] > 0, "it does count"
