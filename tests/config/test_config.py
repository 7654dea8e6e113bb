"""Configuration: precedence, round trips, help, and every kind of mistake with its place and way out."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML

from selfmask_dist.config import Config, ConfigError, describe, load_config, to_yaml
from selfmask_dist.config import help as config_help
from selfmask_dist.config import yaml as config_yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
FIELDS = dict(config_help.fields(Config))


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "some.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def error_of(path: Path | None = None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# ---- what wins


def test_defaults_alone() -> None:
    assert load_config() == Config()
    assert load_config().optim.score_lr == 50.0


def test_overrides_win_over_the_file_and_the_file_over_defaults(write) -> None:
    path = write("seed: 3\noptim:\n  score_lr: 10\n  head_lr: 0.3\n")
    config = load_config(path, ["optim.score_lr=20", "train.epochs=2", "train.epochs=4"])
    assert (config.seed, config.optim.score_lr, config.optim.head_lr) == (3, 20.0, 0.3)
    assert config.train.epochs == 4.0  # the later override
    assert config.optim.momentum == Config().optim.momentum


def test_an_override_replaces_a_list_and_merges_a_section(write) -> None:
    path = write("eval: {knn_k: [5, 10], probe: false}\n")
    config = load_config(path, ["eval={knn_k: [7]}"])
    assert config.eval.knn_k == (7,)
    assert not config.eval.probe


def test_mappings_take_deeper_keys_and_are_replaced_whole(write) -> None:
    path = write("backbone:\n  kwargs: {a: 1, b: {c: 2}}\n")
    assert load_config(path, ["backbone.kwargs.b.d=[3, x]"]).backbone.kwargs == {
        "a": 1,
        "b": {"c": 2, "d": [3, "x"]},
    }
    assert load_config(path, ["backbone.kwargs={e: null}"]).backbone.kwargs == {"e": None}


@pytest.mark.parametrize(
    "text", ["", "\n\n", "# only a comment\n", "---\n", "optim:\n  # all keys commented out\nmask:\n"]
)
def test_a_file_without_values_gives_the_defaults(write, text: str) -> None:
    assert load_config(write(text)) == Config()


def test_anchors_and_byte_order_marks_are_read(write) -> None:
    path = write("\ufeffdata: {train: &folder shards, test: *folder}\n")
    assert load_config(path).data.test == "shards"


# ---- values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E3", 1e3),
        ("1.5e+2", 150.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("7", 7.0),
        ("+3", 3.0),
        ("1_000", 1e3),
    ],
)
def test_numbers_in_every_notation(write, text: str, value: float) -> None:
    assert load_config(write(f"optim: {{score_lr: {text}}}")).optim.score_lr == value
    assert load_config(None, [f"optim.score_lr={text}"]).optim.score_lr == value
    assert isinstance(load_config(None, [f"optim.score_lr={text}"]).optim.score_lr, float)


@pytest.mark.parametrize(
    "text", ["off", "no", "yes", "010", "2024-01-01", "1:30", "0x1F", "<<", "=", "1e", "v1.0.0", "x=y"]
)
def test_text_that_yaml_1_1_would_turn_into_something_else_stays_text(text: str) -> None:
    assert load_config(None, [f"run.name={text}"]).run.name == text


def test_off_is_a_choice_and_not_false() -> None:
    assert load_config(None, ["run.wandb=off"]).run.wandb == "off"


@pytest.mark.parametrize(
    "override",
    [
        "optim.score_lr=true",
        "seed=true",
        "run.progress=1",
        'seed="3"',
        "seed=3.0",
        'optim.score_lr="3"',
        "eval.knn_k=[true]",
    ],
)
def test_no_value_is_converted_to_another_type(override: str) -> None:
    key = override.partition("=")[0]
    assert error_of(None, override).startswith(f"override {override!r}: {key}: got ")


def test_a_list_is_kept_as_a_tuple() -> None:
    config = load_config(None, ["mask.include=[a, b]", "data.crop_scale=[0.5, 1]"])
    assert config.mask.include == ("a", "b")
    assert config.data.crop_scale == (0.5, 1.0)


# ---- frozen


def test_a_config_cannot_be_changed() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.score_lr = 1.0


def test_two_configs_share_no_mutable_value() -> None:
    assert Config().backbone.kwargs is not Config().backbone.kwargs


def test_a_config_built_in_python_is_checked_too() -> None:
    with pytest.raises(ValidationError, match="extra"):
        Config.model_validate({"optim": {"lrr": 1}})
    with pytest.raises(ValueError, match="warmup_epochs"):
        Config.model_validate({"optim": {"warmup_epochs": 11.0}})


def test_a_config_survives_pickling() -> None:
    config = load_config(None, ["backbone.kwargs={a: [1]}", "seed=5"])
    assert pickle.loads(pickle.dumps(config)) == config


# ---- saved and loaded

STRINGS = [
    "1e-3",
    "off",
    "null",
    "~",
    "010",
    "12",
    "a: b",
    "#x",
    "*.bias",
    "é 名",
    " x ",
    "x\ny",
    "{}",
    "'",
    '"',
    "-",
    "true",
]
ROUND_TRIPS = [
    [],
    ["optim.score_lr=1e-7", "optim.clip_norm=1e20", "train.epochs=0.1", "seed=4294967295"],
    ["backbone.kwargs={a: 1e-3, b: '1e-3', c: {d: [1, null, [true, {e: off}]]}, 'off': x, '7': y}"],
    [
        "mask.include=[vit]",
        "mask.exclude=['*.bias', head]",
        "backbone.mean=[0.5, 0, 1]",
        "backbone.std=[1, 2, 3]",
    ],
    *(
        [f"run.wandb_project={config_yaml.flow(text)}", f"mask.exclude=[{config_yaml.flow(text)}]"]
        for text in STRINGS
    ),
]


@pytest.mark.parametrize("overrides", ROUND_TRIPS, ids=lambda overrides: " ".join(overrides)[:40])
def test_a_saved_config_loads_as_itself(write, overrides: list[str]) -> None:
    config = load_config(None, overrides)
    text = to_yaml(config)
    assert load_config(write(text)) == config
    assert to_yaml(load_config(write(text))) == text
    assert text.isascii()  # whatever encoding it is written in


@pytest.mark.parametrize("text", STRINGS)
def test_strings_arrive_unchanged(text: str) -> None:
    assert load_config(None, [f"run.wandb_project={config_yaml.flow(text)}"]).run.wandb_project == text


@pytest.mark.parametrize("version", [(1, 1), (1, 2)])
def test_a_saved_config_holds_every_key_for_any_yaml_reader(version: tuple[int, int]) -> None:
    reader = YAML(typ="safe", pure=True)
    reader.version = version
    saved = reader.load(to_yaml(load_config(None, ["run.wandb=off", "run.name=no"])))
    held = {f"{name}.{key}" for name, value in saved.items() if isinstance(value, dict) for key in value}
    assert {*held, *(name for name, value in saved.items() if not isinstance(value, dict))} == set(FIELDS)
    assert (saved["run"]["wandb"], saved["run"]["name"]) == ("off", "no")


def test_a_saved_config_names_the_groups() -> None:
    lines = to_yaml(Config()).splitlines()
    assert lines[lines.index("  accumulate: 1") - 1] == "  # efficiency"
    assert lines[lines.index("  epochs: 10.0") - 1] == "  # science"


# ---- mistakes: place, key, what was given, what is expected


def test_an_unknown_key_names_file_line_and_the_nearest_keys(write) -> None:
    path = write("seed: 1\n\noptim:\n  momentum: 0.9\n  scor_lr: 3\n")
    expected = "unknown key optim.scor_lr; did you mean optim.score_lr or optim.score_reach?"
    assert error_of(path) == f"{path}:5: {expected}"


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optim.lrr", "optim.score_lr, optim.score_lr_choices, optim.weight_lr or optim.head_lr"),
        ("lr", "optim.score_lr, optim.score_lr_choices, optim.weight_lr or optim.head_lr"),
        # the right name in the wrong section
        ("train.score_lr", "optim.score_lr, optim.score_reach, optim.score_step or optim.score_lr_choices"),
        ("batch_size", "eval.batch_size or train.global_batch_size"),
        ("optimizer", "optim"),
        ("sed", "seed"),
        ("optim.warmup", "optim.warmup_epochs, nbd.warmup_steps, nbd.warmup_rate or nbd.warmup_batch"),
        ("engine.num_workers", "engine.workers or engine.worker_kind"),
    ],
)
def test_nearest_keys(key: str, nearest: str) -> None:
    assert error_of(None, f"{key}=3") == f"override '{key}=3': unknown key {key}; did you mean {nearest}?"


def test_a_key_like_no_other_lists_what_there_is() -> None:
    assert error_of(None, "mask.zebra=3").endswith(
        f"keys of mask are {', '.join(type(Config().mask).model_fields)}"
    )
    assert error_of(None, "zebra=3").endswith(f"keys and sections are {', '.join(Config.model_fields)}")


def test_dotted_keys_in_a_file_and_keys_below_values_are_explained(write) -> None:
    assert error_of(write("optim.score_lr: 3\n")).endswith("in a file write optim: {score_lr: ...}")
    assert error_of(None, "seed.x=3").endswith("unknown key seed.x; seed has no keys under it")
    assert "backbone.kwargs.a is 1, which holds no keys" in error_of(
        write("backbone: {kwargs: {a: 1}}"), "backbone.kwargs.a.b=2"
    )


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("optim:\n  score_lr: fast", '2: optim.score_lr: got "fast"; expected number > 0'),
        ("train:\n  global_batch_size: 0", "2: train.global_batch_size: got 0; expected integer >= 1"),
        ("train:\n  accumulate: 1.5", "2: train.accumulate: got 1.5; expected integer >= 1"),
        ("train:\n  max_steps: x", '2: train.max_steps: got "x"; expected integer >= 1 or null'),
        ("optim:\n  clip_norm: .inf", "2: optim.clip_norm: got Infinity; expected number > 0 or null"),
        ("optim:\n  momentum: 1", "2: optim.momentum: got 1; expected number >= 0 and < 1"),
        ("mask:\n  scale: on", '2: mask.scale: got "on"; expected through | detached | none'),
        ("run:\n  progress: yes", '2: run.progress: got "yes"; expected true | false'),
        ("run:\n  name: 12", "2: run.name: got 12; expected non-empty string; quotes make a string of it"),
        ("run:\n  name: ''", '2: run.name: got ""; expected non-empty string'),
        ("eval:\n  knn_k: 20", "2: eval.knn_k: got 20; expected non-empty list of integers >= 1"),
        ("eval:\n  knn_k: []", "2: eval.knn_k: got []; expected non-empty list of integers >= 1"),
        (
            "eval:\n  knn_k:\n  - 20\n  - x",
            '4: eval.knn_k: got [20, "x"]; expected non-empty list of integers >= 1',
        ),
        (
            "data:\n  crop_scale:\n    [1]",
            "2: data.crop_scale: got [1]; expected list of 2 numbers > 0 and <= 1",
        ),
        (
            "mask:\n  include: [3]",
            "2: mask.include: got [3]; expected non-empty string or non-empty list of strings",
        ),
        ("backbone:\n  kwargs: 3", "2: backbone.kwargs: got 3; expected mapping of plain values"),
        (
            "seed: 1\ntrain: 3",
            "2: train: got 3; expected keys under it: epochs, global_batch_size, max_steps, keep, keep_by, "
            "validation, patience, ema, accumulate",
        ),
    ],
)
def test_a_wrong_value_names_line_value_and_what_is_expected(write, section: str, message: str) -> None:
    path = write(section + "\n")
    assert error_of(path) == f"{path}:{message}"


def test_a_wrong_override_is_quoted() -> None:
    assert error_of(None, "method=maks") == (
        "override 'method=maks': method: got \"maks\"; expected mask | cascade | finetune | probe | frozen | "
        "packnet | lottery | evolution | supsup | wise_ft | rebasin | ensemble"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.score_lr", "expected key=value"),
        ("=3", "expected key=value"),
        ("optim.=3", "expected key=value"),
        ("run.name=", "run.name: got null"),
        ("optim=", "optim: got null; expected keys under it"),
        ("eval.knn_k=[1", "cannot be read as YAML"),
        ("mask.exclude=*.bias", "needs quotes"),
        ("mask.exclude=*", "needs quotes"),
        ("run.name=@x", "needs quotes"),
    ],
)
def test_malformed_overrides(override: str, message: str) -> None:
    error = error_of(None, override)
    assert error.startswith(f"override {override!r}: ")
    assert message in error


def test_all_problems_are_reported_together_in_the_order_of_reading(write) -> None:
    path = write("optim:\n  scor_lr: 3\n  momentum: x\nseed: -1\noptim:\n  head_lr: 1\n")
    lines = error_of(path, "method=maks", "optim.lrr=3").splitlines()
    assert lines[0] == "6 problems in the configuration:"
    assert [line.strip().split(": ")[0] for line in lines[1:]] == [
        *(f"{path}:{line}" for line in (2, 3, 4, 5)),
        "override 'method=maks'",
        "override 'optim.lrr=3'",
    ]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("seed: 1\nmethod: mask\nseed: 2\n", 3, "seed is given twice, first in line 1"),
        ("optim:\n  score_lr: 1\n  score_lr: 1\n", 3, "optim.score_lr is given twice, first in line 2"),
        (
            "backbone:\n  kwargs:\n    a: 1\n    a: 2\n",
            4,
            "backbone.kwargs.a is given twice, first in line 3",
        ),
        ("seed: 1\noptim: [1\n", 3, "cannot be read as YAML"),
        ("seed: 1\nmask: {exclude: *x}\n", 2, "needs quotes"),
        ("seed: 1\n---\nseed: 2\n", 2, "cannot be read as YAML"),
        ("seed: 1\nrun: {name: !!python/object/apply:os.getcwd []}\n", 2, "tag"),
        ("seed: 1\nrun: {name: !!binary aGk=}\n", 2, "tag"),
        ("seed: !!int x\n", 1, "cannot be read as YAML"),
        ("seed: 1\n3: x\n", 2, "the key 3 is not text"),
        ("backbone:\n  kwargs: &a\n    b: *a\n", 2, "contains itself"),
        ("seed: \x00\n", 1, "cannot be read as YAML"),
        ("\n- seed\n", 2, "expected keys and values"),
        ("\nseed\n", 2, "expected keys and values"),
    ],
)
def test_files_that_are_not_a_configuration(write, text: str, line: int, message: str) -> None:
    path = write(text)
    error = error_of(path)
    assert error.startswith(f"{path}:{line}: ")
    assert message in error


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = error_of(tmp_path / "none.yaml")
    assert missing.startswith(f"{tmp_path}/none.yaml: cannot read the configuration: no such file, and none")
    assert "cannot read" in error_of(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("run: {name: é}".encode("latin-1"))
    assert "UTF-8" in error_of(tmp_path / "latin.yaml")


CONFLICTS = [
    (["backbone.name=resnet18"], "neither timm:<model> nor open_clip:<model>"),
    (["backbone.name='timm:'"], "neither timm:<model> nor open_clip:<model>"),
    (["backbone.name=open_clip:ViT-B-32"], "open_clip:ViT-B-32/<tag>"),
    (["backbone.mean=[0, 0, 0]"], "set both or neither"),
    (["objective.head=clip_text"], "needs CLIP's text tower"),
    (["objective.head=masked", "method=finetune"], "set objective.head=linear"),
    (["objective.prompts=['a photo of a {}.', a photo]"], "'a photo' has no {}"),
    (["mask.init=0.5", "mask.threshold=0.5"], "every weight starts pruned"),
    (
        ["optim.warmup_epochs=40", "train.epochs=20"],
        "optim.warmup_epochs (40) is longer than train.epochs (20)",
    ),
    (["train.accumulate=65"], "train.global_batch_size is 64"),
    (["data.crop_scale=[1, 0.2]"], "[0.2, 1]"),
    (["optim.score_step=rms", "optim.score_lr=50"], "optim.score_lr=50 is a rate of plain steps"),
]


@pytest.mark.parametrize(("overrides", "message"), CONFLICTS, ids=lambda value: str(value)[:40])
def test_values_that_do_not_go_together(overrides: list[str], message: str) -> None:
    error = error_of(None, *overrides)
    assert error.startswith(", ".join(f"override {override!r}" for override in overrides) + ": ")
    assert message in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["optim.kind=adamw"], "AdamW gives each element's one of its own"),
        (
            ["engine.name=deepspeed", "optim.clip_norm=1"],
            "engine.name=deepspeed clips all gradients together",
        ),
        (["mask.init=0.01"], "they start 0.01 from the threshold"),
        (["mask.init=0.02"], ""),
        (["mask.family=edge_popup", "mask.init=normal", "mask.scale=detached"], ""),
    ],
)
def test_what_score_steps_of_one_size_do_not_go_with(more: list[str], message: str) -> None:
    common = ["optim.score_step=rms", "optim.score_lr=0.01"]
    if message:
        assert message in error_of(None, *common, *more)
    else:
        load_config(None, [*common, *more])


def test_a_conflict_names_every_place_it_comes_from(write) -> None:
    path = write("optim:\n  warmup_epochs: 40\n")
    assert error_of(path, "train.epochs=2").startswith(
        f"{path}:2, override 'train.epochs=2': optim.warmup_epochs (40)"
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ["backbone.name=open_clip:ViT-B-32/openai", "objective.head=clip_text"],
        ["backbone.name=open_clip:ViT-B-32", "backbone.pretrained=false"],
        ["backbone.name=open_clip:ViT-B-32", "backbone.weights=clip.safetensors"],
        ["backbone.name=open_clip:hf-hub:some/model"],
        ["optim.warmup_epochs=10"],
        ["method=mask", "objective.head=masked"],
        ["mask.init=0", "mask.threshold=-1"],
        ["optim.score_step=rms", "optim.score_lr=0.01"],
        ["optim.score_step=rms", "optim.score_lr=3", "mask.init=1000"],
        ["optim.score_step=rms", "optim.kind=adamw", "method=finetune"],
    ],
)
def test_values_that_do_go_together(overrides: list[str]) -> None:
    load_config(None, overrides)


# ---- help


def test_every_field_says_its_group_and_effect() -> None:
    for name, info in FIELDS.items():
        assert config_help.extra(info, "group") in config_help.GROUPS, name
        assert info.description, name
        assert info.description.endswith((".", "...")), name
        is_number = any(word in config_help.expected(info) for word in ("number", "integer"))
        assert not is_number or config_help.extra(info, "unit") or name == "seed", name


def test_help_explains_every_key_once_under_its_group() -> None:
    text = describe(100)
    positions = [text.index(f"\n{group}: ") for group in config_help.GROUPS]
    assert positions == sorted(positions)
    for name, info in FIELDS.items():
        entry = f"\n  {name}: {config_help.expected(info).split()[0]}"
        assert text.count(f"\n  {name}: ") == 1, name
        group = list(config_help.GROUPS).index(config_help.extra(info, "group"))
        assert positions[group] < text.index(entry), name
        assert group == len(positions) - 1 or text.index(entry) < positions[group + 1], name


@pytest.mark.parametrize("width", [72, 100])
def test_help_fits_its_width_and_loses_no_word(width: int) -> None:
    text = describe(width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    for info in FIELDS.values():
        assert info.description is not None
        assert " ".join(info.description.split()) in words


def test_help_shows_choices_defaults_and_units() -> None:
    words = " ".join(describe(100).split())
    assert "mask.scale: through | detached | none; default: through" in words
    assert "train.max_steps: integer >= 1 or null; default: null; unit: steps" in words
    assert "eval.knn_k: non-empty list of integers >= 1; default: [20, 200]; unit: neighbours" in words


def test_help_takes_the_width_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    assert describe() == describe(72)
    monkeypatch.setenv("COLUMNS", "300")
    assert describe() == describe(100)


# ---- what ships


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_published_configs_load_and_say_how_to_run_them(path: Path) -> None:
    config = load_config(path)
    assert load_config(path, ["method=frozen"]).method == "frozen"  # baselines by one key
    assert load_config(path, ["method=probe"]).method == "probe"
    assert load_config(path, ["method=finetune"]).method == "finetune"
    assert config.run.name == path.stem
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("command", "hardware", "expected"):
        assert any(line.startswith(f"# {word} ") for line in head), word
    assert f"--config {path.relative_to(ROOT)}" in path.read_text()


def test_there_are_published_configs() -> None:
    assert {"supervised_rn18.yaml", "supervised_vitb32_clip.yaml"} <= {path.name for path in CONFIGS}


def test_the_papers_values_are_in_the_published_configs() -> None:
    resnet = load_config(ROOT / "configs" / "supervised_rn18.yaml")
    assert (resnet.optim.score_lr, resnet.train.epochs, resnet.optim.warmup_epochs) == (50.0, 150.0, 40.0)
    assert resnet.train.global_batch_size == 64
    clip = load_config(ROOT / "configs" / "supervised_vitb32_clip.yaml")
    assert (clip.optim.score_lr, clip.train.epochs, clip.optim.warmup_epochs) == (10.0, 32.0, 0.0)
    assert (clip.objective.head, clip.mask.include, clip.mask.split_qkv) == ("clip_text", "vit", True)


def test_the_configuration_is_read_without_torch() -> None:
    code = (
        "import sys, selfmask_dist.config as config; config.load_config(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
