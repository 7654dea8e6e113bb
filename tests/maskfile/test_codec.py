"""The mask codecs: lossless on every family of bits, at the entropy, and safe against any bytes."""

import contextlib
import struct
import tracemalloc

import numpy as np
import pytest

from selfmask_dist.maskfile import codec

SHARES = (0.0, 0.001, 0.03, 0.12, 0.3, 0.5, 0.8, 0.97, 1.0)


def entropy(share: float) -> float:
    """Bits for a bit that is set with probability `share`."""
    return sum(-p * np.log2(p) for p in (share, 1 - share) if p > 0)


def random_bits(num_bits: int, share: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(num_bits) < share


@pytest.mark.parametrize("name", codec.CODECS)
@pytest.mark.parametrize("num_bits", [0, 1, 7, 8, 9, 1000, 65_537])
def test_round_trip(name: str, num_bits: int) -> None:
    for share in SHARES:
        bits = random_bits(num_bits, share)
        decoded = codec.decode(codec.encode(bits, name), num_bits, name)
        assert decoded.dtype == bool
        assert np.array_equal(decoded, bits)


@pytest.mark.parametrize(
    "bits",
    [
        np.arange(5000) == 4999,
        np.arange(5000) == 0,
        np.arange(200_000) % 40_000 == 39_999,  # gaps far above the mean's multiple that has a symbol
        np.arange(200_000) < 300,
        np.arange(100_000) % 9 == 0,
        np.arange(100_000) % 8 == 0,
    ],
    ids=["last", "first", "far", "block", "ninth", "eighth"],
)
def test_round_trip_of_patterns(bits: np.ndarray) -> None:
    for value in (bits, ~bits):
        assert np.array_equal(codec.decode(codec.encode(value), value.size), value)


def test_round_trip_in_classes() -> None:
    generator = np.random.default_rng(1)
    for num_classes in (1, 2, 16, 256):
        classes = generator.integers(0, num_classes, (60, 70)).astype(np.uint8)
        bits = generator.random(classes.shape) < classes / num_classes
        data = codec.encode(bits, classes=classes)
        assert np.array_equal(codec.decode(data, bits.size, classes=classes), bits.reshape(-1))


@pytest.mark.parametrize("share", [share for share in SHARES if 0 < share < 1])
def test_bits_take_their_entropy(share: float) -> None:
    bits = random_bits(1_000_000, share)
    assert len(codec.encode(bits)) * 8 < 1.002 * bits.size * entropy(bits.mean()) + 80


def test_classes_pay_for_what_they_tell() -> None:
    classes = (np.arange(1_000_000) % 2).astype(np.uint8)
    bits = np.random.default_rng(0).random(classes.size) < np.where(classes, 0.02, 0.4)
    expected = bits.size / 2 * sum(entropy(bits[classes == k].mean()) for k in (0, 1))
    assert len(codec.encode(bits, classes=classes)) * 8 < 1.002 * expected
    assert len(codec.encode(bits)) * 8 > 1.2 * expected


def test_classes_of_magnitude_are_exponents_below_the_largest() -> None:
    values = np.array([[1.0, -0.99, 0.76, 0.74], [0.5, -0.06, 1e-30, 0.0]], np.float32)
    found = codec.magnitude_classes(values)
    assert found.dtype == np.uint8
    assert found.tolist() == [[0, 1, 1, 1], [1, 5, 7, 7]]
    assert codec.magnitude_classes(values.astype(np.float64)).tolist() == found.tolist()
    assert codec.magnitude_classes(np.zeros((0, 3), np.float32)).shape == (0, 3)
    assert not codec.magnitude_classes(np.zeros(4, np.float32)).any()


def test_frequencies_are_whole_and_complete() -> None:
    for count, size in ((1, 8), (1, 10**9), (123, 1000), (10**6, 8 * 10**6), (1, 9), (0x7FFF, 2**40)):
        frequencies = codec._gap_frequencies(count, size)
        assert (frequencies.sum(), frequencies.min() >= 1) == (2**24, True), (count, size)
    for count, size in ((1, 2), (1, 7), (125_001, 10**6), (2**39, 2**40)):
        frequencies = codec._byte_frequencies(count, size)
        assert (frequencies.sum(), frequencies.min() >= 1) == (2**24, True), (count, size)


def test_a_stream_can_be_read_from_its_description() -> None:
    """A decoder written from docs/mask_format.md alone: plain integers, no library."""
    bits = random_bits(3000, 0.02)
    data = codec.encode(~bits)
    (zeros, _), (num_symbols, start) = varints(data, 2)
    words = list(struct.unpack(f"<{(len(data) - start) // 4}I", data[start:]))
    frequencies = codec._gap_frequencies(zeros, 3000).tolist()
    starts = np.concatenate([[0], np.cumsum(frequencies)]).tolist()
    state = words.pop()
    if words:
        state = state << 32 | words.pop()
    places, at = [], -1
    for _ in range(num_symbols):
        low = state & 0xFFFFFF
        symbol = next(s for s in range(len(frequencies)) if starts[s] <= low < starts[s + 1])
        state = (state >> 24) * frequencies[symbol] + low - starts[symbol]
        if state < 2**32 and words:
            state = state << 32 | words.pop()
        if symbol == len(frequencies) - 1:
            at += symbol
        else:
            at += symbol + 1
            places.append(at)
    assert places == np.flatnonzero(bits).tolist()


def varints(data: bytes, count: int) -> list[tuple[int, int]]:
    """(value, where it ends) of the first numbers."""
    found, at = [], 0
    for _ in range(count):
        value, shift = 0, 0
        while True:
            byte = data[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                break
        found.append((value, at))
    return found


def test_wrong_lengths_are_errors() -> None:
    data = codec.encode(random_bits(1000, 0.1))
    for wrong in (data[:-4], data[:-1], data[:1], b"", data + b"\0\0\0\1", data + b"\0" * 4, b"\xff" * 40):
        with pytest.raises(ValueError, match="mask bits"):
            codec.decode(wrong, 1000)
    with pytest.raises(ValueError, match="expected"):
        codec.decode(codec.encode(np.ones(9, bool), "packbits-zstd"), 17, "packbits-zstd")
    with pytest.raises(ValueError, match="decompressed"):
        codec.decode(b"not zstd", 8, "packbits-zstd")
    with pytest.raises(ValueError, match="unknown mask codec 'zip'"):
        codec.decode(b"", 0, "zip")


def test_any_bytes_decode_or_raise_in_bounded_memory() -> None:
    generator = np.random.default_rng(0)
    good = codec.encode(random_bits(5000, 0.03))
    tracemalloc.start()
    try:
        for _ in range(2000):
            data = bytearray(good)
            for _ in range(generator.integers(1, 5)):
                data[generator.integers(len(data))] = generator.integers(256)
            data = data[: generator.integers(len(data) + 1)] if generator.random() < 0.3 else data
            with contextlib.suppress(ValueError):
                assert codec.decode(bytes(data), 5000).shape == (5000,)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_the_library_still_codes_as_it_did() -> None:
    """A file written today must be read by every later version: the bytes of a stream are pinned."""
    data = codec.encode(np.arange(400) % 37 == 5)
    assert data.hex() == "85030b2e9da3db2136275a249e5501"
