"""Files that every part of a benchmark leaves in its object.

Decides: the two files that reports and comparisons read. Leaves out: other files of single benchmarks.

    results.json   `BenchmarkResults` as JSON
    items.parquet  columns item (string), metric (string), value (float64): a row per question and metric. The
                   metrics are means of these values, so that two policies can be compared question by question
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from spinreg_core.evaluation.schema import BenchmarkResults
from spinreg_core.runs.job import Job
from spinreg_core.runs.plans import StagePlan

ITEMS_SCHEMA = pa.schema([("item", pa.string()), ("metric", pa.string()), ("value", pa.float64())])
Item = tuple[str, str, float]  # question, metric, value


class PartJob(TypedDict):
    """The fields of a part's job that differ from those of the job that measures several parts."""

    stage: str
    object_id: str
    key: dict[str, Any]
    inputs: dict[str, Any]
    extra: dict[str, Any]


def part_job(part: StagePlan | Job) -> PartJob:
    return {"stage": part.stage, "object_id": part.object_id, "key": part.key, "inputs": part.inputs,
            "extra": part.extra}  # fmt: skip


def write_part(folder: Path, results: BenchmarkResults, items: Sequence[Item]) -> dict[str, Any]:
    """Write `results.json` and `items.parquet` to `folder`; returns the metrics of the part's manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "results.json").write_text(text, encoding="utf-8")
    columns = [list(column) for column in zip(*items, strict=True)] if items else [[], [], []]
    pq.write_table(pa.table(columns, schema=ITEMS_SCHEMA), folder / "items.parquet")
    estimates = results["metrics"]
    values: dict[str, Any] = {name: estimate["value"] for name, estimate in estimates.items()}
    return values | {"intervals": {name: [e["low"], e["high"]] for name, e in estimates.items()}}
