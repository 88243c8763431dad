"""The objects a run is made of, in the order in which they were made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from spinreg_core.runs.head import ROUND_STAGES
from spinreg_core.runs.objects import read_record
from spinreg_core.runs.plans import measured_objects
from spinreg_core.store.base import Store

HELDOUT_ANSWERS = "generate (held-out)"  # the tables' name for the answers that an evaluation sampled
BENCHMARK = "benchmark"
INPUTS = ("base", "data")


class Made(NamedTuple):
    """An object of a run. `record` is its manifest, empty where that is gone. Base and data are made in round 0."""

    round: int
    stage: str
    object_id: str
    record: dict[str, Any]


def objects_of_run(store: Store, head: dict[str, Any]) -> Iterator[Made]:
    """Yield the objects of a run round by round, its benchmarks (stage `benchmark`) after the stages of their round."""
    named = [(0, name, head.get(name)) for name in INPUTS]
    for entry in sorted(head["rounds"], key=lambda entry: int(entry["round"])):
        number = entry["round"]
        named += [(number, stage, entry["stages"].get(stage)) for stage in ROUND_STAGES]
        named += [(number, BENCHMARK, object_id) for object_id in measured_objects(head, number).values()]
    for number, stage, object_id in named:
        if object_id is None:
            continue
        record = read_record(store, object_id) or {}
        heldout = record.get("inputs", {}).get("heldout") if stage == "evaluate" else None
        if heldout is not None:
            yield Made(number, HELDOUT_ANSWERS, heldout, read_record(store, heldout) or {})
        yield Made(number, stage, object_id, record)


def tokens_of(made: Made) -> float | None:
    """Return the tokens that an object sampled, trained on or scored; None if nothing counted them."""
    metrics = made.record.get("metrics", {})
    if made.stage in ("generate", HELDOUT_ANSWERS):
        return metrics.get("tokens")
    if made.stage == "evaluate":
        return metrics.get("tokens_scored")
    if made.stage == "train" and {"tokens_per_second", "seconds"} <= metrics.keys():
        return float(round(metrics["tokens_per_second"] * metrics["seconds"]))
    return None
