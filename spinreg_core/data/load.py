"""Reading a data set into checked rows, and the verdict on how many of them are bad.

Decides: that a bad row is listed and never silently dropped, that exact duplicates count once, and when there are
too many bad rows to go on. Leaves out: the layouts (`formats.py`), the files (`sources.py`), tokens (`encode.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from spinreg_core.config import DataConfig
from spinreg_core.data.formats import Rejected, Row, choose_layout, read_rows
from spinreg_core.data.messages import RowProblem
from spinreg_core.data.readers import Record
from spinreg_core.data.row_file import take_rows, write_rows
from spinreg_core.data.sources import read_records
from spinreg_core.errors import BadInput

SHOWN = 5  # rows and examples that a message names
_LOOKED_AT = 1000  # records whose columns decide on the layout
_DIGITS = 32  # of a SHA-256 (hex) by which rows are compared: 128 bits


@dataclass(frozen=True)
class Duplicates:
    """`exact`: rows left out because the same prompt with the same answer came before. `prompts`: prompts
    that have several different answers, all kept. `examples`: a few of those, with their row numbers.
    """

    exact: int
    prompts: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Loaded:
    """One or several data sets after the checks that need no model. `records` counts their records, good and bad;
    `last` is the number of the last record of each (from 1, going on from one to the next)."""

    dataset: str
    format: str
    records: int
    rows: Sequence[Row]
    rejected: list[Rejected]
    duplicates: Duplicates
    last: dict[str, int]
    guards: dict[str, dict[str, int]] = field(default_factory=dict)  # evaluation set -> prompts looked for, and not

    def content_hash(self) -> str:
        """SHA-256 (hex) of the rows and the rejected rows: equal for equal content, whatever the file's layout."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps([row.source_row, *row.content]).encode())
        for bad in self.rejected:
            digest.update(json.dumps([bad.row, bad.reason]).encode())
        return digest.hexdigest()


def load_rows(
    dataset: str, config: DataConfig, *, split: str | None = None, subset: str | None = None, most: int | None = None
) -> Loaded:
    """Read and check a data set: hub id, local or s3:// file or folder, or builtin:demo.

    `split` and `subset` override those of `config` (for a held-out data set); `most`: records to read. Bad rows are
    listed in `.rejected`; `require_usable` says whether there are too many. Raises BadInput for what concerns the whole
    data set: a missing file, split or column, or no records at all.
    """
    # A data set named as split= of its own (held-out) has no use for the training set's subset.
    records = read_records(dataset, split or config.split, config.subset if split is None else subset, most)
    where = f"dataset {dataset}"
    columns: set[str] = set()
    first: list[Record] = []  # one row may lack a column, most rows do not
    for record in records:
        first.append(record)
        columns |= {str(name) for name in record.content} if isinstance(record.content, dict) else set()
        if columns and len(first) >= _LOOKED_AT:
            break
    if not first:
        raise BadInput(
            where, f"no rows in split {split or config.split!r}", "at least one row for training and one to hold out"
        )
    if not columns:
        bad = first[0].problem or RowProblem("wrong_type", type(first[0].content).__name__)
        raise BadInput(where, f"{len(first)} rows and no record among them (row {first[0].row}: {bad})",
                       "records with named fields")  # fmt: skip
    layout = choose_layout(columns, config, where)
    rejected: list[Rejected] = []
    count = last = 0

    def good_rows() -> Iterator[Row]:
        nonlocal count, last
        for record in chain(first, records):
            count, last = count + 1, record.row
            try:
                if record.problem is not None:
                    raise record.problem
                yield from read_rows(record.content, record.row, layout, config.turns)
            except RowProblem as problem:
                rejected.append(Rejected(record.row, problem.reason, problem.detail))

    rows = write_rows(good_rows())
    kept, duplicates = exact_duplicates(rows)
    return Loaded(dataset, layout.format, count, take_rows(rows, kept), rejected, duplicates, {dataset: last})


def load_heldout(dataset: str, config: DataConfig) -> Loaded | None:
    """The held-out data set if the configuration names one or the demo brings its own, else None."""
    if config.heldout_dataset is not None:
        try:
            return load_rows(config.heldout_dataset, config, split=config.heldout_split)
        except BadInput as error:
            raise BadInput.from_message(f"data.heldout_dataset, {error}") from None
    if dataset == "builtin:demo":
        return load_rows(dataset, config, split="heldout")
    return None


def exact_duplicates(rows: Sequence[Row]) -> tuple[NDArray[np.int64], Duplicates]:
    """Indices of the rows that are none (the first of those that are alike), ascending, and what the others are."""
    names = (row.prompt_hash[:_DIGITS] + _digest([row.answer, row.extras]) for row in rows)
    both = np.fromiter(names, f"S{2 * _DIGITS}", len(rows))  # prompt, answer
    kept = np.sort(np.unique(both, return_index=True)[1])
    prompts = both[kept].astype(f"S{_DIGITS}")
    _, first, which, counts = np.unique(prompts, return_index=True, return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(counts > 1)
    examples = []
    for prompt in sorted(repeated, key=lambda prompt: first[prompt])[:SHOWN]:
        alike = take_rows(rows, kept[which == prompt])
        numbers = ", ".join(str(row.source_row) for row in alike)
        examples.append(f"{shorten(alike[0].messages[-1]['content'])} (rows {numbers})")
    return kept, Duplicates(len(rows) - len(kept), len(repeated), tuple(examples))


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:_DIGITS]


def shorten(text: str, length: int = 60) -> str:
    """One line of at most `length` characters, in quotes."""
    line = " ".join(text.split())
    return f'"{line}"' if len(line) <= length else f'"{line[: length - 1]}…"'


def by_reason(rejected: Sequence[Rejected]) -> dict[str, int]:
    """Counts by reason, most frequent first."""
    return dict(Counter(bad.reason for bad in rejected).most_common())


def bad_share(records: int, rejected: Sequence[Rejected]) -> float:
    """Share of the source's records that gave a bad row (0..1)."""
    return len({bad.row for bad in rejected}) / records


def require_usable(loaded: Loaded, rejected: Sequence[Rejected], max_bad_share: float) -> None:
    """Raise BadInput if more than `max_bad_share` of the records are bad, or none is good.

    `rejected` is all that was refused so far: `loaded.rejected`, later with what tokenising refused.
    """
    share = bad_share(loaded.records, rejected)
    if share <= max_bad_share and len({bad.row for bad in rejected}) < loaded.records:
        return
    counts = ", ".join(f"{count} {reason}" for reason, count in by_reason(rejected).items())
    shown = "; ".join(f"row {bad.row}: {bad.reason} ({bad.detail})" for bad in list(rejected)[:SHOWN])
    raise BadInput(
        f"dataset {loaded.dataset}",
        f"{share:.1%} bad rows ({len({bad.row for bad in rejected})} of {loaded.records}: {counts}). First: {shown}",
        f"at most {max_bad_share:.1%} (data.max_bad_share)",
    )
