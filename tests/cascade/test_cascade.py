"""The cascade: plan, bundle, and whole runs on one and on several processes, stopped and gone on with."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from selfmask_dist import apply_masks
from selfmask_dist.cascade import MODES
from selfmask_dist.cascade.model import load_cascade
from selfmask_dist.cascade.plan import choose_num_groups, expert_epochs, share_out, utilisation
from selfmask_dist.cli import main
from selfmask_dist.cli.train import run
from selfmask_dist.common.files import write_json
from selfmask_dist.config import load_config
from selfmask_dist.config.procedures import Combining
from selfmask_dist.data import eval_loader, eval_transform
from selfmask_dist.evals.store import EmbeddingStore
from selfmask_dist.maskfile import MaskFileError, read_mask_file
from selfmask_dist.maskfile.bank import MaskBank
from selfmask_dist.runs.checkpoint import committed, read_checkpoint
from selfmask_dist.runs.folder import create_run_directory
from selfmask_dist.runs.status import read_status
from selfmask_dist.training.build import build_backbone, open_data
from tests.support.cascade_cases import settings, write_shards
from tests.support.distributed import run_distributed
from tests.support.tiny_run import child_environment, submit_command, wait_until

# ---- the plan


def test_experts_make_equal_steps() -> None:
    sizes = [14254, 8508, 8731, 6983, 11524]  # the authors' clusters of CIFAR-100, and their epochs
    found = [expert_epochs(50_000, size, 150, kind="equal_steps") for size in sizes]
    assert found == [526, 882, 859, 1074, 651]
    assert expert_epochs(50_000, 6983, 150, kind="equal_epochs") == 150
    assert expert_epochs(100, 99, 0.3, kind="equal_steps") == 1, "never none"


def test_groups_take_the_longest_expert_first_and_stay_busy() -> None:
    skewed = [900.0, 100.0, 500.0, 400.0, 100.0]
    groups = share_out(skewed, 2)
    assert groups == [[0, 1], [2, 3, 4]]
    assert utilisation(skewed, groups) == 1.0
    assert sorted(k for group in share_out(skewed, 3) for k in group) == list(range(5))
    equal = [100.0] * 5
    # five equal experts keep four groups busy for 5/8 of the time, so one group of all takes them in turn
    assert choose_num_groups(equal, 4, 64) == 1
    assert choose_num_groups([100.0] * 4, 4, 64) == 4
    assert choose_num_groups([100.0] * 4, 8, 64) == 4, "groups of two processes"
    rng = np.random.default_rng(0)
    for world_size in (1, 2, 4, 8, 16):
        for num_experts in (2, 4, 5, 8):
            costs = rng.pareto(1.5, num_experts) + 0.1
            number = choose_num_groups(list(costs), world_size, 64)
            assert utilisation(list(costs), share_out(list(costs), number)) >= 0.9


def test_groups_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"4 processes with a global batch of 64 can form 1, 2, 4 group"):
        choose_num_groups([1.0] * 3, 4, 64, wanted=3)


# ---- a whole run

COMBINATIONS = ("conditional", "unconditional", "replace", "unconditional_concat")
VARIANTS = f"cascade.combinations=[{', '.join(COMBINATIONS)}]"


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cascade of one process, with the shards beside it."""
    folder = tmp_path_factory.mktemp("cascade")
    shards = write_shards(folder)
    run(load_config(None, settings(shards, folder, "run.name=one", VARIANTS)))
    return folder / "one"


def result_of(directory: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((directory / "result.json").read_text())
    return values


def test_a_cascade_leaves_all_that_is_promised(cascade: Path) -> None:
    result = result_of(cascade)
    views = ["frozen", "self-masked", *COMBINATIONS]
    assert list(result["views"]) == [*views, "frozen, whitened", "self-masked, whitened"]
    assert all(set(row) == {"knn5", "probe"} for row in result["views"].values())
    assert sum(result["clusters"]) == 96
    assert len(result["clusters"]) == 2
    images = [np.load(cascade / "router" / f"expert-{k}.npy") for k in range(2)]
    assert sorted(np.concatenate(images).tolist()) == list(range(96)), "every image has one expert"
    file = read_mask_file(cascade / "cascade.mask")
    assert list(file.masks) == ["dispatcher", "expert-0", "expert-1"]
    assert result["mask"]["bytes"] == (cascade / "cascade.mask").stat().st_size
    assert (cascade / "cascade.png").stat().st_size > 10_000
    events = [json.loads(line)["event"] for line in (cascade / "events.jsonl").read_text().splitlines()]
    assert events[-1] == "end"
    for k, size in enumerate(result["clusters"]):
        expert = load_config(cascade / f"expert-{k}" / "config.yaml")
        assert expert.train.epochs == round(96 / size * 3)
        assert expert.swav.queue_start_epoch == pytest.approx(expert.train.epochs / 5)
        assert result_of(cascade / f"expert-{k}")["steps"] == expert.train.epochs * -(-size // 16)


def test_experts_start_from_the_dispatcher(cascade: Path) -> None:
    file = read_mask_file(cascade / "cascade.mask")
    masks = [torch.cat([bits.flatten() for bits in mask.bits.values()]) for mask in file.masks.values()]
    pruned = [int((~mask).sum()) for mask in masks]
    assert all(count > 100 for count in pruned)
    common = int((~masks[0] & ~masks[1]).sum())
    assert common > 0.8 * pruned[0], "what the dispatcher pruned is mostly pruned by the expert"


def test_every_combination_can_be_asked_for() -> None:
    assert get_args(Combining) == tuple(MODES)
    with pytest.raises(ValueError, match=r"cascade\.combinations"):
        load_config(None, ["cascade.combinations=[both]"])


def test_the_file_alone_embeds_as_the_run_did(cascade: Path) -> None:
    config = load_config(cascade / "config.yaml")
    backbone, (_, test) = build_backbone(config), open_data(config)
    bank = MaskBank(backbone.encoder)
    loaded = load_cascade(cascade / "cascade.mask", bank)
    transform = eval_transform(backbone.spec.preprocessing)
    (batch,) = eval_loader(test, transform, batch_size=32)
    clusters = torch.from_numpy(np.load(cascade / "router" / "test.npy"))
    assert torch.equal(loaded.route(batch.views[0]), clusters)
    assert len(clusters.unique()) == 2
    for mode in (*COMBINATIONS, "dispatcher"):
        stored = EmbeddingStore.open(cascade / "embeddings" / mode / "test").read_slice()
        found = loaded.embed(batch.views[0], mode=mode)
        assert torch.allclose(found, stored.features, atol=1e-4), mode
    frozen = EmbeddingStore.open(cascade / "embeddings" / "frozen" / "test").read_slice()
    assert torch.allclose(bank.embed(batch.views[0], None), frozen.features, atol=1e-6)
    assert loaded.embed(batch.views[0], mode="unconditional_concat").shape[1] == 3 * backbone.spec.dim
    with pytest.raises(ValueError, match="no mode 'both'; it has conditional, unconditional, replace, "):
        loaded.embed(batch.views[0], mode="both")
    with pytest.raises(MaskFileError, match="no router: it is no cascade"):
        load_cascade(cascade / "dispatcher" / "final.mask", backbone.encoder)


def test_a_cascades_masks_leave_no_trace_of_each_other(cascade: Path) -> None:
    config = load_config(cascade / "config.yaml")
    encoder = build_backbone(config).encoder
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    masked = build_backbone(config).encoder
    apply_masks(masked, cascade / "cascade.mask", name="expert-0")
    bank = MaskBank(encoder)
    load_cascade(cascade / "cascade.mask", bank)
    for name in ("expert-0", "dispatcher", "expert-1", "expert-0"):
        with bank.under(f"cascade/{name}"):
            pass
    with bank.under("cascade/expert-0"):
        state = masked.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())
    with bank.under(None):
        assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_an_expert_is_an_ordinary_run(cascade: Path, tmp_path: Path) -> None:
    run(load_config(cascade / "expert-0" / "config.yaml", [f"run.dir={tmp_path}", "run.name=again"]))
    again, first = (
        read_mask_file(path / "final.mask") for path in (tmp_path / "again", cascade / "expert-0")
    )
    for name, bits in first.masks["default"].bits.items():
        assert torch.equal(again.masks["default"].bits[name], bits), name


def test_status_tells_the_progress_over_all_masks(
    cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [result_of(cascade / name)["steps"] for name in ("dispatcher", "expert-0", "expert-1")]
    assert main(["status", str(cascade)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:3] for row in rows[1:]] == [
        ["one", "finished", f"{sum(steps)}/{sum(steps)}"],
        ["dispatcher", "finished", f"{steps[0]}/{steps[0]}"],
        ["expert-0", "finished", f"{steps[1]}/{steps[1]}"],
        ["expert-1", "finished", f"{steps[2]}/{steps[2]}"],
    ]
    shutil.copytree(cascade, tmp_path / "one")
    (tmp_path / "one" / "result.json").unlink()
    shutil.rmtree(tmp_path / "one" / "expert-1")
    status = json.loads((tmp_path / "one" / "status.json").read_text())
    running = {**status, "state": "running", "stage": "expert-0", "time": time.time()}
    write_json(tmp_path / "one" / "status.json", running)
    row = read_status(tmp_path / "one")
    assert (row["state"], row["step"]) == ("running (expert-0)", f"{steps[0] + steps[1]}/{sum(steps)}")


def test_a_finished_cascade_is_not_run_again(cascade: Path) -> None:
    before = result_of(cascade)
    config = load_config(cascade / "config.yaml", ["run.resume=true"])
    assert run(config) == before


def test_what_would_fail_late_is_refused_at_once(cascade: Path, tmp_path: Path) -> None:
    shards = cascade.parent / "shards"
    for change, message in (
        ("cascade.components=40", "cascade.components is 40; .* has embeddings of 32 dimensions"),
        ("cascade.clusters=[60]", "too few for 60 clusters"),
        (
            "objective.name=supervised",
            "trains without labels or captions; set objective.name=nbd",
        ),
        ("crops.local_size=10", "crops.local_size=10 is not a multiple of 8"),
    ):
        with pytest.raises(ValueError, match=message):
            run(load_config(None, settings(shards, tmp_path, change, "run.overwrite=true")))


@pytest.mark.slow
def test_parts_run_one_after_the_other_end_with_the_same_file(cascade: Path, tmp_path: Path) -> None:
    config = load_config(None, settings(cascade.parent / "shards", tmp_path, "run.name=parts", VARIANTS))
    with pytest.raises(ValueError, match="parts has no router yet; run the part router first"):
        run(config, part="expert-0")
    assert run(config, part="router") == {}
    assert not (tmp_path / "parts" / "expert-0").exists()
    with pytest.raises(ValueError, match="a cascade has no part 'experts'; it has router, expert-0, "):
        run(config, part="experts")
    assert run(config, part="expert-1")["steps"] > 0
    assert run(config, part="expert-7") == {}, "the router may find fewer clusters than it may look for"
    with pytest.raises(ValueError, match="expert-0 must be trained before they are combined"):
        run(config, part="combination")
    run(config, part="expert-0")
    result = run(config, part="combination")
    assert result["views"] == result_of(cascade)["views"]
    assert (tmp_path / "parts" / "cascade.mask").read_bytes() == (cascade / "cascade.mask").read_bytes()
    with pytest.raises(ValueError, match="--part is of a cascade, and method is mask"):
        run(load_config(cascade / "expert-0" / "config.yaml"), part="router")


def test_a_smaller_batch_of_the_evaluation_goes_on_with_the_embeddings_there(
    cascade: Path, tmp_path: Path
) -> None:
    """After running out of memory, say."""
    shutil.copytree(cascade, tmp_path / "one")
    for name in ("result.json", "views.json"):
        (tmp_path / "one" / name).unlink()
    shutil.rmtree(tmp_path / "one" / "embeddings" / "expert-1")
    smaller = ["eval.batch_size=8", "eval.probe=false", f"run.dir={tmp_path}"]
    result = run(load_config(cascade / "config.yaml", smaller), part="combination")
    assert result["clusters"] == result_of(cascade)["clusters"]


def test_a_cascade_embeds_in_bf16_where_it_is_asked_to(cascade: Path, tmp_path: Path) -> None:
    own = ["run.name=one", "eval.precision=bf16", "eval.probe=false", "train.epochs=1"]
    run(load_config(None, settings(cascade.parent / "shards", tmp_path, *own)))
    frozen, in_float32 = (
        EmbeddingStore.open(folder / "embeddings" / "frozen" / "test")
        for folder in (tmp_path / "one", cascade)
    )
    assert frozen.provenance["precision"] == "bf16"
    found, expected = frozen.read_slice().features, in_float32.read_slice().features
    assert not torch.allclose(found, expected, rtol=0, atol=1e-4)
    assert torch.allclose(found, expected, rtol=0.02, atol=0.02)
    # the file alone gives the same; router and combination are float32
    bundle = tmp_path / "cascade.mask"
    shutil.copy(tmp_path / "one" / "cascade.mask", bundle)
    assert main(["eval", str(bundle), "labelfree", "--config", str(tmp_path / "one" / "config.yaml")]) == 0
    for mode in load_config(tmp_path / "one" / "config.yaml").cascade.combinations:
        alone, of_run = (
            EmbeddingStore.open(folder / "embeddings" / mode / "test").read_slice().features
            for folder in (tmp_path, tmp_path / "one")
        )
        assert torch.allclose(alone, of_run, atol=1e-4), mode


def test_overwriting_a_cascade_leaves_nothing_of_it(cascade: Path, tmp_path: Path) -> None:
    """A result that stays would be taken for the new run's."""
    shutil.copytree(cascade, tmp_path / "one")
    config = load_config(cascade / "config.yaml", [f"run.dir={tmp_path}", "run.overwrite=true"])
    create_run_directory(config)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["config.yaml", "environment.json"]


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            ("piggyback", "mask.threshold=0.005", "mask.init=0.01", "mask.scale=none", "optim.score_lr=0.2"),
            marks=pytest.mark.slow,
        ),
        ("topk", "mask.keep=0.7", "mask.keep_schedule=cubic", "mask.init=magnitude", "mask.scale=detached"),
    ],
    ids=["piggyback", "topk"],
)
def test_other_families_train_a_cascade_too(cascade: Path, tmp_path: Path, family: tuple[str, ...]) -> None:
    name, *own = family
    own += [f"mask.family={name}", "eval.probe=false", "run.name=other"]
    run(load_config(None, settings(cascade.parent / "shards", tmp_path, *own)))
    other = tmp_path / "other"
    masks = [
        torch.cat([bits.flatten() for bits in mask.bits.values()])
        for mask in read_mask_file(other / "cascade.mask").masks.values()
    ]
    kept = [float(mask.double().mean()) for mask in masks]
    if name == "topk":
        assert kept == pytest.approx([0.7] * 3, abs=0.01)
        lines = (other / "expert-0" / "metrics.jsonl").read_text().splitlines()
        first = json.loads(lines[0])["mask/active"]
        assert first == pytest.approx(0.7, abs=0.01), "an expert goes on from what the dispatcher pruned"
    assert all(0.05 < share < 0.99 for share in kept), kept
    for expert in masks[1:]:
        assert not torch.equal(expert, masks[0])
        common = int((~masks[0] & ~expert).sum())
        assert common > 0.7 * int((~masks[0]).sum()), "what the dispatcher pruned is mostly pruned"
    config = load_config(other / "config.yaml")
    backbone, (_, test) = build_backbone(config), open_data(config)
    bank = MaskBank(backbone.encoder)
    loaded = load_cascade(other / "cascade.mask", bank)
    (batch,) = eval_loader(test, eval_transform(backbone.spec.preprocessing), batch_size=32)
    stored = EmbeddingStore.open(other / "embeddings" / "unconditional" / "test").read_slice()
    assert torch.allclose(loaded.embed(batch.views[0], mode="unconditional"), stored.features, atol=1e-4)


@pytest.mark.slow
def test_a_cascade_of_nbd_has_a_bank_for_each_of_its_parts(cascade: Path, tmp_path: Path) -> None:
    own = ["objective.name=nbd", "nbd.dim=8", "nbd.warmup_steps=10", "nbd.warmup_batch=16"]
    own += ["optim.score_lr=0.05", "run.name=other"]
    run(load_config(None, settings(cascade.parent / "shards", tmp_path, *own)))
    other = tmp_path / "other"
    sizes = result_of(other)["clusters"]
    for name, pictures in (("dispatcher", 96), ("expert-0", sizes[0]), ("expert-1", sizes[1])):
        (checkpoint,) = committed(other / name / "checkpoints")[:1]
        assert len(read_checkpoint(checkpoint).tensors["buffers/bank"]) == pictures
    masks = read_mask_file(other / "cascade.mask").masks
    assert len(masks) == 3
    assert all(any((~bits).any() for bits in mask.bits.values()) for mask in masks.values())


def test_families_that_are_more_than_masks_are_refused_in_a_cascade() -> None:
    for family, more, message in (
        ("twn", (), "a cascade keeps its experts as bits on frozen weights, and mask.family=twn is more"),
        ("magnitude", (), "a cascade's experts train the dispatcher's mask further"),
        ("movement", ("mask.keep_schedule=cubic",), "mask.family=movement is more"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(None, settings(Path("a"), Path("b"), f"mask.family={family}", *more))


# ---- several processes


def _run_rank(overrides: list[str]) -> None:
    run(load_config(None, overrides))


@pytest.mark.distributed
@pytest.mark.slow
def test_experts_at_the_same_time_are_those_trained_in_turn(cascade: Path, tmp_path: Path) -> None:
    shards = cascade.parent / "shards"
    overrides = settings(shards, tmp_path, "run.name=two", "cascade.expert_groups=2", VARIANTS)
    run_distributed(_run_rank, 2, overrides, backend="", timeout=120)
    two = tmp_path / "two"
    assert list(result_of(two)["views"]) == list(result_of(cascade)["views"])
    for k in range(2):
        alone = f"alone-{k}"
        run(load_config(two / f"expert-{k}" / "config.yaml", [f"run.name={alone}"]))
        ours, theirs = (read_mask_file(two / name / "final.mask") for name in (f"expert-{k}", alone))
        for name, bits in ours.masks["default"].bits.items():
            assert torch.equal(theirs.masks["default"].bits[name], bits), name


def _combine_rank(overrides: list[str], config: str) -> None:
    run(load_config(config, overrides), part="combination")


@pytest.mark.distributed
def test_a_cascade_cut_over_processes_embeds_as_a_whole_one(cascade: Path, tmp_path: Path) -> None:
    """Backbone and masks lie in rows on two processes; what is embedded and found is the same."""
    shutil.copytree(cascade, tmp_path / "one")
    for name in ("result.json", "views.json", "cascade.mask"):
        (tmp_path / "one" / name).unlink()
    for view in ("dispatcher", "expert-0", "expert-1", *COMBINATIONS):
        shutil.rmtree(tmp_path / "one" / "embeddings" / view)
    shutil.rmtree(tmp_path / "one" / "combination")
    changes = ["engine.name=fsdp", f"run.dir={tmp_path}"]
    # the dispatcher's were there already when the part began
    shutil.copytree(cascade / "embeddings" / "dispatcher", tmp_path / "one" / "embeddings" / "dispatcher")
    run_distributed(_combine_rank, 2, changes, str(cascade / "config.yaml"), backend="", timeout=120)
    for view in ("expert-0", "expert-1"):
        for split in ("train", "test"):
            found, whole = (
                EmbeddingStore.open(folder / "embeddings" / view / split).read_slice()
                for folder in (tmp_path / "one", cascade)
            )
            assert torch.allclose(found.features, whole.features, rtol=1e-5, atol=1e-6), (view, split)
            assert torch.equal(found.ids, whole.ids)
            assert torch.equal(found.labels, whole.labels)
    ours, theirs = result_of(tmp_path / "one"), result_of(cascade)
    assert ours["views"].keys() == theirs["views"].keys()
    assert ours["views"]["conditional"] == pytest.approx(theirs["views"]["conditional"], abs=1 / 32)
    files = [read_mask_file(folder / "cascade.mask") for folder in (tmp_path / "one", cascade)]
    for name, mask in files[1].masks.items():
        for parameter, bits in mask.bits.items():
            assert torch.equal(files[0].masks[name].bits[parameter], bits)


def _eval_rank(arguments: list[str]) -> int:
    return main(arguments)


@pytest.mark.distributed
def test_a_bundle_is_evaluated_with_its_backbone_cut_over_processes(cascade: Path, tmp_path: Path) -> None:
    """Images of different experts cannot go through together: the combination is made from stores."""
    bundle = tmp_path / "cascade.mask"
    shutil.copy(cascade / "cascade.mask", bundle)
    arguments = ["eval", str(bundle), "labelfree", "engine.name=fsdp"]
    arguments += ["--config", str(cascade / "config.yaml")]
    assert run_distributed(_eval_rank, 2, arguments, backend="", timeout=120) == [0, 0]
    for mode in COMBINATIONS:
        found, of_run = (
            EmbeddingStore.open(folder / "embeddings" / mode / "test").read_slice().features
            for folder in (tmp_path, cascade)
        )
        assert torch.allclose(found, of_run, atol=1e-4), mode


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("method", "engine"),
    [
        ("probe", "fsdp"),
        pytest.param("frozen", "fsdp", marks=pytest.mark.slow),
        pytest.param("probe", "deepspeed", marks=pytest.mark.slow),
    ],
)
def test_a_frozen_backbone_is_measured_cut_over_processes(
    cascade: Path, tmp_path: Path, method: str, engine: str
) -> None:
    own = ["objective.name=supervised", f"method={method}", "engine.zero_stage=3"]
    alone, cut = (
        settings(cascade.parent / "shards", tmp_path, *own, f"run.name={name}", f"engine.name={name}")
        for name in ("ddp", engine)
    )
    run(load_config(None, alone))
    run_distributed(_run_rank, 2, cut, backend="", timeout=120)
    numbers = [result_of(tmp_path / name)["frozen"] for name in ("ddp", engine)]
    assert numbers[0].keys() == numbers[1].keys()
    assert numbers[1] == pytest.approx(numbers[0], abs=1 / 32 + 1e-9)


@pytest.mark.distributed
@pytest.mark.slow
def test_one_expert_fewer_images_than_a_batch_and_ranks_without_any(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, train=20, test=3)
    few = ("cascade.clusters=[1]", "train.global_batch_size=32", "swav.queue_length=0", "eval.probe=false")
    run_distributed(_run_rank, 4, settings(shards, tmp_path, "run.name=few", *few), backend="", timeout=120)
    result = result_of(tmp_path / "few")
    assert result["clusters"] == [20]
    assert result_of(tmp_path / "few" / "expert-0")["steps"] == 3
    assert (
        EmbeddingStore.open(tmp_path / "few" / "embeddings" / "conditional" / "test")
        .read_slice()
        .features.isfinite()
        .all()
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_a_cascade_stopped_in_every_stage_ends_with_the_same_file(cascade: Path, tmp_path: Path) -> None:
    """One signal to one of two processes in each stage; the launcher starts them again."""
    shards = cascade.parent / "shards"
    more = ("cascade.expert_groups=2", "checkpoint.every_steps=3", "launch.snapshot=false")
    quiet = settings(shards, tmp_path, *more, "run.name=quiet")
    run_distributed(_run_rank, 2, quiet, backend="", timeout=120)
    config = tmp_path / "empty.yaml"
    config.write_text("{}\n")
    command = submit_command(config, *settings(shards, tmp_path, *more, "run.name=stopped"), nodes=2)
    process = subprocess.Popen(command, env=child_environment(), stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "stopped"
    for path, number in (
        ("embeddings/frozen/train", signal.SIGUSR2),
        ("dispatcher/metrics.jsonl", signal.SIGKILL),
        ("expert-1/metrics.jsonl", signal.SIGUSR2),
        ("combination", signal.SIGTERM),
    ):
        place = folder / path
        wait_until(lambda place=place: place.exists() or process.poll() is not None)  # type: ignore[misc]
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children:
            os.kill(int(children[-1]), number)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert "restart 1\n" in errors
    assert (folder / "cascade.mask").read_bytes() == (tmp_path / "quiet" / "cascade.mask").read_bytes()


def test_the_table_of_the_run_comes_out_of_its_stores_alone(
    cascade: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from selfmask_dist import cli
    from selfmask_dist.cli.eval import subject as subject_module

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("no model and no picture is needed")

    directory = Path(shutil.copytree(cascade, tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(subject_module, "build_backbone", fail)
        patch.setattr(subject_module, "embed_to_store", fail)
        assert cli.main(["eval", str(directory), "knn", "probe", "--k", "5"]) == 0
    of_run = json.loads((cascade / "views.json").read_text())
    for kind, column in (("knn", "knn5"), ("probe", "probe")):
        rows = json.loads((directory / "eval" / f"{kind}.json").read_text())["rows"]
        assert {row["name"]: row["values"][column] for row in rows} == {
            name: values[column] for name, values in of_run.items()
        }
    # the file alone, elsewhere: the views are embedded anew, through the bundle
    config = ["--config", str(cascade / "config.yaml"), "--out", str(tmp_path / "out")]
    assert cli.main(["eval", str(cascade / "cascade.mask"), "labelfree", *config]) == 0
    for view in ("frozen", "conditional"):
        again = EmbeddingStore.open(tmp_path / "out" / "embeddings" / view / "test").read_slice()
        stored = EmbeddingStore.open(cascade / "embeddings" / view / "test").read_slice()
        assert torch.allclose(again.features, stored.features, atol=1e-4), view
