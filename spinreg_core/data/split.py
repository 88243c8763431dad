"""Split of the rows into training and held-out rows.

Decides: the held-out rows, from hashes and the run's seed alone. Neither a library's random generator nor the order of
the rows has an influence.
Leaves out: reading rows (`load`), the prompts of a round (`generation`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spinreg_core.data.formats import Row
from spinreg_core.errors import BadInput

IntArray = NDArray[np.int64]


def seeded_order(seed: int, *what: object) -> bytes:
    """Return the SHA-256 of a seed and values. Sorting by it gives a random order that is the same everywhere."""
    return hashlib.sha256(":".join(map(str, (seed, *what))).encode()).digest()


def split_rows(rows: Sequence[Row], heldout_rows: int, seed: int) -> tuple[IntArray, IntArray]:
    """Return the indices of the training rows and of `heldout_rows` held-out rows, both ascending.

    Rows with the same opening (messages up to the first user turn) form a group. The first groups in the seeded SHA-256
    order of their openings are held out, each by one row; their other rows are on neither side. So no conversation is
    on both sides, and held-out rows are independent of each other, as confidence intervals assume. Raises BadInput if
    nothing is left to train on.
    """
    group, number = _groups(rows, seed)
    if number <= heldout_rows:
        raise BadInput(
            "data.heldout_rows",
            f"is {heldout_rows}, but the {len(rows)} usable rows have only {number} different openings, so that none "
            "would be left to train on",
            f"at most {number - 1}, or a data.heldout_dataset",
        )
    return np.flatnonzero(group >= heldout_rows), _one_of_each(rows, group, heldout_rows, seed)


def given_heldout(
    rows: Sequence[Row], heldout: Sequence[Row], heldout_rows: int, seed: int
) -> tuple[IntArray, IntArray]:
    """Return the indices of the training rows and of the held-out rows of a data set of its own, both ascending.

    Held-out rows are chosen as by `split_rows`. Training rows with the same opening as one of them are left out. Raises
    BadInput if nothing is left to train on.
    """
    group, _ = _groups(heldout, seed)
    chosen = _one_of_each(heldout, group, heldout_rows, seed)
    openings = {heldout[int(i)].opening_hash for i in chosen}
    train = np.fromiter((i for i, row in enumerate(rows) if row.opening_hash not in openings), np.int64)
    if not len(train):
        raise BadInput("data.heldout_dataset", f"holds all {len(rows)} training prompts", "other prompts than dataset")
    return train, chosen


def any_share_openings(rows: Sequence[Row]) -> bool:
    """Return True if rows share an opening, or have further turns after it."""
    openings = np.empty(len(rows), "S64")
    # One pass only: the rows are on disk.
    for i, row in enumerate(rows):
        opening = row.opening_hash
        if opening != row.prompt_hash:
            return True
        openings[i] = opening.encode()
    return len(np.unique(openings)) < len(rows)


def _groups(rows: Sequence[Row], seed: int) -> tuple[IntArray, int]:
    """Return the rank of each row's opening in the seeded order, and the number of different openings."""
    openings = np.fromiter((seeded_order(seed, row.opening_hash).hex().encode() for row in rows), "S64", len(rows))
    found, group = np.unique(openings, return_inverse=True)
    return group, len(found)


def _one_of_each(rows: Sequence[Row], group: IntArray, most: int, seed: int) -> IntArray:
    """Return one row of each of the first `most` groups: the first in the seeded order of its content. Ascending."""
    first: dict[int, tuple[bytes, int]] = {}
    for i in np.flatnonzero(group < most):
        place = seeded_order(seed, json.dumps(rows[int(i)].content, sort_keys=True)), int(i)
        first[int(group[i])] = min(first.get(int(group[i]), place), place)
    return np.sort(np.fromiter((i for _, i in first.values()), np.int64, len(first)))
