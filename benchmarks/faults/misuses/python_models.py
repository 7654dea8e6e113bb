"""Misuses of models under masks, of banks, and of mask files in Python."""

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.faults.misuses.case import WORKS, Case, check, error
from selfmask_dist import MaskBank, Masks, apply_masks, attach, detach, load_cascade
from selfmask_dist.maskfile import read_mask_file
from tests.support.models import conv_net, make

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def vit(**options: Any) -> nn.Module:
    return make("timm_vit", **{"dtype": torch.float32, **options})[0]


def prune(masks: Masks, share: float = 0.3) -> None:
    """Set scores that prune the smallest weights."""
    sizes = {entry.name: entry.weight.float().abs() for entry in masks.entries}
    masks.load_state_dict({name: size - size.quantile(share) for name, size in sizes.items()})


def mask_file(folder: Path, name: str = "a.mask", *, share: float = 0.3, **options: Any) -> Path:
    masks = attach(vit(**options), include="vit")
    prune(masks, share)
    masks.save(folder / name)
    return folder / name


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IMAGES)
        return found


def under(path: Path, model: nn.Module | None = None) -> Tensor:
    """Return the right output under a mask."""
    model = vit() if model is None else model
    apply_masks(model, path)
    return output(model)


def equal(found: Tensor, wanted: Tensor, what: str) -> None:
    check(torch.allclose(found, wanted, atol=1e-6), f"{what}: off by {(found - wanted).abs().max():.3g}")


# ---- PEFT and other libraries that change modules


def peft_before(folder: Path) -> None:
    """Masks go on the frozen weights, not on the adapters, and the file fits the plain model."""
    import peft

    model = peft.get_peft_model(vit(), peft.LoraConfig(target_modules=["fc1"], r=2))
    masks = attach(model, include="vit")
    names = [entry.name for entry in masks.entries]
    check(not [name for name in names if "lora_" in name], f"masks on adapters: {names[:9]}")
    prune(masks)
    masks.save(folder / "x.mask")
    equal(under(folder / "x.mask"), under(mask_file(folder)), "the plain model under the file")


def peft_merged(folder: Path) -> None:
    """Adapters are merged into the weights under attached masks."""
    import peft

    model = peft.get_peft_model(vit(), peft.LoraConfig(target_modules=["fc1"], r=2, init_lora_weights=False))
    masks = attach(model, include=["*base_layer.weight"])
    optimizer = torch.optim.SGD(masks.parameters(), lr=1.0)
    masks.bind(optimizer)
    model.merge_adapter()
    model(IMAGES).sum().backward()
    optimizer.step()


def fused_layer(folder: Path) -> None:
    """Batch norm is folded into the convolutions of a masked model."""
    model: Any = conv_net().eval()
    attach(model, include="resnet")
    folded = torch.nn.utils.fusion.fuse_conv_bn_eval(model.conv1, model.bn1)
    model.conv1, model.bn1 = folded, nn.Identity()
    attach(model, include="resnet")


def pruned_after(_: Path) -> None:
    """torch.nn.utils.prune on a layer that carries a mask."""
    from torch.nn.utils import prune as torch_prune

    model = vit()
    masks = attach(model, include="vit")
    optimizer = torch.optim.SGD(masks.parameters(), lr=1.0)
    masks.bind(optimizer)
    torch_prune.random_unstructured(model.get_submodule("blocks.0.mlp.fc1"), "weight", amount=0.5)
    model(IMAGES).sum().backward()
    optimizer.step()


def exported(folder: Path) -> None:
    """torch.export makes a program of the model as it is: theta, for good."""
    model = vit().eval()
    masks = attach(model, include="vit")
    prune(masks)
    program = torch.export.export(model, (IMAGES,))
    equal(program.module()(IMAGES), output(model), "the exported program")


def cast_buffers(folder: Path) -> None:
    """Half precision for one block after attach."""
    model = vit()
    masks = attach(model, include="vit")
    optimizer = torch.optim.SGD(masks.parameters(), lr=1.0)
    masks.bind(optimizer)
    model.get_submodule("blocks.1.mlp").to(torch.float64)
    x = torch.randn(2, 24, dtype=torch.float64)
    model.get_submodule("blocks.1.mlp")(x).sum().backward()


def to_meta(_: Path) -> None:
    model = vit()
    masks = attach(model, include="vit")
    optimizer = torch.optim.SGD(masks.parameters(), lr=1.0)
    masks.bind(optimizer)
    model.to("meta")
    for _step in range(2):
        model(IMAGES.to("meta")).sum().backward()
        optimizer.step()


# ---- copies


def state_into_plain(folder: Path) -> None:
    """A masked model's state is saved, and loaded into a model that is then masked anew."""
    model = vit()
    prune(attach(model, include="vit"))
    torch.save(model.state_dict(), folder / "x.pt")
    other = vit()
    other.load_state_dict(torch.load(folder / "x.pt", weights_only=True))
    apply_masks(other, mask_file(folder))


def averaged(_: Path) -> None:
    """Masks on the running average of a masked model, which is a copy with theta in it."""
    model = vit()
    prune(attach(model, include="vit"))
    attach(torch.optim.swa_utils.AveragedModel(model), include="vit")


def copied_block(_: Path) -> None:
    """One block of a masked model is copied into another model."""
    model, other = vit(), vit(seed=3)
    prune(attach(model, include="vit"))
    other.set_submodule("blocks.1", copy.deepcopy(model.get_submodule("blocks.1")))
    attach(other, include="vit")


def shared_block(_: Path) -> None:
    """One block is in two models, and both are masked."""
    model, other = vit(), vit(seed=3)
    attach(model, include="vit")
    other.set_submodule("blocks.1", model.get_submodule("blocks.1"))
    attach(other, include="vit")


def pickled_bank(folder: Path) -> None:
    bank = MaskBank(vit())
    bank.add("a", mask_file(folder))
    pickle.dumps(bank)


def copied_bank(folder: Path) -> None:
    """A copy of a bank, or an error that says what to do."""
    bank = MaskBank(vit())
    bank.add("a", mask_file(folder))
    equal(copy.deepcopy(bank).embed(IMAGES, "a"), under(folder / "a.mask"), "the copied bank")


# ---- banks


def two_banks(folder: Path) -> None:
    encoder = vit()
    first, second = MaskBank(encoder), MaskBank(encoder)
    first.add("a", mask_file(folder, "a.mask"))
    second.add("b", mask_file(folder, "b.mask", share=0.6))
    a, b = under(folder / "a.mask"), under(folder / "b.mask")
    for _turn in range(2):
        equal(first.embed(IMAGES, "a"), a, "the first bank's")
        equal(second.embed(IMAGES, "b"), b, "the second bank's")
        equal(first.embed(IMAGES, None), output(vit()), "the frozen encoder's")


def attach_under_a_bank(folder: Path) -> None:
    encoder = vit()
    bank = MaskBank(encoder)
    bank.add("a", mask_file(folder))
    bank.embed(IMAGES, "a")
    attach(encoder, include="vit")


def apply_under_a_bank(folder: Path) -> None:
    encoder = vit()
    bank = MaskBank(encoder)
    bank.add("a", mask_file(folder))
    bank.embed(IMAGES, "a")
    apply_masks(encoder, mask_file(folder, "b.mask", share=0.6))


def copy_under_a_bank(folder: Path) -> None:
    encoder = vit()
    bank = MaskBank(encoder)
    bank.add("a", mask_file(folder))
    bank.embed(IMAGES, "a")
    attach(copy.deepcopy(encoder), include="vit")


def load_under_a_bank(folder: Path) -> None:
    """Other weights are loaded into the encoder of a bank."""
    encoder = vit()
    bank = MaskBank(encoder)
    bank.add("a", mask_file(folder))
    encoder.load_state_dict(vit(seed=5).state_dict())
    bank.embed(IMAGES, "a")


def double_under_a_bank(folder: Path) -> None:
    encoder = vit()
    bank = MaskBank(encoder)
    bank.add("a", mask_file(folder))
    encoder.double()
    bank.embed(IMAGES.double(), "a")


def embed(images: Any, names: Any = "a") -> Callable[[Path], None]:
    def use(folder: Path) -> None:
        bank = MaskBank(vit())
        bank.add("a", mask_file(folder))
        bank.embed(images, names)

    return use


def names_of_a_tuple(folder: Path) -> None:
    bank = MaskBank(vit())
    bank.add("a", mask_file(folder))
    found = bank.embed(IMAGES, ("a", None, "a", None))
    equal(found[::2], under(folder / "a.mask")[::2], "under the mask")
    equal(found[1::2], output(vit())[1::2], "frozen")


def threads(folder: Path) -> None:
    bank = MaskBank(vit())
    wanted = {}
    for number in range(3):
        path = mask_file(folder, f"{number}.mask", share=0.2 + number / 5)
        bank.add(str(number), path)
        wanted[str(number)] = under(path)
    wrong: list[str] = []

    def work(name: str) -> None:
        for _turn in range(20):
            if not torch.allclose(bank.embed(IMAGES, name), wanted[name], atol=1e-6):
                wrong.append(name)

    workers = [threading.Thread(target=work, args=(name,)) for name in wanted]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    check(not wrong, f"wrong under masks {sorted(set(wrong))}")


def train_mode(folder: Path) -> None:
    """The encoder is put in train mode after the bank was made."""
    encoder = make("conv", dtype=torch.float32)[0]
    masks = attach(copy.deepcopy(encoder), include="resnet")
    prune(masks)
    masks.save(folder / "a.mask")
    bank = MaskBank(encoder)
    bank.add("a", folder / "a.mask")
    right = bank.embed(IMAGES, "a").clone()
    encoder.train()
    equal(bank.embed(IMAGES, "a"), right, "after train()")


# ---- files


def arguments_swapped(folder: Path) -> None:
    apply_masks(mask_file(folder), vit())  # type: ignore[arg-type]


def file_in_place(write: Callable[[Path], None]) -> Callable[[Path], None]:
    def use(folder: Path) -> None:
        write(folder / "x.mask")
        apply_masks(vit(), folder / "x.mask")

    return use


def as_safetensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file(dict(vit().state_dict()), path)


def as_pickle(path: Path) -> None:
    torch.save(vit().state_dict(), path)


def reload_and_change(folder: Path) -> None:
    """Back to the pretrained weights by loading them, and on to another mask."""
    a, b = mask_file(folder, "a.mask"), mask_file(folder, "b.mask", share=0.6)
    model = vit()
    pretrained = copy.deepcopy(model.state_dict())
    apply_masks(model, a)
    model.load_state_dict(pretrained)
    equal(under(b, model), under(b), "under the second mask")


def undo_apply(folder: Path) -> None:
    model = vit()
    apply_masks(model, mask_file(folder))
    detach(model)


def save_over_a_folder(folder: Path) -> None:
    (folder / "x.mask").mkdir()
    attach(vit(), include="vit").save(folder / "x.mask")


def save_below_nothing(folder: Path) -> None:
    attach(vit(), include="vit").save(folder / "none" / "x.mask")
    check(read_mask_file(folder / "none" / "x.mask").masks, "no mask")


def bad_metrics(folder: Path) -> None:
    attach(vit(), include="vit").save(folder / "x.mask", metrics={"knn": float("nan")})


def deeper(folder: Path) -> None:
    """A mask of two blocks on a model of three, whose first two are the same."""
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=2, num_classes=0
    )
    model.load_state_dict({**model.state_dict(), **vit().state_dict()})
    last = copy.deepcopy(model.get_submodule("blocks.2").state_dict())
    apply_masks(model, mask_file(folder))
    theta, right = (m.get_parameter("blocks.1.mlp.fc1.weight") for m in (model, right_model(folder)))
    check(torch.equal(theta, right), "theta of the second block")
    state = model.get_submodule("blocks.2").state_dict()
    check(all(torch.equal(state[key], last[key]) for key in last), "the third block is changed")


def right_model(folder: Path) -> nn.Module:
    model = vit()
    apply_masks(model, folder / "a.mask")
    return model


def in_inference_mode(folder: Path) -> None:
    path = mask_file(folder)
    with torch.inference_mode():
        equal(under(path), under(mask_file_outside(path)), "in inference mode")


def mask_file_outside(path: Path) -> Path:
    return path


def cascade_of_a_mask(folder: Path) -> None:
    load_cascade(mask_file(folder), vit())


def cascade_swapped(folder: Path) -> None:
    load_cascade(vit(), mask_file(folder))  # type: ignore[arg-type]


def name_that_is_not_there(folder: Path) -> None:
    apply_masks(vit(), mask_file(folder), name="expert-0")


def applied_in_train_mode(folder: Path) -> None:
    """Fine-tuning the head after apply_masks leaves theta alone."""
    model = vit()
    apply_masks(model, mask_file(folder))
    before = output(model).clone()
    head = nn.Linear(24, 2)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    head(model.train()(IMAGES)).sum().backward()
    optimizer.step()
    equal(output(model), before, "after training the head")


CASES = [
    Case("get_peft_model before attach", WORKS, peft_before),
    Case("PEFT's adapters merged under masks", error("written to", "merge"), peft_merged),
    Case("batch norm folded into a masked convolution", error("carries? a mask"), fused_layer),
    Case("torch's prune on a masked layer", error("other parameters in their place"), pruned_after),
    Case("torch.export of a masked model", WORKS, exported, seconds=90),
    Case("one block converted after attach", error(r"blocks\.1\.mlp", "converted"), cast_buffers),
    Case("the model moved to meta after attach", error("other parameters in their place"), to_meta),
    Case("a mask on a state that was saved with masks on", error("wrong backbone"), state_into_plain),
    Case("masks on the average of a masked model", error("theta of masks"), averaged),
    Case(
        "a block of a masked model copied into another", error(r"blocks\.1", "theta of masks"), copied_block
    ),
    Case("a masked block shared by two models", error(r"blocks\.1", "carries a mask"), shared_block),
    Case("a bank pickled", error("bank", "thread|pickle"), pickled_bank),
    Case("a bank deep-copied", error("bank", "thread|cop"), copied_bank),
    Case("two banks on one encoder", error("another MaskBank|two banks"), two_banks),
    Case("attach while a bank has a mask on", error("mask 'a'", "MaskBank"), attach_under_a_bank),
    Case("apply_masks while a bank has a mask on", error("mask 'a'", "MaskBank"), apply_under_a_bank),
    Case("a copy of an encoder while a bank has a mask on", error("mask 'a'", "MaskBank"), copy_under_a_bank),
    Case("other weights loaded under a bank", error("changed|written to", "bank"), load_under_a_bank),
    Case("the encoder of a bank converted", error("float64", "float32"), double_under_a_bank),
    Case("pictures as bytes to a bank", error("uint8"), embed(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))),
    Case("one picture without a batch to a bank", error(r"\(3, 16, 16\)"), embed(torch.zeros(3, 16, 16))),
    Case("a numpy array to a bank", error("ndarray"), embed(IMAGES.numpy())),
    Case("doubles to a bank of floats", error("float64", "float32"), embed(IMAGES.double())),
    Case("fewer names than pictures", error("4 images", "2 names"), embed(IMAGES, ["a", "a"])),
    Case("a mask that the bank has not", error("'b'", "a"), embed(IMAGES, "b")),
    Case("names as a tuple, with the frozen encoder between", WORKS, names_of_a_tuple),
    Case("three threads on one bank", WORKS, threads),
    Case("train() on the encoder of a bank", WORKS, train_mode),
    Case("the arguments of apply_masks swapped", error("Module|model"), arguments_swapped),
    Case(
        "a safetensors file for a mask",
        error("not a mask file", "safetensors"),
        file_in_place(as_safetensors),
    ),
    Case("a state dict of torch.save for a mask", error("not a mask file"), file_in_place(as_pickle)),
    Case("an empty file for a mask", error("empty|0 bytes"), file_in_place(Path.touch)),
    Case("a folder for a mask", error(r"x\.mask"), file_in_place(Path.mkdir)),
    Case("pretrained weights loaded between two masks", WORKS, reload_and_change),
    Case("detach of a mask that was applied", error("a.mask", "pretrained weights"), undo_apply),
    Case("save over a folder", error(r"x\.mask", "[Ff]older|directory"), save_over_a_folder),
    Case("save below a folder that is not there", error("none", "No such|no such"), save_below_nothing),
    Case("a metric that is NaN", error("knn", "finite|nan"), bad_metrics),
    Case("a mask of two blocks on three", WORKS, deeper),
    Case("apply_masks in inference mode", WORKS, in_inference_mode),
    Case("load_cascade of a plain mask", error("no cascade", "default"), cascade_of_a_mask),
    Case("the arguments of load_cascade swapped", error("VisionTransformer"), cascade_swapped),
    Case("a name that the file has not", error("expert-0", "default"), name_that_is_not_there),
    Case("a head trained after apply_masks", WORKS, applied_in_train_mode),
]
