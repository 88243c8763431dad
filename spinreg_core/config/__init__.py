"""The configuration of a run: `RunConfig` and its groups."""

from spinreg_core.config.benchmarks import BenchmarksConfig, JudgeConfig, TrackingConfig, UntilConfig
from spinreg_core.config.data import DataConfig
from spinreg_core.config.groups import (
    AVERAGE_FIELDS,
    LORA_FIELDS,
    EvaluationConfig,
    GenerationConfig,
    Group,
    KeepConfig,
    ObjectiveConfig,
    OpponentConfig,
    ResourcesConfig,
    TrainingConfig,
)
from spinreg_core.config.run import (
    MOST_ROUNDS,
    MUTABLE_FIELDS,
    RUN_NAME,
    EngineName,
    RunConfig,
    fixed_fields,
    of_round,
    resolve_engine,
    sampling_dtype,
    variant_fields,
)

__all__ = [
    "AVERAGE_FIELDS",
    "LORA_FIELDS",
    "MOST_ROUNDS",
    "MUTABLE_FIELDS",
    "RUN_NAME",
    "BenchmarksConfig",
    "DataConfig",
    "EngineName",
    "EvaluationConfig",
    "GenerationConfig",
    "Group",
    "JudgeConfig",
    "KeepConfig",
    "ObjectiveConfig",
    "OpponentConfig",
    "ResourcesConfig",
    "RunConfig",
    "TrackingConfig",
    "TrainingConfig",
    "UntilConfig",
    "fixed_fields",
    "of_round",
    "resolve_engine",
    "sampling_dtype",
    "variant_fields",
]
