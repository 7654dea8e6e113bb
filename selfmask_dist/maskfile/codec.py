"""Mask bits to bytes and back, close to their entropy.

    entropy         the places of the rare value, as gaps, by an entropy coder (ANS) that knows its share
    packbits-zstd   packed eight to a byte, then zstd: larger, and readable with everyday tools

Bits may come in classes that both sides know (another mask's bits at the same places, how large the frozen
weights are): each class is then coded with a share of its own. `docs/mask_format.md` is the specification.
Knows numpy arrays, not masks or files.
"""

import math
from collections.abc import Iterator
from typing import TypeAlias

import constriction
import numpy as np
import zstandard

_Coder: TypeAlias = constriction.stream.stack.AnsCoder
_Model: TypeAlias = constriction.stream.model.Categorical

DEFAULT = "entropy"
CODECS = ("entropy", "packbits-zstd")

_ONE = 1 << 32  # a share of one, as the models count it
_PRECISION = 1 << 24  # frequencies of a model sum to this
_MAX_ALPHABET = 4096
_DENSE = 8  # a value that takes more than one place in so many is not rare: bits go eight at a time
_MAX_VARINT = 10  # bytes
_NUM_MAGNITUDES = 8
_ONES_IN_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1)


def encode(bits: np.ndarray, codec: str = DEFAULT, *, classes: np.ndarray | None = None) -> bytes:
    """Encode a bool array of any shape, in row-major order.

    Args:
        classes: uint8, the same shape: which places are alike. `entropy` alone uses them.
    """
    if codec == "packbits-zstd":
        return zstandard.ZstdCompressor(level=19).compress(np.packbits(bits, axis=None).tobytes())
    _check(codec)
    head = bytearray()
    streams: list[tuple[np.ndarray, np.ndarray]] = []
    for places in _split(bits.size, classes):
        part = bits.reshape(-1)[places]
        zeros = part.size - int(np.count_nonzero(part))
        head += _varint(zeros)
        rare, count = _rare(zeros, part.size)
        if not count:
            continue
        is_rare = part if rare else ~part
        if count * _DENSE > part.size:
            streams.append((np.packbits(is_rare).astype(np.int32), _byte_frequencies(count, part.size)))
            continue
        frequencies = _gap_frequencies(count, part.size)
        symbols = _to_symbols(np.flatnonzero(is_rare), len(frequencies) - 1)
        head += _varint(symbols.size)
        streams.append((symbols, frequencies))
    coder = _Coder()
    for symbols, frequencies in reversed(streams):  # what is decoded first lies on top
        coder.encode_reverse(symbols, _model(frequencies))
    return bytes(head) + np.asarray(coder.get_compressed()).astype("<u4").tobytes()


def decode(
    data: bytes, num_bits: int, codec: str = DEFAULT, *, classes: np.ndarray | None = None
) -> np.ndarray:
    """Decode to `(num_bits,)` bools; memory stays within a small multiple of `num_bits`, whatever `data` is.

    Args:
        classes: as they were for `encode`.

    Raises:
        ValueError: unknown codec, or `data` does not hold exactly `num_bits` bits.
    """
    if codec == "packbits-zstd":
        return _decode_packed(data, num_bits)
    _check(codec)
    reader = _ByteReader(data)
    plan: list[tuple[slice | np.ndarray, int, bool, int, int]] = []
    for places in _split(num_bits, classes):
        size = num_bits if isinstance(places, slice) else places.size
        zeros = reader.varint(size)
        rare, count = _rare(zeros, size)
        is_sparse = 0 < count * _DENSE <= size
        plan.append((places, size, rare, count, reader.varint(size) if is_sparse else 0))
    words = reader.words()
    bits = np.empty(num_bits, dtype=bool)
    try:
        coder = _Coder(words)
        for places, size, rare, count, num_symbols in plan:
            bits[places] = _decode_class(coder, size, count, num_symbols) == rare
    except ValueError as error:
        raise ValueError(f"mask bits cannot be decoded: {error}") from error
    if not coder.is_empty():
        raise ValueError("mask bits are followed by something else")
    return bits


def magnitude_classes(values: np.ndarray) -> np.ndarray:
    """Return classes of like magnitude: uint8, in the shape of `values`, which are read as float32.

    Class 0 holds the binary exponent of the largest value, each next one the exponent below; the last, the
    rest.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    exponents = (bits & np.uint32(0x7FFFFFFF)) >> np.uint32(23)
    return np.minimum(exponents.max(initial=0) - exponents, _NUM_MAGNITUDES - 1).astype(np.uint8)


def _decode_class(coder: _Coder, size: int, count: int, num_symbols: int) -> np.ndarray:
    """Return which places of a class hold its rare value, (size,) bool."""
    is_rare = np.zeros(size, dtype=bool)
    if not count:
        return is_rare
    if count * _DENSE > size:
        symbols = coder.decode(_model(_byte_frequencies(count, size)), -(-size // 8))
        unpacked = np.unpackbits(symbols.astype(np.uint8)).view(bool)
        if unpacked[size:].any():
            raise ValueError("there are bits after the last")
        is_rare = unpacked[:size]
    else:
        frequencies = _gap_frequencies(count, size)
        symbols = coder.decode(_model(frequencies), num_symbols)
        ends = np.cumsum(symbols, dtype=np.int64)
        is_end = symbols < len(frequencies) - 1
        places = (ends + np.cumsum(is_end))[is_end] - 1
        if places.size and places[-1] >= size:
            raise ValueError("a place lies after the last bit")
        is_rare[places] = True
    if np.count_nonzero(is_rare) != count:
        raise ValueError("the number of rare bits is not the one stated")
    return is_rare


# ---- classes, and what is rare in one


def _split(num_bits: int, classes: np.ndarray | None) -> Iterator[slice | np.ndarray]:
    """Yield where the bits of each class lie, in ascending order; classes without bits are passed over."""
    if classes is None:
        yield slice(None)
        return
    flat = classes.reshape(-1)
    assert flat.dtype == np.uint8, classes.dtype
    assert flat.size == num_bits, (classes.shape, num_bits)
    order = np.argsort(flat, kind="stable")
    start = 0
    for size in np.bincount(flat):
        if size:
            yield order[start : start + size]
        start += size


def _rare(zeros: int, size: int) -> tuple[bool, int]:
    """Return the rarer value and how often it is there."""
    ones = size - zeros
    return (True, ones) if ones < zeros else (False, zeros)


def _to_symbols(places: np.ndarray, longest: int) -> np.ndarray:
    """Return the gaps before each place as symbols: as often `longest` as fits into a gap, then the rest."""
    gaps = np.diff(places, prepend=-1) - 1
    repeats = gaps // longest
    if not repeats.any():
        return gaps.astype(np.int32)
    symbols = np.full(gaps.size + int(repeats.sum()), longest, dtype=np.int32)
    symbols[np.cumsum(repeats + 1) - 1] = gaps - repeats * longest
    return symbols


# ---- models: frequencies in whole numbers, so that every machine finds the same


def _gap_frequencies(count: int, size: int) -> np.ndarray:
    """Return the frequencies of gaps 0 ... n - 1 and `n or more`, (n + 1,): geometric.

    `count` of `size` places are rare.
    """
    longest = min(_MAX_ALPHABET - 1, 4 * -(-size // count))
    stays = _ONE - (count << 32) // size  # the share of a gap that goes on
    table = np.array([_ONE], dtype=np.uint64)  # table[g]: the share of gaps of g or more
    power = np.uint64(stays)
    while len(table) <= longest:
        table = np.concatenate([table, (table * power) >> np.uint64(32)])
        power = np.uint64((int(power) * int(power)) >> 32)
    alphabet = longest + 1
    cumulative = (table[:alphabet] * np.uint64(_PRECISION - alphabet)) >> np.uint64(32)
    return (cumulative - np.append(cumulative[1:], np.uint64(0))).astype(np.int64) + 1


def _byte_frequencies(count: int, size: int) -> np.ndarray:
    """Return the frequencies of eight bits at once, (256,), of which `count` of `size` are set at random."""
    share = (count << 32) // size
    by_count = [(share**ones * (_ONE - share) ** (8 - ones)) >> 208 for ones in range(9)]
    total = sum(math.comb(8, ones) * weight for ones, weight in enumerate(by_count))
    table = np.array([1 + weight * (_PRECISION - 256) // total for weight in by_count], dtype=np.int64)
    frequencies = table[_ONES_IN_BYTE]
    frequencies[0] += _PRECISION - int(frequencies.sum())
    return frequencies


def _model(frequencies: np.ndarray) -> _Model:
    # the library gives symbol i of n the frequency w_i * (2^24 - n) / sum(w) + 1: here, what is asked for
    return _Model((frequencies - 1).astype(np.float64), perfect=False)


# ---- bytes


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


class _ByteReader:
    """Reads numbers and words off the front of coded bits, and checks each."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def varint(self, most: int) -> int:
        """Return the next number, of seven bits a byte; a ValueError where it is above `most`, or cut off."""
        value = 0
        for shift in range(0, 7 * _MAX_VARINT, 7):
            if self._at >= len(self._data):
                break
            byte = self._data[self._at]
            self._at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value > most:
                    raise ValueError(f"mask bits state a count of {value} among {most}")
                return value
        raise ValueError("mask bits end in the middle of a number")

    def words(self) -> np.ndarray:
        """Return the rest as little-endian uint32."""
        rest = self._data[self._at :]
        if len(rest) % 4:
            raise ValueError(f"mask bits end in {len(rest)} bytes, which are not whole words of 4")
        return np.frombuffer(rest, "<u4").astype(np.uint32)


def _decode_packed(data: bytes, num_bits: int) -> np.ndarray:
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
    if codec not in CODECS:
        raise ValueError(f"unknown mask codec {codec!r}; this version reads {', '.join(CODECS)}")
