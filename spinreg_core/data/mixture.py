"""Several data sets as one to train on, in given shares.

Decides: how their records are numbered, and which rows are taken where a data set has more than its share.
Leaves out: reading each (`load.py`), what is left out for other reasons (`select.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from spinreg_core.config import DataConfig
from spinreg_core.data.formats import Rejected, Row
from spinreg_core.data.load import Loaded, load_rows, without_exact_duplicates
from spinreg_core.errors import BadInput


def load_mixture(dataset: str, config: DataConfig) -> tuple[Loaded, list[int]]:
    """`dataset` and `config.mixed_datasets` as one, and how far the records of each go (their last numbers).

    Records are numbered on from one data set to the next. A row that an earlier one has is an exact duplicate.
    Raises BadInput as `load_rows` does.
    """
    names = [dataset, *config.mixed_datasets]
    if len(set(names)) < len(names):
        raise BadInput("data.mixed_datasets", f"{dataset}, which is the dataset itself", "other data sets")
    # The subset is the first one's.
    found = [load_rows(name, config if i == 0 else config.model_copy(update={"subset": None}), most=config.max_records)
             for i, name in enumerate(names)]  # fmt: skip
    if len(found) == 1:
        return found[0], [found[0].records]
    # Numbers of records go beyond their count where lines are empty or the split is a slice.
    last = [max([0, *(row.source_row for row in one.rows), *(bad.row for bad in one.rejected)]) for one in found]
    ends = list(accumulate(last))
    rows: list[Row] = []
    rejected: list[Rejected] = []
    for first, one in zip([0, *ends], found, strict=False):
        rows += [replace(row, source_row=first + row.source_row) for row in one.rows]
        rejected += [replace(bad, row=first + bad.row) for bad in one.rejected]
    kept, duplicates = without_exact_duplicates(rows)
    duplicates = replace(duplicates, exact=duplicates.exact + sum(one.duplicates.exact for one in found))
    joined = Loaded(" + ".join(names), ", ".join(dict.fromkeys(one.format for one in found)),
                    sum(one.records for one in found), kept, rejected, duplicates)  # fmt: skip
    return joined, ends


def take_shares(
    rows: Sequence[Row], ends: Sequence[int], shares: Mapping[str, float]
) -> tuple[list[Row], list[tuple[Row, str]]]:
    """(rows taken, rows beyond the shares and the data set of each), both in the order of `rows`.

    shares: the data sets in the order of `ends`, and what each weighs. The one with the fewest rows for its weight
    gives all of them; of the others the rows whose content has the smallest SHA-256 are taken, so that a larger share
    contains a smaller one. Raises BadInput where a data set has no row left.
    """
    sources: dict[str, list[Row]] = {name: [] for name in shares}
    names = {id(row): next(n for n, end in zip(shares, ends, strict=True) if row.source_row <= end) for row in rows}
    for row in rows:
        sources[names[id(row)]].append(row)
    for name, source in sources.items():
        if not source:
            raise BadInput("data.mixed_datasets", f"{name} without a row that is new and not left out", "rows of each")
    scale = min(len(source) / shares[name] for name, source in sources.items())
    taken: set[int] = set()
    for name, source in sources.items():
        count = max(min(round(scale * shares[name]), len(source)), 1)
        taken.update(id(row) for row in sorted(source, key=_order)[:count])
    kept = [row for row in rows if id(row) in taken]
    return kept, [(row, names[id(row)]) for row in rows if id(row) not in taken]


def _order(row: Row) -> str:
    return hashlib.sha256(json.dumps([row.messages, row.answer]).encode()).hexdigest()
