"""Arrays, scales and shapes in a mask file: no number is believed before it is checked."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfmask_dist.maskfile.container import Container, Sections
from selfmask_dist.maskfile.mask import MaskFileError

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("float16", "float32", "float64", "int64", "uint8", "bool")
}


def describe_array(name: str, tensor: Tensor, sections: Sections) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise MaskFileError(f"{name} has dtype {dtype}; a mask file holds {', '.join(DTYPES)}")
    data = tensor.contiguous().numpy().astype(DTYPES[dtype]).tobytes()
    return {"name": name, "shape": list(tensor.shape), "dtype": dtype, "section": sections.add(data)}


def parse_array(entry: Mapping[str, Any], whole: Container) -> Tensor:
    data, dtype = whole.section(entry["section"]), DTYPES[entry["dtype"]]
    if len(data) != count(entry["shape"]) * dtype.itemsize:
        raise ValueError(f"{entry['name']}: {len(data)} bytes do not make shape {entry['shape']}")
    if entry["dtype"] == "bool" and data.strip(b"\0\1"):
        raise ValueError(f"{entry['name']}: a truth value is neither 0 nor 1")
    return torch.from_numpy(np.frombuffer(data, dtype).reshape(entry["shape"]).copy())


def parse_scales(name: str, scales: Any, shape: tuple[int, int]) -> Tensor:
    """Scales of `shape` as float64; at least 0 and finite, or theta would not be."""
    numbers = [number for row in scales for number in row]
    if not all(type(number) in (int, float) and 0 <= number < float("inf") for number in numbers):
        raise ValueError(f"{name}: a scale is not a number of at least 0")
    if len(scales) != shape[0] or any(len(row) != shape[1] for row in scales):
        raise ValueError(f"{name}: the scales are not {shape[0]} times {shape[1]}")
    return torch.tensor(scales, dtype=torch.float64).reshape(shape)


def count(shape: Any) -> int:
    """Places of a shape; a product of Python's integers, which does not overflow."""
    count = 1
    if not isinstance(shape, list) or len(shape) > 16:
        raise ValueError(f"bad shape {str(shape)[:80]}")
    for size in shape:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**40:
            raise ValueError(f"bad shape {str(shape)[:80]}")
        count *= size
    return count


def check_size(count: int, most: int) -> None:
    if count > most:
        raise MaskFileError(
            f"it holds {count:,} values, more than the limit of {most:,}; max_weights= raises it"
        )
