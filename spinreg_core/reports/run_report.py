"""The report of a run: one self-contained HTML page and the same as JSON, rebuilt from the store alone.

Decides: the content of a report, the sentences of its verdict, and the alarms. Leaves out: the metrics'
definitions (`evaluation`), tables as text (`tables`), and the look of the page (`templates`).

A report is a view. It can be written again at any time, also while the run is in progress.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq

from spinreg_core.benchmarks.registry import results_of
from spinreg_core.config import RunConfig
from spinreg_core.config.groups import GenerationConfig
from spinreg_core.evaluation.formatting import format_estimate, format_number
from spinreg_core.evaluation.heldout import metrics_of_round
from spinreg_core.evaluation.intervals import Estimate
from spinreg_core.evaluation.metrics import GAME, METRICS, PRIMARY, PRIMARY_REASON
from spinreg_core.evaluation.schema import RoundResults
from spinreg_core.formatting import flatten, format_bytes, format_duration, json_safe
from spinreg_core.reports.lineage import BENCHMARK, INPUTS, objects_of_run, tokens_of
from spinreg_core.reports.schema import Alarm, Lineage, Report, RunVerdict, Sample, WrittenReport
from spinreg_core.reports.tables import benchmark_of, benchmarks, counted
from spinreg_core.reports.templating import template
from spinreg_core.runs.fetch import fetch_file
from spinreg_core.runs.head import Head, require_config, require_head
from spinreg_core.runs.objects import read_manifest, versions
from spinreg_core.runs.stages import STAGES
from spinreg_core.selfplay import REMEDIES
from spinreg_core.store.base import Store
from spinreg_core.store.cache import pinned

SCHEMA = 1
FEW_ROWS = 30
HUMAN = {"answer_length": "human_answer_length", "distinct_2": "human_distinct_2"}


def write_report(store: Store, run: str) -> WrittenReport:
    """Write runs/<run>/report.html and report.json. Raises as `report_data`."""
    data = report_data(store, run)
    keys = {"html": f"runs/{run}/report.html", "json": f"runs/{run}/report.json"}
    store.write(keys["html"], render_report(data).encode())
    store.write(keys["json"], json.dumps(data, indent=1, allow_nan=False).encode())
    return {"html": keys["html"], "json": keys["json"], "data": data}


def render_report(data: Report) -> str:
    """Return the page. It loads nothing from anywhere, and every text from the run is escaped."""
    from plotly.offline import get_plotlyjs

    plotly = get_plotlyjs()
    assert "</script" not in plotly
    page = template("report.html.jinja", estimate=format_estimate, bytes=format_bytes, duration=format_duration)
    return page.render(
        data=data, plotly=plotly, leaves=flatten(data["config"]), benchmarks=benchmarks(data),
        benchmark_of=benchmark_of, counted=counted,
    )  # fmt: skip


def report_data(store: Store, run: str) -> Report:
    """Return the report of a run as plain JSON values.

    Estimates carry their unit (nats, tokens, shares) and 95 % interval. `seconds` are wall-clock seconds of the attempt
    that finished an object, `bytes` the size of its files. NaN and infinities become None.

    Raises:
        BadInput: the store has no such run.
        Removed: `spinreg gc` removed a file that the report needs.
        Damaged: a file or document of the run is missing or altered.
    """
    head, config = require_head(store, run), require_config(store, run)
    last = head.last_round
    # A flow's process shows reports for days; files that it has read must be free to leave the cache.
    with pinned():
        rounds = [_round(store, config, head, number) for number in range(last + 1)]
        samples = _samples(store, rounds)
    base = rounds[0]["metrics"] or {}
    human = {name: base.pop(source) for name, source in HUMAN.items() if source in base}
    data: Report = {
        "schema": SCHEMA,
        "spinreg": versions().get("spinreg"),
        "run": run,
        "store": store.url,
        "config": config.model_dump(mode="json"),
        "primary": {"metric": PRIMARY, "reason": PRIMARY_REASON},
        "definitions": METRICS,
        "game": GAME,
        "verdict": run_verdict(rounds),
        "alarms": alarms(rounds, config.evaluation.alarm_real_drop),
        "notes": run_notes(config.generation, head.ended_early),
        "rounds": rounds,
        "human": human,
        "samples": samples,
        "lineage": _lineage(store, head),
    }
    return json_safe(data)


def read_json(store: Store, object_id: str, name: str) -> Any:
    """Return the content of a JSON file of a finished object. Raises Damaged."""
    return json.loads(fetch_file(store, object_id, name).read_bytes())


def read_metrics(store: Store, config: RunConfig, object_id: str, number: int) -> dict[str, Estimate]:
    """Return the held-out metrics of an evaluated round of a run, with 95 % intervals.

    They are computed again from the scored rows, so that results of every version have the same kind of intervals.
    Raises Damaged.
    """
    rows = pq.read_table(fetch_file(store, object_id, "rows.parquet"))
    return metrics_of_round(rows, config, number)


def _round(store: Store, config: RunConfig, head: Head, number: int) -> RoundResults:
    stages = {stage: object_id for stage in STAGES if (object_id := head.stage(number, stage))}
    found: RoundResults = {
        "round": number, "stages": stages, "metrics": None, "benchmarks": results_of(store, config, head, number),
        "pairs": None, "training": None, "margins": None,
    }  # fmt: skip
    if "mix-opponent" in stages and (manifest := read_manifest(store, stages["mix-opponent"])) is not None:
        found["pairs"] = manifest.metrics
    if "evaluate" in stages:
        found["metrics"] = read_metrics(store, config, stages["evaluate"], number)
        found["margins"] = read_json(store, stages["evaluate"], "samples.json").get("margins")
    if "train" in stages:
        lines = fetch_file(store, stages["train"], "metrics.jsonl").read_text().splitlines()
        summary = read_json(store, stages["train"], "summary.json")
        found["training"] = {"steps": [json.loads(line) for line in lines], "summary": summary}
    return found


def _samples(store: Store, rounds: Sequence[RoundResults]) -> list[Sample]:
    """Return the sample prompts in the order of the data, each with the answer of every evaluated iterate."""
    found: dict[str, Sample] = {}
    for entry in rounds:
        if "evaluate" not in entry["stages"]:
            continue
        for one in read_json(store, entry["stages"]["evaluate"], "samples.json")["samples"]:
            prompt_id = one["prompt_id"]
            row = found.setdefault(
                prompt_id,
                {"prompt_id": prompt_id, "messages": one["messages"], "answer": one["answer"], "rounds": []},
            )
            told = {"text": one["sample"], "finish": one["finish"], "credit": one.get("credit")}
            row["rounds"].append({"round": entry["round"]} | told)
    return list(found.values())


def _lineage(store: Store, head: Head) -> list[Lineage]:
    lines: list[Lineage] = []
    for made in objects_of_run(store, head):
        manifest = made.record
        if manifest is None or made.stage == BENCHMARK:
            continue
        files = [file for file in manifest.files if file.key not in manifest.removed_keys]
        lines.append({
            "round": None if made.stage in INPUTS else made.round, "stage": made.stage, "object_id": made.object_id,
            "uri": store.uri(f"objects/{made.object_id}"), "inputs": manifest.inputs,
            "files": len(files), "removed": len(manifest.files) - len(files),
            "bytes": sum(file.size for file in files), "seconds": manifest.seconds, "tokens": tokens_of(made),
            "created": manifest.created, "writer": manifest.writer, "versions": manifest.versions,
        })  # fmt: skip
    return lines


def _supported(estimate: Estimate) -> int:
    """Return the sign of a difference if its 95 % interval excludes zero, else 0."""
    low, high = estimate["low"], estimate["high"]
    if low is None or high is None:
        return 0
    return 1 if low > 0 else -1 if high < 0 else 0


def _difference(estimate: Estimate) -> str:
    """Return `lower by 0.15 nats/token, 95 % interval [0.12, 0.18]`, with the sign turned to fit the word."""
    sign = -1 if estimate["value"] < 0 else 1
    word = "lower" if sign < 0 else "higher"
    low, high = estimate["low"], estimate["high"]
    by = f"{word} by {format_number(abs(estimate['value']), estimate)} {estimate['unit']}"
    if low is None or high is None:
        return f"{by} (one row has no interval)"
    bounds = sorted((sign * low, sign * high))
    return f"{by}, 95 % interval [{format_number(bounds[0], estimate)}, {format_number(bounds[1], estimate)}]"


def run_verdict(rounds: Sequence[RoundResults]) -> RunVerdict:
    """Return the verdict of the primary metric about the last evaluated round compared with the base.

    `outcome` is `improved` or `worse` if the paired 95 % interval excludes zero, `no difference` if it does not, and
    `none` before the first round is evaluated.
    """
    evaluated = [(entry["round"], metrics) for entry in rounds if (metrics := entry["metrics"])]
    if not evaluated or evaluated[-1][0] == 0:
        text = "Only the base model has been evaluated so far." if evaluated else "Nothing has been evaluated yet."
        return {"outcome": "none", "round": None, "headline": text, "sentences": []}
    number, metrics = evaluated[-1]
    change, value = metrics["nll_vs_base"], metrics[PRIMARY]
    sign = _supported(change)
    outcome, headline = {
        -1: ("improved", f"Round {number} predicts held-out human answers better than the base model."),
        1: ("worse", f"Round {number} predicts held-out human answers worse than the base model."),
        0: ("no difference", f"No difference between round {number} and the base model is supported."),
    }[sign]
    # Both values come from the same rows, so the base's value is the last round's without the paired change.
    base = format_number(value["value"] - change["value"], value)
    sentences = [
        f"Held-out negative log-likelihood after round {number} is {format_estimate(value)} {value['unit']}, compared "
        f"with {base} for the base model: {_difference(change)}, paired over {change['n']} rows. "
        + ("The interval excludes zero." if sign else "The interval contains zero, so this may be chance.")
    ]
    if number > 1:
        step = metrics["nll_vs_previous"]
        sentences.append(
            f"Compared with round {number - 1} it is {_difference(step)}"
            + ("." if _supported(step) else ", which these rows cannot distinguish from no change.")
        )
    sentences += few_rows(change["n"])
    sentences.append(
        "The interval covers the choice of held-out rows; another training seed would change the numbers too. "
        "The metric measures how likely human answers are, not how good sampled answers are."
    )
    return {"outcome": outcome, "round": number, "headline": headline, "sentences": sentences}


def alarms(rounds: Sequence[RoundResults], level: float = 0.0) -> list[Alarm]:
    """Return the alarms: human answers became less likely in training or held out, or a KL is negative.

    level: rise of the held-out NLL in one round that is tolerated (nats/token).
    """
    found: list[Alarm] = []
    for entry in rounds:
        number, training = entry["round"], entry["training"]
        told = training["summary"].get("alarms", []) if training else []
        found += [{"round": number, "where": "training", "text": text} for text in told]
        found += heldout_alarms(number, entry["metrics"] or {}, level)
    return found


def heldout_alarms(number: int, metrics: Mapping[str, Estimate], level: float) -> list[Alarm]:
    """Return the alarms that a round's held-out metrics raise. level: as for `alarms`."""
    found: list[Alarm] = []
    step = metrics.get("nll_vs_previous")
    if step is not None and step["low"] is not None and step["low"] > level:
        against = "the base model" if number == 1 else f"round {number - 1}"
        text = (
            f"Held-out human answers became less likely than under {against}: their NLL is {_difference(step)}. "
            f"Regularisation is meant to prevent this instability: {REMEDIES}."
        )
        found.append({"round": number, "where": "held-out rows", "text": text})
    for against in ("base", "previous"):
        kl = metrics.get(f"kl_{against}")
        if kl is not None and _supported(kl) < 0:
            text = (
                f"The KL to the {against} policy is negative ({format_estimate(kl)} {kl['unit']}), which hardly ever "
                "happens with a policy's own samples. Unless it is close to zero, the sampled policy is not the scored "
                "one. Check generation.dtype (bfloat16 rounds small steps away), temperature, top_p and top_k."
            )
            found.append({"round": number, "where": "samples", "text": text})
    return found


def run_notes(sampler: GenerationConfig, ended: str | None) -> list[str]:
    """Return the limits of a run's numbers, as sentences. ended: why it ended early, or None."""
    return [
        *([] if ended is None else [f"The run {ended}."]),
        *sample_notes([sampler.model_dump()]),
        f"Sampled answers are cut after {sampler.max_new_tokens} tokens, so answer length and KL are those of cut "
        "answers. Reward accuracy compares them with whole human answers.",
    ]


def sample_notes(samplers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the limits of numbers about sampled answers. samplers: temperature, top_p, top_k."""
    found = []
    odd = [one for one in samplers if (one["temperature"], one["top_p"], one["top_k"]) != (1, 1, 0)]
    if odd:
        told = [f"temperature {one['temperature']}, top-p {one['top_p']}, top-k {one['top_k']}" for one in odd]
        found.append(
            f"Answers{' of some runs' if len(odd) < len(samplers) else ''} were sampled with "
            f"{' or '.join(dict.fromkeys(told))}: this is not the policy itself, so KL describes these samples only."
        )
    return found


def few_rows(rows: int) -> list[str]:
    """Return a warning about intervals if there are too few held-out rows, otherwise an empty list."""
    if rows >= FEW_ROWS:
        return []
    return [f"With {rows} held-out rows intervals are too narrow: up to 9 % of them miss the truth at 20 rows, instead "
            f"of 5 %. Use at least {FEW_ROWS}."]  # fmt: skip
