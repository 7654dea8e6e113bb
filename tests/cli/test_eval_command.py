"""`selfmask eval`: numbers out of stores made once, of runs, masks, several masks, data without labels."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from selfmask_dist.cli import main
from selfmask_dist.cli.eval import subject as subject_module
from selfmask_dist.cli.eval.results import Results, Row, format_table
from selfmask_dist.cli.train import run
from selfmask_dist.config import load_config
from selfmask_dist.evals.store import EmbeddingStore
from selfmask_dist.maskfile import read_mask_file
from tests.support.cascade_cases import settings, write_shards
from tests.support.distributed import run_distributed
from tests.support.tars import labelled, picture, write_tar

CLIP = (
    "backbone.name=open_clip:ViT-B-32",
    "backbone.kwargs={embed_dim: 16, vision_cfg: {image_size: 16, layers: 2, width: 32, head_width: 16, "
    "patch_size: 8}, text_cfg: {context_length: 16, width: 16, heads: 2, layers: 1}}",
)
SUPERVISED = ("method=mask", "objective.name=supervised", "optim.warmup_epochs=0", "optim.score_lr=20")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("eval"), noise=600)  # so hard that numbers differ


@pytest.fixture(scope="module")
def finished(shards: Path) -> Path:
    """Two finished runs, `a` and `b`, of one backbone."""
    for name, seed in (("a", 0), ("b", 1)):
        more = (*SUPERVISED, f"run.name={name}", f"train.epochs={2 + seed}")
        run(load_config(None, settings(shards, shards.parent, *more)))
    return shards.parent


@pytest.fixture
def a_run(finished: Path, tmp_path: Path) -> Path:
    """A copy of run `a`, to be evaluated."""
    return Path(shutil.copytree(finished / "a", tmp_path / "a"))


def result(path: Path, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "eval" / f"{kind}.json").read_text())
    assert found["version"] == 1
    return found


def rows(path: Path, kind: str) -> dict[str, dict[str, float]]:
    return {row["name"]: row["values"] for row in result(path, kind)["rows"]}


def chunks(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*.safetensors")}


def test_a_run_is_measured_from_stores_that_are_made_once(
    a_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(a_run), "--k", "5,20", "knn", "--epochs=20", "probe"]) == 0
    of_run = json.loads((a_run / "result.json").read_text())
    for name, section in (("frozen", "frozen"), ("masked", "adapted")):
        assert rows(a_run, "knn")[name]["knn5"] == of_run[section]["knn5"]
        assert rows(a_run, "probe")[name]["probe"] == of_run[section]["probe"]
    table = capsys.readouterr().out
    assert (
        f"{of_run['adapted']['knn5']:.4f} ({of_run['adapted']['knn5'] - of_run['frozen']['knn5']:+.4f})"
        in table
    )
    found = result(a_run, "knn")
    assert found["baseline"] == "frozen"
    assert found["backbone"]["fingerprint"] == of_run["fingerprint"]
    assert found["data"]["train"]["samples"] == 96
    assert len(found["details"]["views"]["masked"]["per_class"]) == 4
    assert set(found["columns"]) == {"knn5", "knn20", "knn5 balanced", "knn5 plain vote", "knn5 of train"}
    assert all((a_run / "eval" / plot).stat().st_size > 5000 for plot in found["plots"])
    assert len(result(a_run, "probe")["details"]["views"]["frozen"]["heads"]) >= 50
    before = chunks(a_run / "embeddings")
    # once more, and every kind: no model, no picture
    monkeypatch.setattr(subject_module, "embed_to_store", _fail)
    monkeypatch.setattr(subject_module, "build_backbone", _fail)
    assert main(["eval", str(a_run), "knn", "lowshot", "labelfree", "--k=5,20", "--tries=2", "--c=10"]) == 0
    assert rows(a_run, "knn") == {row["name"]: row["values"] for row in found["rows"]}
    shots = result(a_run, "lowshot")
    assert shots["columns"] == ["10 %"]
    assert shots["settings"]["c"] == 10
    assert shots["details"]["views"]["masked"]["10 %"]["labels_per_class"] == 2
    assert "less than one label per class: 4 %, 2 %, 1 %, 0.5 %, 0.25 %" in shots["notes"][0]
    assert rows(a_run, "labelfree")["frozen"]["frozen's 5 neighbours kept"] == 1
    assert rows(a_run, "labelfree")["masked"]["frozen's 5 neighbours kept"] < 1
    assert chunks(a_run / "embeddings") == before


def _fail(*_: Any, **__: Any) -> Any:
    raise AssertionError("the stores are enough")


def test_a_damaged_chunk_is_named_and_made_again(a_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(a_run), "labelfree"]) == 0
    before = chunks(a_run / "embeddings")
    victim = a_run / "embeddings" / "masked" / "train" / "00001.safetensors"
    victim.write_bytes(victim.read_bytes()[:-9])
    (a_run / "embeddings" / "frozen" / "test" / "00000.safetensors").unlink()
    assert main(["eval", str(a_run), "labelfree"]) == 0
    assert "00001.safetensors is damaged" in capsys.readouterr().out
    assert chunks(a_run / "embeddings") == before


def _eval_rank(arguments: list[str]) -> int:
    return main(arguments)


@pytest.mark.distributed
def test_two_processes_find_the_numbers_of_one(a_run: Path, tmp_path: Path) -> None:
    arguments = [
        "eval",
        str(a_run),
        "knn",
        "probe",
        "lowshot",
        "labelfree",
        "--k=5",
        "--tries=2",
        "--epochs=4",
    ]
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    two = [*arguments, "--out", str(tmp_path / "two")]
    codes = run_distributed(_eval_rank, 2, two, backend="", timeout=120)
    assert codes == [0, 0]
    assert chunks(tmp_path / "one" / "embeddings") == chunks(tmp_path / "two" / "embeddings")
    for kind in ("knn", "lowshot", "labelfree"):
        for name, values in rows(tmp_path / "one", kind).items():
            assert rows(tmp_path / "two", kind)[name] == pytest.approx(values), (kind, name)
    for name, values in rows(tmp_path / "one", "probe").items():
        found = rows(tmp_path / "two", "probe")[name]
        assert found["probe"] == values["probe"]
        assert found["probe by SGD"] == pytest.approx(values["probe by SGD"], abs=1 / 32 + 1e-9)


@pytest.mark.distributed
def test_two_processes_that_cut_the_backbone_embed_as_one_that_holds_it(
    finished: Path, tuned: Path, tmp_path: Path
) -> None:
    subjects = [str(finished / name) for name in ("a", "b", "lora")]
    arguments = ["eval", *subjects, "labelfree"]
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    two = [*arguments, "engine.name=fsdp", "--out", str(tmp_path / "two")]
    assert run_distributed(_eval_rank, 2, two, backend="", timeout=120) == [0, 0]
    for view in ("frozen", "a", "b", "lora"):
        for split in ("train", "test"):
            whole, found = (
                EmbeddingStore.open(tmp_path / name / "embeddings" / view / split).read_slice().features
                for name in ("one", "two")
            )
            assert torch.allclose(found, whole, rtol=1e-5, atol=1e-5), (view, split)


def test_several_masks_of_one_backbone_and_their_mean(finished: Path, tmp_path: Path) -> None:
    files = [str(finished / "a" / "final.mask"), str(finished / "b")]
    assert main(["eval", *files, "--out", str(tmp_path), "--k=5", "--epochs=4", "knn", "probe"]) == 0
    assert list(rows(tmp_path, "knn")) == ["frozen", "a", "b", "mean of embeddings"]
    assert list(rows(tmp_path, "probe")) == ["frozen", "a", "b", "mean of embeddings", "mean of logits"]
    assert main(["eval", *files, "knn"]) == 2


@pytest.fixture(scope="module")
def tuned(shards: Path) -> Path:
    """Fine-tuned runs beside `a` and `b`: a part of the weights, all of them, low-rank additions."""
    common = ("method=finetune", "objective.name=supervised", "optim.warmup_epochs=0", "optim.weight_lr=0.2")
    for train in ("bias", "all", "lora"):
        more = (*common, f"finetune.train={train}", f"run.name={train}", "train.epochs=2")
        run(load_config(None, settings(shards, shards.parent, *more)))
    return shards.parent


@pytest.mark.parametrize("name", ["bias", "all", "lora"])
def test_a_fine_tuned_run_gives_the_numbers_of_the_run(
    tuned: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(tuned / name, tmp_path / name))
    assert main(["eval", str(path), "knn", "--k=5"]) == 0
    of_run = json.loads((path / "result.json").read_text())
    stores = [chunks(path / "embeddings" / view) for view in ("frozen", "trained")]
    assert stores[0].keys() == stores[1].keys()
    assert stores[0] != stores[1]
    assert rows(path, "knn")["frozen"]["knn5"] == of_run["frozen"]["knn5"]
    assert rows(path, "knn")["fine-tuned"]["knn5"] == of_run["adapted"]["knn5"]
    assert result(path, "knn")["backbone"]["fingerprint"] == of_run["fingerprint"]
    monkeypatch.setattr(subject_module, "embed_to_store", _fail)
    assert main(["eval", str(path), "knn", "--k=5"]) == 0


def test_fine_tuned_runs_stand_beside_masks(finished: Path, tuned: Path, tmp_path: Path) -> None:
    paths = [str(finished / name) for name in ("bias", "a", "lora", "all")]
    assert main(["eval", *paths, "--out", str(tmp_path), "--k=5", "knn", "masks"]) == 0
    assert list(rows(tmp_path, "knn")) == ["frozen", "bias", "a", "lora", "all", "mean of embeddings"]
    assert list(rows(tmp_path, "masks")) == ["a"]
    for name in ("bias", "lora", "all", "a"):
        adapted = json.loads((finished / name / "result.json").read_text())["adapted"]
        assert rows(tmp_path, "knn")[name]["knn5"] == adapted["knn5"]


def test_weights_that_do_not_fit_are_refused(
    finished: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(tuned / "bias", tmp_path / "bias"))
    assert main(["eval", str(path), "knn", "seed=9"]) == 2
    assert "finetuned.safetensors is of a backbone with fingerprint" in capsys.readouterr().err
    result = json.loads((path / "result.json").read_text())
    (path / "result.json").write_text(json.dumps(result | {"fingerprint": "0" * 64}))
    assert main(["eval", str(path), str(finished / "a"), "knn", "--out", str(tmp_path / "out")]) == 2
    assert "these are of different backbones" in capsys.readouterr().err
    (path / "result.json").unlink()
    assert main(["eval", str(path), "knn"]) == 2
    assert "bias is not finished: it has finetuned.safetensors" in capsys.readouterr().err


def test_what_masks_say_needs_no_images(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["eval", str(finished / "a"), str(finished / "b"), "masks", "--out", str(out)]
    assert main(command) == 0
    assert not (out / "embeddings").exists()
    found = result(out, "masks")
    assert found["plots"] == ["masks.png"]
    assert (out / "eval" / "masks.png").stat().st_size > 5000
    for name in ("a", "b"):
        mask = read_mask_file(finished / name / "final.mask").masks["default"]
        assert rows(out, "masks")[name]["pruned"] == pytest.approx(1 - mask.num_kept() / mask.num_weights())
    (note,) = found["notes"]
    assert note.startswith("a and b: phi ")
    assert found["details"]["pairs"][0]["similarity"]["weights"] == mask.num_weights()


def test_data_without_labels_gives_label_free_numbers_and_says_so(
    a_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain").mkdir()
    for split, count in (("train", 40), ("test", 12)):
        write_tar(tmp_path / "plain" / f"{split}.tar", [(f"{i:03d}.jpg", picture(i)) for i in range(count)])
    words = ["eval", str(a_run), "--data", str(tmp_path / "plain"), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    told = capsys.readouterr().out
    for kind in ("knn", "probe", "lowshot", "zeroshot"):
        assert f"{kind}: left out: data.train has no labels, which {kind} needs" in told
    found = sorted(path.name for path in (tmp_path / "out" / "eval").glob("*.json"))
    assert found == ["labelfree.json", "masks.json"]
    assert main([*words, "knn"]) == 2
    assert "data.train has no labels, which knn needs; labelfree gives" in capsys.readouterr().err


def test_zero_shot_with_a_text_tower(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = "objective.prompts=['a photo of something {}.', '{}']"
    clip = settings(shards, tmp_path, *CLIP, "method=frozen", "objective.name=supervised", "run.name=clip")
    run(load_config(None, [*clip, prompts, "eval.probe=false"]))
    assert main(["eval", str(tmp_path / "clip"), "zeroshot", "knn"]) == 0
    found = result(tmp_path / "clip", "zeroshot")
    assert found["settings"]["prompts"] == ["a photo of something {}.", "{}"]
    accuracies = found["details"]["views"]["frozen"]
    assert list(accuracies) == ["all prompts", "a photo of something {}.", "{}"]
    assert found["rows"][0]["values"]["zeroshot"] == accuracies["all prompts"]
    assert found["rows"][0]["values"]["zeroshot top 5"] == 1, "there are four classes"
    assert "holds no mask: only the frozen backbone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "knn", "--k", "500"], "k is 500, but the bank holds 96 samples; choose k from 1 to 96"),
        (["{run}", "--k", "5", "knm"], "knm is neither a file or folder nor a kind"),
        (["knn"], "name what to evaluate"),
        (["{run}", "zeroshot"], "has no text tower with weights, which zeroshot needs"),
        (["{run}", "--k", "many"], "--k takes numbers with commas between them"),
        (["{run}/final.mask", "knn", "seed=7"], "of a backbone with fingerprint"),
        (["{run}", "labelfree", "--data", "{run}"], "holds no train folder and no train.tar"),
        (["{run}/eval.txt", "knn"], "is not a mask file"),
        (["{run}/logs", "knn"], "is not a run: it has no config.yaml"),
    ],
)
def test_bad_input_is_named(
    a_run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (a_run / "eval.txt").write_text("no mask")
    (a_run / "logs").mkdir(exist_ok=True)
    extra = ["backbone.image_size=16"] if "seed=7" in words else []
    assert main(["eval", *(word.format(run=a_run) for word in words), *extra]) == 2
    assert message in capsys.readouterr().err


def test_one_class_only_is_refused(a_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one").mkdir()
    for split in ("train", "test"):
        write_tar(tmp_path / "one" / f"{split}.tar", labelled(map(str, range(30)), classes=1))
    words = ["eval", str(a_run), "probe", "--data", str(tmp_path / "one"), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "a probe needs at least two classes; every training label is 0" in capsys.readouterr().err


def test_stores_of_other_data_are_not_mistaken(a_run: Path, shards: Path, capsys: Any) -> None:
    assert main(["eval", str(a_run), "labelfree"]) == 0
    swapped = [f"data.train={shards / 'test'}", f"data.test={shards / 'train'}"]
    assert main(["eval", str(a_run), "labelfree", *swapped]) == 2
    assert "holds other embeddings: its num_samples is 96 and 32 is asked for" in capsys.readouterr().err


def test_a_table_has_spreads_and_gaps() -> None:
    table = format_table(
        Results(
            "lowshot",
            ["1 %", "2 %"],
            [Row("frozen", {"1 %": 0.5}, {"1 %": 0.01}), Row("masked", {"1 %": 0.625, "2 %": 0.75})],
            baseline="frozen",
            notes=["two are missing"],
        )
    )
    lines = [line.split() for line in table.splitlines()]
    assert lines[1] == ["frozen", "0.5000", "±0.0100", "-"]
    assert lines[2] == ["masked", "0.6250", "(+0.1250)", "0.7500"]
    assert lines[3] == ["note:", "two", "are", "missing"]
