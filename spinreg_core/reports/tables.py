"""The metrics of a run as a table: for the terminal, for Markdown, for Prefect's table artifact.

Decides: the lines of the table and their titles; the primary metric and the better direction are marked everywhere.
Leaves out: the numbers (`run_report`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spinreg_core.evaluation.formatting import ARROWS, counts, format_estimate, label
from spinreg_core.evaluation.intervals import Estimate
from spinreg_core.evaluation.metrics import METRICS, PRIMARY
from spinreg_core.evaluation.schema import RoundResults, StoredBenchmark
from spinreg_core.formatting import markdown_table, text_table, wrap
from spinreg_core.reports.schema import Report


@dataclass(frozen=True)
class _Line:
    """A metric or benchmark and its cell in every evaluated round. `title` also says the number of rows."""

    short: str
    title: str
    better: str
    cells: list[str]
    primary: bool = False


def round_name(number: int) -> str:
    return "base" if number == 0 else f"round {number}"


def counted(data: Report, name: str) -> str:
    """Return the number of rows that a metric is about, as `n 64`."""
    return counts(metrics.get(name) for metrics in _evaluated(data).values())


def benchmarks(data: Report) -> list[tuple[str, str]]:
    """Return (kind, name) of every benchmark of any round, in the order of the rounds' lists."""
    return list(dict.fromkeys((part["kind"], part["name"]) for entry in data["rounds"] for part in entry["benchmarks"]))


def benchmark_of(entry: RoundResults, kind: str, name: str) -> StoredBenchmark | None:
    """Return a round's results of a benchmark, or None if the round was not measured with it."""
    return next((part for part in entry["benchmarks"] if (part["kind"], part["name"]) == (kind, name)), None)


def metrics_table(data: Report) -> str:
    """Return plain text: a line per metric and benchmark, a column per round; then the verdict and the alarms."""
    rows = [["", *_names(data)], *([line.short, *line.cells] for line in _lines(data))]
    by_n: dict[str, list[str]] = {}
    for name in _shown(data):
        by_n.setdefault(counted(data, name), []).append(METRICS[name]["label"])
    rows_of = "; ".join(n if len(by_n) == 1 else f"{n}: {', '.join(names)}" for n, names in by_n.items())
    texts = [*_legend(data), f"Rows: {rows_of}.", "", data["verdict"]["headline"], *data["verdict"]["sentences"]]
    texts += [f"ALARM, round {alarm['round']}, {alarm['where']}: {alarm['text']}" for alarm in data["alarms"]]
    return "\n".join([*text_table(rows), *wrap(texts)])


def metrics_markdown(data: Report) -> str:
    """Return Markdown: the verdict, the alarms, then the table with a line per metric and a column per round."""
    lines = [f"**{data['verdict']['headline']}**", "", " ".join(data["verdict"]["sentences"]), ""]
    for alarm in data["alarms"]:
        text = " ".join(alarm["text"].split())
        lines += [f"> **Alarm, round {alarm['round']}, {alarm['where']}.** {text}", ""]
    if names := _names(data):
        rows = [["metric", *names]]
        for line in _lines(data):
            title = line.title.replace("*", "\\*")
            rows.append([f"**{title}**" if line.primary else title, *line.cells])
        lines += [*markdown_table(rows), "", *(line.replace("*", "\\*") + "  " for line in _legend(data))]
    return "\n".join(lines).strip() + "\n"


def metrics_rows(data: Report) -> list[dict[str, str]]:
    """Return rows for a table artifact: the metric or benchmark, its better direction, and a column per round."""
    return [
        {"metric": line.title, "better": line.better, **dict(zip(_names(data), line.cells, strict=True))}
        for line in _lines(data)
    ]


def link(uri: str) -> str:
    """Return a Markdown link to a place in the store, its address as the text."""
    return f"[`{uri}`]({uri if '://' in uri else Path(uri).as_uri()})"


def _evaluated(data: Report) -> dict[int, dict[str, Estimate]]:
    return {entry["round"]: metrics for entry in data["rounds"] if (metrics := entry["metrics"])}


def _names(data: Report) -> list[str]:
    return [round_name(number) for number in _evaluated(data)]


def _shown(data: Report) -> list[str]:
    """Return the metrics that are defined for any round, in the order of `METRICS`."""
    return [name for name in METRICS if any(name in metrics for metrics in _evaluated(data).values())]


def _legend(data: Report) -> list[str]:
    return [
        "↓ lower is better, ↑ higher is better, no arrow: neither. [ ] 95 % interval over held-out rows.",
        f"* primary metric. {data['primary']['reason']}",
    ]


def _lines(data: Report) -> list[_Line]:
    evaluated, lines = _evaluated(data), []
    for name in _shown(data):
        cells = [format_estimate(metrics.get(name)) or "-" for metrics in evaluated.values()]
        better = METRICS[name]["better"] or ""
        lines.append(_Line(label(name), label(name, counted(data, name)), better, cells, name == PRIMARY))
    for kind, name in benchmarks(data):
        found = {entry["round"]: part for entry in data["rounds"] if (part := benchmark_of(entry, kind, name))}
        *_, last = found.values()
        numbers = {number: part["metrics"][part["primary"]] for number, part in found.items()}
        title = f"{name} {last['primary']} {ARROWS[last['better']]} ({kind}, {counts(numbers.values())})"
        cells = [format_estimate(numbers.get(number)) or "-" for number in evaluated]
        lines.append(_Line(title, title, last["better"], cells))
    return lines
