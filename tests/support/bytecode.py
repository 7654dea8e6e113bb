"""Compiled modules are kept where the environment would have every process compile them anew."""

import tempfile
from collections.abc import MutableMapping
from pathlib import Path

CACHE = Path(tempfile.gettempdir()) / "selfmask-pycache"


def keep_bytecode(environment: MutableMapping[str, str]) -> bool:
    """Let the processes of this environment keep their compiled modules; return whether that was forbidden.

    Tests start dozens of processes, and compiling torch and timm takes each of them 10 s. Where
    PYTHONDONTWRITEBYTECODE is set, the compiled modules go to a folder of their own, none beside the sources.
    """
    if not environment.pop("PYTHONDONTWRITEBYTECODE", ""):
        return False
    environment.setdefault("PYTHONPYCACHEPREFIX", str(CACHE))
    return True
