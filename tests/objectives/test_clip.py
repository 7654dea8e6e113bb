"""Images and captions: captions through the data plane, CLIP's and SLIP's loss against a plain formula, ranks
and engines alike, whole runs on image-text shards.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from selfmask_dist import data
from selfmask_dist.backbones import Backbone, load_backbone
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.config import ConfigError, load_config
from selfmask_dist.config.backbone import BackboneConfig
from selfmask_dist.config.objectives import ClipConfig, SlipConfig
from selfmask_dist.config.sections import EngineConfig
from selfmask_dist.data import Batch, SampleError, Workers, open_source, train_loader
from selfmask_dist.data.build import build_index
from selfmask_dist.data.indexing.index import difference
from selfmask_dist.masking import attach
from selfmask_dist.objectives import Clip, Context, Slip, build_objective
from selfmask_dist.objectives.base import TrainStep
from selfmask_dist.parallel import EngineState, World, build_engine
from tests.support.distributed import run_distributed
from tests.support.resuming import check_resumed_equals_whole, last_state, losses_of, train
from tests.support.tars import labelled, picture, write_tar
from tests.support.tiny_run import write_config

ROWS, STEPS = 6, 3
Text = Literal["frozen", "trained"]
KWARGS: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 1},
}
WORDS = ("a red square", "two dogs", "the sea at night", "a green hill", "bread on a table", "snow")
PRE = Preprocessing(image_size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def image_text(folder: Path, *, missing: tuple[int, ...] = ()) -> Path:
    """Two tars of 12 pictures with captions and no labels; those `missing` have no caption."""
    folder.mkdir()
    members = []
    for number in range(24):
        members.append((f"{number:03d}.jpg", picture(number)))
        if number not in missing:
            members.append((f"{number:03d}.txt", f"{WORDS[number % 6]}, picture {number}\n".encode()))
    half = next(i for i, (name, _) in enumerate(members) if name == "012.jpg")
    write_tar(folder / "a.tar", members[:half])
    write_tar(folder / "b.tar", members[half:])
    return folder


# ---- captions in the data plane


@pytest.mark.parametrize("is_indexed", [False, True])
def test_captions_come_with_their_pictures(tmp_path: Path, is_indexed: bool) -> None:
    folder = image_text(tmp_path / "pairs")
    if is_indexed:
        build_index(folder, require_labels=False)
    source = open_source(folder, require_labels=False)
    assert source.has_captions
    assert source.read_captions(np.array([13, 2])) == ["two dogs, picture 13", "the sea at night, picture 2"]
    part = data.Subset(source, np.array([5, 7]))
    assert part.read_captions(np.array([1])) == ["two dogs, picture 7"]
    transform = data.train_transform(PRE)
    loader = train_loader(source, transform, global_batch_size=8, seed=0, workers=Workers(1)).with_captions()
    for batch in loader:
        assert list(batch.captions) == [f"{WORDS[i % 6]}, picture {i}" for i in batch.ids.tolist()]
    loader.close()
    assert next(iter(train_loader(source, transform, global_batch_size=8, seed=0))).captions == ()


def test_a_sample_without_caption_is_a_broken_one(tmp_path: Path) -> None:
    source = open_source(image_text(tmp_path / "pairs", missing=(4,)), require_labels=False)
    quarantine = data.Quarantine(tmp_path / "quarantine.jsonl", num_samples=24, budget=0.1, rank=0)
    load = partial(train_loader, source, data.train_transform(PRE), global_batch_size=24, seed=0)
    found = list(load(quarantine=quarantine).with_captions())
    assert found[0].weights[found[0].ids == 4].tolist() == [0.0]
    assert found[0].weights.sum() == 23
    assert "it has no caption (.txt)" in found[0].failures[0].reason
    with pytest.raises(SampleError, match="it has no caption"):
        list(load().with_captions())


def test_data_without_captions_is_as_it_was(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", labelled(["a", "b"]))
    built = build_index(tmp_path).index
    assert not open_source(tmp_path).has_captions
    assert "captions" not in built.identity
    with pytest.raises(ValueError, match="no training image has a caption"):
        train_loader(
            open_source(tmp_path), data.train_transform(PRE), global_batch_size=2, seed=0
        ).with_captions()
    longer = image_text(tmp_path / "pairs")
    first = open_source(longer, require_labels=False).identity
    (longer / "b.tar").unlink()
    second = open_source(longer, require_labels=False)
    assert difference(first | {"captions": "0" * 16}, first) == "its captions have other places or lengths"
    kept = second.index.keep(np.arange(12) % 2 == 0, num_rejected=0)
    assert kept.caption_length is not None
    assert len(kept.caption_length) == 6


def test_a_view_alone_and_crops_are_joined() -> None:
    from PIL import Image

    crops = data.multicrop_transform(PRE, crops=(data.Crops(2, 16, (0.2, 1.0)),), on_device=True)
    joined = data.Joined(data.train_transform(PRE), crops)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    views = joined(image, np.random.default_rng(3))
    assert joined.finish is not None
    finished = joined.finish(tuple(view[None] for view in views))
    rng = np.random.default_rng(3)
    (alone,) = data.train_transform(PRE)(image, rng)
    assert torch.equal(finished[0][0], alone)
    others = data.multicrop_transform(PRE, crops=(data.Crops(2, 16, (0.2, 1.0)),), on_device=False)(
        image, rng
    )
    assert len(finished) == 3
    assert all(torch.allclose(a[0], b, atol=1e-5) for a, b in zip(finished[1:], others, strict=True))


# ---- the loss


def backbone() -> Backbone:
    return load_backbone(
        BackboneConfig(name="open_clip:ViT-B-32", pretrained=False, kwargs=KWARGS, image_size=16)
    )


def build(name: str, found: Backbone, context: Context, text: Text) -> Clip:
    assert found.text is not None
    assert found.logit_scale is not None
    text_config = ClipConfig(text=text)
    if name == "clip":
        objective = Clip(found.text, found.logit_scale, text_config, context)
    else:
        config = SlipConfig(weight=0.5, dim=5, hidden=8)
        objective = Slip(16, found.text, found.logit_scale, config, context, text_config=text_config)
    return objective.double()


def batch_of(name: str, step: int, rank: int = 0, size: int = 1) -> Batch:
    count = ROWS if step != 1 else ROWS - 1  # a ragged batch: one rank pads
    generator = torch.Generator().manual_seed(step)
    views = torch.randn(
        3 if name == "slip" else 1, count, 3, 16, 16, generator=generator, dtype=torch.float64
    )
    places = torch.arange(rank, size * -(-count // size), size)
    return Batch(
        tuple(view[places % count] for view in views),
        torch.full((len(places),), -1),
        (places < count).float(),
        places,
        count,
        captions=tuple(WORDS[i % count] for i in places.tolist()),
    )


def plain_loss(images: Tensor, texts: Tensor, scale: float) -> Tensor:
    total = torch.zeros(())
    for i in range(len(images)):
        similar = [scale * images[i] @ t / images[i].norm() / t.norm() for t in texts]
        total = total - similar[i] + torch.stack(similar).exp().sum().log()
        similar = [scale * texts[i] @ u / texts[i].norm() / u.norm() for u in images]
        total = total - similar[i] + torch.stack(similar).exp().sum().log()
    return total / (2 * len(images))


@pytest.mark.parametrize("text", ["frozen", "trained"])
def test_clips_loss_and_gradients_are_those_of_the_formula(text: Text) -> None:
    found = backbone()
    encoder = found.encoder.double().requires_grad_(True)
    objective, batch = build("clip", found, Context(0, 1, ROWS), text), batch_of("clip", 0)
    loss, metrics = objective(encoder, batch)
    loss.backward()
    assert objective.training
    images = encoder(batch.views[0])
    texts = objective.text(objective.tokenize(list(batch.captions)))
    scale = found.logit_scale or 0.0
    assert scale == pytest.approx(1 / 0.07)
    expected = plain_loss(images, texts, scale)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # the scale is float32
    weight = encoder.get_parameter("transformer.resblocks.0.attn.in_proj_weight")
    (grad,) = torch.autograd.grad(expected, [weight], retain_graph=True)
    assert weight.grad is not None
    assert torch.allclose(weight.grad, grad, rtol=1e-5, atol=1e-9)
    heads = objective.head_parameters()
    assert bool(heads) == (text == "trained")
    assert all(parameter.grad is not None for parameter in heads)
    if text == "trained":
        embedding = objective.text.get_parameter("clip.token_embedding.weight")
        (grad,) = torch.autograd.grad(expected, [embedding])
        assert embedding.grad is not None
        assert torch.allclose(embedding.grad, grad, rtol=1e-5, atol=1e-9)
    assert set(objective.kept_state()) == ({"log_scale"} | texts_of(objective) if heads else set())
    assert 0 <= metrics["agreement"] <= 1


def texts_of(objective: Clip) -> set[str]:
    return {f"text.{name}" for name in objective.text.state_dict()}


def test_slip_is_clip_plus_simclr() -> None:
    found = backbone()
    encoder = found.encoder.double()
    objective, batch = build("slip", found, Context(0, 1, ROWS), "frozen"), batch_of("slip", 0)
    loss, metrics = objective(encoder, batch)
    assert found.logit_scale is not None
    texts = objective.text(objective.tokenize(list(batch.captions)))
    clip = plain_loss(encoder(batch.views[0]), texts, found.logit_scale)
    z = torch.stack([encoder(view) for view in batch.views[1:]])
    own = dict(objective.named_parameters())
    for index in range(3):
        z = z @ own[f"projector.layers.{index}.weight"].T
        if index < 2:
            z = (z - z.mean(1, keepdim=True)) / (z.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            z = z * own[f"projector.norms.{index}.weight"] + own[f"projector.norms.{index}.bias"]
            z = z.relu()
    z = (z / z.norm(dim=2, keepdim=True)).flatten(0, 1)
    similar = (z @ z.T / 0.1).exp().fill_diagonal_(0)
    positive = similar[torch.arange(12), (torch.arange(12) + ROWS) % 12]
    simclr = -(positive / similar.sum(1)).log().mean()
    assert metrics["clip"].item() == pytest.approx(clip.item(), rel=1e-6)
    assert metrics["simclr"].item() == pytest.approx(simclr.item(), rel=1e-9)
    assert loss.item() == pytest.approx(clip.item() + 0.5 * simclr.item(), rel=1e-6)
    flat = metrics | {"clip": torch.tensor(np.log(ROWS))}
    said = [objective.remarks({key: float(value) for key, value in flat.items()}) for _ in range(3)]
    assert "CLIP learns nothing" in said[2][0]


def test_rows_without_weight_change_nothing() -> None:
    found = backbone()
    encoder = found.encoder.double()
    for name in ("clip", "slip"):
        objective, batch = build(name, found, Context(0, 1, 8), "frozen"), batch_of(name, 0)
        views = tuple(torch.cat([view, 9 * torch.ones(2, 3, 16, 16)]) for view in batch.views)
        weights = torch.tensor([1.0] * ROWS + [0.0] * 2)
        captions = (*batch.captions, "", "odd")
        more = Batch(views, torch.zeros(8), weights, torch.arange(8), ROWS, captions=captions)
        assert objective(encoder, more)[0].item() == pytest.approx(
            objective(encoder, batch)[0].item(), rel=1e-9
        )


def test_a_backbone_without_text_is_refused() -> None:
    vit = load_backbone(BackboneConfig(name="timm:test_vit", pretrained=False))
    for name in ("clip", "slip"):
        of_clip = "backbone.name=open_clip:ViT-B-32/openai"
        config = load_config(None, [f"objective.name={name}", of_clip, "crops.local_count=0"])
        with pytest.raises(ValueError, match=rf"objective\.name={name} needs a text tower"):
            build_objective(config, backbone=vit, classes=())
    with pytest.raises(ConfigError, match="use a backbone open_clip"):
        load_config(None, ["objective.name=clip"])


# ---- many ranks, all engines

CASES = [("clip", "ddp"), ("clip", "fsdp"), ("clip", "bits"), ("slip", "fsdp")]


def run_steps(name: str, kind: str) -> tuple[list[float], EngineState]:
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    world = World(rank, size)
    found = backbone()
    context = Context(rank, size, ROWS, world.sum, world.sum_with_gradient)
    objective = build(name, found, context, "trained" if name == "clip" else "frozen")
    engine = build_engine(
        TrainStep(found.encoder.double(), objective, batchnorm="frozen"),
        encoder=found.encoder,
        blocks=found.spec.blocks,
        world=world,
        config=EngineConfig.model_validate({"name": kind}),
    )
    masks = engine.attach(found.encoder, attach, include="vit")
    groups = [
        {"name": "scores", "params": list(masks.parameters()), "lr": 100.0},
        {"name": "head", "params": objective.head_parameters(), "lr": 0.01},
    ]
    engine.start(torch.optim.SGD(groups, momentum=0.9))
    losses = []
    for step in range(STEPS):
        metrics = engine.forward_backward(batch_of(name, step, rank, size))
        losses.append(world.sum(metrics["loss"].clone()).item())
        engine.step()
    return losses, engine.state()


def run_cases() -> list[Any]:
    return [run_steps(*case) for case in CASES]


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_two_ranks_and_all_engines_compute_what_one_process_does() -> None:
    alone = {name: run_steps(name, "ddp") for name in ("clip", "slip")}
    for (name, kind), (losses, state) in zip(
        CASES, run_distributed(run_cases, 2, timeout=120)[0], strict=True
    ):
        expected_losses, expected = alone[name]
        assert losses == pytest.approx(expected_losses, rel=1e-9), (name, kind)
        assert set(state.parameters) == set(expected.parameters)
        for key, tensor in expected.parameters.items():
            torch.testing.assert_close(state.parameters[key], tensor, rtol=1e-6, atol=1e-8)
    trained = alone["clip"][1].parameters
    assert "objective.text.clip.token_embedding.weight" in trained
    assert "objective.log_scale" in trained
    assert any((scores <= 0).any() for key, scores in trained.items() if key.startswith("encoder."))


# ---- whole runs


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("clip", ["clip.text=trained"]),
        ("slip", ["slip.dim=8", "slip.hidden=16", "crops.local_count=0", "crops.blur=0"]),
    ],
)
def test_a_run_on_image_text_shards_needs_no_labels_and_goes_on_bit_for_bit(
    tmp_path: Path, name: str, more: list[str]
) -> None:
    folder = str(image_text(tmp_path / "pairs"))
    path = write_config(
        tmp_path / "tiny.yaml",
        {"train": folder, "test": folder},
        backbone={"name": "open_clip:ViT-B-32", "pretrained": False, "image_size": 16, "kwargs": KWARGS},
        objective={"name": name},
        optim={"score_lr": 50.0, "head_lr": 0.05},
        eval={"final": False},
    )
    text = path.read_text().replace("  crop_pct: 1.0\n", "")
    path.write_text(text)
    check_resumed_equals_whole(path, ["run.name=a", "train.epochs=3", *more], tmp_path / "a", step=2)
    assert len(losses_of(tmp_path / "a")) == 6
    state, head = last_state(tmp_path / "a"), tmp_path / "a" / "head.safetensors"
    if name == "clip":
        saved = load_file(head)
        key = "text.clip.token_embedding.weight"
        assert torch.equal(saved[key], state[f"parameters/objective.{key}"])
    else:
        assert not head.exists()
        assert not any("objective.text" in key for key in state), "a frozen tower is not saved"
    result = train(path, ["run.name=b", *more, "eval.final=true", "train.max_steps=1"])
    assert "retrieval" in result, "what can be measured without labels is"
    assert not {"knn5", "probe"} & set(result["adapted"])
