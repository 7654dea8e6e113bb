"""Libraries that only some commands need, imported when they are used; the error says how to get them.

open_clip = require("open_clip", "open_clip_torch", needed_by="backbone.name=open_clip:ViT-B-32")
starlette = require("starlette.applications", "starlette uvicorn", extra="serve", needed_by="selfmask serve")
"""

import importlib
import importlib.util
import shlex
import sys
from types import ModuleType


class MissingLibraryError(ValueError, ImportError):
    """A library is not installed. It is a ValueError too, because `selfmask` prints those as one line."""


def require(
    module: str, package: str, *, extra: str | None = None, needed_by: str | None = None
) -> ModuleType:
    """Import `module` and return it, or say which command installs it.

    Args:
        module: the name to import, dots allowed ("open_clip.factory").
        package: what to install for it, as the package index names it; several are parted by blanks.
        extra: the extra of selfmask_dist that holds it, for the message.
        needed_by: what needs the library, for the message: a config key with its value, or a command.

    Raises:
        MissingLibraryError: it is not installed, or cannot be imported (the message then holds the reason).
            The error is both a ValueError and an ImportError.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        # a library can also be there and fail on one that it needs itself
        is_absent = isinstance(error, ModuleNotFoundError) and error.name == library
        state = "is not installed" if is_absent else f"cannot be imported ({error})"
        subject = f"{needed_by} needs {library}, which" if needed_by else library
        held = f" (the extra `{extra}` of selfmask_dist holds it)" if extra else ""
        raise MissingLibraryError(
            f"{subject} {state}; bring it in with `{install_command(package)}`{held}"
        ) from error


def install_command(package: str) -> str:
    """Return the shell command that installs `package` (several parted by blanks) for the running Python.

    It names the interpreter, so that it never goes to another environment. Environments that uv made hold no
    pip; there the command is uv's.
    """
    has_pip = importlib.util.find_spec("pip") is not None
    start = [sys.executable, "-m", "pip", "install"]
    if not has_pip:
        start = ["uv", "pip", "install", "--python", sys.executable]
    return shlex.join([*start, *package.split()])
