"""The comparison of runs as one self-contained HTML page, as JSON and as a table, written to the store.

Decides: the place of the files (`comparisons/<name>/`), the columns of the table, and its download links in the page.
Leaves out: every number and sentence (`compare`, `wording`) and the look of the page (`reports/templates`).
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from spinreg_core.comparison.compare import compare
from spinreg_core.comparison.schema import Comparison, Numbers, WrittenComparison
from spinreg_core.comparison.wording import cells, counts_at, mark
from spinreg_core.evaluation.formatting import format_estimate
from spinreg_core.formatting import format_duration, json_safe
from spinreg_core.reports.templating import template
from spinreg_core.store.base import Store

_LARGEST_LINK = 2 * 2**20  # bytes
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
) -> WrittenComparison:
    """Write comparisons/<name>/report.html, report.json, table.csv and table.parquet, over older ones.

    Return their keys and the comparison, with None in place of NaN and infinities. Arguments and errors as `compare`.
    """
    data: Comparison = json_safe(compare(store, runs, against, name, failed))
    place = f"comparisons/{data['name']}"
    table = table_of(data)
    files = {"csv": csv_of(table), "parquet": parquet_of(table)}
    store.write(f"{place}/table.csv", files["csv"])
    store.write(f"{place}/table.parquet", files["parquet"])
    store.write(f"{place}/report.json", json.dumps(data, indent=1, allow_nan=False).encode())
    store.write(f"{place}/report.html", render_comparison(data, files).encode())
    return {
        "html": f"{place}/report.html", "json": f"{place}/report.json",
        "csv": f"{place}/table.csv", "parquet": f"{place}/table.parquet", "data": data,
    }  # fmt: skip


def table_of(data: Numbers) -> pa.Table:
    """Return the values and differences of every metric, round and variant, with `TABLE_SCHEMA`."""
    numbers = [*data["values"], *data["comparisons"]]
    rows = [{"against": "", **one, "seeds": len(one["values"])} for one in numbers]
    return pa.Table.from_pylist([{name: row.get(name) for name in TABLE_SCHEMA.names} for row in rows], TABLE_SCHEMA)


def csv_of(table: pa.Table) -> bytes:
    """Return a table as CSV: RFC 4180, UTF-8, floats in full.

    A quote is put before text that a spreadsheet would run as a formula.
    """
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


def render_comparison(data: Comparison, files: dict[str, bytes]) -> str:
    """Return the page. It loads nothing from anywhere, and every text from the runs is escaped.

    files: content of the table by kind (csv, parquet); small ones become links in the page.
    """
    from plotly.offline import get_plotlyjs

    page = template("comparison.html.jinja", estimate=format_estimate, duration=format_duration, mark=mark)
    links = {kind: base64.b64encode(raw).decode() for kind, raw in files.items() if len(raw) <= _LARGEST_LINK}
    return page.render(data=data, cells=cells(data), counts_at=counts_at, links=links, plotly=get_plotlyjs())
