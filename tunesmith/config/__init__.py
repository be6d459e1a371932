"""The config: its schema, and how a YAML file with line numbers becomes one."""

from tunesmith.config.keys import all_keys
from tunesmith.config.load import dump_config, load_config
from tunesmith.config.schema import (
    AdapterConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    PreferConfig,
    RunConfig,
    SourceConfig,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
    "AdapterConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "ModelConfig",
    "PreferConfig",
    "RunConfig",
    "SourceConfig",
    "TrackingConfig",
    "TrainConfig",
    "all_keys",
    "dump_config",
    "load_config",
]
