"""Several data sets as one training set, in given shares.

Decides: the numbers of their records, and the rows taken from a data set that has more than its share.
Leaves out: reading each data set (`load`), other reasons to leave a row out (`filters`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from spinreg_core.config import DataConfig
from spinreg_core.data.formats import Rejected, Row
from spinreg_core.data.load import Loaded, exact_duplicates, load_rows, require_usable
from spinreg_core.data.row_file import take_rows, write_rows
from spinreg_core.errors import BadInput


def load_mixture(dataset: str, config: DataConfig) -> Loaded:
    """Load `dataset` and `config.mixed_datasets` as one. A row that an earlier data set has is an exact duplicate.

    Raises BadInput as `load_rows` does, and if one of several data sets has too many bad rows.
    """
    names = [dataset, *config.mixed_datasets]
    if len(set(names)) < len(names):
        raise BadInput("data.mixed_datasets", f"names {dataset}, which is the dataset itself", "name other data sets")
    found = [load_rows(dataset, config, most=config.max_records)]
    if not config.mixed_datasets:
        return found[0]
    # The subset belongs to the first data set.
    others = config.model_copy(update={"subset": None})
    found += [load_rows(name, others, most=config.max_records) for name in config.mixed_datasets]
    rejected: list[Rejected] = []
    last: dict[str, int] = {}

    def numbered_rows() -> Iterator[Row]:
        for one in found:
            require_usable(one, one.rejected, config.max_bad_share)
            first = max(last.values(), default=0)
            yield from (replace(row, source_row=first + row.source_row) for row in one.rows)
            rejected.extend(replace(bad, row=first + bad.row) for bad in one.rejected)
            last[one.dataset] = first + one.last[one.dataset]

    rows = write_rows(numbered_rows())
    kept, duplicates = exact_duplicates(rows)
    return Loaded(
        " + ".join(names),
        ", ".join(dict.fromkeys(one.format for one in found)),
        sum(one.records for one in found),
        take_rows(rows, kept),
        rejected,
        replace(duplicates, exact=duplicates.exact + sum(one.duplicates.exact for one in found)),
        last,
        unused=sorted({name for one in found for name in one.unused}),
        notes=[note for one in found for note in one.notes],
    )


def take_shares(
    rows: Sequence[Row], last: Mapping[str, int], shares: Mapping[str, float]
) -> tuple[Sequence[Row], dict[str, int]]:
    """Return the rows taken, in the order of `rows`, and the number of rows beyond its share by data set.

    `last`: see `Loaded`. `shares`: the weight of each data set. The data set with the fewest rows for its weight gives
    all of them. The others give the rows whose content has the smallest SHA-256, so that a larger share contains a
    smaller one. Raises BadInput if a data set has no row left.
    """
    sources = np.searchsorted(list(last.values()), np.fromiter((row.source_row for row in rows), np.int64, len(rows)))
    order = np.fromiter((_order(row) for row in rows), "S64", len(rows))
    counts = {name: int(n) for name, n in zip(last, np.bincount(sources, minlength=len(last)), strict=True)}
    for name, count in counts.items():
        if not count:
            raise BadInput("data.mixed_datasets", f"names {name}, which has no row that is new and not left out",
                           "at least one such row of each data set")  # fmt: skip
    scale = min(count / shares[name] for name, count in counts.items())
    taken = []
    beyond: dict[str, int] = {}
    for number, (name, count) in enumerate(counts.items()):
        take = max(min(round(scale * shares[name]), count), 1)
        own = np.flatnonzero(sources == number)
        taken.append(own[np.argsort(order[own], kind="stable")[:take]])
        if take < count:
            beyond[name] = count - take
    return take_rows(rows, np.sort(np.concatenate(taken))), beyond


def _order(row: Row) -> bytes:
    return hashlib.sha256(json.dumps(row.content).encode()).hexdigest().encode()
