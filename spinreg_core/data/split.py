"""Which rows are held out, and which prompts a round gets.

Decides: both, from hashes and the run's seed alone: no library's random generator matters, and for what is held out
not even the order of the rows (a round's prompts are drawn by their place among the training rows).
Leaves out: reading rows (`load.py`).
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
    return hashlib.sha256(":".join(map(str, (seed, *what))).encode()).digest()


def split_rows(rows: Sequence[Row], heldout_rows: int, seed: int) -> tuple[IntArray, IntArray]:
    """Indices of the rows (train, held-out), ascending; held-out are `heldout_rows`, or as many as open differently.

    Rows that open alike (same messages up to the first user turn) are one group: the groups that come first in the
    seeded SHA-256 order of their openings are held out, each by one row, and their other rows are on neither side. So
    no prompt and no piece of one conversation is on both, and held-out rows are independent of each other, which every
    interval over them takes for granted. Raises BadInput if nothing is left to train on.
    """
    group, number = _groups(rows, seed)
    if number <= heldout_rows:
        raise BadInput(
            "data.heldout_rows",
            f"{heldout_rows} held-out rows of {len(rows)} usable rows that open in {number} ways, which leaves none to "
            "train on",
            f"at most {number - 1}, or a heldout_dataset",
        )
    return np.flatnonzero(group >= heldout_rows), _one_of_each(rows, group, heldout_rows, seed)


def given_heldout(
    rows: Sequence[Row], heldout: Sequence[Row], heldout_rows: int, seed: int
) -> tuple[IntArray, IntArray]:
    """Indices (train, held-out) of each, ascending, where the held-out rows come from a data set of their own.

    Held-out are rows of it chosen as by `split_rows`. Training rows that open like any of them are left out. Raises
    BadInput if nothing is left to train on.
    """
    group, _ = _groups(heldout, seed)
    chosen = _one_of_each(heldout, group, heldout_rows, seed)
    openings = {heldout[int(i)].opening_hash for i in chosen}
    train = np.fromiter((i for i, row in enumerate(rows) if row.opening_hash not in openings), np.int64)
    if not len(train):
        raise BadInput("data.heldout_dataset", f"all {len(rows)} training prompts in it", "other prompts than dataset")
    return train, chosen


def alike(rows: Sequence[Row]) -> bool:
    """Whether some rows open like others, or go on after their opening: where none do, a row is its opening."""
    openings = np.empty(len(rows), "S64")
    for i, row in enumerate(rows):  # once: they may be on disk
        opening = row.opening_hash
        if opening != row.prompt_hash:
            return True
        openings[i] = opening.encode()
    return len(np.unique(openings)) < len(rows)


def _groups(rows: Sequence[Row], seed: int) -> tuple[IntArray, int]:
    """Of each row the number of its opening in the seeded order, and how many openings there are."""
    openings = np.fromiter((seeded_order(seed, row.opening_hash).hex().encode() for row in rows), "S64", len(rows))
    found, group = np.unique(openings, return_inverse=True)
    return group, len(found)


def _one_of_each(rows: Sequence[Row], group: IntArray, most: int, seed: int) -> IntArray:
    """Of each of the first groups the row that comes first in the seeded order of what it holds; ascending."""
    first: dict[int, tuple[bytes, int]] = {}
    for i in np.flatnonzero(group < most):
        place = seeded_order(seed, json.dumps(rows[int(i)].content, sort_keys=True)), int(i)
        first[int(group[i])] = min(first.get(int(group[i]), place), place)
    return np.sort(np.fromiter((i for _, i in first.values()), np.int64, len(first)))
