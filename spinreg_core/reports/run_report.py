"""The report of a run: one self-contained HTML page and the same as JSON, rebuilt from the store alone.

Decides: what is shown of a run, the sentences of the verdict, and what raises an alarm. Leaves out: the
metrics' definitions (`evaluation/metrics.py`), tables as text (`tables.py`), and the page's looks
(`report.html.jinja`).

A report is a view: it can be written again at any time, also while the run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from spinreg_core.benchmarks.registry import results_of
from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput
from spinreg_core.evaluation.early_stopping import ended_early
from spinreg_core.evaluation.formatting import format_estimate, format_number
from spinreg_core.evaluation.intervals import Estimate
from spinreg_core.evaluation.metrics import GAME, METRICS, PRIMARY, PRIMARY_REASON
from spinreg_core.formatting import flatten, format_bytes, format_duration, json_safe
from spinreg_core.reports.tables import benchmark_of, benchmarks, counted
from spinreg_core.reports.templating import template
from spinreg_core.runs.fetch import fetch_file
from spinreg_core.runs.head import ROUND_STAGES, list_runs, read_config, read_head, stage_object
from spinreg_core.runs.objects import read_manifest, read_record, removed_keys, versions
from spinreg_core.selfplay import REMEDIES
from spinreg_core.store.base import Store
from spinreg_core.store.cache import pinned

SCHEMA = 1
HELDOUT_ANSWERS = "generate (held-out)"  # what the tables call the answers that an evaluation sampled
HUMAN = {"answer_length": "human_answer_length", "distinct_2": "human_distinct_2"}


def write_report(store: Store, run: str) -> dict[str, Any]:
    """Write runs/<run>/report.html and report.json; returns their keys as `html`, `json`, and the `data`."""
    html, data = build_report(store, run)
    keys = {"html": f"runs/{run}/report.html", "json": f"runs/{run}/report.json"}
    store.write(keys["html"], html.encode())
    store.write(keys["json"], json.dumps(data, indent=1, allow_nan=False).encode())
    return {**keys, "data": data}


def build_report(store: Store, run: str) -> tuple[str, dict[str, Any]]:
    """The page and its data. Raises BadInput where there is no such run, Damaged where a file is."""
    data = report_data(store, run)
    return render(data), data


def render(data: dict[str, Any]) -> str:
    """The page: loads nothing from anywhere, and every text from the run stays text."""
    from plotly.offline import get_plotlyjs

    plotly = get_plotlyjs()
    assert "</script" not in plotly
    page = template("report.html.jinja", estimate=format_estimate, bytes=format_bytes, duration=format_duration)
    return page.render(
        data=data,
        plotly=plotly,
        leaves=flatten(data["config"]),
        benchmarks=benchmarks(data),
        benchmark_of=benchmark_of,
        counted=counted,
    )


def read_run(store: Store, run: str) -> tuple[dict[str, Any], RunConfig]:
    """Head and configuration of a run. Raises BadInput where there is no such run."""
    head, config = read_head(store, run), read_config(store, run)
    if head is None or config is None:
        known = ", ".join(list_runs(store)) or "none"
        raise BadInput(f"run {run!r} in {store.url}", "no such run", f"one of the store's runs ({known})")
    return head, config


def report_data(store: Store, run: str) -> dict[str, Any]:
    """Everything the report says, as plain JSON values (no NaN). Raises BadInput where there is no such run."""
    head, config = read_run(store, run)
    last = max((entry["round"] for entry in head["rounds"]), default=0)
    with pinned():  # a flow's process shows reports for days
        rounds = [_round(store, config, head, number) for number in range(last + 1)]
        samples = _samples(store, head, last)
    base = rounds[0]["metrics"] or {}
    human = {name: base.pop(source) for name, source in HUMAN.items() if source in base}
    data = {
        "schema": SCHEMA,
        "spinreg": versions().get("spinreg"),
        "run": run,
        "store": store.url,
        "config": config.model_dump(mode="json"),
        "primary": {"metric": PRIMARY, "reason": PRIMARY_REASON},
        "definitions": {name: asdict(metric) for name, metric in METRICS.items()},
        "game": {name: asdict(metric) for name, metric in GAME.items()},
        "verdict": verdict(rounds),
        "alarms": alarms(rounds, config.evaluation.alarm_real_drop),
        "notes": notes(config.model_dump(mode="json"), rounds, ended_early(head)),
        "rounds": rounds,
        "human": human,
        "samples": samples,
        "lineage": _lineage(store, head, last),
    }
    return json_safe(data)


def _round(store: Store, config: RunConfig, head: dict[str, Any], number: int) -> dict[str, Any]:
    """What one round left: its objects, held-out metrics, benchmarks, pairs and training curve; None for what is not
    there yet."""
    stages = {stage: object_id for stage in ROUND_STAGES if (object_id := stage_object(head, number, stage))}
    metrics = training = pairs = margins = None
    if "mix-opponent" in stages and (manifest := read_manifest(store, stages["mix-opponent"])) is not None:
        pairs = manifest["metrics"]
    if "evaluate" in stages:
        metrics = json.loads(fetch_file(store, stages["evaluate"], "metrics.json").read_bytes())
        margins = json.loads(fetch_file(store, stages["evaluate"], "samples.json").read_bytes()).get("margins")
    if "train" in stages:
        lines = fetch_file(store, stages["train"], "metrics.jsonl").read_text().splitlines()
        summary = json.loads(fetch_file(store, stages["train"], "summary.json").read_bytes())
        training = {"steps": [json.loads(line) for line in lines], "summary": summary}
    measured = [
        found | {"uri": store.uri(f"objects/{found['object_id']}")} for found in results_of(store, config, head, number)
    ]
    return {
        "round": number, "stages": stages, "metrics": metrics, "benchmarks": measured, "pairs": pairs,
        "training": training, "margins": margins,
    }  # fmt: skip


def _samples(store: Store, head: dict[str, Any], last: int) -> list[dict[str, Any]]:
    """The base's sample prompts, each with the human answer and the answer of every iterate."""
    found: dict[str, dict[str, Any]] = {}
    for number in range(last + 1):
        object_id = stage_object(head, number, "evaluate")
        if object_id is None:
            continue
        for sample in json.loads(fetch_file(store, object_id, "samples.json").read_bytes())["samples"]:
            row = found.setdefault(
                sample["prompt_id"],
                {
                    "prompt_id": sample["prompt_id"],
                    "messages": sample["messages"],
                    "answer": sample["answer"],
                    "rounds": [],
                },
            )
            row["rounds"].append(
                {"round": number, "text": sample["sample"], "finish": sample["finish"], "credit": sample.get("credit")}
            )
    return list(found.values())


def _lineage(store: Store, head: dict[str, Any], last: int) -> list[dict[str, Any]]:
    """One line per object of the run, in the order they were made from each other."""
    named: list[tuple[int | None, str, str | None]] = [(None, name, head.get(name)) for name in ("base", "data")]
    for number in range(last + 1):
        named += [(number, stage, stage_object(head, number, stage)) for stage in ROUND_STAGES]
    lines: list[dict[str, Any]] = []
    while named:
        made_in, stage, object_id = named.pop(0)
        manifest = read_record(store, object_id) if object_id else None
        if manifest is None:
            continue
        removed = removed_keys(manifest)
        files = [entry for entry in manifest["files"] if entry["key"] not in removed]
        if stage == "evaluate":
            named.insert(0, (made_in, HELDOUT_ANSWERS, manifest["inputs"].get("heldout")))
        lines.append(
            {
                "round": made_in,
                "stage": stage,
                "object_id": object_id,
                "uri": store.uri(f"objects/{object_id}"),
                "inputs": manifest["inputs"],
                "files": len(files),
                "removed": len(manifest["files"]) - len(files),
                "bytes": sum(entry["size"] for entry in files),
                "seconds": manifest["seconds"],
                "tokens": tokens_of(stage, manifest["metrics"]),
                "created": manifest["created"],
                "writer": manifest["writer"],
                "versions": manifest["versions"],
            }
        )
    return lines


def tokens_of(stage: str, metrics: dict[str, Any]) -> float | None:
    """Tokens sampled by a generate object, passed through by a train object, or of answers that an evaluation scored;
    None where nobody counted."""
    if stage in ("generate", HELDOUT_ANSWERS):
        return metrics.get("tokens")
    if stage == "evaluate":
        return metrics.get("tokens_scored")
    if stage == "train" and {"tokens_per_second", "seconds"} <= metrics.keys():
        return float(round(metrics["tokens_per_second"] * metrics["seconds"]))
    return None


def _supported(estimate: Estimate) -> int:
    """Sign of a difference whose 95 % interval excludes zero; 0 where it does not."""
    low, high = estimate["low"], estimate["high"]
    if low is None or high is None:
        return 0
    return 1 if low > 0 else -1 if high < 0 else 0


def _difference(estimate: Estimate) -> str:
    """`lower by 0.15 nats/token, 95 % interval [0.12, 0.18]`, with the sign turned to fit the word."""
    sign = -1 if estimate["value"] < 0 else 1
    word = "lower" if sign < 0 else "higher"
    low, high = estimate["low"], estimate["high"]
    by = f"{word} by {format_number(abs(estimate['value']), estimate)} {estimate['unit']}"
    if low is None or high is None:
        return f"{by} (one row has no interval)"
    bounds = sorted((sign * low, sign * high))
    return f"{by}, 95 % interval [{format_number(bounds[0], estimate)}, {format_number(bounds[1], estimate)}]"


def verdict(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """What the primary metric says about the last evaluated round against the base, in plain sentences.

    outcome: `improved` or `worse` where the paired 95 % interval excludes zero, `no difference` where it does
    not, `none` before the first round is evaluated.
    """
    evaluated = [entry for entry in rounds if entry["metrics"]]
    if not evaluated or evaluated[-1]["round"] == 0:
        text = "Only the base model has been evaluated so far." if evaluated else "Nothing has been evaluated yet."
        return {"outcome": "none", "round": None, "headline": text, "sentences": []}
    last = evaluated[-1]
    number, metrics = last["round"], last["metrics"]
    change, value = metrics["nll_vs_base"], metrics[PRIMARY]
    sign = _supported(change)
    outcome = {-1: "improved", 1: "worse", 0: "no difference"}[sign]
    headline = {
        -1: f"Round {number} predicts held-out human answers better than the base model.",
        1: f"Round {number} predicts held-out human answers worse than the base model.",
        0: f"No difference between round {number} and the base model is supported.",
    }[sign]
    # The base's value is the last one's without the paired change: both come from the same rows.
    base = format_number(value["value"] - change["value"], value)
    sentences = [
        f"Held-out negative log-likelihood after round {number} is {format_estimate(value)} {value['unit']}, against "
        f"{base} for the base model: {_difference(change)}, paired over {change['n']} rows. "
        + ("The interval excludes zero." if sign else "The interval contains zero, so this may be chance.")
    ]
    if number > 1:
        step = metrics["nll_vs_previous"]
        sentences.append(
            f"Against round {number - 1} it is {_difference(step)}"
            + ("." if _supported(step) else ", which these rows cannot tell from no change.")
        )
    sentences.append(
        "The interval is about which rows were held out; another training seed would move the numbers too. "
        "It is about human answers being more or less likely, not about how sampled answers are liked."
    )
    return {"outcome": outcome, "round": number, "headline": headline, "sentences": sentences}


def alarms(rounds: list[dict[str, Any]], level: float = 0.0) -> list[dict[str, Any]]:
    """What a user must see: human answers that became less likely, held out or while training.

    level: rise of the held-out NLL in one round that is put up with (nats/token).
    """
    found = []
    for entry in rounds:
        number, metrics, training = entry["round"], entry["metrics"] or {}, entry["training"] or {}
        for text in training.get("summary", {}).get("alarms", []):
            found.append({"round": number, "where": "training", "text": text})
        step = metrics.get("nll_vs_previous")
        if step is not None and step["low"] is not None and step["low"] > level:
            against = "the base model" if number == 1 else f"round {number - 1}"
            text = (
                f"Held-out human answers became less likely than under {against}: their NLL is {_difference(step)}. "
                f"This is the instability that regularisation is for: {REMEDIES}."
            )
            found.append({"round": number, "where": "held-out rows", "text": text})
        for name, against in (("kl_base", "base"), ("kl_previous", "previous")):
            kl = metrics.get(name)
            if kl is not None and _supported(kl) < 0:
                text = (
                    f"The KL to the {against} policy comes out negative ({format_estimate(kl)} {kl['unit']}), which a "
                    "policy's own samples hardly ever do: unless it is next to nothing, the sampled policy is not the "
                    "scored one. Look at generation.dtype (bfloat16 rounds small steps away), temperature, top_p and "
                    "top_k."
                )
                found.append({"round": number, "where": "samples", "text": text})
    return found


def notes(config: dict[str, Any], rounds: list[dict[str, Any]], ended: str | None) -> list[str]:
    """What limits the numbers of this run, and why it ended early."""
    sampler = config["generation"]
    rows = next((entry["metrics"][PRIMARY]["n"] for entry in rounds if entry["metrics"]), None)
    return [
        *([] if ended is None else [f"The run {ended}."]),
        *sample_notes([sampler], rows),
        f"Sampled answers end after {sampler['max_new_tokens']} tokens at the latest: answer length and KL are "
        "those of answers cut there. Reward accuracy compares them with whole human answers.",
    ]


def sample_notes(samplers: Sequence[Mapping[str, Any]], rows: int | None) -> list[str]:
    """What limits numbers about answers that were sampled so (temperature, top_p, top_k), on so many held-out rows."""
    found = []
    odd = [one for one in samplers if (one["temperature"], one["top_p"], one["top_k"]) != (1, 1, 0)]
    if odd:
        told = [f"temperature {one['temperature']}, top-p {one['top_p']}, top-k {one['top_k']}" for one in odd]
        found.append(
            f"Answers{' of some runs' if len(odd) < len(samplers) else ''} were sampled with "
            f"{' or '.join(dict.fromkeys(told))}: that is not the policy itself, so KL is about these samples only."
        )
    if rows is not None and rows < 30:
        found.append(f"With {rows} held-out rows the bootstrap intervals are too narrow; take at least 30.")
    return found
