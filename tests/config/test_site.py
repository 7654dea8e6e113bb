"""A site file: layers, names of data sets, weights, and where each value is said to come from."""

from pathlib import Path

import pytest

from selfmask_dist.cli import main
from selfmask_dist.config import Config, ConfigError, load_config
from selfmask_dist.config.config import load_with_places
from selfmask_dist.config.site import Site, find_site, read_site


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """A folder of data sets: `birds` in parts, `heap` of tars alone."""
    for part in ("birds/train", "birds/test", "heap"):
        (tmp_path / "sets" / part).mkdir(parents=True)
        (tmp_path / "sets" / part / "a.tar").touch()
    return tmp_path / "sets"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_site_stands_between_the_defaults_and_the_run(tmp_path: Path) -> None:
    site = read_site(write(tmp_path / "site.yaml", "launch: {partition: big, hours: 4}\nseed: 3\n"))
    path = write(tmp_path / "run.yaml", "launch:\n  hours: 8\n")
    config, places = load_with_places(path, ["train.epochs=2"], site=site)
    assert (config.launch.partition, config.launch.hours, config.seed) == ("big", 8, 3)
    assert places["launch.partition"] == f"{tmp_path}/site.yaml:1"
    assert places["launch.hours"] == f"{path}:2"
    assert places["train.epochs"] == "override 'train.epochs=2'"
    assert "launch.qos" not in places
    assert load_config(path).launch.partition is None, "a program that names no site has none"


def test_a_data_set_is_found_by_its_name(tmp_path: Path, sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = ["data.train=birds", "data.test=birds"]
    text = f"site: {{data_root: {sets}, data: {{photos: {sets}/heap, there: {sets}/birds}}}}"
    site = read_site(write(tmp_path / "site.yaml", text))

    def folders(overrides: list[str], site: Site | None) -> tuple[str | None, str | None]:
        data = load_config(None, overrides, site=site).data
        return data.train, data.test

    assert folders(named, site) == (f"{sets}/birds/train", f"{sets}/birds/test")
    assert folders(["data.train=there"], site)[0] == f"{sets}/birds/train"
    assert folders(["data.train=photos"], site)[0] == f"{sets}/heap", "which has no parts"
    assert folders(named, None) == ("birds", "birds")
    monkeypatch.setenv("SELFMASK_DATA", str(sets))
    assert folders(named, None) == (f"{sets}/birds/train", f"{sets}/birds/test")
    monkeypatch.chdir(sets)
    assert folders(named, None) == ("birds", "birds"), "a folder that is here is what is meant"


def test_weights_modules_and_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/big")
    text = "site:\n  weights: {timm:resnet18: $PLACE/r18.safetensors}\n"
    text += "  hub_cache: $PLACE/hub\n  modules: [cuda, gcc]\n"
    site = read_site(write(tmp_path / "site.yaml", text))
    config = load_config(None, ["backbone.name=timm:resnet18", "launch.setup=[date]"], site=site)
    assert config.backbone.weights == "/big/r18.safetensors"
    assert config.launch.environment == {"HF_HOME": "/big/hub"}
    assert config.launch.setup == ("module load cuda gcc", "date")
    assert load_config(None, ["backbone.name=timm:vit_tiny_patch16_224"], site=site).backbone.weights is None
    for said in ("backbone.weights=null", "backbone.weights=mine.safetensors"):
        kept = load_config(None, ["backbone.name=timm:resnet18", said], site=site)
        assert kept.backbone.weights in (None, "mine.safetensors"), "what a run says wins"


def test_a_run_that_is_read_again_is_the_same(tmp_path: Path, sets: Path) -> None:
    from selfmask_dist.config import to_yaml

    text = f"launch: {{partition: big}}\nsite: {{data_root: {sets}, modules: [cuda]}}\n"
    site = read_site(write(tmp_path / "site.yaml", text))
    config, places = load_with_places(None, ["data.train=birds"], site=site)
    path = write(tmp_path / "config.yaml", to_yaml(config, places))
    assert load_config(path, site=site) == config
    assert load_config(path) == config
    assert "# override 'data.train=birds', found by" in path.read_text()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("lunch: {partition: big}", "site.yaml:1: unknown key lunch"),
        ("launch: {partition: 3}", "site.yaml:1: launch.partition: got 3"),
        ("site:\n  data_rot: /x", "site.yaml:2: unknown key site.data_rot; did you mean site.data_root or"),
        ("site: {modules: cuda}", "site.yaml:1: site.modules: got"),
        ("[1]", "expected keys and values"),
        ("launch: {", "cannot be read as YAML"),
    ],
)
def test_a_mistake_in_a_site_file_is_named_with_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = write(tmp_path / "site.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_config(None, site=read_site(path))
    assert complaint in str(caught.value)


def test_where_a_site_file_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SELFMASK_SITE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert find_site().path is None
    (tmp_path / "home" / "selfmask").mkdir(parents=True)
    home = write(tmp_path / "home" / "selfmask" / "site.yaml", "seed: 1")
    assert find_site().path == home
    here = write(tmp_path / "work" / "site.yaml", "seed: 2")
    assert find_site().path == here
    monkeypatch.setenv("SELFMASK_SITE", str(write(tmp_path / "named.yaml", "seed: 3")))
    assert find_site().path == tmp_path / "named.yaml"
    assert find_site(str(home)).path == home
    assert find_site("none").path is None
    monkeypatch.chdir(tmp_path)
    assert find_site("named.yaml").path == tmp_path / "named.yaml", "nodes start elsewhere"
    monkeypatch.setenv("SELFMASK_SITE", "none")
    assert find_site().path is None
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot read the configuration: no such file"):
        find_site("nowhere.yaml")


def test_config_shows_which_layer_a_value_came_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "site.yaml", "launch: {partition: big}")
    assert main(["config", "--site", str(path), "train.epochs=3"]) == 0
    shown = capsys.readouterr().out
    assert f"  partition: big  # {path}:1\n" in shown
    assert "  epochs: 3.0  # override 'train.epochs=3'\n" in shown
    assert "  hours: 24.0\n" in shown
    assert isinstance(load_config(write(tmp_path / "again.yaml", shown)), Config)
