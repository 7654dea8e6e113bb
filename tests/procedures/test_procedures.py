"""Procedures that train: PackNet, lottery tickets, Knowledge Evolution, on digits, against their papers."""

import copy
import math

import pytest
import timm
import torch
from torch import Tensor, nn

from selfmask_dist.procedures import evolution, lottery, packnet
from selfmask_dist.training.hold import FREE, HELD, ZERO, Codes, Hold, keep_largest
from tests.support.models import conv_net
from tests.support.procedure_cases import accuracy, digits, mlp, packed_theta, train


def test_held_entries_survive_every_kind_of_step() -> None:
    pixels, labels, *_ = digits()
    for make in (
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
    ):
        model = mlp(64, 16, 10)
        before = copy.deepcopy(model.state_dict())
        code = torch.randint(0, 3, (16, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
        held = Hold(model, {"0.weight": code})
        optimizer = make(model.parameters())
        held.bind(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
        after = model.get_parameter("0.weight").detach().clone()
        assert torch.equal(after[code == HELD], before["0.weight"][code == HELD])
        assert not after[code == ZERO].any()
        assert (after != before["0.weight"])[code == FREE].all()
        assert not torch.equal(model.get_parameter("2.weight"), before["2.weight"])

        held.remove()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixels), labels).backward()
        optimizer.step()
        assert (model.get_parameter("0.weight") != after)[code == HELD].any()


@pytest.mark.parametrize(
    ("codes", "complaint"),
    [
        ({"nothing": torch.zeros(2)}, "no such parameter"),
        ({"0.weight": torch.zeros(2, dtype=torch.int8)}, r"are \(2,\), the parameter \(16, 64\)"),
        ({"0.weight": torch.full((16, 64), 7, dtype=torch.int8)}, r"hold \[7\]"),
    ],
)
def test_codes_that_do_not_fit_are_refused(codes: Codes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Hold(mlp(64, 16, 10), codes)


def test_the_largest_are_kept_per_tensor_and_over_all() -> None:
    weights = {"a": torch.tensor([1.0, -9, 3, 2]), "b": torch.tensor([[-20.0, 30], [10, 10]])}
    allowed = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    allowed["b"][0, 1] = False
    per_tensor = keep_largest(weights, allowed, 0.5)
    assert per_tensor["a"].tolist() == [False, True, True, False]
    assert per_tensor["b"].tolist() == [
        [True, False],
        [True, False],
    ]  # round(1.5) of 3; the first of equal ones
    overall = keep_largest(weights, allowed, 3 / 7, scope="global")
    assert overall["a"].tolist() == [False] * 4
    assert overall["b"].tolist() == [[True, False], [True, True]]
    with pytest.raises(ValueError, match="lie in 0 to 1"):
        keep_largest(weights, allowed, 1.5)


# ---- PackNet


def packnet_task(pixels: Tensor, labels: Tensor, task: int) -> tuple[Tensor, Tensor]:
    """Permuted digits: another order of pixels for each task."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(task))
    return pixels[:, order], labels


def test_packnet_leaves_earlier_tasks_to_the_bit() -> None:
    pixels, labels, test_pixels, test_labels = digits()
    body = mlp(64, 96, 48, norm=True)
    heads = {task: mlp(48, 10, seed=task) for task in (1, 2, 3)}
    outputs: dict[int, Tensor] = {}

    def train_task(task: int, codes: Codes) -> nn.Module:
        model = nn.Sequential(body, heads[task])
        held = Hold(body, codes)
        model.train()
        if task > 1:  # statistics stay the first task's
            body.eval()
        x, y = packnet_task(pixels, labels, task)
        parameters = [*model.parameters()]
        train(model, parameters, x, y, steps=60, lr=0.1, bind=held.bind, weight_decay=1e-3)
        held.remove()
        return model.eval()

    weights = {name: body.get_parameter(name) for name in ("0.weight", "3.weight")}
    owners = packnet.no_owners(weights)
    for task in (1, 2, 3):
        train_task(task, packnet.train_codes(body, owners, task))
        owners = packnet.reserve(weights, owners, task, keep=0.5)
        model = train_task(task, packnet.retrain_codes(body, owners, task))
        outputs[task] = model(packnet_task(test_pixels, test_labels, task)[0]).detach()

    for name, owner in owners.items():  # each task takes half of what was left, of each tensor
        left = owner.numel()
        for task in (1, 2, 3):
            number = int((owner == task).sum())
            assert number == round(left / 2), name
            left -= number
    end = copy.deepcopy(body.state_dict())
    for task in (3, 1, 2):
        body.load_state_dict(end | packed_theta(end, owners, task))
        model = nn.Sequential(body, heads[task]).eval()
        x, y = packnet_task(test_pixels, test_labels, task)
        assert torch.equal(model(x), outputs[task])
        assert accuracy(model, x, y) > 0.85
    total = 64 * 96 + 96 * 48
    assert packnet.stored_bits(owners, 3) == 2 * total
    assert packnet.stored_bits(owners, 4) == 3 * total


def test_packnet_prunes_the_smallest_of_its_own_weights_only() -> None:
    weights = {"w": torch.tensor([5.0, 0.1, 4.0, 0.2, 3.0, 0.3])}
    owners = packnet.reserve(weights, packnet.no_owners(weights), 1, keep=0.5)
    assert owners["w"].tolist() == [1, 0, 1, 0, 1, 0]
    owners = packnet.reserve(weights, owners, 2, keep=1 / 3)
    assert owners["w"].tolist() == [1, 0, 1, 0, 1, 2]
    owners = packnet.reserve(weights, owners, 3, keep=1.0)
    with pytest.raises(ValueError, match="no weight is left for task 4"):
        packnet.reserve(weights, owners, 4, keep=0.5)
    with pytest.raises(ValueError, match="task 3 has reserved"):
        packnet.reserve(weights, owners, 3, keep=0.5)


# ---- lottery tickets


def test_lottery_tickets_are_rewound_and_beat_a_random_mask() -> None:
    pixels, labels, test_pixels, test_labels = digits()
    model = mlp(64, 96, 10)
    train(model, model.parameters(), pixels, labels, steps=5, lr=0.1)
    at_k = copy.deepcopy(model.state_dict())
    names = ["0.weight", "2.weight"]

    def train_from_k(mask: lottery.Ticket) -> float:
        start = lottery.rewind(at_k, mask)
        for name, tensor in at_k.items():
            assert torch.equal(start[name], tensor * mask[name] if name in mask else tensor)
        model.load_state_dict(start)
        held = Hold(model, lottery.hold_codes(mask))
        train(model, model.parameters(), pixels, labels, steps=60, lr=0.1, bind=held.bind)
        held.remove()
        return accuracy(model, test_pixels, test_labels)

    mask = lottery.whole({name: at_k[name] for name in names})
    total = sum(kept.numel() for kept in mask.values())
    for round_ in range(4):
        assert sum(int(kept.sum()) for kept in mask.values()) == total // 2**round_
        reached = train_from_k(mask)
        end = {name: model.get_parameter(name).detach().clone() for name in names}
        assert all(not end[n][~mask[n]].any() for n in names)
        before, mask = mask, lottery.prune(end, mask, 0.5)
        assert all(not (mask[n] & ~before[n]).any() for n in names)  # what is pruned stays so
        gone = torch.cat([end[n][before[n] & ~mask[n]].abs() for n in names])
        assert gone.max() <= torch.cat([end[n][mask[n]].abs() for n in names]).min()
    assert reached > 0.85
    generator = torch.Generator().manual_seed(0)
    shuffled = {
        n: m.flatten()[torch.randperm(m.numel(), generator=generator)].view(m.shape)
        for n, m in before.items()
    }
    assert reached > train_from_k(shuffled)


def test_a_share_that_prunes_nothing_or_all_is_refused() -> None:
    mask = lottery.whole({"w": torch.ones(4)})
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            lottery.prune({"w": torch.ones(4)}, mask, share)


# ---- Knowledge Evolution


def test_kels_of_a_resnet18_costs_what_its_authors_print() -> None:
    """Their log of ResNet-18 with a head of 100 classes (aircraft) at 224 px, mask included."""
    model = timm.create_model("resnet18", num_classes=100)
    dense = evolution.measure_cost(model, 224)
    small = evolution.measure_cost(evolution.extract_slim(model, 0.5, outputs=["fc"]), 224)
    assert dense.operations / 1e9 == pytest.approx(3.632418, abs=1e-6)
    assert small.operations / 1e9 == pytest.approx(0.968435, abs=1e-6)
    with_mask = [(cost.parameters + cost.masked) / 1e6 for cost in (dense, small)]
    assert with_mask == pytest.approx([22.445925, 5.644260], abs=2e-6)  # they add in float32
    assert dense.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("rate", [0.5, 0.3, 1.0])
def test_the_slim_network_is_the_masked_dense_one(rate: float) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=7, in_chans=3).double()
    for name, tensor in model.state_dict().items():  # every term counts: batch statistics, biases, scales
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5)
            if name.endswith(("bias", "mean")):
                tensor.sub_(1)
    model.eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    small = evolution.extract_slim(model, rate, outputs=["fc"])
    split = evolution.kels(model, rate, outputs=["fc"])
    masked = copy.deepcopy(model)
    masked.load_state_dict(evolution.fit_hypothesis(model.state_dict(), split))
    torch.testing.assert_close(small(images), masked(images), rtol=1e-10, atol=1e-10)
    assert sum(p.numel() for p in small.parameters()) == sum(int(m.sum()) for m in split.values())
    small(images).sum().backward()  # it can be trained on
    if rate == 1:
        assert torch.equal(small(images), model(images))


def test_kels_keeps_the_first_kernels() -> None:
    split = evolution.kels(conv_net(), 0.3)
    first, second = split["conv1.weight"], split["conv2.weight"]
    assert first[:3].all()
    assert int(first.sum()) == 3 * 3 * 9  # ceil(0.3 * 8) kernels with all three colours
    assert second[:5, :3].all()
    assert int(second.sum()) == 5 * 3 * 9
    assert int(split["bn2.bias"].sum()) == 5


def test_generations_keep_the_fit_half_and_renew_the_rest() -> None:
    pixels, labels, test_pixels, test_labels = digits()
    model = mlp(64, 64, 10)
    split = evolution.wels(dict(model.named_parameters()), 0.8, seed=1)
    for name, mask in split.items():
        assert int(mask.sum()) == round(0.8 * mask.numel()), name
    fresh = {g: mlp(64, 64, 10, seed=100 + g).state_dict() for g in (1, 2)}
    ends: list[dict[str, Tensor]] = []

    for generation in range(3):
        if generation:
            start = evolution.evolve(model.state_dict(), fresh[generation], split)
            for name, tensor in start.items():
                assert torch.equal(tensor[split[name]], ends[-1][name][split[name]])
                assert torch.equal(tensor[~split[name]], fresh[generation][name][~split[name]])
            model.load_state_dict(start)
        train(model, model.parameters(), pixels, labels, steps=40, lr=0.1, seed=generation)
        ends.append(copy.deepcopy(model.state_dict()))
    assert accuracy(model, test_pixels, test_labels) > 0.9


def test_what_kels_cannot_split_is_named() -> None:
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2
    )
    with pytest.raises(ValueError, match="split by weights"):
        evolution.kels(vit, 0.5)
    with pytest.raises(ValueError, match="split rate"):
        evolution.wels({"w": torch.ones(3)}, 0.0, seed=0)
    assert math.isclose(evolution.kept(7, 0.5), 4)
