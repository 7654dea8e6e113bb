"""Misuses of commands: files and folders that do not fit, options without sense, closed pipes, resumes."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from benchmarks.faults.misuses.case import WORKS, Case, Said, check, error, selfmask, shell, told, warning
from benchmarks.faults.misuses.shared import config, data, finished

Use = Callable[[Path], Said | None]


def mask() -> Path:
    return finished() / "final.mask"


def words(*given: str) -> Use:
    """A command; RUN is a finished run, MASK its mask, HERE the empty folder, DATA the shards."""

    def use(folder: Path) -> Said:
        places = {"RUN": finished(), "MASK": mask(), "HERE": folder, "DATA": Path(data()["train"]).parent}
        found = []
        for word in given:
            for name, place in places.items():
                word = word.replace(name, str(place))
            found.append(word)
        return selfmask(*found)

    return use


def line(command: str, *, status: int | None = None) -> Use:
    """A line of a shell, with the same names as variables."""

    def use(folder: Path) -> Said:
        said = shell(command, folder, RUN=str(finished()), MASK=str(mask()))
        return said if status is None else told(said, status=status)

    return use


def shown(wanted: str, *given: str) -> Use:
    """A command that works and prints what is right."""

    def use(folder: Path) -> Said:
        said = told(words(*given)(folder) or Said(1, ""))
        check(re.search(wanted, said.text), f"no {wanted!r} in {said.text[-300:]}")
        return said

    return use


def train(*given: str) -> Use:
    def use(folder: Path) -> Said:
        path = config(folder, eval={"final": False})
        return selfmask("train", "--config", path, "train.max_steps=1", *given)

    return use


# ---- folders of runs


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """A file system on which nothing can be written, where this user may mount one."""
    place = folder / "fixed"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        place.chmod(0o555)
        yield place
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def unwritable(folder: Path) -> Said:
    with read_only(folder) as place:
        return selfmask("train", "--config", config(folder), f"run.dir={place}", "train.max_steps=1")


def report_unwritable(folder: Path) -> Said:
    with read_only(folder) as place:
        return selfmask("report", finished(), "--out", place / "x.html")


def mask_unwritable(folder: Path) -> Said:
    with read_only(folder) as place:
        return selfmask("mask", "merge", mask(), mask(), "--out", place / "x.mask")


def file_for_a_folder(folder: Path) -> Said:
    (folder / "runs").touch()
    path = config(folder)
    return selfmask("train", "--config", path, f"run.dir={folder / 'runs'}", "train.max_steps=1")


def name_is_a_file(folder: Path) -> Said:
    path = config(folder)
    (folder / "a").touch()
    return selfmask("train", "--config", path, "run.name=a", "train.max_steps=1")


def taken(folder: Path) -> Said:
    path = config(folder, eval={"final": False})
    told(selfmask("train", "--config", path, "run.name=a", "train.max_steps=1"))
    return selfmask("train", "--config", path, "run.name=a", "train.max_steps=1")


def foreign_folder(folder: Path) -> Said:
    """overwrite=true on a folder that holds somebody's own files beside a run's."""
    path = config(folder, eval={"final": False})
    told(selfmask("train", "--config", path, "run.name=a", "train.max_steps=1"))
    (folder / "a" / "thesis.tex").write_text("mine")
    again = ["run.name=a", "train.max_steps=1", "run.overwrite=true"]
    told(selfmask("train", "--config", path, *again))
    check((folder / "a" / "thesis.tex").read_text() == "mine", "the user's file is gone")
    return Said(0, "")


def both(folder: Path) -> Said:
    return train("run.resume=true", "run.overwrite=true", "run.name=a")(folder) or Said(0, "")


def resumed_without_checkpoint(folder: Path) -> Said:
    """The checkpoints were deleted to save space, and the run is to go on."""
    path = config(folder, eval={"final": False})
    told(selfmask("train", "--config", path, "run.name=a", "train.max_steps=2"))
    shutil.rmtree(folder / "a" / "checkpoints")
    (folder / "a" / "result.json").unlink()
    return selfmask("train", "--config", path, "run.name=a", "train.max_steps=2", "run.resume=true")


def damaged_config(folder: Path) -> Said:
    path = config(folder, eval={"final": False})
    told(selfmask("train", "--config", path, "run.name=a", "train.max_steps=1"))
    (folder / "a" / "config.yaml").write_text("optim: {score")
    return selfmask("train", "--config", path, "run.name=a", "train.max_steps=1", "run.resume=true")


def damaged_result(folder: Path) -> Said:
    run = folder / "done"
    shutil.copytree(finished(), run)
    (run / "result.json").write_text('{"adapted": ')
    return selfmask("report", run)


def failed_start(folder: Path) -> Said:
    """Weights that are not there, found out late, and then the same name again."""
    path = config(folder, eval={"final": False})
    keys = ["run.name=a", "train.max_steps=1"]
    wrong = selfmask("train", "--config", path, *keys, "backbone.weights=none.pth")
    check(wrong.status == 2, f"exit status {wrong.status}")
    return told(selfmask("train", "--config", path, *keys))


def failed_cascade_start(folder: Path) -> Said:
    """A cascade whose configuration fails inside its first stage, and then the same name again."""
    path = config(folder, eval={"final": False})
    own = ["run.name=a", "train.max_steps=1"]
    cascade = ["method=cascade", "objective.name=swav", "crops.local_size=15"]
    wrong = selfmask("train", "--config", path, *own, *cascade)
    check(wrong.status == 2, f"exit status {wrong.status}: {wrong.text[-200:]}")
    return told(selfmask("train", "--config", path, *own))


def failed_procedure_start(folder: Path) -> Said:
    """A chain of runs that fails in its first link, and then the same name again."""
    path = config(folder, eval={"final": False})
    own = ["run.name=a", "train.max_steps=1"]
    wrong = selfmask("train", "--config", path, *own, "method=packnet", "procedure.include=[nothing]")
    check(wrong.status == 2, f"exit status {wrong.status}: {wrong.text[-200:]}")
    return told(selfmask("train", "--config", path, *own))


def unbuildable(folder: Path) -> Said:
    """The library that makes the backbone fails on an argument of it; the name is free afterwards."""
    path = config(folder, eval={"final": False})
    own = ["run.name=a", "train.max_steps=1"]
    wrong = selfmask("train", "--config", path, *own, "backbone.kwargs.num_heads=5")
    told(selfmask("train", "--config", path, *own))
    return wrong


def unknown_argument(folder: Path) -> Said:
    path = config(folder, eval={"final": False})
    own = ["run.name=a", "train.max_steps=1"]
    wrong = selfmask("train", "--config", path, *own, "backbone.kwargs.num_haeds=2")
    told(selfmask("train", "--config", path, *own))
    return wrong


def port_taken(_: Path) -> Said:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        config_path = finished() / "config.yaml"
        return selfmask("serve", "--config", config_path, "--port", other.getsockname()[1])


def ranks_left_over(rank: str) -> Use:
    """Variables of another launcher are still set in the shell."""

    def use(folder: Path) -> Said:
        path = config(folder, eval={"final": False})
        with mock.patch.dict(os.environ, {"RANK": rank}):
            return selfmask("train", "--config", path, "train.max_steps=1", "run.name=a")

    return use


CASES = [
    Case("an unwritable folder for runs", error("fixed", "[Rr]ead-only|denied|written"), unwritable),
    Case("an unwritable folder for a report", error("fixed", "[Rr]ead-only|denied"), report_unwritable),
    Case("an unwritable folder for a mask", error("fixed", "[Rr]ead-only|denied"), mask_unwritable),
    Case("a file for the folder of runs", error("runs"), file_for_a_folder),
    Case("a file for a run's folder", error("/a", "file"), name_is_a_file),
    Case("a name that is taken", error("/a", "run.resume", "run.overwrite"), taken),
    Case("overwrite beside somebody's files", WORKS, foreign_folder),
    Case("resume and overwrite at once", error("run.resume", "run.overwrite"), both),
    Case("resume without the checkpoints", warning("checkpoint"), resumed_without_checkpoint),
    Case("resume of nothing", error("holds no run"), train("run.resume=true", "run.name=b")),
    Case("resume of a run with a damaged configuration", error("config.yaml"), damaged_config),
    Case("a report of a run with a damaged result", warning("result.json", "damaged"), damaged_result),
    Case("a start that fails, and the name again", WORKS, failed_start),
    Case("a cascade that fails in its first stage, and the name again", WORKS, failed_cascade_start),
    Case("a procedure that fails in its first link, and the name again", WORKS, failed_procedure_start),
    Case("a backbone's argument that does not fit", error("num_heads|divisible"), unbuildable),
    Case("a backbone's argument that is misspelt", error("num_haeds"), unknown_argument),
    Case("status of a file", error("MASK|final.mask"), words("status", "MASK")),
    Case("logs of a rank below 0", error("rank"), words("logs", "RUN", "--rank", "-1")),
    Case("logs of no lines", error("--lines"), words("logs", "RUN", "--lines", "0")),
    Case("logs of a folder that is no run", error("there are no logs"), words("logs", "HERE")),
    Case("checkpoints pruned to none", error("--keep"), words("checkpoints", "prune", "RUN", "--keep", "0")),
    Case("inspect of a folder", error("folder"), words("inspect", "RUN")),
    Case("inspect of a configuration", error("not a mask file"), words("inspect", "RUN/config.yaml")),
    Case(
        "a mask's difference from itself", WORKS, shown(r"all +25,152 +0 +0", "mask", "diff", "MASK", "MASK")
    ),
    Case(
        "merge of one mask",
        WORKS,
        shown(r"default keeps 99\.\d+%", "mask", "merge", "MASK", "--out", "HERE/x.mask"),
    ),
    Case(
        "merge onto its own input",
        error("--out", "lost"),
        words("mask", "merge", "MASK", "--out", "MASK"),
    ),
    Case(
        "merge by a rule that is not there",
        error("xor", "majority"),
        words("mask", "merge", "MASK", "--how", "xor", "--out", "HERE/x"),
    ),
    Case(
        "merge into a folder that is not there",
        error("none"),
        words("mask", "merge", "MASK", "--out", "HERE/none/x.mask"),
    ),
    Case(
        "interpolate beyond 1",
        error("2"),
        words("mask", "interpolate", "RUN", "RUN", "--at", "2", "--out", "HERE/x.mask"),
    ),
    Case(
        "interpolate with files for runs",
        error("run"),
        words("mask", "interpolate", "MASK", "MASK", "--out", "HERE/x.mask"),
    ),
    Case(
        "convert against weights without a backbone",
        error("--config"),
        words("mask", "convert", "MASK", "HERE/x.mask", "--against-weights"),
    ),
    Case(
        "import of what has no scores",
        error("mask_real|scores"),
        words(
            "mask", "import", "RUN/head.safetensors", "--config", "RUN/config.yaml", "--out", "HERE/x.mask"
        ),
    ),
    Case(
        "a mask of the file that is not there",
        error("'b'", "default"),
        words("mask", "diff", "MASK:b", "MASK"),
    ),
    Case("eval of a folder without a run", error("HERE|no run|config"), words("eval", "HERE")),
    Case("eval with neighbours in words", error("--k", "five"), words("eval", "RUN", "--k", "five")),
    Case(
        "eval with more neighbours than pictures",
        error("1000", "48"),
        words("eval", "RUN", "--k", "1000", "--out", "HERE"),
    ),
    Case(
        "eval with data elsewhere",
        error("none"),
        words("eval", "RUN", "--data", "HERE/none", "--out", "HERE"),
    ),
    Case(
        "embed of a folder",
        error("folder|picture"),
        words("embed", "HERE", "--masks", "MASK", "--out", "HERE/x.npz"),
    ),
    Case(
        "embed of a mask",
        error("final.mask", "picture"),
        words("embed", "MASK", "--masks", "MASK", "--out", "HERE/x.npz"),
    ),
    Case(
        "embed in batches of none",
        error("--batch-size"),
        words("embed", "MASK", "--masks", "MASK", "--out", "HERE/x.npz", "--batch-size", "0"),
    ),
    Case(
        "embed on a device that is not there",
        error("cuda|gpu", "device"),
        words("embed", "MASK", "--masks", "MASK", "--out", "HERE/x.npz", "--device", "cuda:7"),
    ),
    Case(
        "one mask given twice to embed",
        error("done"),
        words("embed", "MASK", "--masks", "MASK", "MASK", "--out", "HERE/x.npz"),
    ),
    Case(
        "serve on a port out of range",
        error("port", "70000"),
        words("serve", "--masks", "MASK", "--port", "70000"),
    ),
    Case("serve on a port that is taken", error("port|in use"), port_taken),
    Case(
        "serve with no waiting allowed",
        error("--max-waiting"),
        words("serve", "--masks", "MASK", "--max-waiting", "0"),
    ),
    Case("report of nothing", error("no run|not a run|config"), words("report", "HERE")),
    Case("report onto a folder", error("folder"), words("report", "RUN", "--out", "HERE")),
    Case("help on a misspelt key", error("score_lr"), words("help", "optim.score_rl")),
    Case("a command that is not there", error("trian", "train"), words("trian")),
    Case("data verify of an empty folder", error("tar", "convert"), words("data", "verify", "HERE")),
    Case(
        "data index with a budget in percent",
        error("budget", "5"),
        words("data", "index", "DATA/train", "--budget", "5"),
    ),
    Case(
        "data index with workers below 1",
        error("workers"),
        words("data", "index", "DATA/train", "--workers", "0"),
    ),
    Case(
        "launch on no nodes",
        error("--nodes"),
        words("launch", "--nodes", "0", "--config", "RUN/config.yaml", "run.name=z"),
    ),
    Case(
        "launch with seeds in words",
        error("--seeds", "one"),
        words("launch", "--seeds", "one", "--config", "RUN/config.yaml"),
    ),
    Case(
        "launch with one seed twice",
        error("seed"),
        words("launch", "--seeds", "1,1", "--config", "RUN/config.yaml", "--dry-run"),
    ),
    Case(
        "plan on less than a GPU",
        error("gpus|nodes"),
        words("plan", "--nodes", "0", "--config", "RUN/config.yaml"),
    ),
    Case(
        "a reader that goes away",
        WORKS,
        line("selfmask help all | head -1; test ${PIPESTATUS[0]} = 141 -o ${PIPESTATUS[0]} = 0"),
        seconds=120,
    ),
    Case("standard output closed", WORKS, line("selfmask configs >&-", status=0), seconds=120),
    Case("standard error closed", WORKS, line("selfmask status $RUN 2>&-", status=0), seconds=120),
    Case(
        "a full disk behind standard output",
        error("space"),
        line("selfmask configs > /dev/full"),
        seconds=120,
    ),
    Case("RANK left over, and no number", error("RANK", "one"), ranks_left_over("one")),
    Case("RANK left over alone", error("RANK=1", "WORLD_SIZE"), ranks_left_over("1")),
]
