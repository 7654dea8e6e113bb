"""A training loop of one's own cannot go wrong without a word: what leaves masks untrained is an error.

And what only looks like it is silent: pytest turns warnings into errors.
"""

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selfmask_dist import Masks, attach, detach
from selfmask_dist.masking import ForgottenBindWarning
from tests.support.models import make


class Loop:
    """A model with a head, an optimizer over its masks, and steps on seeded batches."""

    def __init__(self, *, bind: bool = True, head: bool = True, **options: Any) -> None:
        self.model, preset = make("timm_vit", dtype=torch.float32)
        self.net: Callable[[Tensor], Tensor] = self.model
        self.masks: Masks = attach(self.model, include=preset, **options)
        self.head = nn.Linear(24, 3)
        trained = [*self.masks.parameters(), *(self.head.parameters() if head else ())]
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(trained, lr=100.0)
        if bind:
            self.masks.bind(self.optimizer)

    def loss(self, seed: int = 0) -> Tensor:
        images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        return nn.functional.cross_entropy(self.head(self.net(images)), torch.arange(6) % 3)

    def step(self, count: int = 1) -> None:
        for seed in range(count):
            self.optimizer.zero_grad()
            self.loss(seed).backward()
            self.optimizer.step()

    def pruned(self) -> int:
        return sum(int((~mask).sum()) for mask in self.masks.masks().values())


def freeze(loop: Loop) -> None:
    loop.model.requires_grad_(False)


def freeze_by_peft(loop: Loop) -> None:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(loop.model, peft.LoraConfig(target_modules=["fc1"], r=2))


def assign(loop: Loop) -> None:
    loop.model.load_state_dict({k: v.clone() for k, v in loop.model.state_dict().items()}, assign=True)


def convert_with_new_parameters(loop: Loop) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        loop.model.to(torch.float64).to(torch.float32)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def replace_a_layer(loop: Loop) -> None:
    loop.model.set_submodule("blocks.1.mlp.fc1", nn.Linear(24, 96))


def copy_model(loop: Loop) -> None:
    loop.net = copy.deepcopy(loop.model)


def copy_as_bytes(loop: Loop) -> None:
    loop.net = pickle.loads(pickle.dumps(loop.model))


def compute_without_gradient(loop: Loop) -> None:
    loop.net = torch.no_grad()(loop.model)


SPOILED: dict[Callable[[Loop], None], str] = {
    freeze: "requires_grad_?.*set to False after attach",
    freeze_by_peft: "set to False after attach",
    assign: r"other parameters in their place: after attach, it was loaded with load_state_dict\(assign=True",
    convert_with_new_parameters: "other parameters in their place",
    replace_a_layer: r"^blocks\.1\.mlp\.fc1\.weight, blocks\.1\.mlp\.fc1\.bias carry masks",
    copy_model: "computed with a copy of it",
    copy_as_bytes: "computed with a copy of it",
    compute_without_gradient: "under no_grad",
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_a_step_that_trains_no_mask_says_why(spoil: Callable[[Loop], None]) -> None:
    loop = Loop()
    spoil(loop)
    with pytest.raises(ValueError, match=SPOILED[spoil]):
        loop.step()


@pytest.mark.parametrize("spoil", [freeze, assign, copy_model], ids=lambda spoil: spoil.__name__)
def test_it_is_noticed_in_the_middle_of_a_training_too(spoil: Callable[[Loop], None]) -> None:
    loop = Loop(head=False)
    loop.step(3)
    spoil(loop)
    with pytest.raises(ValueError, match=SPOILED[spoil]):
        loop.step(2)


@pytest.mark.parametrize("convert", [nn.Module.double, nn.Module.bfloat16], ids=lambda f: f.__name__)
def test_a_model_that_is_converted_after_attach(convert: Callable[[nn.Module], nn.Module]) -> None:
    loop = Loop()
    convert(loop.model)
    dtype = next(loop.model.parameters()).dtype
    with pytest.raises(ValueError, match=f"is {dtype} on cpu now and was torch.float32 on cpu .*converted"):
        loop.model(torch.randn(2, 3, 16, 16, dtype=dtype)).sum().backward()


@pytest.mark.parametrize("patterns", [("*attn*", "*mlp*"), ("blocks.0.mlp.*", "blocks.1.mlp.*")])
def test_masks_that_are_attached_later_leave_the_first_ones_trained(patterns: tuple[str, str]) -> None:
    model, _ = make("timm_vit", dtype=torch.float32)
    first, second = (attach(model, include=pattern) for pattern in patterns)
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=100.0)
    first.bind(optimizer)
    second.bind(optimizer)
    for seed in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)))[:, 0].sum().backward()
        optimizer.step()
    assert all(
        not mask.all()
        for masks in (first, second)
        for mask in [torch.cat([m.flatten() for m in masks.masks().values()])]
    )
    assert not model.get_parameter("norm.weight").requires_grad


# ---- what is right stays silent


def accumulated(loop: Loop) -> None:
    for part in range(8):
        (loop.loss(part) / 8).backward()
    loop.optimizer.step()


def with_closure(loop: Loop) -> None:
    def closure() -> float:
        loop.optimizer.zero_grad()
        loss = loop.loss()
        loss.backward()
        return loss.item()

    for _ in range(3):
        loop.optimizer.step(closure)


def with_a_scaler_that_skips(loop: Loop) -> None:
    scaler = torch.amp.GradScaler("cpu")
    for seed in range(4):
        loop.optimizer.zero_grad()
        scaler.scale(loop.loss(seed) * (torch.inf if seed == 1 else 1.0)).backward()
        scaler.unscale_(loop.optimizer)
        nn.utils.clip_grad_norm_(list(loop.masks.parameters()), 1.0)
        scaler.step(loop.optimizer)
        scaler.update()


def with_zeros_for_none(loop: Loop) -> None:
    for seed in range(3):
        loop.optimizer.zero_grad(set_to_none=False)
        loop.loss(seed).backward()
        loop.optimizer.step()


def after_a_first_step_for_the_schedule(loop: Loop) -> None:
    schedule = torch.optim.lr_scheduler.LinearLR(loop.optimizer, total_iters=3)
    loop.optimizer.step()  # on nothing, so that torch does not warn of the order
    schedule.step()
    loop.step(3)


def with_averages_swapped_in(loop: Loop) -> None:
    loop.step(2)
    now = copy.deepcopy(loop.model.state_dict())
    loop.model.load_state_dict({name: value * 0.5 for name, value in now.items()})
    loop.model(torch.randn(1, 3, 16, 16))
    loop.model.load_state_dict(now)
    loop.step(2)


def paused(loop: Loop) -> None:
    for parameter in loop.masks.parameters():
        parameter.requires_grad_(False)
    loop.net = torch.no_grad()(loop.model)
    loop.step(3)
    loop.net = loop.model
    for entry in loop.masks.entries:
        entry.scores.requires_grad_(True)
    loop.step(1)


def with_a_frozen_block(loop: Loop) -> None:
    loop.model.get_submodule("blocks.0").requires_grad_(False)
    loop.step(3)


def rewritten_by_hand(loop: Loop) -> None:
    for seed in range(3):
        loop.loss(seed).backward()
        with torch.no_grad():
            for scores in loop.masks.parameters():
                assert scores.grad is not None
                scores.sub_(100 * scores.grad)
                scores.grad = None
        loop.masks.rewrite()


def to_channels_last(loop: Loop) -> None:
    loop.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loop.step(3)


RIGHT = (
    accumulated,
    with_closure,
    with_a_scaler_that_skips,
    with_zeros_for_none,
    after_a_first_step_for_the_schedule,
    with_averages_swapped_in,
    paused,
    with_a_frozen_block,
    rewritten_by_hand,
    to_channels_last,
)


@pytest.mark.parametrize("train", RIGHT, ids=lambda train: train.__name__)
def test_right_loops_are_silent_and_train(train: Callable[[Loop], None], tmp_path: Path) -> None:
    loop = Loop()
    train(loop)
    assert loop.pruned() > 0
    loop.masks.save(tmp_path / "x.mask")


@pytest.mark.parametrize("family", ["random", "magnitude"])
def test_masks_that_are_not_trained_ask_for_no_gradient(family: str, tmp_path: Path) -> None:
    loop = Loop(family=family)
    loop.step(3)
    loop.masks.save(tmp_path / "x.mask")


def test_reading_gradients_without_training_is_silent(tmp_path: Path) -> None:
    loop, other = Loop(bind=False), nn.Linear(2, 1)
    loop.loss().backward()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)  # another model's training
    for _ in range(4):
        other(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    loop.masks.save(tmp_path / "x.mask")


# ---- bind


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_forgotten_bind_is_an_error_at_the_next_backward_or_save(
    kind: type[torch.optim.Optimizer], tmp_path: Path
) -> None:
    loop = Loop(bind=False)
    loop.optimizer = kind(loop.masks.parameters(), lr=1.0, weight_decay=0.0)  # type: ignore[call-arg]
    loop.step()
    with pytest.raises(ValueError, match=f"changed by {kind.__name__}, which is not bound"):
        loop.masks.save(tmp_path / "x.mask")
    with pytest.raises(ValueError, match=r"theta did not follow.*masks\.bind\(optimizer\)"):
        loop.step()
    assert not (tmp_path / "x.mask").exists()


def test_an_optimizer_that_writes_through_data_is_noticed_too() -> None:
    class Old(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(parameter.grad, alpha=-1.0)

    loop = Loop(bind=False)
    loop.optimizer = Old(loop.masks.parameters(), {})
    loop.step()
    with pytest.raises(ValueError, match="changed by Old, which is not bound"):
        loop.step()


def test_an_optimizer_that_takes_the_place_of_the_bound_one(tmp_path: Path) -> None:
    loop = Loop()
    loop.step(2)
    loop.optimizer = torch.optim.AdamW(loop.masks.parameters(), lr=1.0, weight_decay=0.0)
    loop.step()
    with pytest.raises(ValueError, match=r"by AdamW, which is not bound \(bound is another SGD\)"):
        loop.step()
    with pytest.raises(ValueError, match="would not be what was trained"):
        loop.masks.save(tmp_path / "x.mask")
    loop.masks.bind(loop.optimizer)
    loop.masks.rewrite()
    loop.step(2)


def test_masks_that_nothing_steps_are_warned_of_and_not_saved(tmp_path: Path) -> None:
    loop = Loop(bind=False)
    loop.optimizer = torch.optim.SGD(loop.head.parameters(), lr=0.1)
    with pytest.warns(ForgottenBindWarning, match=r"SGD steps other parameters.*masks\.bind"):
        loop.step(4)
    with pytest.raises(ValueError, match="gradients in 4 backwards, and no optimizer is bound"):
        loop.masks.save(tmp_path / "x.mask")


def test_an_optimizer_over_the_models_parameters_is_noticed() -> None:
    loop = Loop(bind=False)
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.1)
    loop.step()
    with pytest.raises(ValueError, match="an optimizer steps the model's parameters"):
        loop.step()


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_weights_loaded_into_a_masked_model_are_not_taken_for_theta(share: float) -> None:
    loop = Loop()
    loop.step(2)
    loop.model.load_state_dict({name: value * share for name, value in loop.model.state_dict().items()})
    with pytest.raises(ValueError, match="a state dict was loaded into the model"):
        loop.step()
    loop.masks.rewrite()
    loop.step()


def test_binding_one_optimizer_twice_counts_its_steps_once() -> None:
    loop = Loop()
    loop.masks.bind(loop.optimizer)
    loop.step(3)
    assert loop.masks.step == 3


# ---- copies, and masks whose handle is lost


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_masked_model_says_what_it_is(copied: Callable[[nn.Module], nn.Module]) -> None:
    loop = Loop()
    loop.step(3)
    model = copied(loop.model)
    for use in (lambda: attach(model, include="vit"), lambda: detach(model)):
        with pytest.raises(ValueError, match="theta of masks that were attached when the model was copied"):
            use()
    fresh, _ = make("timm_vit", dtype=torch.float32)
    model.load_state_dict(fresh.state_dict())
    attach(model, include="vit")  # it is the pretrained one now


def test_theta_can_be_taken_as_plain_weights() -> None:
    loop = Loop()
    loop.step(3)
    model = copy.deepcopy(loop.model)
    detach(model, restore=False)
    masks = attach(model, include="vit")
    assert all(torch.equal(e.weight, loop.model.get_parameter(e.name)) for e in masks.entries)


@pytest.mark.parametrize("options", [{}, {"family": "random"}, {"family": "joint", "exclude": "*.bias"}])
def test_masks_whose_handle_is_lost_come_off(options: dict[str, Any]) -> None:
    model, preset = make("timm_vit", dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    attach(model, include=preset, **options)
    gc.collect()
    with pytest.raises(ValueError, match=r"carries a mask already.*selfmask_dist\.detach\(model\)"):
        attach(model, include=preset)
    detach(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="carries no masks"):
        detach(model)


def test_masks_are_not_copied_and_say_what_they_are() -> None:
    loop = Loop(bind=False)
    assert "16 tensors" in repr(loop.masks)
    assert "not bound" in repr(loop.masks)
    loop.masks.bind(loop.optimizer)
    assert "family threshold; bound to SGD" in repr(loop.masks)
    with pytest.raises(TypeError, match=r"masks\.state_dict\(\)"):
        copy.deepcopy(loop.masks)
    loop.masks.detach()
    assert "detached" in repr(loop.masks)


def test_detach_does_not_pretend_to_restore_parameters_that_are_gone() -> None:
    loop = Loop()
    loop.step(2)
    assign(loop)
    with pytest.raises(ValueError, match=r"other parameters in their place.*detach\(restore=False\)"):
        loop.masks.detach()
    loop.masks.detach(restore=False)
