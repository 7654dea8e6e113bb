"""What a run is: one frozen, validated object, made from

    defaults < site file < YAML file < key=value overrides

The keys are those of `all_sections`; `conflicts` says which values do not go together. Knows nothing of
torch, and does not look whether a backbone, a folder or a parameter exists: that is checked where it is used.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from selfmask_dist.config import help as config_help
from selfmask_dist.config import loading
from selfmask_dist.config import yaml as config_yaml
from selfmask_dist.config.all_sections import AllSections
from selfmask_dist.config.conflicts import conflicts
from selfmask_dist.config.site import DATA_VARIABLE, Site, complete

# What a section's default is under an objective, where it is another one; a value that is given wins.
DEFAULTS_OF: dict[str, dict[str, dict[str, Any]]] = {
    "nbd": {
        "optim": {"score_step": "rms"},
        "train": {"global_batch_size": 128, "epochs": 8.0},
        "backbone": {"batchnorm": "frozen"},
    }
}
_WARMUP = 0.1  # of nbd's epochs


class Config(AllSections):
    """A whole run: the same object on every rank, and saved with the run."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_objective(cls, values: Any) -> Any:
        """Fill in what is not given and has another default under the objective."""
        objective = values.get("objective") if isinstance(values, dict) else None
        name = objective.get("name") if isinstance(objective, dict) else None
        if name not in DEFAULTS_OF:
            return values
        filled = dict(values)
        for section, defaults in DEFAULTS_OF[name].items():
            given = filled.get(section, {})
            if isinstance(given, dict):
                filled[section] = {**defaults, **given}
        optim, train = filled["optim"], filled["train"]
        if isinstance(optim, dict) and isinstance(train, dict) and isinstance(train["epochs"], int | float):
            filled["optim"] = {"warmup_epochs": _WARMUP * train["epochs"], **optim}
        if isinstance(optim, dict) and not {"score_lr", "score_lr_choices"} & optim.keys():
            filled["optim"] = {"score_reach": "auto", **filled["optim"]}
        return filled

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if found := conflicts(self):
            raise loading.ConflictError(found)
        return self

    @property
    def needs_labels(self) -> bool:
        """Whether the run is nothing without labels and a test split; one that trains without them is not."""
        return self.method not in ("mask", "finetune") or self.objective.name == "supervised"


def load_config(
    path: str | Path | None = None, overrides: Sequence[str] = (), *, site: Site | None = None
) -> Config:
    """Return the configuration of a run: defaults, a site's, the YAML file's, then `key=value` overrides.

    A `data.train` or `data.test` that is the name of a data set becomes its folder, where the site or
    $SELFMASK_DATA has it.

    Args:
        path: a YAML file, such as the `config.yaml` of an earlier run, or the name of a configuration that
            ships; None for the defaults.
        site: see `find_site`, which the command line takes; None for none.
        overrides: dotted keys with YAML values, `optim.score_lr=10` or `eval.knn_k=[20]`; a later one wins.

    Raises:
        ConfigError: with every problem of file and overrides, each with its place and the way out.
    """
    return load_with_places(path, overrides, site=site)[0]


def load_with_places(
    path: str | Path | None, overrides: Sequence[str], *, site: Site | None = None
) -> tuple[Config, dict[str, str]]:
    """Return the configuration, and where each of its values was given that is not a default, by key."""
    site = site or Site()
    config, places = loading.load(Config, path, overrides, below=site.given)
    for section, values in complete(config, site, places).items():
        changed = getattr(config, section).model_copy(update=values)
        config = config.model_copy(update={section: changed})
        for key in values:
            by = f"{site.path or '$' + DATA_VARIABLE}"
            given = places.get(f"{section}.{key}")
            places[f"{section}.{key}"] = f"{given}, found by {by}" if given else f"{by}, site"
    return config, places


def to_yaml(config: Config, places: Mapping[str, str] | None = None) -> str:
    """Return every key with its value as YAML in ASCII, by section and group. It loads as an equal Config.

    Args:
        places: where values were given, as comments behind them.
    """
    values = config.model_dump(mode="json")
    notes = {key: text.encode("ascii", "replace").decode() for key, text in (places or {}).items()}
    return config_yaml.dump(values, config_help.groups(Config), config_help.GROUPS, notes)


def describe(width: int | None = None) -> str:
    """Return the text of `--help`: all keys by group, each with name, type, default, unit and effect.

    `width`: columns; None for the terminal's, 100 at most.
    """
    return config_help.describe(Config, width)


def flat_science(config: Config) -> dict[str, Any]:
    """Return the keys that change results, dotted, with their values."""
    groups = config_help.groups(Config)
    return {
        name: reduce(getattr, name.split("."), config) for name, group in groups.items() if group == "science"
    }
