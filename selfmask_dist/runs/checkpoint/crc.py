"""CRC-32 of bytes that several processes read: the checksum of a whole from those of its parts.

    crc(A B) = crc(A) x^(8 len(B)) + crc(B)     polynomials over GF(2), modulo CRC-32's

So a block of a file is verified by whoever read which part of it, in any order, and no byte is read twice.
The algorithm is `crc32_combine` of zlib, which Python's `zlib` does not offer.
"""

from functools import cache

_POLYNOMIAL = 0xEDB88320  # CRC-32's without x^32, the highest power in the lowest bit
_ONE, _X = 1 << 31, 1 << 30


def combined_crc(first: int, second: int, second_length: int) -> int:
    """Return the CRC-32 of two pieces of bytes, one behind the other, from the CRC-32 of each."""
    return _product(_power(8 * second_length), first) ^ second


@cache
def _power(exponent: int) -> int:
    """Return x^exponent."""
    if exponent < 2:
        return _X if exponent else _ONE
    root = _power(exponent // 2)
    square = _product(root, root)
    return _product(square, _X) if exponent % 2 else square


def _product(first: int, second: int) -> int:
    found, bit = 0, _ONE
    while first:
        if first & bit:
            found ^= second
            first ^= bit
        bit >>= 1
        second = (second >> 1) ^ (_POLYNOMIAL if second & 1 else 0)
    return found
