"""The plan of each stage: the inputs of its job, the key that is fingerprinted, and its other settings.

Decides: what can change the result of a stage, and therefore what runs share. Leaves out: the stages themselves
(`spinreg_core.stages`), commits (`lease.py`).

A key holds only what can change the result by more than the rounding of sums. Alpha and history are no part of round 1,
where both references are the base, so a grid over them makes round 1 once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spinreg_core.config import (
    AVERAGE_FIELDS,
    LORA_FIELDS,
    EngineName,
    OpponentConfig,
    RunConfig,
    TrainingConfig,
    of_round,
    resolve_engine,
    sampling_dtype,
)
from spinreg_core.errors import SpinregError
from spinreg_core.runs.head import HELDOUT, Head
from spinreg_core.runs.job import Job
from spinreg_core.runs.objects import fingerprint
from spinreg_core.selfplay.opponent import effective_alpha, mixture_weights, references

# Keys name their fields, so that a new field moves no object id. A field that came after 0.1.0 is left out of a key
# while it has the value that equals the behaviour of 0.1.0 (CONTRIBUTING.md, "What is stored").
SAMPLER_FIELDS = ("temperature", "top_p", "top_k", "max_new_tokens", "shard_size")
TRAINING_FIELDS = ("optimizer", "weight_decay", "schedule", "warmup", "epochs", "batch_size", "max_grad_norm",
                   "precision", "save_dtype")  # fmt: skip
EVALUATION_FIELDS = ("bootstrap", "final_answer", "shown_samples")


@dataclass(frozen=True)
class StagePlan:
    """The job of a stage, without the store and the writer of an attempt.

    corrections: the markers in `key` of corrections that change the result in this configuration.
    """

    stage: str
    round: int
    key: dict[str, Any]
    inputs: dict[str, Any]
    extra: dict[str, Any]
    corrections: tuple[str, ...] = ()

    @property
    def object_id(self) -> str:
        return fingerprint(self.stage, self.key)

    @property
    def id_before_corrections(self) -> str:
        return fingerprint(self.stage, {name: self.key[name] for name in self.key.keys() - {*self.corrections}})

    def job(self, config: RunConfig, store_url: str, writer: str, workdir: Path) -> Job:
        return Job(
            stage=self.stage, object_id=self.object_id, key=self.key, store=store_url, writer=writer,
            round=self.round, inputs=self.inputs, config=config, workdir=workdir, extra=self.extra,
        )  # fmt: skip


def policy_object(head: Head, iterate: int) -> str:
    """Return the object with `policy/` of iterate n: the base for 0, else the one that round n trained."""
    found = head.base if iterate == 0 else head.stage(iterate, "train")
    if found is None:
        raise SpinregError(f"run {head.run!r} has no iterate {iterate}: round {iterate} was never trained")
    return found


def _data(head: Head) -> str:
    """Return the object with the rows of the run."""
    found = head.data
    if found is None:
        raise SpinregError(f"run {head.run!r}: found no data in its head; expected the rows of its rounds")
    return found


def average_key(training: TrainingConfig, policy: str, before: str, base: str) -> dict[str, str | float | None]:
    """Return the key of an average of policies, from the new policy, the average before it, and the base (ids)."""
    return {"method": training.average, "weight": training.average_weight, "policy": policy, "before": before,
            "base": base}  # fmt: skip


def average_object(config: RunConfig, head: Head, iterate: int) -> str:
    """Return the average that ends with iterate n, which the training of round n makes; for n = 0 the base."""
    found = base = policy_object(head, 0)
    for number in range(1, iterate + 1):
        found = fingerprint("average", average_key(config.training, policy_object(head, number), found, base))
    return found


def policy_for_role(
    config: RunConfig, head: Head, iterate: int, role: Literal["opponent", "reference", "start"]
) -> str:
    """Return the object with the policy for iterate n in a role: its average if the configuration says so."""
    if config.training.average is not None and role in config.training.average_as:
        return average_object(config, head, iterate)
    return policy_object(head, iterate)


def _sampler(config: RunConfig) -> dict[str, object]:
    fields: dict[str, object] = config.generation.model_dump(mode="json", include=set(SAMPLER_FIELDS))
    return fields | {"engine": resolve_engine(config.generation.engine), "dtype": sampling_dtype(config)}


def _history(config: RunConfig, round_number: int) -> list[float]:
    """Return the weights of iterates t, t-1, ..., newest first, with t = round - 1."""
    o = config.opponent
    return mixture_weights(round_number - 1, o.history, o.weighting, decay=o.decay)


def _corrected(
    stage: str, number: int, key: dict[str, Any], inputs: dict[str, Any], extra: dict[str, Any], **markers: str | None
) -> StagePlan:
    """Return a plan whose key has the markers that are not None."""
    marked = {name: marker for name, marker in markers.items() if marker is not None}
    return StagePlan(stage, number, key | marked, inputs, extra, tuple(marked))


def _packing(training: TrainingConfig) -> str | None:
    # In bfloat16, models with states, convolutions or sinks were packed, and their sequences changed each other.
    return "independent" if training.precision == "bf16" else None


def plan_generate(config: RunConfig, head: Head, round_number: int) -> StagePlan:
    """Plan the answers to the round's prompts.

    pi_t answers, or (source regenerate) the drawn iterates, or mixtures of these with the base.
    """
    t = round_number - 1
    weights = _history(config, round_number) if config.opponent.source == "regenerate" else [1.0]
    iterates = [t - k for k, weight in enumerate(weights) if weight > 0]
    policies = {str(n): policy_for_role(config, head, n, "opponent") for n in iterates}
    extra: dict[str, Any] = {"rows": "train", "weights": weights}
    if config.opponent.geometric_share and t:
        alpha = config.opponent.geometric_alpha
        extra["geometric"] = {
            "share": config.opponent.geometric_share, "alpha": config.objective.alpha if alpha is None else alpha
        }  # fmt: skip
        policies["0"] = policy_object(head, 0)
    if config.opponent.replay_share and len(weights) > 1:
        extra["replay_share"] = config.opponent.replay_share
    prompts = config.data.model_dump(mode="json", include={"prompts_per_round", "round_prompts"})
    key = extra | {
        "data": _data(head), "prompts": prompts, "answers": config.generation.answers_per_prompt,
        "round": round_number, "seed": config.seed, "policies": policies, "sampler": _sampler(config),
    }  # fmt: skip
    return StagePlan("generate", round_number, key, {"data": _data(head), "policies": policies}, extra)


def plan_heldout(config: RunConfig, head: Head, iterate: int) -> StagePlan:
    """Plan one answer of iterate n to every held-out prompt."""
    # The key has no round: the answers belong to a policy, and equal policies of two runs share them.
    policies = {str(iterate): policy_object(head, iterate)}
    key = {
        "rows": "heldout", "data": _data(head), "seed": config.seed, "policies": policies,
        "sampler": _sampler(config),
    }  # fmt: skip
    return StagePlan("generate", iterate, key, {"data": _data(head), "policies": policies}, {"rows": "heldout"})


def for_each_possible_engine(config: RunConfig) -> list[RunConfig]:
    """Return the configuration with every engine that `auto` may stand for.

    The machine that runs a stage decides, and it may be another one than this.
    """
    engines: tuple[EngineName, ...] = ("hf", "vllm")
    if config.generation.engine != "auto":
        return [config]
    generations = [config.generation.model_copy(update={"engine": engine}) for engine in engines]
    return [config.model_copy(update={"generation": generation}) for generation in generations]


def plan_mix_opponent(config: RunConfig, head: Head, round_number: int) -> StagePlan:
    """Plan the pairs of the round with their cached reference scores."""
    alpha, weights = config.objective.alpha, _history(config, round_number)
    generations = head.require_stage(round_number, "generate")
    earlier = []
    if config.opponent.source == "replay" or config.opponent.replay_share:
        earlier = [
            {
                "round": round_number - k,
                "generations": head.require_stage(round_number - k, "generate"),
                "pairs": head.require_stage(round_number - k, "mix-opponent"),
            }
            for k in range(1, len(weights))
        ]
    inputs: dict[str, Any] = {
        "data": _data(head), "generations": generations, "earlier": earlier,
        "previous": policy_for_role(config, head, round_number - 1, "reference"), "base": policy_object(head, 0),
    }  # fmt: skip
    if config.objective.reference == "iterate":
        iterates = [round_number - 1 - k for k, weight in enumerate(weights) if weight > 0]
        inputs["iterates"] = {str(n): policy_for_role(config, head, n, "opponent") for n in iterates}
    key = inputs | {
        "round": round_number, "seed": config.seed, "weights": weights,
        "opponent": _pairing(config.opponent) | {"scores": "scorer"},
        # Only which references the loss reads, not alpha itself: a grid over 0 < alpha < 1 scores once.
        "scores": references(alpha, round_number),
        "precision": config.training.precision,
    }  # fmt: skip
    # Earlier pairs may hold log pi_0 of a row already. That saves work and cannot change a result, so it is no input.
    scored = [found for n in range(1, round_number) if (found := head.stage(n, "mix-opponent"))]
    return _corrected("mix-opponent", round_number, key, inputs, {"scored": scored}, packing=_packing(config.training))


def _pairing(opponent: OpponentConfig) -> dict[str, Any]:
    """Return the key fields for choosing and treating pairs; later fields are left out at their 0.1.0 value."""
    limit = {} if opponent.max_pairs is None else {"max_pairs": opponent.max_pairs}
    return opponent.model_dump(mode="json", include={"source", "truncated"}) | limit


def plan_train(config: RunConfig, head: Head, round_number: int) -> StagePlan:
    """Plan the training of iterate n from iterate n - 1 and the pairs of the round."""
    inputs = {
        "pairs": head.require_stage(round_number, "mix-opponent"),
        "previous": policy_for_role(config, head, round_number - 1, "start"),
    }
    if config.training.average is not None:
        inputs |= {"before": average_object(config, head, round_number - 1), "base": policy_object(head, 0)}
    names = {*TRAINING_FIELDS}
    if config.training.average is not None:
        names |= {"average", *AVERAGE_FIELDS}
    if config.training.lora_rank is not None:
        names |= {"lora_rank", *LORA_FIELDS}
        inputs["base"] = policy_object(head, 0)
    training = config.training.model_dump(mode="json", include=names)
    key = inputs | {
        "round": round_number, "seed": config.seed, "training": training,
        "learning_rate": of_round(config.training.learning_rate, round_number),
        "alpha": effective_alpha(config.objective.alpha, round_number),
        "beta": of_round(config.objective.beta, round_number),
        "link": config.objective.link,
    }  # fmt: skip
    if config.objective.guard != 1:
        key["guard"] = config.objective.guard
    # An adapter computed in bfloat16 is not quite the merged policy that was scored, so its start is measured.
    adapted = config.training.rounds_adapter and round_number > 1
    return _corrected(
        "train", round_number, key, inputs, {}, packing=_packing(config.training),
        start="measured" if adapted else None, decay="matrices" if config.training.weight_decay else None,
    )  # fmt: skip


def plan_evaluate(config: RunConfig, head: Head, round_number: int) -> StagePlan:
    """Plan the held-out metrics of iterate n (0: the base)."""
    n = round_number
    inputs = {
        "data": _data(head), "policy": policy_object(head, n), "base": policy_object(head, 0),
        "previous": policy_object(head, n - 1) if n else None,
        "evaluate_base": head.require_stage(0, "evaluate") if n else None,
        "evaluate_previous": head.require_stage(n - 1, "evaluate") if n else None,
        "heldout": head.require_stage(n, HELDOUT),
    }  # fmt: skip
    key = inputs | {
        "precision": config.training.precision, "seed": config.seed,
        "alpha": effective_alpha(config.objective.alpha, n) if n else None,
        "beta": of_round(config.objective.beta, n) if n else None,
        "evaluation": config.evaluation.model_dump(mode="json", include=set(EVALUATION_FIELDS)),
    }  # fmt: skip
    return _corrected("evaluate", n, key, inputs, {}, packing=_packing(config.training))


def ids_in(inputs: Any) -> Iterator[str]:
    """Yield the object ids in the inputs of a job or a manifest."""
    if isinstance(inputs, dict):
        inputs = list(inputs.values())
    if isinstance(inputs, list):
        for value in inputs:
            yield from ids_in(value)
    elif isinstance(inputs, str):
        yield inputs
