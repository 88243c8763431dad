"""What a comparison reads of its runs: scores question by question, sample answers, costs.

Decides: which metrics are compared question by question, what makes two sets of questions the same (`block`), which
runs are one variant. Leaves out: the statistics (`evaluation/paired.py`) and what is said (`compare.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spinreg_core.benchmarks.registry import results_of
from spinreg_core.benchmarks.results import PartResults
from spinreg_core.config import RunConfig, variant_fields
from spinreg_core.config.resolve import differences
from spinreg_core.errors import BadInput
from spinreg_core.evaluation.heldout import row_scores
from spinreg_core.evaluation.metrics import GAME, METRICS
from spinreg_core.evaluation.paired import Scores
from spinreg_core.formatting import flatten
from spinreg_core.reports.run_report import HELDOUT_ANSWERS, alarms, read_run, tokens_of
from spinreg_core.runs.fetch import fetch_file
from spinreg_core.runs.head import ROUND_STAGES, stage_object
from spinreg_core.runs.objects import read_record
from spinreg_core.runs.plans import measured_objects
from spinreg_core.selfplay.opponent import effective_alpha
from spinreg_core.store.base import Store

HELDOUT = (
    "heldout_nll", "reward_accuracy", "exact_match", "kl_base", "kl_previous", "answer_length", "end_of_turn_rate",
    "distinct_2", "margin", "real_change", "generated_change", "entropy",
)  # fmt: skip
BENCHMARK = "benchmark"
COST_STAGES = (*ROUND_STAGES, HELDOUT_ANSWERS, BENCHMARK)
# Of a benchmark's settings, what says nothing about what was asked and how it was judged: how it was computed, what of
# it is the policy's own, and what `fingerprints` and `prompts` say better.
_NOT_ASKED = frozenset(
    (
        "backend",
        "batch_size",
        "bootstrap",
        "engine",
        "identical",
        "include_path",
        "limit",
        "precision",
        "processes",
        "seed",
    )
)
_ANSWERS = ("policy", "evaluate", "answers")  # of its fingerprints, those of what was measured


@dataclass
class Evaluated:
    """One run. scores: {round: {metric: Scores}}, evaluated rounds only; definitions: of its benchmarks' metrics;
    no_items: its benchmarks whose primary metric is no mean over questions; measured: its benchmarks, with what their
    figures rest on."""

    run: str
    config: RunConfig
    head: dict[str, Any]
    scores: dict[int, dict[str, Scores]] = field(default_factory=dict)
    definitions: dict[str, dict[str, Any]] = field(default_factory=dict)
    no_items: set[str] = field(default_factory=set)
    measured: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rounds(self) -> list[int]:
        return sorted(self.scores)


@dataclass
class Variant:
    """Runs that differ in their seed alone."""

    label: str
    members: list[Evaluated]

    @property
    def rounds(self) -> list[int]:
        """Those that every seed has evaluated."""
        return sorted(set.intersection(*(set(member.scores) for member in self.members)))

    def scores(self, metric: str, number: int) -> list[Scores]:
        found = [member.scores.get(number, {}).get(metric) for member in self.members]
        return [one for one in found if one is not None]


def read_evaluated(store: Store, run: str) -> Evaluated:
    """A run with its scores. Raises BadInput where there is no such run, or nothing of it is evaluated, Removed or
    Damaged where a file is gone."""
    head, config = read_run(store, run)
    if not head.get("data"):
        raise BadInput(
            "runs to compare", f"{run!r}, of which nothing is evaluated yet", "at least round 1 of every run"
        )
    member = Evaluated(run, config, head)
    for number in sorted(entry["round"] for entry in head["rounds"]):
        object_id = stage_object(head, number, "evaluate")
        if object_id is None:
            continue
        rows = pq.read_table(fetch_file(store, object_id, "rows.parquet"))
        scores = heldout_scores(rows, str(head["data"]), effective_alpha(config.objective.alpha, number))
        for document in results_of(store, config, head, number):
            found = read_benchmark(store, document, member.definitions)
            scores |= found
            told = ("object_id", "kind", "name", "settings", "fingerprints", "versions", "cost")
            member.measured.append({"run": run, "round": number} | {name: document.get(name) for name in told})
            if not found:
                member.no_items.add(f"{document['name']}/{document['primary']}")
        member.scores[number] = scores
    return member


def heldout_scores(rows: pa.Table, block: str, alpha: float) -> dict[str, Scores]:
    """Of an evaluate object's rows, the metrics that are compared row by row."""
    ids, found = tuple(rows["prompt_id"].to_pylist()), row_scores(rows, alpha)
    return {name: Scores(block, ids, *found[name]) for name in HELDOUT if name in found}


def read_benchmark(store: Store, document: PartResults, definitions: dict[str, dict[str, Any]]) -> dict[str, Scores]:
    """The primary metric of a benchmark's part, item by item; nothing where it is not the mean of its items."""
    name, primary = document["name"], document["primary"]
    rows = pq.read_table(fetch_file(store, document["object_id"], "items.parquet")).to_pylist()
    items = {row["item"]: row["value"] for row in rows if row["metric"] == primary}
    values, metric = np.array([*items.values()], np.float64), document["metrics"][primary]
    if not items or not math.isclose(values.mean(), metric["value"], rel_tol=1e-9, abs_tol=1e-9):
        return {}
    key = f"{name}/{primary}"
    definitions[key] = {
        "label": key, "unit": metric["unit"], "better": document["better"],
        "definition": f"Benchmark of kind {document['kind']}: its primary metric, item by item.",
    }  # fmt: skip
    return {key: Scores(asked_of(document), tuple(items), values, np.ones(len(values)))}


def asked_of(document: PartResults) -> str:
    """All of a benchmark's results that two policies must have in common to be compared by it: the questions and their
    prompts, the judge, and the answers that theirs were held against.

    Win rates against the previous iterate have other such answers in every run, but for round 1: they are not paired.
    """
    common = {
        "kind": document["kind"], "name": document["name"], "primary": document["primary"],
        "settings": {k: v for k, v in document.get("settings", {}).items() if k not in _NOT_ASKED},
        "fingerprints": {k: v for k, v in document.get("fingerprints", {}).items() if k not in _ANSWERS},
        "lm-eval": document.get("versions", {}).get("lm-eval"),
    }  # fmt: skip
    return json.dumps(common, sort_keys=True)


def alarms_of(store: Store, members: list[Evaluated]) -> list[dict[str, Any]]:
    """The alarms of the runs' held-out rows, each once, with the runs that raised it (which share its round)."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for member in members:
        rounds = []
        for number in member.rounds:
            path = fetch_file(store, str(stage_object(member.head, number, "evaluate")), "metrics.json")
            rounds.append({"round": number, "metrics": json.loads(path.read_bytes()), "training": None})
        for one in alarms(rounds, member.config.evaluation.alarm_real_drop):
            found.setdefault(tuple(one.values()), one | {"runs": []})["runs"].append(member.run)
    return list(found.values())


def definitions_of(members: list[Evaluated]) -> dict[str, dict[str, Any]]:
    """How each metric that any run has is shown, in the order of the page."""
    there = {name for member in members for scores in member.scores.values() for name in scores}
    found: dict[str, dict[str, Any]] = {}
    for name in HELDOUT:
        metric = METRICS.get(name) or GAME[name]
        if name in there:
            found[name] = {"label": metric.label, "unit": metric.unit, "better": metric.better,
                           "definition": metric.definition}  # fmt: skip
    for member in members:
        found |= member.definitions
    return found


def one_per_seed(members: list[Evaluated], against: str | None) -> tuple[list[Evaluated], dict[str, str]]:
    """Without runs that repeat another's configuration and seed (plain SPIN in two grids, say), which are no further
    seed; and of each such run which it repeats: the run `against`, or the one that went furthest."""
    first: dict[str, str] = {}
    keys = {m.run: json.dumps([variant_fields(m.config), m.config.seed], sort_keys=True) for m in members}
    for member in sorted(members, key=lambda one: (one.run != against, -max(one.rounds, default=-1))):
        first.setdefault(keys[member.run], member.run)
    repeats = {run: first[key] for run, key in keys.items() if first[key] != run}
    return [member for member in members if member.run not in repeats], repeats


def variants_of(members: list[Evaluated]) -> list[Variant]:
    """Runs whose variant fields are equal are one variant; in the order in which they were named.

    A variant's label is what tells it from the others where that is one to three fields, else its first run's name.
    """
    groups: list[list[Evaluated]] = []
    for member in members:
        for group in groups:
            if variant_fields(group[0].config) == variant_fields(member.config):
                group.append(member)
                break
        else:
            groups.append([member])
    fields = [dict(flatten(variant_fields(group[0].config))) for group in groups]
    telling = [name for name in dict.fromkeys(n for one in fields for n in one)
               if len({one.get(name) for one in fields}) > 1]  # fmt: skip
    labels = [", ".join(f"{name.rpartition('.')[2]} {one.get(name, '-')}" for name in telling) for one in fields]
    if not 1 <= len(telling) <= 3 or len(set(labels)) < len(labels) or max(map(len, labels)) > 60:
        labels = [group[0].run for group in groups]
    return [Variant(label, group) for label, group in zip(labels, groups, strict=True)]


def why_unpaired(ours: Variant, theirs: Variant) -> str:
    """Why no held-out rows are common to two variants."""
    seeds = [sorted({member.config.seed for member in variant.members}) for variant in (ours, theirs)]
    fields: list[dict[str, Any]] = [
        {name: variant_fields(variant.members[0].config)[name] for name in ("model", "dataset", "data")}
        for variant in (ours, theirs)
    ]
    told = differences(fields[1], fields[0])
    if told:
        return "their held-out rows are of other data objects: " + "; ".join(told)
    if not set(seeds[0]) & set(seeds[1]):
        return (
            f"the held-out rows depend on the seed, and they have none in common ({seeds[0]} against {seeds[1]}): "
            "name runs of equal seeds"
        )
    return "their held-out rows are of other data objects with the same configuration: the data or the model changed"


def samples_of(store: Store, variants: list[Variant]) -> list[dict[str, Any]]:
    """The first held-out prompts of every run, each with the human answer and what every variant and round answered."""
    found: dict[str, dict[str, Any]] = {}
    for variant in variants:
        for member in variant.members:
            for number in member.rounds:
                object_id = stage_object(member.head, number, "evaluate")
                assert object_id is not None
                shown = json.loads(fetch_file(store, object_id, "samples.json").read_bytes())["samples"]
                for sample in shown:
                    key = f"{member.head['data']} {sample['prompt_id']}"
                    row = found.setdefault(
                        key, {"messages": sample["messages"], "answer": sample["answer"], "answers": []}
                    )
                    row["answers"].append({"variant": variant.label, "run": member.run, "round": number,
                                           "text": sample["sample"], "finish": sample["finish"]})  # fmt: skip
    return list(found.values())


def lineage_of(store: Store, members: list[Evaluated]) -> list[dict[str, Any]]:
    """Every object of the runs once, with the runs that it is part of and what it took: seconds (of the attempt that
    finished it), tokens, and `paid` to a judge."""
    found: dict[str, dict[str, Any]] = {}
    for member in members:
        paid = {one["object_id"]: (one["cost"] or {}).get("paid", 0.0) for one in member.measured}
        named: list[tuple[int, str, str | None]] = [(0, name, member.head.get(name)) for name in ("base", "data")]
        for entry in sorted(member.head["rounds"], key=lambda entry: int(entry["round"])):
            named += [(entry["round"], stage, entry["stages"].get(stage)) for stage in ROUND_STAGES]
            measured = measured_objects(member.head, entry["round"])
            named += [(entry["round"], BENCHMARK, object_id) for object_id in measured.values()]
        for number, stage, object_id in _with_heldout(store, named):
            if object_id is None:
                continue
            if object_id in found:
                found[object_id]["runs"].append(member.run)
                continue
            record = read_record(store, object_id) or {}
            found[object_id] = {
                "round": number, "stage": stage, "object_id": object_id, "uri": store.uri(f"objects/{object_id}"),
                "seconds": record.get("seconds"), "created": record.get("created"), "runs": [member.run],
                "tokens": tokens_of(stage, record.get("metrics", {})), "paid": paid.get(object_id, 0.0),
                "inputs": record.get("inputs"), "versions": record.get("versions"),
            }  # fmt: skip
    return list(found.values())


def _with_heldout(store: Store, named: Sequence[tuple[int, str, str | None]]) -> Iterator[tuple[int, str, str | None]]:
    """The same, with the object of its held-out answers before each evaluation."""
    for number, stage, object_id in named:
        if stage == "evaluate" and object_id is not None:
            yield number, HELDOUT_ANSWERS, (read_record(store, object_id) or {}).get("inputs", {}).get("heldout")
        yield number, stage, object_id


def costs_of(variants: list[Variant], lineage: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per variant, the mean over its runs: seconds in each stage, tokens sampled and trained on, what judges were
    paid, and how much of the seconds is in objects that other runs of this comparison use too (`shared_seconds`; it
    was spent once). What an attempt took that was stopped is in none of the seconds."""
    found = []
    for variant in variants:
        runs = {member.run for member in variant.members}

        def per_run(lines: list[dict[str, Any]], key: str, runs: set[str] = runs) -> float:
            return sum((line[key] or 0.0) * len(runs & set(line["runs"])) for line in lines) / len(runs)

        def counted(lines: list[dict[str, Any]], runs: set[str] = runs) -> float | None:
            own = [line for line in lines if runs & set(line["runs"])]
            return None if any(line["tokens"] is None for line in own) else per_run(own, "tokens", runs)

        stages = {stage: [line for line in lineage if line["stage"] == stage] for stage in COST_STAGES}
        seconds = {stage: per_run(lines, "seconds") for stage, lines in stages.items()}
        shared = [line for lines in stages.values() for line in lines if len(line["runs"]) > 1]
        found.append(
            {
                "variant": variant.label,
                "runs": len(runs),
                "rounds": max(max(member.rounds, default=0) for member in variant.members),
                "seconds": seconds,
                "total_seconds": sum(seconds.values()),
                "shared_seconds": per_run(shared, "seconds"),
                "tokens": {
                    stage: counted(stages[stage]) for stage in ("generate", HELDOUT_ANSWERS, "train", "evaluate")
                },
                "paid": per_run(stages[BENCHMARK], "paid"),
            }
        )
    return found
