"""Procedures that mix trained networks: WiSE-FT, Git Re-Basin, ensembles."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfmask_dist.backbones.weights import interpolate
from selfmask_dist.procedures import ensemble, wise_ft
from selfmask_dist.procedures.rebasin import match as rebasin
from selfmask_dist.procedures.rebasin import permutation
from selfmask_dist.procedures.rebasin.specs import permutation_spec
from tests.support.evals import knn_accuracy, linear_probe
from tests.support.procedure_cases import accuracy, digits, mlp, train

# ---- WiSE-FT


def trained(*widths: int, seed: int, norm: bool = False, steps: int = 150) -> nn.Sequential:
    pixels, labels, *_ = digits()
    model = mlp(*widths, seed=seed, norm=norm)
    train(model, model.parameters(), pixels, labels, steps=steps, lr=0.1, seed=seed)
    return model.eval()


def test_the_ends_of_the_curve_are_the_two_models() -> None:
    *_, pixels, labels = digits()
    frozen, adapted = trained(64, 32, 10, seed=0, norm=True, steps=10), trained(64, 32, 10, seed=1, norm=True)
    first, second = copy.deepcopy(frozen.state_dict()), copy.deepcopy(adapted.state_dict())
    outputs: dict[float, Tensor] = {}

    def measure(model: nn.Module) -> dict[str, float]:
        outputs[len(outputs)] = model(pixels).detach()
        return {"accuracy": accuracy(model, pixels, labels)}

    model = copy.deepcopy(frozen)
    points = wise_ft.measure_curve(model, first, second, measure)
    assert [point.alpha for point in points] == pytest.approx(np.linspace(0, 1, 11))
    assert torch.equal(outputs[0], frozen(pixels))
    assert torch.equal(outputs[10], adapted(pixels))
    assert all(torch.equal(tensor, first[name]) for name, tensor in model.state_dict().items())
    assert points[0].values["accuracy"] == accuracy(frozen, pixels, labels)
    assert wise_ft.best_point(points, "accuracy").values["accuracy"] == max(
        p.values["accuracy"] for p in points
    )
    for alpha in (0.0, 1.0):
        ends = interpolate(first, second, alpha)
        assert all(torch.equal(ends[name], (second if alpha else first)[name]) for name in first)


def test_the_line_is_the_formula() -> None:
    first = {"w": torch.randn(5, dtype=torch.float64), "n": torch.tensor(10)}
    second = {"w": torch.randn(5, dtype=torch.float64), "n": torch.tensor(20)}
    middle = interpolate(first, second, 0.3)
    torch.testing.assert_close(middle["w"], 0.7 * first["w"] + 0.3 * second["w"])
    assert middle["n"] == 10
    with pytest.raises(ValueError, match="only one has w"):
        interpolate({"n": first["n"]}, second, 0.3)
    with pytest.raises(ValueError, match=r"\(5,\) in one model and \(4,\)"):
        interpolate(first, {**second, "w": torch.zeros(4)}, 0.3)


# ---- Git Re-Basin


def resnet(kind: str, num_classes: int = 5, channels: tuple[int, ...] = (8, 8, 12, 16)) -> nn.Module:
    return timm.create_model(kind, num_classes=num_classes, channels=channels, stem_width=8)


def vit(**options: Any) -> nn.Module:
    sizes: dict[str, Any] = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 4,
        "num_classes": 5,
    }
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **options})


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: mlp(64, 24, 16, 10),
    "mlp with batch normalisation": lambda: mlp(64, 24, 16, 10, norm=True),
    "resnet18": lambda: resnet("resnet18"),
    "resnet18 encoder": lambda: resnet("resnet18", num_classes=0),
    "resnet50": lambda: resnet("resnet50"),
    "vit": vit,
    "vit encoder": lambda: vit(num_classes=0),
    "vit with scales, registers": lambda: vit(
        init_values=0.5, reg_tokens=2, qk_norm=True, global_pool="avg", fc_norm=True
    ),
}


def lively(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network in eval mode and float64 in which every tensor differs from unit to unit."""
    torch.manual_seed(seed)
    model = build().double().eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and (tensor.ndim == 1 or not tensor.any()):
            tensor.uniform_(0.5, 1.5)
            if name.endswith(("bias", "mean")):
                tensor.sub_(1)
    return model


def inputs_of(model: nn.Module, number: int = 8) -> Tensor:
    shape = (number, 64) if isinstance(model, nn.Sequential) else (number, 3, 16, 16)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def random_permutations(spec: permutation.Spec, *, seed: int) -> permutation.Permutations:
    """Any that `apply` takes: blocks change places as wholes, and units within them."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for groups in permutation.together(spec):
        order = torch.randperm(groups[0].blocks, generator=generator)
        for group in groups:
            width = group.size // group.blocks
            found[group.name] = torch.cat(
                [block * width + torch.randperm(width, generator=generator) for block in order]
            )
    return found


@pytest.mark.parametrize("kind", NETWORKS)
def test_permuting_changes_nothing_and_is_found_again(kind: str) -> None:
    model = lively(NETWORKS[kind])
    images, spec = inputs_of(model), permutation_spec(model)
    truth = random_permutations(spec, seed=3)
    assert all(len(p) > 1 for p in truth.values())
    inverse = {name: order.argsort() for name, order in truth.items()}
    state = model.state_dict()
    moved = copy.deepcopy(model)
    moved.load_state_dict(permutation.apply(state, spec, truth))
    changed = [name for name, tensor in moved.state_dict().items() if not torch.equal(tensor, state[name])]
    assert {axis.tensor for group in spec for axis in group.axes} == set(changed)
    with torch.no_grad():
        torch.testing.assert_close(moved(images), model(images), rtol=1e-9, atol=1e-9)
    back = permutation.apply(moved.state_dict(), spec, inverse)
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())

    by_weights = rebasin.match_weights(state, moved.state_dict(), spec)
    by_activations = rebasin.match_activations(model, moved, [images, -images], spec)
    for found in (by_weights, by_activations):
        assert {n: p.tolist() for n, p in found.items()} == {n: p.tolist() for n, p in inverse.items()}


def as_rows(pixels: Tensor) -> Tensor:
    return pixels


def as_pictures(pixels: Tensor) -> Tensor:
    return F.interpolate(pixels.view(-1, 1, 8, 8), scale_factor=2).expand(-1, 3, -1, -1)


@pytest.mark.parametrize(
    ("build", "shape", "steps"),
    [
        (lambda seed: mlp(64, 128, 64, 10, seed=seed), as_rows, 150),
        pytest.param(
            lambda seed: resnet("resnet18", 10, (16, 32, 64, 128)), as_pictures, 200, marks=pytest.mark.slow
        ),
    ],
    ids=["mlp", "resnet18"],
)
def test_matching_lowers_the_barrier_between_two_trained_networks(
    build: Callable[[int], nn.Module], shape: Callable[[Tensor], Tensor], steps: int
) -> None:
    pixels, labels, test_pixels, test_labels = digits()
    pixels, test_pixels = shape(pixels), shape(test_pixels)
    networks = []
    for seed in range(2):
        torch.manual_seed(seed)
        network = build(seed)
        train(network, network.parameters(), pixels, labels, steps=steps, lr=0.1, seed=seed)
        networks.append(network)
    first, second = networks
    model, spec = copy.deepcopy(first), permutation_spec(first)

    def loss(network: nn.Module) -> float:
        rebasin.reset_batchnorm(network.eval(), pixels.split(250))
        with torch.no_grad():
            return float(F.cross_entropy(network(test_pixels), test_labels))

    def barrier(permutations: permutation.Permutations) -> float:
        moved = permutation.apply(second.state_dict(), spec, permutations)
        return rebasin.loss_barrier(model, first.state_dict(), moved, loss, alphas=(0.25, 0.5, 0.75))

    before = barrier(permutation.identity(spec))
    by_weights = barrier(rebasin.match_weights(first.state_dict(), second.state_dict(), spec))
    by_activations = barrier(rebasin.match_activations(first, second, pixels.split(500), spec))
    assert before > 0.1
    assert by_activations < before / 2
    if not rebasin.has_batchnorm(model):  # which leaves the sizes of weights free: they say little so soon
        assert by_weights < before / 2


def test_blocks_of_units_stay_whole() -> None:
    model = vit()
    spec = permutation_spec(model)
    found = random_permutations(spec, seed=0)
    apart, other = dict(found), dict(found)
    queries, values = (f"{kind} blocks.1.attn" for kind in ("queries", "values"))
    apart[queries] = torch.arange(24).roll(1)
    with pytest.raises(ValueError, match=rf"{queries} takes its 4 blocks apart"):
        permutation.apply(model.state_dict(), spec, apart)
    other[values] = found[values].roll(6)
    with pytest.raises(ValueError, match=rf"{queries}, {values} put their blocks in other orders"):
        permutation.apply(model.state_dict(), spec, other)


def test_the_barrier_is_the_definition() -> None:
    model = nn.Linear(1, 1, bias=False)
    start, end = {"weight": torch.tensor([[-1.0]])}, {"weight": torch.tensor([[2.0]])}

    def loss(network: nn.Module) -> float:  # w^4 - 3 w^2: two valleys and a hill at 0
        w = network.get_parameter("weight").item()
        return w**4 - 3 * w**2

    found = rebasin.loss_barrier(model, start, end, loss, alphas=[a / 30 for a in range(31)])
    grid = torch.linspace(0, 1, 31, dtype=torch.float64)
    w = -1 + 3 * grid
    assert found == pytest.approx(float((w**4 - 3 * w**2 - (-2 * (1 - grid) + 4 * grid)).max()), abs=1e-5)


def test_batchnorm_is_reset_to_the_data() -> None:
    pixels, *_ = digits()
    model = mlp(64, 24, 10, norm=True).eval()
    rebasin.reset_batchnorm(model, pixels[:1000].split(250))
    with torch.no_grad():
        hidden = model[0](pixels[:1000])
    norm = model[1]
    torch.testing.assert_close(norm.running_mean, hidden.mean(dim=0))
    expected = torch.stack([part.var(dim=0) for part in hidden.split(250)]).mean(dim=0)
    torch.testing.assert_close(norm.running_var, expected)
    assert not model.training
    assert norm.momentum == 0.1


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (lambda: nn.Conv2d(3, 3, 1), "neither a Sequential MLP"),
        (lambda: timm.create_model("resnext50_32x4d"), "grouped"),
        (lambda: timm.create_model("seresnet18"), "no rule here covers"),
        (lambda: timm.create_model("vit_tiny_patch16_224", mlp_layer=timm.layers.GluMlp), "needs"),
    ],
)
def test_unknown_parts_are_refused(model: Callable[[], nn.Module], complaint: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=complaint):
        permutation_spec(model())


# ---- ensembles


def test_an_ensemble_is_measured_by_its_mean() -> None:
    pixels, labels, test_pixels, test_labels = digits()
    pixels, labels = pixels[:400], labels[:400]
    networks = [trained(64, 16, 10, seed=seed, steps=40) for seed in range(3)]
    train, test = (ensemble.SplitLabels(part, torch.arange(len(part))) for part in (labels, test_labels))
    with torch.no_grad():
        members = [ensemble.Member(n[0](pixels), n[0](test_pixels), n(test_pixels)) for n in networks]
    three = ensemble.measure_ensemble(members, train, test, ks=(5,))
    shares = torch.stack([member.logits.softmax(dim=1) for member in members])
    geometric = shares.log().mean(dim=0).argmax(dim=1)
    assert three["head"] == pytest.approx(float((geometric == test_labels).double().mean()))
    alone = [accuracy(network, test_pixels, test_labels) for network in networks]
    assert three["head_alone"] == pytest.approx(sum(alone) / 3)
    assert three["head"] > three["head_alone"]
    mean, mean_test = (
        torch.stack([F.normalize(part) for part in parts]).mean(dim=0)
        for parts in ([m.train for m in members], [m.test for m in members])
    )
    knn = knn_accuracy(mean, labels, mean_test, test_labels, k=5, num_classes=10)
    assert three["knn5"] == pytest.approx(knn)
    assert three["probe"] == linear_probe(mean, labels, mean_test, test_labels).accuracy
    assert three["probe_logits"] > three["probe_alone"]
    one = ensemble.measure_ensemble(members[:1], train, test, ks=(5,))
    assert one["probe_alone"] == one["probe_logits"]
    assert "probe" not in ensemble.measure_ensemble(members, train, test, probe=False)
    with pytest.raises(ValueError, match="one member or more"):
        ensemble.measure_ensemble([], train, test)
