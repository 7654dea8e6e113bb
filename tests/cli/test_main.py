"""The command line as a whole: help, what is not a command's argument, and what ends without a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from selfmask_dist import __version__
from selfmask_dist.cli import main
from selfmask_dist.cli.config import explain, methods
from selfmask_dist.config import Config
from selfmask_dist.config import help as config_help


def _selfmask(*words: str) -> list[str]:
    return [sys.executable, "-m", "selfmask_dist.cli", *words]


def test_help_and_version_answer_without_the_configuration() -> None:
    """`--help` must not wait for torch or pydantic, which take seconds on a slow disk."""
    check = (
        "import sys\nfrom selfmask_dist.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'pydantic', 'numpy', 'matplotlib'} & set(sys.modules)\nassert not heavy, heavy"
    )
    for words in (["--help"], ["--version"], ["train", "--help"], ["plan", "--help"], ["eval", "--help"]):
        done = subprocess.run([sys.executable, "-c", check, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    done = subprocess.run(_selfmask("--version"), capture_output=True, text=True, check=True)
    assert done.stdout == f"selfmask_dist {__version__}\n"


def test_help_of_train_is_short_and_says_where_the_keys_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    told = capsys.readouterr().out
    assert len(told.splitlines()) < 30
    assert "selfmask help" in told


def test_help_lists_sections_and_the_keys_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0
    told = capsys.readouterr().out
    for section in config_help.sections(Config):
        assert f"\n{section} " in told
    assert max(map(len, told.splitlines())) <= 100
    keys = [name for name, _ in config_help.fields(Config) if name.startswith("optim.")]
    section = explain("optim")
    assert [
        line.split(":")[0].strip() for line in section.splitlines() if line.startswith("  optim.")
    ] == keys
    assert "mask.family" not in section
    assert explain("optim.score_lr").startswith("  optim.score_lr: number")
    assert len(explain("all").splitlines()) > 500


def test_help_on_a_method_names_what_it_reads() -> None:
    packnet = explain("method=packnet")
    assert packnet == explain("packnet")
    assert "\n  procedure   " in packnet
    assert "\n  procedure.keep: " in packnet
    assert "procedure.rounds" not in packnet, "which is for lottery"
    assert "\n  cascade  " not in packnet
    for name in methods():
        assert f"method={name} " in explain(f"method={name}")
    # a section and a method: the section's keys, and the way to the method
    assert "cascade.clusters" in explain("cascade")
    assert "selfmask help method=cascade" in explain("cascade")
    # every key of `procedure` is for some procedure, but for two that procedures set for their own stages
    set_by_stages = ("procedure.start_from", "procedure.hold")
    told = "".join(explain(f"method={name}") for name in methods())
    for name, _ in config_help.fields(Config):
        assert not name.startswith("procedure.") or f"  {name}: " in told or name in set_by_stages, name


def test_the_methods_are_those_of_the_configuration() -> None:
    assert sorted(methods()) == sorted(Config.model_fields["method"].annotation.__args__)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("topic", "hint"),
    [("optm", "did you mean optim"), ("score_lr", "did you mean optim.score_lr"), ("§", "lists")],
)
def test_help_on_nothing_known_names_what_is_near(
    topic: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["help", topic]) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["train", "--train.epochs=3"], "write train.epochs=3, without the dashes"),
        (
            ["plan", "--seed=3", "--optim.score_lr", "10"],
            "write seed=3 optim.score_lr=..., without the dashes",
        ),
    ],
)
def test_a_setting_with_dashes_gets_the_way_out(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert hint in capsys.readouterr().err


def test_an_unknown_option_gets_no_such_advice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "x", "--fast"])
    told = capsys.readouterr().err
    assert "unrecognized arguments: --fast" in told
    assert "dashes" not in told


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    """`selfmask help all | head -1`: more than a pipe's buffer holds, and nobody reads on."""
    for words in (["help", "all"], ["config"]):
        process = subprocess.Popen(_selfmask(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        complaint = process.stderr.read()
        process.stderr.close()
        assert process.wait(60) == 141
        assert complaint == b""


@pytest.mark.parametrize("words", [["inspect", "."], ["config", "--config", "."], ["mask", "verify", "."]])
def test_a_folder_in_place_of_a_file_is_a_message(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) in (1, 2)
    captured = capsys.readouterr()
    assert "directory" in captured.out + captured.err or "folder" in captured.err


def test_paths_that_do_not_fit_are_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    assert main(["inspect", str(file / "inside")]) == 2
    assert f"{file / 'inside'}: not a directory" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "secret.mask"
    file.write_bytes(b"x")
    file.chmod(0)
    assert main(["inspect", str(file)]) == 2
    assert "permission denied" in capsys.readouterr().err
