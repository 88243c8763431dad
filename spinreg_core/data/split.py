"""Which rows are held out, and which prompts a round gets.

Decides: both, from hashes and the run's seed alone: no library's random generator matters, and for what is held out
not even the order of the rows (a round's prompts are drawn by their place among the training rows).
Leaves out: reading rows (`load.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from spinreg_core.data.formats import Row
from spinreg_core.errors import BadInput

IntArray = NDArray[np.int64]


def _order(seed: int, *what: object) -> bytes:
    return hashlib.sha256(":".join(map(str, (seed, *what))).encode()).digest()


def split_rows(rows: Sequence[Row], heldout_rows: int, seed: int) -> tuple[IntArray, IntArray]:
    """Indices of the rows (train, held-out), ascending; held-out are at most `heldout_rows`.

    Rows that open alike (same messages up to the first user turn) stay together, so no prompt and no piece
    of one conversation is on both sides. The seeded SHA-256 order of the openings decides; a group that
    would overfill the held-out side is passed over. Raises BadInput if nothing is left to train on.
    """
    openings = np.fromiter((_order(seed, row.opening_hash).hex().encode() for row in rows), "S64", len(rows))
    _, group, sizes = np.unique(openings, return_inverse=True, return_counts=True)  # groups in their order
    chosen = np.zeros(len(sizes), bool)
    count = 0
    for number, size in enumerate(sizes):
        if count + size <= heldout_rows:
            chosen[number], count = True, count + size
    held = chosen[group]
    if held.all() or not held.any():
        raise BadInput(
            "data.heldout_rows",
            f"{heldout_rows} held-out rows of {len(rows)} usable rows: {len(rows) - held.sum()} train, {held.sum()} "
            "held out",
            "rows on both sides; lower it or name a heldout_dataset",
        )
    return np.flatnonzero(~held), np.flatnonzero(held)


def given_heldout(
    rows: Sequence[Row], heldout: Sequence[Row], heldout_rows: int, seed: int
) -> tuple[IntArray, IntArray]:
    """Indices (train, held-out) of each, ascending, where the held-out rows come from a data set of their own.

    Held-out are its first `heldout_rows` rows in seeded order of their prompts. Training rows that open like
    any of them are left out. Raises BadInput if nothing is left to train on.
    """
    order = np.fromiter((_order(seed, row.prompt_hash).hex().encode() for row in heldout), "S64", len(heldout))
    chosen = np.sort(np.argsort(order, kind="stable")[:heldout_rows])
    openings = {heldout[int(i)].opening_hash for i in chosen}
    train = np.fromiter((i for i, row in enumerate(rows) if row.opening_hash not in openings), np.int64)
    if not len(train):
        raise BadInput("data.heldout_dataset", f"all {len(rows)} training prompts in it", "other prompts than dataset")
    return train, chosen


def round_prompts(
    n: int, prompts_per_round: int | None, round_number: int, mode: Literal["fresh", "same"], seed: int
) -> IntArray:
    """Indices (into the n training rows) of the prompts of a round, counted from 1; int64.

    fresh: consecutive pieces of one seeded permutation after another, each a full pass over the rows. A round
    that straddles two passes takes no row twice, because the next pass puts the rows that the round has
    already at its end. same: the first piece, every round. All n rows where so many or more are asked for.
    """
    if prompts_per_round is None or prompts_per_round >= n:
        return np.arange(n)
    m = prompts_per_round
    begin = 0 if mode == "same" else (round_number - 1) * m
    taken: list[IntArray] = []
    straddling = np.zeros(n, bool)  # what the round across the last boundary took before it
    for number in range((begin + m - 1) // n + 1):
        ranks = np.fromiter((int.from_bytes(_order(seed, number, i)[:8]) for i in range(n)), np.uint64, n)
        order = np.lexsort((ranks, straddling))
        low = begin - number * n
        taken.append(order[max(low, 0) : max(low + m, 0)])
        straddling = np.zeros(n, bool)
        straddling[order[n - (number + 1) * n % m :]] = bool((number + 1) * n % m)
    return np.concatenate(taken)
