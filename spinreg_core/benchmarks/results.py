"""What every part of a benchmark leaves in its object, whatever measured it.

Decides: the two files, which the report and comparisons read:

    results.json   {"kind": lm-eval | mt-bench | win-rate, "name", "primary": the metric that counts,
                   "better": higher | lower, "metrics": {name: Estimate}, "settings": {...},
                   "fingerprints": {"policy", "data", "prompts"}, "versions": {...}, "cost": {"seconds", ...}}
    items.parquet  columns item (string), metric (string), value (float64): what the metrics are means of, a row for
                   each question and metric, so that two policies can be compared question by question

Leaves out: whatever else a part keeps (`lm_eval.py`, `mt_bench.py`, `win_rate.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spinreg_core.evaluation.intervals import Estimate

ITEMS_SCHEMA = pa.schema([("item", pa.string()), ("metric", pa.string()), ("value", pa.float64())])


def write_part(folder: Path, document: dict[str, Any], items: Sequence[tuple[str, str, float]]) -> dict[str, Any]:
    """Write `results.json` and `items.parquet` to `folder`; returns the metrics of the part's manifest.

    items: (item, metric, value), one for each question and metric.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "results.json").write_text(text, encoding="utf-8")
    columns = [list(column) for column in zip(*items, strict=True)] if items else [[], [], []]
    pq.write_table(pa.table(columns, schema=ITEMS_SCHEMA), folder / "items.parquet")
    estimates: dict[str, Estimate] = document["metrics"]
    values: dict[str, Any] = {name: estimate["value"] for name, estimate in estimates.items()}
    return values | {"intervals": {name: [e["low"], e["high"]] for name, e in estimates.items()}}
