"""Encoded pictures to views, with the work of each known and bounded before it is done.

    bytes -> header: pixels, shape, pieces, memory -> small: decoded at once in one of `decoders` threads
                                                   -> large: when its memory is free, in threads of their own

A small picture never waits for a large one, and large ones wait for each other in the order in which they
came. Knows nothing of HTTP but the status of a refusal.
"""

import asyncio
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
from PIL import Image
from torch import Tensor

from selfmask_dist.cli.service.limits import Limits
from selfmask_dist.cli.service.refusal import RefusedError, is_out_of_memory
from selfmask_dist.cli.service.structure import (
    PiecesError,
    check_scans,
    check_structure,
    counted,
    not_a_picture,
)
from selfmask_dist.common.pictures import ShapeError, check_shape, to_rgb
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data import eval_transform
from selfmask_dist.data.views.decode import decode
from selfmask_dist.data.views.single import resized_size

# PIL would hand others to programs of the machine (EPS to Ghostscript)
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_SMALL = 32 * 2**20  # bytes of work
# bytes a pixel at the highest point on the way to RGB, which itself takes 4 in PIL; see `to_rgb`. Measured
# on 16 million pixels of each, the resident size grew by this at most, within 6 percent.
_BYTES_OF_MODE = {
    "1": 5,
    "L": 5,
    "P": 9,
    "RGB": 4,
    "RGBA": 8,
    "RGBX": 8,
    "LA": 8,
    "PA": 12,
    "CMYK": 8,
    "I": 18,
}
_BYTES_OF_DEEP = 12  # 16 bits: the picture, its bytes, what is shifted, the bytes of eight bits, grey, RGB
_BYTES_OF_OTHER = 22  # floats: the same with four bytes for each of the first four
# what the decoder holds beside the picture: all coefficients of a progressive JPEG, the canvases of a WebP
_BYTES_OF_FORMAT = {"JPEG": 9, "MPO": 9, "WEBP": 12}


class Pictures:
    """Makes views of pictures, in threads; `close` ends those."""

    def __init__(self, preprocessing: Preprocessing, limits: Limits) -> None:
        self._pre, self._limits = preprocessing, limits
        self._transform = eval_transform(preprocessing)
        threads = limits.decoders or len(os.sched_getaffinity(0))
        self._small = ThreadPoolExecutor(threads, "small-pictures")
        self._large = ThreadPoolExecutor(threads, "large-pictures")
        self._room = _Room(limits.max_decode_mib * 2**20)

    def close(self) -> None:
        """End the threads, after the pictures in work."""
        for pool in (self._small, self._large):
            pool.shutdown(wait=True, cancel_futures=True)

    async def view(self, data: bytes, content_type: str = "") -> Tensor:
        """Return the view (3, size, size) of an encoded picture.

        Args:
            content_type: what the client called it, for the sentence about what is no picture.

        Raises:
            RefusedError: it is no picture, damaged, beyond a limit, or memory does not hold it.
        """
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._small, self._open, data, content_type)
        if isinstance(found, Tensor):
            return found
        work = self._work(found)
        await self._room.take(work)
        future: Future[Tensor] = self._large.submit(self._view, found, data)
        # not when the caller stops to wait: the thread goes on, and so does its memory
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(partial(self._room.give, work)))
        return await asyncio.wrap_future(future)

    def _open(self, data: bytes, content_type: str) -> Tensor | Image.Image:
        """Return the view of a small picture, or a large one with its header read."""
        try:
            check_structure(data)
            image = Image.open(counted(data), formats=_FORMATS)
        except Image.DecompressionBombError as error:
            most = self._limits.max_pixels
            raise RefusedError(
                413, f"the picture is too large: {error}; at most {most:,} are taken"
            ) from error
        except PiecesError as error:
            raise RefusedError(400, f"the picture {error}") from error
        except Exception as error:  # broken files make PIL's plug-ins raise almost anything
            if is_out_of_memory(error):
                raise RefusedError(507, "there is no memory for this picture; send a smaller one") from error
            raise RefusedError(400, not_a_picture(data, content_type)) from error
        self._check(image, data)
        return image if self._work(image) > _SMALL else self._view(image, data)

    def _check(self, image: Image.Image, data: bytes) -> None:
        """Refuse by the header what would be too much work."""
        (width, height), most = image.size, self._limits.max_pixels
        if width * height > most:
            raise RefusedError(413, f"the picture has {width} x {height} pixels, at most {most:,} are taken")
        try:
            check_shape(image.size)
            resized_size(self._pre, image.size)
            if image.format in ("JPEG", "MPO") or "jpeg" in str(image.info.get("compression")):
                check_scans(data, width * height)
        except ShapeError as error:
            raise RefusedError(413, f"the picture {error}") from error
        except PiecesError as error:
            raise RefusedError(400, f"the picture {error}") from error
        work, memory = self._work(image), self._limits.max_decode_mib
        if work > memory * 2**20:
            raise RefusedError(
                413,
                f"the picture has {width} x {height} pixels of mode {image.mode} and takes {work >> 20:,} MiB"
                f" to decode, more than {memory:,} MiB; send a smaller one, or one of 8 bits",
            )

    def _work(self, image: Image.Image) -> int:
        """Return the bytes that a picture takes at the highest point, until it is a view."""
        mode, (width, height) = image.mode, image.size
        deep = _BYTES_OF_DEEP if mode.startswith("I;16") else _BYTES_OF_OTHER
        each = _BYTES_OF_MODE.get(mode, deep) + _BYTES_OF_FORMAT.get(str(image.format), 0)
        new_width, new_height = resized_size(self._pre, image.size)
        # PIL resizes the rows first
        return each * width * height + 4 * new_width * (height + new_height)

    def _view(self, image: Image.Image, data: bytes) -> Tensor:
        width, height = image.size
        try:
            if image.format in ("JPEG", "MPO"):
                rgb = decode(data)
            else:  # as `decode` does, on the picture that was judged
                image.load()
                rgb = to_rgb(image)
            return self._transform(rgb, np.random.default_rng(0))[0]
        except Exception as error:
            if is_out_of_memory(error):
                raise RefusedError(
                    507,
                    f"there is no memory for a picture of {width} x {height} pixels now; send a smaller one,"
                    " or try again later",
                ) from error
            if isinstance(error, ValueError | PiecesError):  # those of our own, which say what it is
                raise RefusedError(400, f"the picture {error}") from error
            raise RefusedError(
                400,
                f"the picture cannot be decoded ({type(error).__name__}: {error}); save it anew as JPEG or"
                " PNG",
            ) from error


class _Room:
    """Bytes that may be in use at once; who asked first is let in first."""

    def __init__(self, total: int) -> None:
        self._free = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, number: int) -> None:
        """Return when so many bytes are free, which are then taken."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((number, turn))
        self._let_in()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # let in at the same moment
                self.give(number)
            self._let_in()
            raise

    def give(self, number: int) -> None:
        """Give so many bytes back."""
        self._free += number
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting:
            number, turn = self._waiting[0]
            if not turn.cancelled():
                if number > self._free:
                    return
                self._free -= number
                turn.set_result(None)
            self._waiting.popleft()
