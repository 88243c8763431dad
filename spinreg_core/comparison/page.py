"""The comparison of runs as one self-contained HTML page, as JSON and as a table, written to the store.

Decides: where they lie (`comparisons/<name>/`), the table's columns, and how its files get into the page.
Leaves out: every number and sentence (`compare.py`, `text.py`) and the looks (`comparison.html.jinja`).
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spinreg_core.comparison.compare import comparison_data
from spinreg_core.comparison.text import cells, counts_at, mark
from spinreg_core.evaluation.formatting import format_estimate
from spinreg_core.formatting import format_duration, json_safe
from spinreg_core.reports.templating import template
from spinreg_core.store.base import Store

_LARGEST_LINK = 2 * 2**20  # bytes of a table that the page carries
# One row for every value (`against` empty) and every paired difference.
TABLE_SCHEMA = pa.schema(
    [("metric", pa.string()), ("round", pa.int64()), ("variant", pa.string()), ("against", pa.string()),
     ("value", pa.float64()), ("low", pa.float64()), ("high", pa.float64()), ("spread", pa.float64()),
     ("corrected_low", pa.float64()), ("corrected_high", pa.float64()), ("p", pa.float64()),
     ("p_holm", pa.float64()), ("family", pa.string()), ("supported", pa.int64()), ("n", pa.int64()),
     ("seeds", pa.int64()), ("unit", pa.string())]
)  # fmt: skip


def write_comparison(
    store: Store,
    runs: Sequence[str],
    name: str | None = None,
    against: str | None = None,
    failed: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write comparisons/<name>/report.html, report.json, table.csv and table.parquet, over what was there.

    Returns their keys as `html`, `json`, `csv`, `parquet`, and the `data`. Raises as `comparison_data`.
    """
    data = json_safe(comparison_data(store, runs, against, name, failed))
    place = f"comparisons/{data['name']}"
    named = {"html": "report.html", "json": "report.json", "csv": "table.csv", "parquet": "table.parquet"}
    keys = {kind: f"{place}/{file}" for kind, file in named.items()}
    table = table_of(data)
    files = {"csv": csv_of(table), "parquet": parquet_of(table)}
    store.write(keys["csv"], files["csv"])
    store.write(keys["parquet"], files["parquet"])
    store.write(keys["json"], json.dumps(data, indent=1, allow_nan=False).encode())
    store.write(keys["html"], render(data, files).encode())
    return {**keys, "data": data}


def table_of(data: dict[str, Any]) -> pa.Table:
    """Values and differences of every metric, round and variant, with `TABLE_SCHEMA`."""
    rows = [{**one, "against": "", "seeds": len(one["values"])} for one in data["values"]]
    rows += [{**one, "seeds": len(one["values"])} for one in data["comparisons"]]
    return pa.Table.from_pylist([{name: row.get(name) for name in TABLE_SCHEMA.names} for row in rows], TABLE_SCHEMA)


def csv_of(table: pa.Table) -> bytes:
    """RFC 4180, UTF-8, floats in full. A text that a spreadsheet would take for a formula gets a quote before it."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(table.column_names)
    for row in table.to_pylist():
        writer.writerow([f"'{v}" if isinstance(v, str) and v[:1] in ("=", "+", "-", "@") else v for v in row.values()])
    return text.getvalue().encode()


def parquet_of(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def render(data: dict[str, Any], files: dict[str, bytes]) -> str:
    """The page: loads nothing from anywhere, and every text from the runs stays text. files: csv, parquet."""
    from plotly.offline import get_plotlyjs

    page = template("comparison.html.jinja", estimate=format_estimate, duration=format_duration, mark=mark)
    links = {kind: base64.b64encode(raw).decode() for kind, raw in files.items() if len(raw) <= _LARGEST_LINK}
    return page.render(data=data, cells=cells(data), counts_at=counts_at, links=links, plotly=get_plotlyjs())
