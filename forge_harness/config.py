"""Configuration: forge.toml or [tool.forge-harness], environment and flags.

    loaded = load_config(flags={"run.seed": 3})
    loaded.config.run.seed, loaded.origin("run.seed")   # 3, "flag"

Precedence is flags, then `FORGE_HARNESS_<SECTION>_<KEY>`, then the file, then defaults.
"""

from __future__ import annotations

from forge_harness._config.problems import expected
from forge_harness._config.resolve import LoadedConfig, load_config, resolve
from forge_harness._config.schema import (
    HarnessConfig,
    ModelConfig,
    PathsConfig,
    RunConfig,
    TrainConfig,
    config_json_schema,
    default_values,
)
from forge_harness._config.sources import (
    CONFIG_NAME,
    ENV_PREFIX,
    Origin,
    configuration_variables,
    find_config_file,
    project_table,
)
from forge_harness._config.template import commented_toml

__all__ = [
    "CONFIG_NAME",
    "ENV_PREFIX",
    "HarnessConfig",
    "LoadedConfig",
    "ModelConfig",
    "Origin",
    "PathsConfig",
    "RunConfig",
    "TrainConfig",
    "commented_toml",
    "config_json_schema",
    "configuration_variables",
    "default_values",
    "expected",
    "find_config_file",
    "load_config",
    "project_table",
    "resolve",
]
