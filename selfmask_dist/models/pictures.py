"""Pictures for whole models: found in folders, and made into what an encoder takes."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from selfmask_dist.common.pictures import EXTENSIONS, is_system_file, to_rgb
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data import decode_any, eval_transform


class PictureTransform:
    """A picture to a tensor (channels, size, size), exactly as evaluation sees it.

    Args:
        preprocessing: of the backbone.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self._transform = eval_transform(preprocessing)

    def __call__(self, picture: str | Path | bytes | Image.Image) -> Tensor:
        """Return the view of a path, of encoded bytes, or of PIL's picture.

        Raises:
            ValueError: it is no picture that can be read; the message names it.
        """
        name = f"{picture}" if isinstance(picture, str | Path) else "the picture"
        try:
            if isinstance(picture, Image.Image):
                return self._transform(to_rgb(picture), np.random.default_rng(0))[0]
            data = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
            return self._transform(decode_any(data), np.random.default_rng(0))[0]
        except ValueError as error:
            raise ValueError(f"{name} {error}") from error


def find_pictures(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield pictures: files as they are, and of folders all pictures in and below, in order of their names.

    Raises:
        ValueError: a folder holds no picture.
        FileNotFoundError: there is no such file or folder.
    """
    for path in paths:
        if not path.is_dir():
            if not path.exists():
                raise FileNotFoundError(2, "no such file or folder", str(path))
            yield path
            continue
        found = sorted(
            file
            for file in path.rglob("*")
            if file.suffix[1:].lower() in _SUFFIXES
            and not is_system_file(file.relative_to(path).as_posix())
            and file.is_file()
        )
        if not found:
            raise ValueError(f"{path} holds no picture (by their names' endings: {', '.join(EXTENSIONS)})")
        yield from found


_SUFFIXES = {extension.lstrip(".") for extension in EXTENSIONS}
