"""Which job each stage gets: its inputs, what is fingerprinted, and what else it is told.

Decides: what can change a stage's result, and therefore what runs can share. Leaves out: how a stage works
(`stages/`), and who commits (`head.py`). Imports nothing heavy: the flow process calls this.

A key holds only what can change the result by more than the rounding of sums: alpha and history are no part of
round 1, where both references are the base, so a grid over them does round 1 once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spinreg_core.config import (
    AVERAGE_FIELDS,
    LORA_FIELDS,
    MUTABLE_FIELDS,
    RunConfig,
    TrainingConfig,
    of_round,
    resolve_engine,
    sampling_dtype,
)
from spinreg_core.errors import SpinregError
from spinreg_core.runs.head import stage_object
from spinreg_core.runs.job import Job
from spinreg_core.runs.objects import fingerprint
from spinreg_core.selfplay.opponent import effective_alpha, mixture_weights, references


@dataclass(frozen=True)
class StagePlan:
    """A stage's job, as far as it is known without a writer."""

    stage: str
    round: int
    key: dict[str, Any]
    inputs: dict[str, Any]
    extra: dict[str, Any]

    @property
    def object_id(self) -> str:
        return fingerprint(self.stage, self.key)

    def job(self, config: RunConfig, store_url: str, writer: str, workdir: Path) -> Job:
        return Job(
            stage=self.stage, object_id=self.object_id, key=self.key, store=store_url, writer=writer,
            round=self.round, inputs=self.inputs, config=config, workdir=workdir, extra=self.extra,
        )  # fmt: skip


def policy_object(head: dict[str, Any], iterate: int) -> str:
    """The object whose `policy/` is iterate n: the base for 0, else what round n trained."""
    found = head.get("base") if iterate == 0 else stage_object(head, iterate, "train")
    if found is None:
        raise SpinregError(f"run {head['run']!r} has no iterate {iterate}: round {iterate} was never trained")
    return found


def _data(head: dict[str, Any]) -> str:
    """The object with the run's rows."""
    found: str | None = head.get("data")
    if found is None:
        raise SpinregError(f"run {head['run']!r}: found no data in its head; expected the rows of its rounds")
    return found


def average_key(training: TrainingConfig, policy: str, before: str, base: str) -> dict[str, Any]:
    """What an average of policies is made of: object ids of the new policy, the average before it, and the base."""
    return {"method": training.average, "weight": training.average_weight, "policy": policy, "before": before,
            "base": base}  # fmt: skip


def average_object(config: RunConfig, head: dict[str, Any], iterate: int) -> str:
    """The average that ends with iterate n; of the base alone it is the base. Made when round n is trained."""
    found = base = policy_object(head, 0)
    for number in range(1, iterate + 1):
        found = fingerprint("average", average_key(config.training, policy_object(head, number), found, base))
    return found


def policy_for_role(
    config: RunConfig, head: dict[str, Any], iterate: int, role: Literal["opponent", "reference", "start"]
) -> str:
    """The object whose `policy/` stands for iterate n in a role: its average where the configuration says so."""
    if config.training.average is not None and role in config.training.average_as:
        return average_object(config, head, iterate)
    return policy_object(head, iterate)


def _required(head: dict[str, Any], round_number: int, stage: str) -> str:
    found = stage_object(head, round_number, stage)
    if found is None:
        raise SpinregError(f"run {head['run']!r}: round {round_number} has no committed {stage}")
    return found


def _sampler(config: RunConfig) -> dict[str, Any]:
    generation = config.generation
    engine = resolve_engine(generation.engine)
    unread = {"tensor_parallel", "answers_per_prompt"}
    return generation.model_dump(mode="json", exclude=unread) | {"engine": engine, "dtype": sampling_dtype(config)}


def _history(config: RunConfig, round_number: int) -> list[float]:
    """Weights of iterates t, t-1, ..., newest first, with t = round - 1."""
    o = config.opponent
    return mixture_weights(round_number - 1, o.history, o.weighting, decay=o.decay)


def plan_generate(config: RunConfig, head: dict[str, Any], round_number: int) -> StagePlan:
    """Answers to the round's prompts, by pi_t or (source regenerate) by the drawn iterates, or by mixtures of them with
    the base."""
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


def plan_heldout(config: RunConfig, head: dict[str, Any], iterate: int) -> StagePlan:
    """One answer of iterate n to every held-out prompt; part of its evaluation."""
    policies = {str(iterate): policy_object(head, iterate)}
    key = {
        "rows": "heldout", "data": _data(head), "seed": config.seed, "policies": policies,
        "sampler": _sampler(config),
    }  # fmt: skip
    return StagePlan("generate", iterate, key, {"data": _data(head), "policies": policies}, {"rows": "heldout"})


def for_each_possible_engine(config: RunConfig) -> list[RunConfig]:
    """The configuration with every engine that `auto` may stand for: it is settled by the machine that runs a stage,
    which need not be the one that asks."""
    engines: tuple[Literal["hf", "vllm"], ...] = ("hf", "vllm")
    if config.generation.engine != "auto":
        return [config]
    generations = [config.generation.model_copy(update={"engine": engine}) for engine in engines]
    return [config.model_copy(update={"generation": generation}) for generation in generations]


def heldout_objects(config: RunConfig, head: dict[str, Any], iterate: int) -> list[str]:
    """What the held-out answers of iterate n may be named, as far as head and configuration tell."""
    return [plan_heldout(one, head, iterate).object_id for one in for_each_possible_engine(config)]


def plan_mix_opponent(config: RunConfig, head: dict[str, Any], round_number: int) -> StagePlan:
    """The round's pairs with their cached reference scores."""
    alpha, weights = config.objective.alpha, _history(config, round_number)
    generations = _required(head, round_number, "generate")
    earlier = []
    if config.opponent.source == "replay" or config.opponent.replay_share:
        earlier = [
            {
                "round": round_number - k,
                "generations": _required(head, round_number - k, "generate"),
                "pairs": _required(head, round_number - k, "mix-opponent"),
            }
            for k in range(1, len(weights))
        ]
    inputs = {
        "data": _data(head), "generations": generations, "earlier": earlier,
        "previous": policy_for_role(config, head, round_number - 1, "reference"), "base": policy_object(head, 0),
    }  # fmt: skip
    key = inputs | {
        "round": round_number, "seed": config.seed, "weights": weights,
        "opponent": config.opponent.model_dump(mode="json", include={"source", "truncated"}) | {"scores": "scorer"},
        # Only which references the loss reads, not alpha itself: a grid over 0 < alpha < 1 scores once.
        "scores": references(alpha, round_number),
        "precision": config.training.precision,
    }  # fmt: skip
    # Where log pi_0 of a row may stand already; it saves work and cannot change a result, so it is no part of the key.
    scored = [found for n in range(1, round_number) if (found := stage_object(head, n, "mix-opponent"))]
    return StagePlan("mix-opponent", round_number, key, inputs, {"scored": scored})


def plan_train(config: RunConfig, head: dict[str, Any], round_number: int) -> StagePlan:
    """Iterate n out of iterate n - 1 and the round's pairs."""
    inputs = {
        "pairs": _required(head, round_number, "mix-opponent"),
        "previous": policy_for_role(config, head, round_number - 1, "start"),
    }
    if config.training.average is not None:
        inputs |= {"before": average_object(config, head, round_number - 1), "base": policy_object(head, 0)}
    unread = {"learning_rate", *(name.partition(".")[2] for name in MUTABLE_FIELDS if name.startswith("training."))}
    if config.training.average is None:
        unread |= {"average", *AVERAGE_FIELDS}
    if config.training.lora_rank is None:
        unread |= {"lora_rank", *LORA_FIELDS}
    else:
        inputs["base"] = policy_object(head, 0)
    training = config.training.model_dump(mode="json", exclude=unread)
    key = inputs | {
        "round": round_number, "seed": config.seed, "training": training,
        "learning_rate": of_round(config.training.learning_rate, round_number),
        "alpha": effective_alpha(config.objective.alpha, round_number),
        "beta": of_round(config.objective.beta, round_number),
        "link": config.objective.link,
    }  # fmt: skip
    return StagePlan("train", round_number, key, inputs, {})


def plan_evaluate(config: RunConfig, head: dict[str, Any], round_number: int) -> StagePlan:
    """Held-out metrics of iterate n (0: the base), samples included."""
    n = round_number
    inputs = {
        "data": _data(head), "policy": policy_object(head, n), "base": policy_object(head, 0),
        "previous": policy_object(head, n - 1) if n else None,
        "evaluate_base": _required(head, 0, "evaluate") if n else None,
        "evaluate_previous": _required(head, n - 1, "evaluate") if n else None,
    }  # fmt: skip
    heldout = plan_heldout(config, head, n)
    inputs["heldout"] = heldout.object_id
    key = inputs | {
        "precision": config.training.precision, "seed": config.seed,
        "alpha": effective_alpha(config.objective.alpha, n) if n else None,
        "beta": of_round(config.objective.beta, n) if n else None,
        "evaluation": config.evaluation.model_dump(mode="json", exclude={"alarm_real_drop"}),
    }  # fmt: skip
    generate = {"object_id": heldout.object_id, "key": heldout.key, "inputs": heldout.inputs, "extra": heldout.extra}
    return StagePlan("evaluate", n, key, inputs, {"generate": generate})


def measured_objects(head: dict[str, Any], iterate: int) -> dict[str, str]:
    """Objects with benchmarks of iterate n, by kind and name (`lm-eval gsm8k`): of each what was asked for last."""
    entry: dict[str, Any] = next((entry for entry in head["rounds"] if entry["round"] == iterate), {})
    return dict(entry.get("measured", {}))


def objects_of(
    config: RunConfig, head: dict[str, Any], heldout: Callable[[int, str], Iterable[str]] | None = None
) -> dict[str, tuple[int, str]]:
    """Every object a run is made of, in the order of their making, and the (round, stage) that makes it; base and data
    are of (0, "prepare"), benchmarks of an iterate of (round, "benchmark").

    heldout: the objects with the held-out answers, of a round and its evaluation; by default all that it may be.
    """
    found: dict[str, tuple[int, str]] = {head[name]: (0, "prepare") for name in ("base", "data") if head.get(name)}
    for entry in sorted(head["rounds"], key=lambda entry: entry["round"]):
        for stage, object_id in entry["stages"].items():
            if stage == "train" and config.training.average is not None:
                found.setdefault(average_object(config, head, entry["round"]), (entry["round"], stage))
            if stage == "evaluate":
                number = entry["round"]
                answers = heldout(number, object_id) if heldout else heldout_objects(config, head, number)
                found |= {one: (number, stage) for one in answers if one not in found}
            found.setdefault(object_id, (entry["round"], stage))
        for object_id in measured_objects(head, entry["round"]).values():
            found.setdefault(object_id, (entry["round"], "benchmark"))
    return found


def ids_in(inputs: Any) -> Iterator[str]:
    """Object ids in a job's or a manifest's inputs."""
    if isinstance(inputs, dict):
        inputs = list(inputs.values())
    if isinstance(inputs, list):
        for value in inputs:
            yield from ids_in(value)
    elif isinstance(inputs, str):
        yield inputs


STAGE_PLANS = {
    "generate": plan_generate,
    "mix-opponent": plan_mix_opponent,
    "train": plan_train,
    "evaluate": plan_evaluate,
}
