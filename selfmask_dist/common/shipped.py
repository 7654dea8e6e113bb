"""What ships with the package and lies beside it in a checkout: `launchers`, `data_prep` and `configs`.

    installed wheel             checkout, editable install, snapshot in a run's folder
    selfmask_dist/_launchers    launchers
    selfmask_dist/_data_prep    data_prep
    selfmask_dist/_configs      configs

In a wheel they lie inside the package, so that nothing of these names is spread over site-packages. In a
checkout they lie where their scripts are typed: `python launchers/submit.py`. The modules import each other
relatively, and so work under both names. Knows nothing of what is in them.
"""

import difflib
import importlib
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parents[1]
IS_WHEEL = (PACKAGE / "_launchers").is_dir()
ROOT = PACKAGE.parent  # what has to be on Python's path
CODE = ("selfmask_dist",) if IS_WHEEL else ("selfmask_dist", "launchers", "data_prep")  # folders of ROOT
_ENDING = ".yaml"


def shipped_module(name: str) -> ModuleType:
    """Import and return a module that ships with the package.

    Args:
        name: as it is called in a checkout, for example "launchers.submit".
    """
    return importlib.import_module(f"selfmask_dist._{name}" if IS_WHEEL else name)


def shipped_configs() -> dict[str, Path]:
    """Return the files of the configurations that ship, by name; empty where there are none.

    A name is the path inside `configs` without its ending, for example "methods/masks/threshold". In a run's
    snapshot of the code there are none, because its restarts read the configuration where it was.
    """
    folder = PACKAGE / "_configs" if IS_WHEEL else ROOT / "configs"
    files = sorted(folder.rglob(f"*{_ENDING}"), key=lambda path: (len(path.parts), path))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def find_config(text: str | Path) -> Path:
    """Return the file that a `--config` means: the path itself where there is a file, else one that ships.

    A shipped one is found by its name or by the last part of it: "methods/masks/threshold" and "threshold".
    "configs/" before it and ".yaml" after it, as in a checkout's path, may stay. A folder of that name, for
    example of a run, does not hide it.

    Raises:
        ValueError: there is neither; the message names the nearest ones that ship.
    """
    path = Path(text)
    if path.exists() and not path.is_dir():
        return path
    configs = shipped_configs()
    name = path.as_posix().removesuffix(_ENDING)
    short = name.removeprefix("configs/")
    found = [file for known, file in configs.items() if short in (known, known.rpartition("/")[2])]
    if len(found) == 1:
        return found[0]
    if path.is_dir():
        return path  # reading it says what is wrong
    near = difflib.get_close_matches(short, [*configs, *(known.rpartition("/")[2] for known in configs)], n=3)
    hint = f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
    raise ValueError(
        f"{path}: cannot read the configuration: no such file, and none of this name ships with selfmask_dist"
        f"{hint} (`selfmask configs` lists those that ship)"
    )
