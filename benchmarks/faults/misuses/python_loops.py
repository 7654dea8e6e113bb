"""Misuses of attach, bind and the training loop around them."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.faults.misuses.case import WORKS, Case, Wanted, check, error, warning
from selfmask_dist import Masks, attach
from selfmask_dist.masking import build_family
from tests.support.models import conv_net, make


class Loop:
    """A small ViT under masks, a head, an optimizer over both, and steps on seeded batches."""

    def __init__(self, *, kind: str = "timm_vit", lr: float = 100.0, **options: Any) -> None:
        self.model, preset = make(kind, dtype=torch.float32)
        self.net: Any = self.model
        self.masks: Masks = attach(self.model, include=preset, **options)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.head = nn.Linear(24 if kind == "timm_vit" else 16, 3)
        parameters = [*self.masks.parameters(), *self.head.parameters()]
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=lr)
        self.masks.bind(self.optimizer)

    def backward(self, seed: int = 0, share: float = 1.0) -> None:
        images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        loss = nn.functional.cross_entropy(self.head(self.net(images)), torch.arange(6) % 3)
        (loss * share).backward()

    def step(self, count: int = 1) -> "Loop":
        for seed in range(count):
            self.optimizer.zero_grad()
            self.backward(seed)
            self.optimizer.step()
        return self

    def scores(self) -> Tensor:
        return torch.cat([entry.scores.detach().flatten() for entry in self.masks.entries])


def same(first: Loop, second: Loop) -> None:
    """Check that two loops made the same scores, and some that are pruned."""
    check(torch.equal(first.scores(), second.scores()), "the scores are not those of the plain loop")
    check(bool((first.scores() <= 0).any()), "nothing is pruned")


# ---- gradients


def clear_scores_alone(_: Path) -> None:
    loop = Loop()
    for seed in range(3):
        loop.backward(seed)
        loop.optimizer.step()
        for parameter in [*loop.masks.parameters(), *loop.head.parameters()]:
            parameter.grad = None
    same(loop, Loop().step(3))


def clear_scores_between_backwards(_: Path) -> None:
    """The first batch's gradient is thrown away by hand."""
    loop = Loop()
    loop.backward(7)
    for parameter in [*loop.masks.parameters(), *loop.head.parameters()]:
        parameter.grad = None
    loop.backward(0)
    loop.optimizer.step()
    same(loop, Loop().step(1))


def zero_scores_in_place(_: Path) -> None:
    loop = Loop()
    loop.backward(7)
    for parameter in [*loop.masks.parameters(), *loop.head.parameters()]:
        assert parameter.grad is not None
        parameter.grad.zero_()
    loop.backward(0)
    loop.optimizer.step()
    same(loop, Loop().step(1))


def clip_the_models_gradients(_: Path) -> None:
    loop = Loop()
    loop.backward()
    nn.utils.clip_grad_norm_(loop.model.parameters(), 1e-3)
    loop.optimizer.step()


def clip_the_masks_gradients(_: Path) -> None:
    loop = Loop(lr=1.0)
    before = loop.scores()
    loop.backward()
    nn.utils.clip_grad_norm_(list(loop.masks.parameters()), 1e-3)
    loop.optimizer.step()
    moved = (loop.scores() - before).norm().item()
    check(abs(moved - 1e-3) < 1e-5, f"the scores moved by {moved}, not by the clipped norm")


def zero_grad_of_the_model(_: Path) -> None:
    loop = Loop()
    for seed in range(3):
        loop.model.zero_grad()
        loop.head.zero_grad()
        loop.backward(seed)
        loop.optimizer.step()
    same(loop, Loop().step(3))


def retain_and_backward_twice(_: Path) -> None:
    """Half of a loss, and then the other half of the same graph."""
    loop = Loop()
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    loss = nn.functional.cross_entropy(loop.head(loop.model(images)), torch.arange(6) % 3)
    (loss * 0.5).backward(retain_graph=True)
    (loss * 0.5).backward()
    loop.optimizer.step()
    other = Loop().step(1)
    torch.testing.assert_close(loop.scores(), other.scores(), rtol=1e-4, atol=1e-5)


def autograd_grad(_: Path) -> None:
    """torch.autograd.grad does not accumulate, so that no score gets a gradient."""
    loop = Loop()
    for _step in range(2):
        images = torch.randn(6, 3, 16, 16)
        loss = loop.head(loop.model(images)).sum()
        torch.autograd.grad(loss, [entry.theta for entry in loop.masks.entries])
        loop.optimizer.step()


def detached_features(_: Path) -> None:
    """The head is trained on features cut from the graph."""
    loop = Loop()
    for _step in range(2):
        loop.optimizer.zero_grad()
        loop.head(loop.model(torch.randn(6, 3, 16, 16)).detach()).sum().backward()
        loop.optimizer.step()


def infinite_loss(folder: Path) -> None:
    loop = Loop()
    loop.backward(share=float("inf"))
    loop.optimizer.step()
    loop.masks.save(folder / "x.mask")


# ---- optimizers


def two_optimizers_of_half_the_layers(_: Path) -> None:
    loop, plain = Loop(), Loop()
    parameters = list(loop.masks.parameters())
    halves = [torch.optim.SGD(part, lr=100.0) for part in (parameters[:8], parameters[8:])]
    head = torch.optim.SGD(loop.head.parameters(), lr=100.0)
    masks = attach_again(loop)
    parameters = list(masks.parameters())
    halves = [torch.optim.SGD(part, lr=100.0) for part in (parameters[:8], parameters[8:])]
    for half in halves:
        masks.bind(half)
    for seed in range(3):
        for optimizer in (*halves, head):
            optimizer.zero_grad()
        loop.backward(seed)
        for optimizer in (*halves, head):
            optimizer.step()
    same(loop, plain.step(3))


def attach_again(loop: Loop) -> Masks:
    loop.masks.detach()
    loop.masks = attach(loop.model, include="vit")
    return loop.masks


def one_layer_in_no_optimizer(folder: Path) -> None:
    """Scores that nobody steps stay as they are, and are saved so."""
    model, preset = make("timm_vit", dtype=torch.float32)
    masks = attach(model, include=preset)
    optimizer = torch.optim.SGD(list(masks.parameters())[:2], lr=1e4)
    masks.bind(optimizer)
    for seed in range(3):
        optimizer.zero_grad()
        images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        nn.functional.cross_entropy(model(images)[:, :3], torch.arange(4) % 3).backward()
        optimizer.step()
    pruned = [bool((entry.scores <= 0).any()) for entry in masks.entries]
    check(any(pruned[:2]) and not any(pruned[2:]), f"pruned: {pruned}")
    masks.save(folder / "x.mask")


def lbfgs(_: Path) -> None:
    loop = Loop()
    masks = attach_again(loop)
    optimizer = torch.optim.LBFGS(masks.parameters(), lr=50.0, max_iter=3)
    masks.bind(optimizer)

    def closure() -> float:
        optimizer.zero_grad()
        loop.backward()
        return 1.0

    optimizer.step(closure)
    theta = torch.cat([entry.theta.detach().flatten() for entry in masks.entries])
    masks.rewrite()
    again = torch.cat([entry.theta.detach().flatten() for entry in masks.entries])
    check(torch.equal(theta, again), "theta is not that of the scores")


def add_group_later(_: Path) -> None:
    loop = Loop()
    masks = attach_again(loop)
    optimizer = torch.optim.SGD(loop.head.parameters(), lr=100.0)
    masks.bind(optimizer)


def optimizer_of_other_masks(_: Path) -> None:
    Loop().masks.bind(Loop().optimizer)


def decay_set_later(folder: Path) -> None:
    """weight_decay put into the group after bind pulls the scores to the threshold."""
    loop = Loop()
    for group in loop.optimizer.param_groups:
        group["weight_decay"] = 0.1
    loop.step(3)


def optimizer_state_of_theta(_: Path) -> None:
    """An optimizer is loaded whose parameters are theta's."""
    loop = Loop()
    loop.optimizer = torch.optim.SGD([entry.theta for entry in loop.masks.entries], lr=0.1)
    loop.masks.bind(loop.optimizer)


def generator_twice(_: Path) -> None:
    """A generator of parameters is read once, and empty for the optimizer."""
    model, preset = make("timm_vit", dtype=torch.float32)
    masks = attach(model, include=preset)
    parameters = masks.parameters()
    sum(parameter.numel() for parameter in parameters)
    head = nn.Linear(2, 2)
    masks.bind(torch.optim.SGD([*parameters, *head.parameters()], lr=1.0))


def copied_optimizer(folder: Path) -> None:
    """The copy steps copies of the scores."""
    loop = Loop()
    first, loop.optimizer = loop.optimizer, copy.deepcopy(loop.optimizer)
    loop.step(3)
    check(loop.masks.step == 0 and first is not loop.optimizer, "the first optimizer was stepped")
    loop.masks.save(folder / "x.mask")


# ---- detaching


def go_on_after_detach(_: Path) -> None:
    loop = Loop().step(1)
    loop.masks.detach()
    loop.model.requires_grad_(True)
    for seed in range(3):
        loop.optimizer.zero_grad()
        loop.net(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))).sum().backward()
        loop.optimizer.step()


def use_after_detach(name: str) -> Any:
    def use(folder: Path) -> None:
        loop = Loop(kind="conv", lr=30.0).step(3)
        state = loop.masks.state_dict()
        loop.masks.detach()
        after = copy.deepcopy(loop.model.state_dict())
        actions = {
            "rewrite": loop.masks.rewrite,
            "load": lambda: loop.masks.load_state_dict(state),
            "bind": lambda: loop.masks.bind(torch.optim.SGD(loop.masks.parameters(), lr=1.0)),
            "save": lambda: loop.masks.save(folder / "x.mask"),
        }
        actions[name]()
        same = all(torch.equal(value, after[key]) for key, value in loop.model.state_dict().items())
        check(same, "the model is a theta again, and nobody said so")

    return use


# ---- attach


def attached(wanted: Wanted, name: str, build: Any, **options: Any) -> Case:
    def use(_: Path) -> None:
        attach(build(), **options)

    return Case(name, wanted, use)


def vit() -> nn.Module:
    return make("timm_vit", dtype=torch.float32)[0]


def attach_in_inference_mode(_: Path) -> None:
    model = vit()
    with torch.inference_mode():
        masks = attach(model, include="vit")
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    check(all(entry.scores.grad is not None for entry in masks.entries), "no gradient")


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return vit()


def dynamic_int8() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(vit(), {nn.Linear}, dtype=torch.qint8)


def nan_weights() -> nn.Module:
    model = vit()
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.fc2.weight")[0, 0] = float("nan")
    return model


def tied(_: Path) -> None:
    """One weight in two places is masked once, and both see theta."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    masks = attach(model, include="*.weight")
    optimizer = torch.optim.SGD(masks.parameters(), lr=5.0)
    masks.bind(optimizer)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    (entry,) = masks.entries
    check(model[2].weight is entry.theta and bool((entry.theta == 0).any()), "one of the two is not theta")


def shuffled_groups(_: Path) -> None:
    """A state whose keys come in another order."""
    loop, other = Loop().step(3), Loop()
    other.masks.load_state_dict(dict(reversed(loop.masks.state_dict().items())))
    check(torch.equal(loop.scores(), other.scores()), "scores are on other layers")


def numpy_state(_: Path) -> None:
    loop = Loop().step(1)
    state: Any = {name: value.numpy() for name, value in loop.masks.state_dict().items()}
    Loop().masks.load_state_dict(state)


def nan_state(folder: Path) -> None:
    loop = Loop()
    state = {n: v.clone() for n, v in loop.masks.state_dict().items()}
    state["blocks.0.mlp.fc1.weight"][3] = float("nan")
    loop.masks.load_state_dict(state)
    loop.masks.save(folder / "x.mask")


def bool_state(_: Path) -> None:
    """Masks where scores are wanted: True is 1 and kept, False is 0, the threshold, and pruned."""
    loop, other = Loop().step(3), Loop()
    other.masks.load_state_dict(loop.masks.masks())
    same_bits = all(torch.equal(m, other.masks.masks()[n]) for n, m in loop.masks.masks().items())
    check(same_bits, "the masks are others")


def schedule_without_steps(_: Path) -> None:
    """A family whose share follows steps, and an optimizer that is stepped twice a batch."""
    family = build_family("topk", keep=0.5, keep_schedule="linear", keep_steps=4)
    loop = Loop(family=family, init="normal")
    loop.step(4)
    check(abs(sum(loop.masks.sparsity().values()) / len(loop.masks.entries) - 0.5) < 0.02, "share is not 0.5")


def amp(_: Path) -> None:
    loop = Loop()
    for seed in range(3):
        loop.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loop.backward(seed)
        loop.optimizer.step()
    check(bool((loop.scores() <= 0).any()) and bool(loop.scores().isfinite().all()), "nothing is trained")


def channels_last_file(folder: Path) -> None:
    from selfmask_dist import apply_masks

    pretrained = conv_net()
    model = copy.deepcopy(pretrained).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    masks = attach(model, include="resnet")
    optimizer = torch.optim.SGD(masks.parameters(), lr=30.0)
    masks.bind(optimizer)
    model(torch.randn(4, 3, 16, 16))[:, :3].square().sum().backward()
    optimizer.step()
    masks.save(folder / "x.mask")
    apply_masks(pretrained, folder / "x.mask")
    images = torch.randn(2, 3, 16, 16)
    difference = (pretrained.eval()(images) - model.eval()(images)).abs().max().item()
    check(difference < 1e-5, f"the outputs differ by {difference}")


def compiled_before(_: Path) -> None:
    """The model was compiled, and has run, before masks came."""
    loop, plain = Loop(), Loop()
    loop.masks.detach()
    loop.net = torch.compile(loop.model, backend="aot_eager")
    loop.net(torch.randn(6, 3, 16, 16))
    loop.masks = attach(loop.model, include="vit")
    loop.optimizer = torch.optim.SGD([*loop.masks.parameters(), *loop.head.parameters()], lr=100.0)
    loop.masks.bind(loop.optimizer)
    loop.step(3)
    plain.step(3)
    apart = (loop.scores() > 0) != (plain.scores() > 0)
    check(apart.float().mean() < 0.01, f"{apart.float().mean():.1%} of the bits are others")


CASES = [
    Case("gradients set to None on the scores alone", WORKS, clear_scores_alone),
    Case("a batch's gradient thrown away by hand", WORKS, clear_scores_between_backwards),
    Case("scores' gradients zeroed in place", WORKS, zero_scores_in_place),
    Case(
        "clip_grad_norm_ on the model's parameters",
        warning("gradient", r"masks\.parameters\(\)"),
        clip_the_models_gradients,
    ),
    Case("clip_grad_norm_ on the masks' parameters", WORKS, clip_the_masks_gradients),
    Case("zero_grad of the model in place of the optimizer's", WORKS, zero_grad_of_the_model),
    Case("two backwards through one graph", WORKS, retain_and_backward_twice),
    Case("torch.autograd.grad in place of backward", error("no score", "gradient"), autograd_grad),
    Case("a head on detached features", error("no score", "gradient"), detached_features),
    Case("an infinite loss, then save", error("not finite", r"blocks\."), infinite_loss),
    Case("two optimizers, each of half the layers", WORKS, two_optimizers_of_half_the_layers),
    Case("an optimizer of some layers only", WORKS, one_layer_in_no_optimizer),
    Case("L-BFGS with a closure", WORKS, lbfgs),
    Case("bind an optimizer of the head", error("none of these masks' scores"), add_group_later),
    Case("bind an optimizer of other masks", error("none of these masks' scores"), optimizer_of_other_masks),
    Case("weight decay set after bind", error("weight_decay=0.1"), decay_set_later),
    Case("an optimizer over theta", error("masks' scores|holds theta"), optimizer_state_of_theta),
    Case("a generator of parameters that was read before", error("none of these masks"), generator_twice),
    Case("the optimizer deep-copied", error("SGD", "never stepped", r"masks\.bind"), copied_optimizer),
    Case("training goes on after detach", error("detach"), go_on_after_detach),
    Case("rewrite after detach", error("detached"), use_after_detach("rewrite")),
    Case("load_state_dict after detach", error("detached"), use_after_detach("load")),
    Case("bind after detach", error("detached"), use_after_detach("bind")),
    Case("save after detach, with moved statistics", error("detached"), use_after_detach("save")),
    attached(error("blocks.0.mlp", r"\*"), "include names a module", vit, include="blocks.0.mlp"),
    attached(error("matches no parameter"), "include is a regular expression", vit, include=r"blocks\..*fc1"),
    attached(error("include", "empty|no pattern"), "include is an empty list", vit, include=[]),
    attached(error("include", "NoneType|None"), "include is None", vit, include=None),
    attached(
        error("Module", "OrderedDict"), "attach to a state dict", lambda: vit().state_dict(), include="vit"
    ),
    attached(error("Module", "function"), "attach to a function", lambda: vit, include="vit"),
    attached(error("no parameter"), "attach to a model without parameters", nn.Sequential, include="auto"),
    attached(error("inference_mode"), "a model made under inference_mode", made_in_inference_mode),
    Case("attach under inference_mode", error("inference_mode"), attach_in_inference_mode),
    attached(error("no parameter", "quantized|packed"), "a dynamically quantised model", dynamic_int8),
    attached(error(r"blocks\.1\.mlp\.fc2\.weight", "finite"), "weights with a NaN", nan_weights),
    attached(error("init", "kaimin"), "init is misspelt", vit, include="vit", init="kaimin_uniform"),
    attached(error("family", "treshold"), "family is misspelt", vit, include="vit", family="treshold"),
    attached(error("threshold"), "a threshold above the scores", vit, include="vit", threshold=2.0),
    attached(error("threshold|init"), "a threshold that is NaN", vit, include="vit", threshold=float("nan")),
    attached(error("first_layers"), "first_layers=0", vit, include="vit", first_layers=0),
    Case("one weight in two places", WORKS, tied),
    Case("a state in another order", WORKS, shuffled_groups),
    Case("a state of numpy arrays", error("blocks", "ndarray|numpy"), numpy_state),
    Case("a state with a NaN, then save", error("not finite", r"blocks\.0\.mlp\.fc1\.weight"), nan_state),
    Case("masks in place of scores", WORKS, bool_state),
    Case("a schedule of the kept share", WORKS, schedule_without_steps),
    Case("autocast to bfloat16", WORKS, amp),
    Case("channels_last before attach, a plain model after", WORKS, channels_last_file),
    Case("compiled, and run, before attach", WORKS, compiled_before, seconds=120),
]
