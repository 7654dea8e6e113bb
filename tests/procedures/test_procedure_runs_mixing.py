"""SupSup, WiSE-FT, Git Re-Basin and ensembles as runs, against their formulas; stopped anywhere, on two
processes.
"""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from selfmask_dist import data as selfmask_data
from selfmask_dist.cli.train import run
from selfmask_dist.config import Config, ConfigError, load_config
from selfmask_dist.maskfile import drop_models, read_mask_file
from selfmask_dist.maskfile.api import apply_masks
from selfmask_dist.procedures.classifier import Classifier, open_classifier
from selfmask_dist.training.build import build_backbone, open_data
from tests.support.distributed import run_distributed
from tests.support.evals import knn_accuracy
from tests.support.procedure_cases import RESNET, start
from tests.support.tiny_run import result_of, write_config, write_tiny_data

SMALL = {"kwargs": {"patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2}}
RUNS: dict[str, dict[str, Any]] = {
    "supsup": {
        "procedure": {"tasks": 2, "infer_images": [3, 1]},
        "mask": {"init": "normal"},
        "optim": {"score_lr": 500.0},
    },
    "wise_ft": {"procedure": {"alphas": [0.0, 0.4, 1.0]}, "finetune": {"train": "norm"}},
    "wise_ft of a mask": {"procedure": {"alphas": [0.0, 0.4, 1.0], "adapt": "mask"}},
    "rebasin": {
        "procedure": {"alphas": [0.5], "match_images": 20},
        "backbone": RESNET,
        "optim": {"weight_lr": 0.05},
    },
    "ensemble": {
        "procedure": {"members": 2, "small_backbone": SMALL},
        "mask": {"init": "normal"},
        "optim": {"score_lr": 500.0},
    },
}
MEASURED = ("*.json", "curve.png")  # what is measured, and not trained, in a run's folder
Finished = Callable[[str], tuple[dict[str, Any], Path]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> Finished:
    """A run to its end, once for all tests; started again, it goes on with what is there."""
    base = tmp_path_factory.mktemp("runs")
    first: dict[str, dict[str, Any]] = {}

    def find(name: str) -> tuple[dict[str, Any], Path]:
        options = {"method": name.partition(" ")[0], **RUNS[name]}
        result, folder = start(base, data, name.replace(" ", "-"), **options)
        return first.setdefault(name, result), folder

    return find


def config_of(folder: Path, **changes: Any) -> Config:
    return load_config(
        folder / "config.yaml", [f"{key.replace('__', '.')}={v}" for key, v in changes.items()]
    )


def images_of(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """All images as the encoder wants them, and labels."""
    config = config_of(folder)
    source = open_data(config)[0 if split == "train" else 1]
    view = selfmask_data.eval_transform(build_backbone(config).spec.preprocessing)
    batch = next(iter(selfmask_data.eval_loader(source, view, batch_size=len(source))))
    return batch.views[0], batch.labels


def network_of(folder: Path, stage: str | None = None, **changes: Any) -> Classifier:
    """The frozen backbone with a new head, or what a stage ended with."""
    config = config_of(folder, **changes)
    network = open_classifier(config, open_data(config)[0].classes)
    frozen = folder / "backbone.safetensors"
    if frozen.exists() and not changes:
        network.encoder.load_state_dict(load_file(frozen))
    if stage is not None:
        place = folder / stage
        if (place / "final.mask").exists():
            apply_masks(network.encoder, place / "final.mask")
        else:
            network.encoder.load_state_dict(load_file(place / "encoder.safetensors"))
        network.objective.load_state_dict(load_file(place / "head.safetensors"))
    return network.requires_grad_(False)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(dim=1) == labels).double().mean())


# ---- SupSup


def test_supsup_keeps_every_mask_in_one_file(finished: Finished) -> None:
    result, folder = finished("supsup")
    together = read_mask_file(folder / "supermasks.mask")
    alone = {
        name: read_mask_file(folder / name / "final.mask").masks["default"] for name in ("task-1", "task-2")
    }
    assert list(together.masks) == list(alone)
    for name, mask in alone.items():
        assert all(torch.equal(bits, together.masks[name].bits[key]) for key, bits in mask.bits.items())
    assert any(not torch.equal(b, alone["task-2"].bits[key]) for key, b in alone["task-1"].bits.items())
    assert result["stored_bytes"] == (folder / "supermasks.mask").stat().st_size
    assert [task["classes"] for task in result["tasks"]] == [["blue", "green"], ["red"]]
    apply_masks(network_of(folder).encoder, folder / "supermasks.mask", name="task-2")  # fits its backbone


def test_supsup_infers_by_the_entropies(finished: Finished) -> None:
    """`each` and `one-shot` by hand: thetas applied one by one, a derivative as a difference quotient."""
    result, folder = finished("supsup")
    images, labels = images_of(folder, "test")
    rows = {"task-1": [0, 1], "task-2": [2, 0]}  # a class never met stands in for the missing one
    networks: dict[str, Classifier] = {}
    for name, chosen in rows.items():
        network = network_of(folder, name).double()
        head = network.objective.get_submodule("head")
        assert isinstance(head, nn.Linear)
        rows_of = (nn.Parameter(p[chosen], requires_grad=False) for p in head.parameters())
        head.weight, head.bias = rows_of
        networks[name] = network
    states = {name: network.state_dict() for name, network in networks.items()}

    def entropy(alphas: dict[str, float], pixels: Tensor) -> float:
        """H of the superposition; heads stay halved."""
        mixed = {
            key: sum((alphas[n] if key.startswith("encoder") else 0.5) * s[key] for n, s in states.items())
            for key in states["task-1"]
        }
        frozen = {key for key in mixed if key not in masked}
        mixed |= {key: states["task-1"][key] for key in frozen if key.startswith("encoder")}
        logits = torch.func.functional_call(networks["task-1"], mixed, (pixels.double(),))
        return float(-(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean())

    bits = read_mask_file(folder / "supermasks.mask").masks["task-1"].bits
    masked = {f"encoder.{key}" for key in bits}
    train_images, train_labels = images_of(folder, "train")
    reference = []
    for classes in ([0, 1], [2]):
        places = np.flatnonzero(np.isin(train_labels, classes))
        # as many of each task as the smaller one has
        reference += places[np.linspace(0, len(places) - 1, 16).round().astype(int)].tolist()

    def slope(task: str, pixels: Tensor) -> float:
        step, found = 1e-4, []
        for sign in (1, -1):
            alphas = {name: 0.5 + (sign * step if name == task else 0) for name in states}
            found.append(entropy(alphas, pixels))
        return (found[0] - found[1]) / (2 * step)

    hits = dict.fromkeys(("one-shot", "each"), 0)
    known = 0
    for truth, classes in (("task-1", [0, 1]), ("task-2", [2])):
        for place in np.flatnonzero(np.isin(labels, classes)):
            image, own = images[place : place + 1], {}
            for name, network in networks.items():
                logits = network(image.double())
                own[name] = float(-(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean())
                if name == truth:
                    known += int([*classes, 9][int(logits.argmax())] == labels[place])
            hits["each"] += min(own, key=own.__getitem__) == truth
            scores = {name: slope(name, train_images[reference]) - slope(name, image) for name in states}
            hits["one-shot"] += max(scores, key=scores.__getitem__) == truth
    found = result["inferred"]["1"]
    assert found["known"]["head"] == result["adapted"]["head"] == pytest.approx(known / len(labels))
    for method, number in hits.items():
        assert found[method]["tasks"] == pytest.approx(number / len(labels)), method
    assert found["binary"] == found["one-shot"]  # of two tasks they are the same
    assert result["adapted"]["inferred"] == result["inferred"]["3"]["each"]["tasks"]


# ---- WiSE-FT


@pytest.mark.parametrize("name", ["wise_ft", "wise_ft of a mask"])
def test_wise_ft_measures_the_line_and_chooses_on_held_out_images(finished: Finished, name: str) -> None:
    result, folder = finished(name)
    frozen = build_backbone(config_of(folder)).encoder.state_dict()
    if name == "wise_ft":
        changed = load_file(folder / "adapted" / "finetuned.safetensors")
        assert 0 < len(changed) < len(frozen)
        adapted = {**frozen, **changed}
    else:
        mask = read_mask_file(folder / "adapted" / "final.mask").masks["default"]
        adapted = dict(frozen)
        for key, bits in mask.bits.items():
            adapted[key] = frozen[key] * bits * (bits.numel() / bits.sum()) ** 0.5
    chosen, alpha = load_file(folder / "chosen.safetensors"), result["alpha"]
    for key, tensor in frozen.items():
        torch.testing.assert_close(chosen[key], (1 - alpha) * tensor + alpha * adapted[key])

    trained_on = set(np.load(folder / "fit.npy").tolist())
    labels = open_data(config_of(folder))[0].labels
    held_out = [place for place in range(48) if place not in trained_on]
    assert np.bincount(labels[held_out]).tolist() == [3, 3, 3]  # a fifth of 16, rounded down
    best = max(result["curve"], key=lambda point: point["held_out"]["knn5"])  # of equal ones the first
    assert (best["alpha"], best["test"]) == (alpha, result["adapted"])

    images, targets = images_of(folder, "test")
    bank, bank_labels = (tensor[sorted(trained_on)] for tensor in images_of(folder, "train"))
    network = network_of(folder)
    network.objective.load_state_dict(load_file(folder / "adapted" / "head.safetensors"))
    for point in result["curve"]:
        theta = {k: (1 - point["alpha"]) * t + point["alpha"] * adapted[k] for k, t in frozen.items()}
        network.encoder.load_state_dict(theta)
        knn = knn_accuracy(
            network.encoder(bank), bank_labels, network.encoder(images), targets, k=5, num_classes=3
        )
        assert point["test"] == pytest.approx({"knn5": knn, "head": accuracy(network(images), targets)})
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


# ---- Git Re-Basin


def test_rebasin_averages_permuted_networks(finished: Finished) -> None:
    result, folder = finished("rebasin")
    first, second = (network_of(folder, stage) for stage in ("first", "second"))
    images, labels = images_of(folder, "train")
    samples = torch.linspace(0, 47, 20, dtype=torch.float64).round().long()
    states = {"as they are": second.state_dict()}
    for way in ("weights", "activations"):
        states[way] = load_file(folder / f"matched-by-{way}.safetensors")
        moved = network_of(folder)
        moved.load_state_dict(states[way])
        torch.testing.assert_close(moved(images), second(images), rtol=1e-4, atol=1e-5)
        assert any(not torch.equal(t, states["as they are"][key]) for key, t in states[way].items())

    def loss(network: nn.Module) -> float:
        """With statistics of the samples; one batch, so that they are the batch's own."""
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        network.get_submodule("encoder").train()
        network(images[samples])
        network.eval()
        return float(F.cross_entropy(network(images[samples]), labels[samples]))

    one = first.state_dict()
    for way, state in states.items():
        losses = []
        for alpha in (0.0, 0.5, 1.0):
            network = network_of(folder)
            network.load_state_dict(
                {
                    k: (1 - alpha) * t + alpha * state[k] if t.is_floating_point() else t
                    for k, t in one.items()
                }
            )
            losses.append(loss(network))
        barrier = max(0.0, losses[1] - (losses[0] + losses[2]) / 2)
        assert result["barriers"][way] == pytest.approx(barrier, abs=1e-4), way
    best = min(("weights", "activations"), key=result["barriers"].__getitem__)
    assert result["matched_by"] == best

    merged = network_of(folder)
    merged.encoder.load_state_dict(load_file(folder / "merged.safetensors"))
    merged.objective.load_state_dict(load_file(folder / "merged_head.safetensors"))
    for key, tensor in merged.named_parameters():
        torch.testing.assert_close(tensor.data, (one[key] + states[best][key]) / 2)
    seen: list[Tensor] = []
    merged.encoder.get_submodule("bn1").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    merged(images[samples])
    mean = merged.encoder.get_buffer("bn1.running_mean")
    torch.testing.assert_close(mean, seen[0].mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    test_images, test_labels = images_of(folder, "test")
    assert result["adapted"]["head"] == pytest.approx(accuracy(merged(test_images), test_labels))


# ---- ensembles


def test_an_ensemble_is_the_mean_of_its_members(finished: Finished) -> None:
    result, folder = finished("ensemble")
    images, labels = images_of(folder, "test")
    bank, bank_labels = images_of(folder, "train")
    small = {"backbone__kwargs": "{patch_size: 8, embed_dim: 8, depth: 1, num_heads: 2}"}
    for kind, changes in (("masks", {}), ("small_models", small)):
        members = [network_of(folder, f"member-{kind}-{index}", **changes) for index in (0, 1)]
        logs = torch.stack([member(images).log_softmax(dim=1) for member in members])
        train, test = (
            torch.stack([F.normalize(member.encoder(pixels)) for member in members]).mean(dim=0)
            for pixels in (bank, images)
        )
        knn = knn_accuracy(train, bank_labels, test, labels, k=5, num_classes=3)
        assert result[kind]["knn5"] == pytest.approx(knn)
        assert result[kind]["head"] == pytest.approx(accuracy(logs.mean(dim=0), labels))
        alone = [accuracy(log, labels) for log in logs]
        assert result[kind]["head_alone"] == pytest.approx(sum(alone) / 2)
    files = [folder / f"member-masks-{index}" / "final.mask" for index in (0, 1)]
    # what masks cost is said without their heads
    alone = [
        drop_models(shutil.copy(file, folder.parent / f"alone-{file.parent.name}.mask")) for file in files
    ]
    assert result["masks"]["bits"] == 8 * sum(alone)
    one, other = (read_mask_file(file).masks["default"] for file in files)
    assert one.weights_fingerprint == other.weights_fingerprint
    assert any(not torch.equal(bits, other.bits[key]) for key, bits in one.bits.items())


# ---- all of them


@pytest.mark.parametrize("name", RUNS)
def test_a_chain_that_was_stopped_anywhere_ends_alike(finished: Finished, name: str) -> None:
    """Stages are taken away from the end, in the order they were made in, half of them and then all."""
    result, folder = finished(name)
    own = [path for path in folder.iterdir() if path.suffix not in (".yaml", ".jsonl")]
    made = sorted(own, key=lambda path: (path / "result.json" if path.is_dir() else path).stat().st_mtime_ns)
    made = [path for path in made if path.name not in ("status.json", "environment.json", "result.json")]
    kept = {path: path.read_bytes() for path in made if path.suffix in (".safetensors", ".mask", ".json")}
    for number in (len(made) // 2, len(made)):
        for path in (folder / "result.json", *made[-number:]):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        finished(name)
        assert result_of(folder) == result
        assert {path.name for path in made} <= {path.name for path in folder.iterdir()}
        assert all(path.read_bytes() == content for path, content in kept.items())


@pytest.mark.distributed
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_measure_the_same(finished: Finished, name: str) -> None:
    """From the stages that one process trained: what is measured between and after them."""
    result, folder = finished(name)
    for pattern in MEASURED:
        for path in folder.glob(pattern):
            path.unlink()
    run_distributed(_run_again, 2, folder, backend="", timeout=120)
    assert flat(result_of(folder)) == pytest.approx(flat(result), rel=1e-4, abs=1e-4)


def _run_again(folder: Path) -> None:
    torch.set_num_threads(1)
    run(load_config(folder / "config.yaml", ["run.resume=true"]))


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested numbers by dotted key; other values as a part of the key."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return dict(itertools.chain.from_iterable(flat(v, f"{key}.{k}").items() for k, v in items))
    return {key: value} if isinstance(value, int | float) else {f"{key}={value}": 0}


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["method=supsup", "objective.head=masked"], "does not handle objective.head=masked"),
        (["method=wise_ft", "objective.head=masked"], "set it to linear or clip_text"),
        (["method=supsup", "objective.name=swav"], "objective.name=supervised"),
        (["method=supsup", "mask.family=topk"], "gives all scores one rank"),
        (["method=ensemble", "mask.family=twn"], "mask.family=twn is another thing"),
        (["method=wise_ft", "finetune.train=lora"], "set finetune.train=all, bias or norm"),
        (["method=rebasin", "finetune.train=bias"], "set finetune.train=all"),
        (["method=rebasin", "objective.head_norm=batchnorm"], "l2 or none"),
        (["method=rebasin", "engine.name=bits"], "use ddp or fsdp"),
        (["method=ensemble", "procedure.small_backbone={nam: x}"], "has the key nam"),
        (["method=wise_ft", "procedure.alphas=[0, 2]"], "procedure.alphas"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, data: dict[str, str], overrides: list[str], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config(write_config(tmp_path / "x.yaml", data), overrides)


def test_what_only_the_data_or_the_network_shows_is_refused_before_training(
    tmp_path: Path, data: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match="two or more classes in a task"):
        start(tmp_path, data, "a", method="supsup", procedure={"tasks": 3})
    unknown = {"name": "timm:convnext_atto", "image_size": 32, "kwargs": {}}
    with pytest.raises(ValueError, match="neither a Sequential MLP"):
        start(tmp_path, data, "b", method="rebasin", backbone=unknown)
    np.save(tmp_path / "few.npy", np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="a single training sample, so none can be held out"):
        start(tmp_path, {**data, "subset": str(tmp_path / "few.npy")}, "c", method="wise_ft")
    assert not list(tmp_path.glob("?/*/metrics.jsonl"))
