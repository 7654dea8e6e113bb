"""crc32, as fast as this machine can: isal computes zlib's value with the processor's own instructions, ten
times as fast, where it is installed.
"""

try:
    from isal.isal_zlib import crc32
except ImportError:  # an optional dependency: selfmask_dist[fast]
    from zlib import crc32

__all__ = ["crc32"]
