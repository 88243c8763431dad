"""The runs of a comparison: scores question by question, sample answers, costs.

Decides: the metrics that are compared question by question, when two sets of questions are the same (`block`), and
which runs form one variant. Leaves out: the statistics (`evaluation`) and the sentences (`wording`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spinreg_core.benchmarks.registry import results_of
from spinreg_core.comparison.schema import BenchmarkEntry, ComparedSample, Cost, SharedAlarm, SharedObject
from spinreg_core.config import RunConfig, variant_fields
from spinreg_core.config.resolve import differences
from spinreg_core.errors import BadInput
from spinreg_core.evaluation.heldout import metrics_of_round, row_scores
from spinreg_core.evaluation.metrics import GAME, METRICS, Metric
from spinreg_core.evaluation.paired import Scores
from spinreg_core.evaluation.schema import StoredBenchmark
from spinreg_core.formatting import flatten
from spinreg_core.reports.lineage import BENCHMARK, objects_of_run, tokens_of
from spinreg_core.reports.run_report import heldout_alarms, read_json
from spinreg_core.reports.schema import Alarm
from spinreg_core.runs.fetch import fetch_file
from spinreg_core.runs.head import HELDOUT, Head, require_config, require_head
from spinreg_core.runs.stages import STAGES
from spinreg_core.selfplay.opponent import effective_alpha
from spinreg_core.store.base import Store

HELDOUT_METRICS = (
    "heldout_nll", "reward_accuracy", "exact_match", "kl_base", "kl_previous", "answer_length", "end_of_turn_rate",
    "distinct_2", "margin", "real_change", "generated_change", "entropy",
)  # fmt: skip
COST_STAGES = (*STAGES, BENCHMARK)
# Settings of a benchmark that do not change its questions or its judge: they say how it was computed, or belong to the
# policy, or are covered by `fingerprints` and `prompts`.
_NOT_ASKED = {
    "backend", "batch_size", "bootstrap", "engine", "identical", "include_path", "limit", "precision", "processes",
    "seed",
}  # fmt: skip
# Fingerprints of the measured policy, which differ between policies that answered the same questions.
_ANSWERS = ("policy", "evaluate", "answers")


@dataclass
class Evaluated:
    """A run with the scores of its evaluated rounds: {round: {metric: Scores}}.

    `alarms` are those of its held-out rows, `definitions` those of its benchmarks' metrics. `no_items` names benchmarks
    with a primary metric that is not a mean over questions.
    """

    run: str
    config: RunConfig
    head: Head
    scores: dict[int, dict[str, Scores]] = field(default_factory=dict)
    alarms: list[Alarm] = field(default_factory=list)
    definitions: dict[str, Metric] = field(default_factory=dict)
    no_items: set[str] = field(default_factory=set)
    measured: list[BenchmarkEntry] = field(default_factory=list)

    @property
    def rounds(self) -> list[int]:
        return sorted(self.scores)

    @property
    def data(self) -> str:
        """The object with its rows."""
        return str(self.head.data)

    def evaluation(self, number: int) -> str | None:
        """Return the object of a round's evaluation."""
        return self.head.stage(number, "evaluate")

    def read(self, store: Store, number: int, name: str) -> Any:
        """Return a JSON file of the evaluation of an evaluated round. Raises Damaged."""
        return read_json(store, str(self.evaluation(number)), name)


@dataclass
class Variant:
    """Runs that differ in their seed alone."""

    label: str
    members: list[Evaluated]

    @property
    def rounds(self) -> list[int]:
        """The rounds that every seed has evaluated."""
        return sorted(set.intersection(*(set(member.scores) for member in self.members)))

    @property
    def fields(self) -> dict[str, Any]:
        return variant_fields(self.members[0].config)

    @property
    def data(self) -> set[str]:
        """The objects with the rows of its runs."""
        return {member.data for member in self.members}

    def scores(self, metric: str, number: int) -> list[Scores]:
        found = [member.scores.get(number, {}).get(metric) for member in self.members]
        return [one for one in found if one is not None]

    def evaluations(self, number: int) -> set[str | None]:
        return {member.evaluation(number) for member in self.members}


def read_evaluated(store: Store, run: str) -> Evaluated:
    """Return a run with its scores.

    Raises BadInput for a missing run or one without evaluation, Removed or Damaged for a missing or altered file.
    """
    head, config = require_head(store, run), require_config(store, run)
    if not head.data:
        raise BadInput(f"run {run!r}", "has no evaluated round yet", "run it to round 1 at least, then compare it")
    member = Evaluated(run, config, head)
    for number in sorted(entry.round for entry in head.rounds):
        object_id = member.evaluation(number)
        if object_id is None:
            continue
        rows = pq.read_table(fetch_file(store, object_id, "rows.parquet"))
        scores = heldout_scores(rows, member.data, effective_alpha(config.objective.alpha, number))
        metrics = metrics_of_round(rows, config, number)
        member.alarms += heldout_alarms(number, metrics, config.evaluation.alarm_real_drop)
        for part in results_of(store, config, head, number):
            key = f"{part['name']}/{part['primary']}"
            found = benchmark_scores(store, part)
            if found is None:
                member.no_items.add(key)
            else:
                scores[key] = found
                member.definitions[key] = {
                    "label": key, "unit": part["metrics"][part["primary"]]["unit"], "better": part["better"],
                    "definition": f"Benchmark of kind {part['kind']}: its primary metric, item by item.",
                }  # fmt: skip
            member.measured.append({
                "run": run, "round": number, "object_id": part["object_id"], "kind": part["kind"], "name": part["name"],
                "settings": part["settings"], "fingerprints": part["fingerprints"], "versions": part["versions"],
                "cost": part["cost"],
            })  # fmt: skip
        member.scores[number] = scores
    return member


def heldout_scores(rows: pa.Table, block: str, alpha: float) -> dict[str, Scores]:
    """Return the metrics that are compared row by row, from an evaluation's rows."""
    ids, found = tuple(rows["prompt_id"].to_pylist()), row_scores(rows, alpha)
    return {name: Scores(block, ids, *found[name]) for name in HELDOUT_METRICS if name in found}


def benchmark_scores(store: Store, part: StoredBenchmark) -> Scores | None:
    """Return a benchmark's primary metric item by item, or None if it is not the mean of its items."""
    primary = part["primary"]
    rows = pq.read_table(fetch_file(store, part["object_id"], "items.parquet")).to_pylist()
    items = {row["item"]: row["value"] for row in rows if row["metric"] == primary}
    values = np.array([*items.values()], np.float64)
    # The tolerance covers the order of summation only.
    if not items or not math.isclose(values.mean(), part["metrics"][primary]["value"], rel_tol=1e-9, abs_tol=1e-9):
        return None
    return Scores(asked_of(part), tuple(items), values, np.ones(len(values)))


def asked_of(part: StoredBenchmark) -> str:
    """Return the parts of a benchmark that must be equal for two policies to be compared by it.

    That is its questions and prompts, the judge, and the opponent's answers. Win rates against the previous iterate
    have other opponents in every run, except in round 1; so they are not paired.
    """
    common = {
        "kind": part["kind"], "name": part["name"], "primary": part["primary"],
        "settings": {k: v for k, v in part["settings"].items() if k not in _NOT_ASKED},
        "fingerprints": {k: v for k, v in part["fingerprints"].items() if k not in _ANSWERS},
        "lm-eval": part["versions"].get("lm-eval"),
    }  # fmt: skip
    return json.dumps(common, sort_keys=True)


def alarms_of(members: list[Evaluated]) -> list[SharedAlarm]:
    """Return the alarms of the runs' held-out rows, each once, with the runs that raised it (which share its round)."""
    found: dict[tuple[int, str, str], SharedAlarm] = {}
    for member in members:
        for one in member.alarms:
            key = (one["round"], one["where"], one["text"])
            found.setdefault(key, {**one, "runs": []})["runs"].append(member.run)
    return list(found.values())


def definitions_of(members: list[Evaluated]) -> dict[str, Metric]:
    """Return how each metric that any run has is shown, in the order of the page."""
    there = {name for member in members for scores in member.scores.values() for name in scores}
    found: dict[str, Metric] = {
        name: {**(METRICS.get(name) or GAME[name])} for name in HELDOUT_METRICS if name in there
    }
    for member in members:
        found |= member.definitions
    return found


def one_per_seed(members: list[Evaluated], against: str | None) -> tuple[list[Evaluated], dict[str, str]]:
    """Return the runs without those that repeat another's configuration and seed, and the run that each repeats.

    A repeated run (plain SPIN in two grids, for example) is no further seed. The run `against` stays, otherwise the one
    with the most rounds.
    """
    first: dict[str, str] = {}
    keys = {m.run: _key([variant_fields(m.config), m.config.seed]) for m in members}
    for member in sorted(members, key=lambda one: (one.run != against, -max(one.rounds, default=-1))):
        first.setdefault(keys[member.run], member.run)
    repeats = {run: first[key] for run, key in keys.items() if first[key] != run}
    return [member for member in members if member.run not in repeats], repeats


def variants_of(members: list[Evaluated]) -> list[Variant]:
    """Return the variants (runs with equal variant fields), in the order in which their runs were named.

    A label names the one to three fields in which the variants differ; otherwise it is the first run's name.
    """
    groups: dict[str, Variant] = {}
    for member in members:
        groups.setdefault(_key(variant_fields(member.config)), Variant(member.run, [])).members.append(member)
    variants = list(groups.values())
    fields = [dict(flatten(variant.fields)) for variant in variants]
    telling = [name for name in dict.fromkeys(n for one in fields for n in one)
               if len({one.get(name) for one in fields}) > 1]  # fmt: skip
    labels = [", ".join(f"{name.rpartition('.')[2]} {one.get(name, '-')}" for name in telling) for one in fields]
    if 1 <= len(telling) <= 3 and len(set(labels)) == len(labels) and max(map(len, labels)) <= 60:
        for variant, label in zip(variants, labels, strict=True):
            variant.label = label
    return variants


def _key(values: Any) -> str:
    return json.dumps(values, sort_keys=True)


def why_unpaired(ours: Variant, theirs: Variant) -> str:
    """Return why two variants have no held-out rows in common."""
    seeds = [sorted({member.config.seed for member in variant.members}) for variant in (ours, theirs)]
    old, new = ({name: one.fields[name] for name in ("model", "dataset", "data")} for one in (theirs, ours))
    told = differences(old, new)
    if told:
        return "their held-out rows come from other data objects: " + "; ".join(told)
    if not set(seeds[0]) & set(seeds[1]):
        return (
            f"the held-out rows depend on the seed, and they have none in common ({seeds[0]} against {seeds[1]}); "
            "name runs with equal seeds"
        )
    return "their held-out rows come from other data objects of one configuration: the data or the model changed"


def samples_of(store: Store, variants: list[Variant]) -> list[ComparedSample]:
    """Return the first held-out prompts of every run, each with the human answer and all sampled answers."""
    found: dict[str, ComparedSample] = {}
    for variant in variants:
        for member in variant.members:
            for number in member.rounds:
                for one in member.read(store, number, "samples.json")["samples"]:
                    row = found.setdefault(
                        f"{member.data} {one['prompt_id']}",
                        {"messages": one["messages"], "answer": one["answer"], "answers": []},
                    )
                    place = {"variant": variant.label, "run": member.run, "round": number}
                    row["answers"].append(place | {"text": one["sample"], "finish": one["finish"]})
    return list(found.values())


def lineage_of(store: Store, members: list[Evaluated]) -> list[SharedObject]:
    """Return every object of the runs once, with the runs that it is part of and its cost."""
    found: dict[str, SharedObject] = {}
    for member in members:
        paid = {one["object_id"]: one["cost"].get("paid", 0.0) for one in member.measured}
        for made in objects_of_run(store, member.head):
            record = made.record
            if made.object_id not in found:
                found[made.object_id] = {
                    "round": made.round, "stage": made.stage, "object_id": made.object_id,
                    "uri": store.uri(f"objects/{made.object_id}"), "seconds": record.seconds if record else None,
                    "created": record.created if record else None, "runs": [], "tokens": tokens_of(made),
                    "paid": paid.get(made.object_id, 0.0), "inputs": record.inputs if record else None,
                    "versions": record.versions if record else None,
                }  # fmt: skip
            found[made.object_id]["runs"].append(member.run)
    return list(found.values())


def cost_of(variant: Variant, lineage: Sequence[SharedObject]) -> Cost:
    """Return the cost of a variant, as means over its runs. Time of attempts that did not finish is not included."""
    runs = {member.run for member in variant.members}
    stages = {stage: [line for line in lineage if line["stage"] == stage] for stage in COST_STAGES}

    def per_run(lines: Sequence[SharedObject], key: Literal["seconds", "tokens", "paid"]) -> float:
        return sum((line[key] or 0.0) * len(runs & set(line["runs"])) for line in lines) / len(runs)

    def tokens(stage: str) -> float | None:
        own = [line for line in stages[stage] if runs & set(line["runs"])]
        return None if any(line["tokens"] is None for line in own) else per_run(own, "tokens")

    seconds = {stage: per_run(lines, "seconds") for stage, lines in stages.items()}
    shared = [line for lines in stages.values() for line in lines if len(line["runs"]) > 1]
    return {
        "variant": variant.label, "runs": len(runs),
        "rounds": max(max(member.rounds, default=0) for member in variant.members),
        "seconds": seconds, "total_seconds": sum(seconds.values()), "shared_seconds": per_run(shared, "seconds"),
        "tokens": {stage: tokens(stage) for stage in ("generate", HELDOUT, "train", "evaluate")},
        "paid": per_run(stages[BENCHMARK], "paid"),
    }  # fmt: skip
