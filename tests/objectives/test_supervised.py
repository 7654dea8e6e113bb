"""The supervised objective: its loss by hand, its parts on ranks, its heads, and labels it cannot use."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfmask_dist.backbones import Backbone, BackboneSpec, load_backbone
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.common.seeding import named_generator
from selfmask_dist.config import Config, load_config
from selfmask_dist.config.backbone import BackboneConfig
from selfmask_dist.config.objectives import ObjectiveConfig
from selfmask_dist.data import Batch, Mixed
from selfmask_dist.objectives import Supervised, build_objective
from selfmask_dist.objectives.supervised import L2_LENGTH, FeatureBatchNorm

DIM, NUM_CLASSES, ROWS = 12, 5, 8
HEADS = ("linear", "masked", "clip_text")


class Encoder(nn.Module):
    """Pixels to features, with one trainable weight per feature, so that gradients can be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 2, DIM, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) * self.gain


@pytest.fixture
def batch(generator: torch.Generator) -> Batch:
    return Batch(
        views=(torch.randn(ROWS, 3, 2, 2, generator=generator, dtype=torch.float64),),
        labels=torch.randint(NUM_CLASSES, (ROWS,), generator=generator),
        weights=torch.ones(ROWS),
        ids=torch.arange(ROWS) + 100,
        global_count=ROWS,
    )


def rows_of(batch: Batch, rows: slice) -> Batch:
    """A rank's part of a global batch."""
    return Batch(
        (batch.views[0][rows],), batch.labels[rows], batch.weights[rows], batch.ids[rows], batch.global_count
    )


def supervised(head: Any = "linear", *, seed: int = 0, **keys: Any) -> Supervised:
    config = ObjectiveConfig(head=head, **keys)
    if head == "clip_text":
        text = F.normalize(torch.randn(NUM_CLASSES, DIM, generator=named_generator(1, "text")), dim=1)
        return Supervised(DIM, NUM_CLASSES, config, text_embeddings=text, logit_scale=20.0).double()
    return Supervised(DIM, NUM_CLASSES, config, seed=seed).double()


def logits_by_hand(objective: Supervised, features: Tensor, head_norm: str) -> Tensor:
    length = features.square().sum(dim=1, keepdim=True).sqrt()
    if objective.head is None:
        return 20.0 * (features / length) @ objective.text_embeddings.T
    if head_norm == "l2":
        features = 8.0 * features / length
    bias = 0 if objective.head.bias is None else objective.head.bias
    return features @ objective.head.weight.T + bias


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(
    ("head", "head_norm"), [("linear", "none"), ("linear", "l2"), ("masked", "l2"), ("clip_text", "l2")]
)
def test_loss_and_metrics_equal_the_hand_formula(
    batch: Batch, head: str, head_norm: str, smoothing: float
) -> None:
    objective, encoder = supervised(head, head_norm=head_norm, label_smoothing=smoothing), Encoder()
    batch.weights[2] = 0.0
    batch.global_count = 20
    loss, metrics = objective(encoder, batch)
    logits = logits_by_hand(objective, encoder(batch.views[0]), head_norm)
    log_probabilities = logits - logits.exp().sum(dim=1, keepdim=True).log()
    target = torch.full((ROWS, NUM_CLASSES), smoothing / NUM_CLASSES, dtype=torch.float64)
    target[torch.arange(ROWS), batch.labels] += 1 - smoothing
    per_row = -(target * log_probabilities).sum(dim=1)
    expected = sum(per_row[i] for i in range(ROWS) if i != 2) / 20
    torch.testing.assert_close(loss, expected)
    right = sum(int(logits[i].argmax() == batch.labels[i]) for i in range(ROWS) if i != 2)
    assert metrics["accuracy"].item() == pytest.approx(right / 20)
    assert metrics.keys() == {"loss", "accuracy"}
    assert torch.equal(metrics["loss"], loss)
    assert not any(value.requires_grad for value in metrics.values())
    torch.testing.assert_close(objective.predict(encoder, batch.views[0]), logits)


@pytest.mark.parametrize("head", HEADS)
def test_parts_of_a_batch_sum_to_the_whole(batch: Batch, head: str) -> None:
    objective, encoder = supervised(head), Encoder()

    def values(parts: list[Batch]) -> list[Tensor]:
        encoder.zero_grad()
        objective.zero_grad()
        totals = [torch.zeros((), dtype=torch.float64) for _ in range(3)]
        for part in parts:
            loss, metrics = objective(encoder, part)
            loss.backward()
            totals = [a + b for a, b in zip(totals, (loss.detach(), *metrics.values()), strict=True)]
        gradients = [
            p.grad.clone() for p in (encoder.gain, *objective.head_parameters()) if p.grad is not None
        ]
        assert len(gradients) == (3 if head == "linear" else 1)
        return totals + gradients

    whole = values([batch])
    parts = values([rows_of(batch, slice(0, 5)), rows_of(batch, slice(5, 6)), rows_of(batch, slice(6, None))])
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("head_norm", ["none", "l2", "batchnorm"])
def test_padding_has_no_influence(batch: Batch, head_norm: str) -> None:
    def values(used: Batch) -> tuple[Tensor, ...]:
        objective, encoder = supervised(head_norm=head_norm), Encoder()
        loss, metrics = objective(encoder, used)
        loss.backward()
        assert encoder.gain.grad is not None
        return loss, metrics["accuracy"], encoder.gain.grad, *(p.grad for p in objective.head_parameters())

    padded = Batch(
        views=(torch.cat([batch.views[0], 100 * torch.ones(3, 3, 2, 2, dtype=torch.float64)]),),
        labels=torch.cat([batch.labels, torch.tensor([0, -1, 10**6])]),
        weights=torch.cat([batch.weights, torch.zeros(3)]),
        ids=torch.cat([batch.ids, torch.tensor([1, 2, 3])]),
        global_count=ROWS,
    )
    for one, other in zip(values(batch), values(padded), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("head_norm", ["none", "l2", "batchnorm"])
def test_a_rank_with_nothing_but_padding_adds_zero(batch: Batch, head_norm: str) -> None:
    batch.weights.zero_()
    objective, encoder = supervised(head_norm=head_norm), Encoder()
    loss, metrics = objective(encoder, batch)
    loss.backward()
    assert loss.item() == metrics["accuracy"].item() == 0
    assert encoder.gain.grad is not None
    assert not encoder.gain.grad.any()
    if objective.norm is not None:
        assert not objective.norm.running_mean.any()
        assert bool((objective.norm.running_var == 1).all())


@pytest.mark.parametrize(("label", "named"), [(-1, r"103 \(label -1\)"), (NUM_CLASSES, r"103 \(label 5\)")])
def test_a_label_outside_the_classes_is_an_error(batch: Batch, label: int, named: str) -> None:
    batch.labels[3] = label
    with pytest.raises(ValueError, match=f"needs labels 0 to 4 .*1 samples .*sample {named}"):
        supervised()(Encoder(), batch)


# ---- heads


def test_only_a_linear_head_has_parameters_to_train() -> None:
    linear, masked, clip_text = (supervised(head) for head in HEADS)
    assert linear.head_parameters() == list(linear.parameters())
    assert [name for name, _ in linear.named_parameters()] == ["head.weight", "head.bias"]
    assert all(p.requires_grad for p in linear.parameters())
    assert masked.head_parameters() == clip_text.head_parameters() == []
    assert [(name, p.requires_grad) for name, p in masked.named_parameters()] == [("head.weight", False)]
    assert list(clip_text.parameters()) == []
    assert clip_text.state_dict() == {}


def test_heads_follow_the_seed_and_leave_the_global_generator() -> None:
    before = torch.get_rng_state()
    for head in ("linear", "masked"):
        first, again, other = (supervised(head, seed=seed).state_dict()["head.weight"] for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_first_logits_have_the_size_their_head_needs(generator: torch.Generator) -> None:
    features = torch.randn(500, 256, generator=generator)
    linear, masked = (
        Supervised(256, 100, ObjectiveConfig.model_validate({"head": head})) for head in HEADS[:2]
    )
    identity = nn.Identity()
    loss = F.cross_entropy(
        linear.predict(identity, features), torch.randint(100, (500,), generator=generator)
    )
    assert loss.item() == pytest.approx(math.log(100), abs=0.02)
    assert masked.head is not None
    assert masked.head.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.02)


def test_a_masked_head_learns_by_a_mask_alone(batch: Batch) -> None:
    """What the objective leaves to whoever attaches masks: an ordinary layer named `head`."""
    from selfmask_dist.masking import attach

    objective, encoder = supervised("masked", head_norm="l2"), Encoder().requires_grad_(False)
    masks = attach(objective, include="head.*")
    optimizer = torch.optim.SGD(masks.parameters(), lr=5, momentum=0.9)
    masks.bind(optimizer)
    losses = []
    for _ in range(60):
        loss, _metrics = objective(encoder, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("dim", [16, 1024])
def test_the_l2_length_keeps_the_default_rate_stable_in_any_dimension(
    dim: int, generator: torch.Generator
) -> None:
    """Features that nearly agree, as a ViT's do, are the worst case: raw ones of norm 58 explode."""
    features = 58 * F.normalize(torch.ones(dim) + 0.3 * torch.randn(64, dim, generator=generator), dim=1)
    labels = torch.randint(2, (64,), generator=generator)
    batch = Batch((features,), labels, torch.ones(64), torch.arange(64), 64)

    def largest_loss(head_norm: Any) -> float:
        objective = Supervised(dim, 2, ObjectiveConfig(head_norm=head_norm))
        optimizer = torch.optim.SGD(objective.head_parameters(), lr=0.1, momentum=0.9)
        losses = []
        for _ in range(100):
            loss, _ = objective(nn.Identity(), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return max(losses)

    assert L2_LENGTH**2 / 2 * 0.1 < 2 * (1 + 0.9)
    assert largest_loss("l2") < 1
    assert largest_loss("none") > 5


def test_feature_batchnorm_is_torchs_where_no_row_is_padding(generator: torch.Generator) -> None:
    own, torchs = FeatureBatchNorm(DIM).double(), nn.BatchNorm1d(DIM, affine=False).double()
    for _ in range(3):
        x = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64).requires_grad_()
        y = x.detach().clone().requires_grad_()
        a, b = own(x, torch.ones(ROWS)), torchs(y)
        torch.testing.assert_close(a, b)
        a.square().sum().sin().backward()
        b.square().sum().sin().backward()
        torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(own.running_mean, torchs.running_mean)
    torch.testing.assert_close(own.running_var, torchs.running_var)
    torch.testing.assert_close(own.eval()(x), torchs.eval()(x))


def test_logits_are_float32_under_autocast(batch: Batch) -> None:
    objective = Supervised(DIM, NUM_CLASSES, ObjectiveConfig())
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(DIM, DIM))
    images = batch.views[0].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, logits = encoder(images), objective.predict(encoder, images)
    assert (features.dtype, logits.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(logits, objective.predict(nn.Identity(), features.float()))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"text_embeddings": None}, r"needs text embeddings of shape \(5, 12\); got None"),
        ({"text_embeddings": torch.zeros(5, 3)}, r"shape \(5, 12\); got \(5, 3\)"),
        ({"num_classes": 1}, "needs 2 classes or more; the data has 1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Supervised(
            DIM, **{"num_classes": NUM_CLASSES, "config": ObjectiveConfig(head="clip_text"), **arguments}
        )


# ---- building by name


def stub_backbone(**arguments: Any) -> Backbone:
    preprocessing = Preprocessing(32, (0.5,) * 3, (0.5,) * 3)
    return Backbone(nn.Identity(), BackboneSpec("timm:stub", DIM, (), preprocessing, "", 0), **arguments)


def of_head(head: str, *more: str) -> Config:
    return load_config(
        None, ["backbone.name=open_clip:ViT-B-32/openai", f"objective.head={head}", "seed=3", *more]
    )


def test_an_objective_is_built_from_the_configuration() -> None:
    objective = build_objective(of_head("masked"), backbone=stub_backbone(), classes=("a", "b", "c"))
    assert isinstance(objective, Supervised)
    assert objective.head is not None
    assert objective.head.weight.shape == (3, DIM)
    assert torch.equal(
        objective.head.weight,
        Supervised(DIM, 3, ObjectiveConfig(head="masked"), seed=3).get_parameter("head.weight"),
    )
    with pytest.raises(ValueError, match=r"clip_text needs a text tower.* timm:stub"):
        build_objective(of_head("clip_text"), backbone=stub_backbone(), classes=("a", "b"))


def test_clip_text_averages_the_prompts_of_a_class() -> None:
    calls: list[list[str]] = []

    def embed(prompts: list[str]) -> Tensor:
        calls.append(prompts)
        return F.normalize(
            torch.randn(len(prompts), DIM, generator=named_generator(len(calls), "text")), dim=1
        )

    backbone = stub_backbone(text_embeddings=embed, logit_scale=50.0)
    config = of_head("clip_text", "objective.prompts=['a photo of a {}.', '{} on a table']")
    objective = build_objective(config, backbone=backbone, classes=("red_pepper", "t-shirt"))
    assert calls == [
        ["a photo of a red pepper.", "a photo of a t-shirt."],
        ["red pepper on a table", "t-shirt on a table"],
    ]
    mean = (
        sum(F.normalize(torch.randn(2, DIM, generator=named_generator(i, "text")), dim=1) for i in (1, 2)) / 2
    )
    assert isinstance(mean, Tensor)
    expected = mean / mean.norm(dim=1, keepdim=True)
    features = torch.randn(4, DIM, generator=named_generator(0, "features"))
    logits = objective.predict(nn.Identity(), features)
    torch.testing.assert_close(logits, 50 * F.cosine_similarity(features[:, None], expected[None], dim=2))


def test_clip_text_is_clips_own_zero_shot_classifier(batch: Batch) -> None:
    kwargs: dict[str, Any] = {
        "embed_dim": DIM,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 1},
    }
    backbone = load_backbone(BackboneConfig(name="open_clip:ViT-B-32", pretrained=False, kwargs=kwargs))
    classes = tuple("abcde")
    objective = build_objective(of_head("clip_text"), backbone=backbone, classes=classes)
    images = torch.randn(ROWS, 3, 16, 16, generator=named_generator(0, "images"))
    assert backbone.text_embeddings is not None
    text = backbone.text_embeddings([f"a photo of a {name}." for name in classes])
    expected = F.normalize(backbone.encoder(images), dim=1) @ text.T / 0.07
    torch.testing.assert_close(objective.predict(backbone.encoder, images), expected)
    batch.views = (images,)
    loss, _ = objective(backbone.encoder, batch)
    torch.testing.assert_close(loss, F.cross_entropy(expected, batch.labels))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_mixed_pictures_have_the_mixed_target(batch: Batch, smoothing: float) -> None:
    objective, encoder = supervised(label_smoothing=smoothing), Encoder()
    others = (batch.labels + 1) % NUM_CLASSES
    shares = torch.linspace(0.1, 1, ROWS, dtype=torch.float64)
    batch.mixed = Mixed(others, shares)
    loss, metrics = objective(encoder, batch)
    one_hot = [F.one_hot(labels, NUM_CLASSES).double() for labels in (batch.labels, others)]
    target = shares[:, None] * one_hot[0] + (1 - shares[:, None]) * one_hot[1]
    logits = objective.predict(encoder, batch.views[0])
    wanted = F.cross_entropy(logits, target, label_smoothing=smoothing)
    torch.testing.assert_close(loss, wanted)
    right = (logits.argmax(dim=1) == batch.labels).double().mean()
    torch.testing.assert_close(metrics["accuracy"], right, check_dtype=False)
