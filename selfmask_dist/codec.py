"""Mask bits to bytes and back: packed eight to a byte, then zstd.

A codec is a name in a mask file's header and two functions here. Bits run in the tensor's row-major order,
most significant bit first (`numpy.packbits`); unused bits of the last byte are zero.
"""

import numpy as np
import zstandard

DEFAULT = "packbits-zstd"


def encode(bits: np.ndarray, codec: str = DEFAULT) -> bytes:
    """Encode a bool array of any shape."""
    _check(codec)
    return zstandard.ZstdCompressor(level=19).compress(np.packbits(bits, axis=None).tobytes())


def decode(data: bytes, num_bits: int, codec: str = DEFAULT) -> np.ndarray:
    """Decode to `(num_bits,)` bools; never allocates more than `num_bits` asks for.

    Raises:
        ValueError: unknown codec, or `data` does not hold exactly `num_bits` bits.
    """
    _check(codec)
    num_bytes = (num_bits + 7) // 8
    try:
        frame_size = zstandard.frame_content_size(data)
        if frame_size != num_bytes:
            raise ValueError(
                f"mask bits take {frame_size} bytes where {num_bytes} are expected for {num_bits} bits"
            )
        packed = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"mask bits cannot be decompressed: {error}") from error
    bits = np.unpackbits(np.frombuffer(packed, np.uint8)).astype(bool)
    if bits[num_bits:].any():
        raise ValueError("mask bits have set bits after their end")
    return bits[:num_bits]


def _check(codec: str) -> None:
    if codec != DEFAULT:
        raise ValueError(f"unknown mask codec {codec!r}; this version reads {DEFAULT!r}")
