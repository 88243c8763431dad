"""The objects a run is made of, in the order in which they were made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from spinreg_core.runs.head import HELDOUT, Head
from spinreg_core.runs.manifest import Manifest
from spinreg_core.runs.objects import read_record
from spinreg_core.runs.stages import committed
from spinreg_core.store.base import Store

BENCHMARK = "benchmark"
INPUTS = ("base", "data")


class RunObject(NamedTuple):
    """An object of a run. `record` is its manifest, None where that is gone. Base and data are made in round 0."""

    round: int
    stage: str
    object_id: str
    record: Manifest | None


def objects_of_run(store: Store, head: Head) -> Iterator[RunObject]:
    """Yield the objects of a run round by round, its benchmarks (stage `benchmark`) after the stages of their round."""
    for number, stage, object_id in committed(head):
        yield RunObject(number, stage, object_id, read_record(store, object_id))


def tokens_of(made: RunObject) -> float | None:
    """Return the tokens that an object sampled, trained on or scored; None if nothing counted them."""
    metrics = {} if made.record is None else made.record.metrics
    if made.stage in ("generate", HELDOUT):
        return metrics.get("tokens")
    if made.stage == "evaluate":
        return metrics.get("tokens_scored")
    if made.stage == "train" and {"tokens_per_second", "seconds"} <= metrics.keys():
        return float(round(metrics["tokens_per_second"] * metrics["seconds"]))
    return None
