"""Misuses of a configuration: on the command line, in YAML files, and of keys that are not for a method."""

from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.misuses.case import WORKS, Case, Said, Wanted, check, error, selfmask, told, warning
from benchmarks.faults.misuses.shared import config, data, finished


def given(name: str, wanted: Wanted, *words: str) -> Case:
    """Words after `selfmask config`."""
    return Case(name, wanted, lambda _: selfmask("config", *words))


def shows(name: str, line: str, *words: str) -> Case:
    """Words after `selfmask config` that are to give a line of the resolved configuration."""

    def use(_: Path) -> Said:
        said = told(selfmask("config", *words))
        check(line in [one.strip() for one in said.text.splitlines()], f"no line {line!r}")
        return said

    return Case(name, WORKS, use)


def written(name: str, wanted: Wanted, text: str | bytes) -> Case:
    """A YAML file with this text."""

    def use(folder: Path) -> Said:
        path = folder / "x.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return selfmask("config", "--config", path)

    return Case(name, wanted, use)


def trained(name: str, wanted: Wanted, *words: str) -> Case:
    """Words after `selfmask train` with the tiny configuration; at most one step."""

    def use(folder: Path) -> Said:
        path = config(folder, eval={"final": False})
        return selfmask("train", "--config", path, "train.max_steps=1", "run.name=a", *words)

    return Case(name, wanted, use)


def in_place_of_a_file(make: Callable[[Path], Path]) -> Callable[[Path], Said]:
    return lambda folder: selfmask("config", "--config", make(folder))


def folder_of_a_run(_: Path) -> Path:
    return finished()


def a_mask(_: Path) -> Path:
    return finished() / "final.mask"


def its_json(_: Path) -> Path:
    return finished() / "environment.json"


def two_files(folder: Path) -> Said:
    first, second = config(folder / "a"), config(folder / "b")
    return selfmask("train", "--config", first, "--config", second, "train.max_steps=1")


def dash_dash_key(folder: Path) -> Said:
    return selfmask("train", "--config", config(folder), "--train.epochs", "3")


def spaces_around(folder: Path) -> Said:
    return selfmask("config", "train.epochs", "=", "3")


def literal_brackets(folder: Path) -> Said:
    """Data lie in a folder whose name looks like a pattern."""
    (folder / "set[1]{a,b}").mkdir()
    (folder / "set[1]{a,b}" / "shards").symlink_to(Path(data()["train"]).parent)
    shards = folder / "set[1]{a,b}" / "shards"
    path = config(folder, eval={"final": False})
    keys = [f"data.train='{shards / 'train'}'", f"data.test='{shards / 'test'}'", "run.name=a"]
    return told(selfmask("train", "--config", path, "train.max_steps=1", *keys))


def blank_at_the_end(folder: Path) -> Said:
    path = config(folder, eval={"final": False})
    keys = [f"data.train={data()['train']} ", "run.name=a", "train.max_steps=1"]
    return told(selfmask("train", "--config", path, *keys))


def swapped_data(folder: Path) -> Said:
    """The images, and not their shards."""
    images = Path(data()["train"]).parents[1] / "images" / "train"
    return selfmask("train", "--config", config(folder), f"data.train={images}", "run.name=a")


CASES = [
    given("one equals sign too many", error("train.epochs", r'"=3"'), "train.epochs==3"),
    given("blanks around the equals sign", error("'train.epochs'", "key=value"), "train.epochs", "=", "3"),
    Case(
        "a key as an option with its value after it",
        error(r"train\.epochs=", "without the dashes"),
        dash_dash_key,
    ),
    given("a number in words", error("train.epochs", "ten"), "train.epochs=ten"),
    given("a number with a unit", error("train.epochs", "3ep"), "train.epochs=3ep"),
    given("a decimal comma", error("optim.score_lr", "0,1"), "optim.score_lr=0,1"),
    given("a share in percent", error("mask.keep", "50%"), "mask.keep=50%"),
    given("a number in quotes within quotes", error("train.epochs", '"3"'), "train.epochs='\"3\"'"),
    given("a negative seed", error("seed", "-1"), "seed=-1"),
    given("a negative batch", error("train.global_batch_size", "-64"), "train.global_batch_size=-64"),
    given("a learning rate that is NaN", error("optim.score_lr", "NaN|nan"), "optim.score_lr=.nan"),
    given("an infinite learning rate", error("optim.score_lr", "Infinity|inf"), "optim.score_lr=.inf"),
    given("infinity as Python writes it", error("optim.score_lr", "inf"), "optim.score_lr=inf"),
    given("None as Python writes it", error("train.max_steps", "None"), "train.max_steps=None"),
    given("a tuple as Python writes it", error("data.crop_scale", r"\(0\.2"), "data.crop_scale=(0.2, 1)"),
    given("a list without brackets", error("eval.knn_k", "5,10"), "eval.knn_k=5,10"),
    shows("one key twice: a later one wins", "epochs: 3.0", "train.epochs=2", "train.epochs=3"),
    given("a name that is a whole path", error("run.name", "run.dir"), "run.name=/tmp/a"),
    given("a name of 300 letters", error("run.name", "300"), f"run.name={'a' * 300}"),
    given("a name that leads out of the folder", error("run.name", r"\.\."), "run.name=.."),
    given("a name with a line break", error("run.name"), 'run.name="a\\nb"'),
    given("a key with a capital", error(r"did you mean train\.epochs"), "train.Epochs=3"),
    given("a dash for an underscore", error(r"optim\.score_lr"), "optim.score-lr=3"),
    given("a section without its dot", error("train.epochs"), "trainepochs=3"),
    shows("a key with a blank in front", "epochs: 3.0", " train.epochs=3"),
    shows("nested quotes keep a comma and a colon", "name: 'a: b, c'", "run.name='a: b, c'"),
    shows("a large number with underscores", "max_steps: 1000000", "train.max_steps=1_000_000"),
    shows("a number with an exponent", "score_lr: 10.0", "optim.score_lr=1e1"),
    shows("a list in YAML over lines", "knn_k: [5, 10]", "eval.knn_k=\n- 5\n- 10\n"),
    written("tabs for indents", error(r"x\.yaml:2", "tabs"), "train:\n\tepochs: 3\n"),
    written("two colons in a line", error(r"x\.yaml:1"), "run: name: a\n"),
    written("no blank after a colon", error(r"x\.yaml:2|x\.yaml:1", "train"), "train:\n  epochs:3\n"),
    written("JSON for YAML", WORKS, '{"train": {"epochs": 3}}'),
    written("UTF-16, as an editor saved it", error("UTF-8"), "train: {epochs: 3}".encode("utf-16")),
    written("a merge conflict", error(r"x\.yaml:\d"), "<<<<<<< ours\nseed: 1\n=======\nseed: 2\n>>>>>>>\n"),
    written("an environment variable", error("run.dir", "HOME", "variables"), "run: {dir: $HOME/runs}\n"),
    written("Windows' line ends", WORKS, "train:\r\n  epochs: 3\r\n"),
    written("a key of an anchor", error("unknown key"), "base: &b {epochs: 3}\ntrain:\n  <<: *b\n"),
    written("a section whose keys are commented out", WORKS, "train:\n#  epochs: 3\noptim:\n  score_lr: 1\n"),
    Case("a run's folder for a file", error(r"config\.yaml|folder"), in_place_of_a_file(folder_of_a_run)),
    Case("a mask for a file", error("not a text file|YAML"), in_place_of_a_file(a_mask)),
    Case("another JSON for a file", error("unknown key", "command"), in_place_of_a_file(its_json)),
    Case("two files for one run", error("--config", "twice|two|once"), two_files),
    Case("a folder whose name looks like a pattern", WORKS, literal_brackets),
    Case("a blank at the end of a path", WORKS, blank_at_the_end),
    Case("pictures where shards are wanted", error("tar", "convert"), swapped_data),
    trained("a family's key for another family", warning(r"mask\.keep"), "mask.keep=0.5"),
    trained("a method's key for another method", warning(r"procedure\.tasks|packnet"), "procedure.tasks=2"),
    trained("an objective's key for another", warning(r"simclr\.temperature"), "simclr.temperature=0.2"),
    trained(
        "epochs for a method without training",
        warning(r"train\.epochs|optim\.score_lr"),
        "method=frozen",
        "optim.score_lr=3",
        "eval.final=true",
    ),
    trained("fine-tuning's key for masks", warning("finetune"), "finetune.lora_rank=2"),
    trained("a schedule longer than the training", error("warmup"), "optim.warmup_epochs=3"),
    trained("more processes of data than pictures", WORKS, "engine.workers=2", "train.global_batch_size=2"),
    trained("a batch larger than the data", WORKS, "train.global_batch_size=64"),
    trained("a device that is not there", error("cuda", "engine.device"), "engine.device=cuda"),
    trained("a device that nobody has", error("engine.device"), "engine.device=tpu"),
]
