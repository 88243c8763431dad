"""The fields of a run's report, as `report.json` holds them.

Decides: the names and types that readers of a report rely on. Leaves out: where the values come from.
"""

from __future__ import annotations

from typing import Any, TypedDict

from spinreg_core.evaluation.intervals import Estimate
from spinreg_core.evaluation.metrics import Metric
from spinreg_core.evaluation.schema import RoundResults


class Alarm(TypedDict):
    round: int
    where: str  # training, held-out rows or samples
    text: str


class RunVerdict(TypedDict):
    outcome: str  # improved, worse, no difference or none
    round: int | None
    headline: str
    sentences: list[str]


class Sample(TypedDict):
    """A held-out prompt with the human answer and one sampled answer per round."""

    prompt_id: str
    messages: list[dict[str, str]]
    answer: str
    rounds: list[dict[str, Any]]


class MadeObject(TypedDict):
    """An object of a run, None where it is unknown. `seconds` are those of the attempt that finished it."""

    round: int | None
    stage: str
    object_id: str
    uri: str
    inputs: dict[str, Any] | None
    seconds: float | None
    tokens: float | None
    versions: dict[str, str] | None


class Lineage(MadeObject):
    """An object with its files in the store, and the number of those that retention removed."""

    files: int
    removed: int
    bytes: int
    created: str
    writer: str


class Report(TypedDict):
    """A run's report. Every value is plain JSON; NaN and infinities are None."""

    schema: int
    spinreg: str | None
    run: str
    store: str
    config: dict[str, Any]
    primary: dict[str, str]
    definitions: dict[str, Metric]
    game: dict[str, Metric]
    verdict: RunVerdict
    alarms: list[Alarm]
    notes: list[str]
    rounds: list[RoundResults]
    human: dict[str, Estimate]
    samples: list[Sample]
    lineage: list[Lineage]


class WrittenReport(TypedDict):
    """Keys of the files in the store, and the report itself."""

    html: str
    json: str
    data: Report
