"""What a run is: one frozen, validated object. Never imports torch.

    load_config("run.yaml", ["train.epochs=3"])     defaults < YAML file < key=value

`config` has the object and the conflicts between its sections, the other files a section or two each.
"""

from selfmask_dist.config.config import Config, describe, flat_science, load_config, to_yaml
from selfmask_dist.config.loading import ConfigError

__all__ = ["Config", "ConfigError", "describe", "flat_science", "load_config", "to_yaml"]
