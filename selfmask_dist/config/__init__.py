"""What a run is: one frozen, validated object. Never imports torch.

    load_config("run.yaml", ["train.epochs=3"])     defaults < site file < YAML file < key=value

`config` has the object, `all_sections` its keys, and `conflicts` the values that do not go together.
`loading`, `yaml` and `help` read, write and explain any object of this kind; `site` finds what a place says
for all its runs; the other files hold the sections.
"""

from selfmask_dist.config.config import Config, describe, flat_science, load_config, to_yaml
from selfmask_dist.config.loading import ConfigError

__all__ = ["Config", "ConfigError", "describe", "flat_science", "load_config", "to_yaml"]
