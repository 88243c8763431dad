"""The metrics of a run as a table: for the terminal, for Markdown, for Prefect's table artifact.

Decides: how a number and its interval are written, and that the primary metric and the better direction are
marked everywhere. Leaves out: the numbers (`report.report_data`).
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from spinreg_core.evaluation.formatting import ARROWS, counts, format_estimate, label
from spinreg_core.evaluation.metrics import METRICS, PRIMARY

_COLUMNS = 110  # of a terminal
_PER_BLOCK = 3  # rounds side by side


def round_name(number: int) -> str:
    return "base" if number == 0 else f"round {number}"


def _evaluated(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in data["rounds"] if entry["metrics"]]


def _shown(data: dict[str, Any]) -> list[str]:
    """The metrics that are defined for any round, in the order of `METRICS`."""
    return [name for name in METRICS if any(name in entry["metrics"] for entry in _evaluated(data))]


def counted(data: dict[str, Any], name: str) -> str:
    """How many rows a metric of a report is about, as `counts`."""
    return counts(entry["metrics"].get(name) for entry in _evaluated(data))


def legend(data: dict[str, Any]) -> list[str]:
    """What the marks mean, in lines for people."""
    return [
        "↓ lower is better, ↑ higher is better, no arrow: neither by itself. [ ] 95 % interval over held-out rows.",
        f"* primary metric. {data['primary']['reason']}",
    ]


def _cells(data: dict[str, Any], name: str) -> list[str]:
    return [format_estimate(entry["metrics"].get(name)) or "-" for entry in _evaluated(data)]


def metrics_table(data: dict[str, Any]) -> str:
    """Plain text: one line per metric and benchmark, one column per round, in blocks of three rounds; then verdict and
    alarms."""
    evaluated = _evaluated(data)
    lines = []
    for start in range(0, len(evaluated), _PER_BLOCK):
        block = slice(start, start + _PER_BLOCK)
        rows = [["", *(round_name(entry["round"]) for entry in evaluated[block])]]
        rows += [[label(name), *_cells(data, name)[block]] for name in _shown(data)]
        rows += [[benchmark_label(data, *one), *_benchmark_cells(data, *one)[block]] for one in benchmarks(data)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        lines.append("")
    by_n: dict[str, list[str]] = {}
    for name in _shown(data):
        by_n.setdefault(counted(data, name), []).append(METRICS[name].label)
    rows_of = "; ".join(n if len(by_n) == 1 else f"{n}: {', '.join(names)}" for n, names in by_n.items())
    texts = [*legend(data), f"Rows: {rows_of}.", "", data["verdict"]["headline"], *data["verdict"]["sentences"]]
    texts += [f"ALARM, round {alarm['round']}, {alarm['where']}: {alarm['text']}" for alarm in data["alarms"]]
    return "\n".join([*lines, *(textwrap.fill(text, _COLUMNS) for text in texts)])


def metrics_markdown(data: dict[str, Any]) -> str:
    """Markdown: verdict, alarms, then a table with one line per metric and benchmark and one column per round."""
    evaluated = _evaluated(data)
    lines = [f"**{data['verdict']['headline']}**", "", " ".join(data["verdict"]["sentences"]), ""]
    for alarm in data["alarms"]:
        lines += [f"> **Alarm, round {alarm['round']}, {alarm['where']}.** {_one_line(alarm['text'])}", ""]
    if evaluated:
        lines.append("| metric | " + " | ".join(round_name(entry["round"]) for entry in evaluated) + " |")
        lines.append("|---|" + "---|" * len(evaluated))
        for name in _shown(data):
            title = label(name, counted(data, name)).replace("*", "\\*")
            lines.append(f"| {f'**{title}**' if name == PRIMARY else title} | " + " | ".join(_cells(data, name)) + " |")
        for one in benchmarks(data):
            title = benchmark_label(data, *one).replace("|", "\\|")
            lines.append(f"| {title} | " + " | ".join(_benchmark_cells(data, *one)) + " |")
        lines += ["", *(line.replace("*", "\\*") + "  " for line in legend(data))]
    return "\n".join(lines).strip() + "\n"


def metrics_rows(data: dict[str, Any]) -> list[dict[str, str]]:
    """For a table artifact: one mapping per metric and benchmark, with its direction and one column per round."""
    names = [round_name(entry["round"]) for entry in _evaluated(data)]
    rows = [
        {
            "metric": label(name, counted(data, name)),
            "better": METRICS[name].better or "",
            **dict(zip(names, _cells(data, name), strict=True)),
        }
        for name in _shown(data)
    ]
    for one in benchmarks(data):
        found = next(part for entry in data["rounds"] if (part := benchmark_of(entry, *one)))
        cells = dict(zip(names, _benchmark_cells(data, *one), strict=True))
        rows.append({"metric": benchmark_label(data, *one), "better": found["better"], **cells})
    return rows


def benchmarks(data: dict[str, Any]) -> list[tuple[str, str]]:
    """(kind, name) of every benchmark that any round was measured with, in the order of the rounds' lists."""
    found = ((part["kind"], part["name"]) for entry in data["rounds"] for part in entry.get("benchmarks", ()))
    return list(dict.fromkeys(found))


def benchmark_of(entry: dict[str, Any], kind: str, name: str) -> dict[str, Any] | None:
    """A round's results of a benchmark, or None where it was not measured."""
    parts = entry.get("benchmarks", ())
    return next((part for part in parts if (part["kind"], part["name"]) == (kind, name)), None)


def benchmark_label(data: dict[str, Any], kind: str, name: str) -> str:
    """`gsm8k exact_match ↑ (lm-eval, n 1319)`: its primary metric, and the questions it was measured on."""
    parts = [part for entry in data["rounds"] if (part := benchmark_of(entry, kind, name))]
    primary, better = parts[-1]["primary"], parts[-1]["better"]
    return f"{name} {primary} {ARROWS[better]} ({kind}, {counts(part['metrics'][part['primary']] for part in parts)})"


def _benchmark_cells(data: dict[str, Any], kind: str, name: str) -> list[str]:
    parts = [benchmark_of(entry, kind, name) for entry in _evaluated(data)]
    return [format_estimate(part["metrics"][part["primary"]]) if part else "-" for part in parts]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def link(uri: str) -> str:
    """A Markdown link to a place in the store, its address as the text."""
    return f"[`{uri}`]({uri if '://' in uri else Path(uri).as_uri()})"
