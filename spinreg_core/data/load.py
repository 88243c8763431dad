"""Checked rows of a data set.

Decides: that every bad row is listed, that exact duplicates count once, and the share of bad rows that is too large.
Leaves out: layouts (`formats`), files (`sources`), tokens (`encode`).
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
from spinreg_core.data.formats import Rejected, Row, choose_layout, read_rows, unused_fields, usable_columns
from spinreg_core.data.messages import RowProblem
from spinreg_core.data.readers import Record
from spinreg_core.data.row_file import take_rows, write_rows
from spinreg_core.data.sources import read_records
from spinreg_core.errors import BadInput

# Rows and examples in a message.
SHOWN = 5
# Records whose columns decide the layout.
_LOOKED_AT = 1000
# Hex digits of a SHA-256 by which rows are compared. 128 bits make a collision of two rows practically impossible.
_DIGITS = 32


@dataclass(frozen=True)
class Duplicates:
    """Repeated prompts of a data set.

    `exact`: rows left out because an earlier row has the same prompt and answer. `prompts`: prompts with several
    different answers, all kept. `examples`: a few of those, with their row numbers.
    """

    exact: int
    prompts: int
    examples: list[str]


@dataclass(frozen=True)
class Loaded:
    """One or several data sets after the checks that need no model.

    `records` counts good and bad records. `last` holds the number of each data set's last record; records are numbered
    from 1 across all data sets. `guards` holds the counts of `contamination.guarded` by evaluation set. `unused` names
    the fields of records and turns that rows do not use, `notes` the files that were read and not read.
    """

    dataset: str
    format: str
    records: int
    rows: Sequence[Row]
    rejected: list[Rejected]
    duplicates: Duplicates
    last: dict[str, int]
    guards: dict[str, dict[str, int]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def content_hash(self) -> str:
        """Return the SHA-256 (hex) of the rows and the rejected rows, equal for equal content in any file layout."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps([row.source_row, *row.content]).encode())
        for bad in self.rejected:
            digest.update(json.dumps([bad.row, bad.reason]).encode())
        return digest.hexdigest()


def load_rows(dataset: str, config: DataConfig, *, split: str | None = None, most: int | None = None) -> Loaded:
    """Read and check a data set: a hub id, a local or s3:// file or folder, or builtin:demo.

    `split` is that of a held-out data set, which has no subset; `most` limits the records that are read. Bad rows are
    listed in `.rejected`, and `require_usable` checks their number. Raises BadInput for problems of the whole data set:
    a missing file, split or column, or no records at all.
    """
    # A held-out data set has a split of its own, and the training set's subset does not apply to it.
    notes: list[str] = []
    records = read_records(dataset, split or config.split, config.subset if split is None else None, most,
                           columns=usable_columns(config), notes=notes)  # fmt: skip
    where = f"dataset {dataset}"
    columns: set[str] = set()
    # One row may lack a column, so that the first alone does not show the layout.
    first: list[Record] = []
    for record in records:
        first.append(record)
        columns |= {str(name) for name in record.content} if isinstance(record.content, dict) else set()
        columns |= {*record.unread}
        if columns and len(first) >= _LOOKED_AT:
            break
    if not first:
        raise BadInput(where, f"has no rows in split {split or config.split!r}",
                       "at least one row for training and one to hold out")  # fmt: skip
    if not columns:
        bad = first[0].problem or RowProblem("wrong_type", type(first[0].content).__name__)
        raise BadInput(where, f"has {len(first)} rows, and none of them is a record (row {first[0].row}: {bad})",
                       "records with named fields")  # fmt: skip
    layout = choose_layout(columns, config, where)
    rejected: list[Rejected] = []
    unused: set[str] = set()
    count = last = 0

    def good_rows() -> Iterator[Row]:
        nonlocal count, last
        for record in chain(first, records):
            count, last = count + 1, record.row
            try:
                if record.problem is not None:
                    raise record.problem
                unused.update(unused_fields(record.content, layout), record.unread)
                yield from read_rows(record.content, record.row, layout, config.turns)
            except RowProblem as problem:
                rejected.append(Rejected(record.row, problem.reason, problem.detail))

    rows = write_rows(good_rows())
    kept, duplicates = exact_duplicates(rows)
    return Loaded(dataset, layout.format, count, take_rows(rows, kept), rejected, duplicates, {dataset: last},
                  unused=sorted(unused), notes=notes)  # fmt: skip


def load_heldout(dataset: str, config: DataConfig) -> Loaded | None:
    """Return the held-out data set of the configuration or of the demo, or None. Raises BadInput."""
    if config.heldout_dataset is not None:
        try:
            return load_rows(config.heldout_dataset, config, split=config.heldout_split)
        except BadInput as error:
            raise BadInput(f"data.heldout_dataset, {error.where}", error.found, error.expected) from None
    if dataset == "builtin:demo":
        return load_rows(dataset, config, split="heldout")
    return None


def exact_duplicates(rows: Sequence[Row]) -> tuple[NDArray[np.int64], Duplicates]:
    """Return the indices of the rows without exact duplicates, ascending, and a report on the duplicates.

    Of equal rows, the first one stays.
    """
    names = (row.prompt_hash[:_DIGITS] + _digest([row.answer, row.extras]) for row in rows)
    # The hash of the prompt, then that of the answer.
    both = np.fromiter(names, f"S{2 * _DIGITS}", len(rows))
    kept = np.sort(np.unique(both, return_index=True)[1])
    prompts = both[kept].astype(f"S{_DIGITS}")
    _, first, which, counts = np.unique(prompts, return_index=True, return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(counts > 1)
    examples = []
    for prompt in sorted(repeated, key=lambda prompt: first[prompt])[:SHOWN]:
        alike = take_rows(rows, kept[which == prompt])
        numbers = ", ".join(str(row.source_row) for row in alike)
        examples.append(f"{shorten(alike[0].messages[-1]['content'])} (rows {numbers})")
    return kept, Duplicates(len(rows) - len(kept), len(repeated), examples)


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:_DIGITS]


def shorten(text: str, length: int = 60) -> str:
    """Return a text as one quoted line of at most `length` characters."""
    line = " ".join(text.split())
    return f'"{line}"' if len(line) <= length else f'"{line[: length - 1]}…"'


def by_reason(rejected: Sequence[Rejected]) -> dict[str, int]:
    """Count rows by reason, most frequent first."""
    return dict(Counter(bad.reason for bad in rejected).most_common())


def bad_share(records: int, rejected: Sequence[Rejected]) -> float:
    """Return the share of the records (0..1) that gave a bad row."""
    return len({bad.row for bad in rejected}) / records


def require_usable(loaded: Loaded, rejected: Sequence[Rejected], max_bad_share: float) -> None:
    """Raise BadInput if more than `max_bad_share` of the records are bad, or all of them.

    `rejected` lists all rows refused so far: `loaded.rejected`, and later also those refused by `encode`.
    """
    share = bad_share(loaded.records, rejected)
    if share <= max_bad_share and share < 1:
        return
    counts = ", ".join(f"{count} {reason}" for reason, count in by_reason(rejected).items())
    shown = "; ".join(f"row {bad.row}: {bad.reason} ({bad.detail})" for bad in list(rejected)[:SHOWN])
    raise BadInput(
        f"dataset {loaded.dataset}",
        f"has {share:.1%} bad rows ({round(share * loaded.records)} of {loaded.records}: {counts}). First: {shown}",
        f"at most {max_bad_share:.1%} (data.max_bad_share)",
    )
