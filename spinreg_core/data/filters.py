"""Filters of the training rows: by length, by pattern, and by overlap with an evaluation set.

Decides: the reasons to leave a good row out, and their order; the first one that applies counts.
Leaves out: the meaning of overlap (`contamination`), bad rows and exact duplicates (`load`), token limits (`encode`).
"""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from spinreg_core.config import DataConfig
from spinreg_core.data.contamination import Guard, evaluation_prompts, guarded
from spinreg_core.data.formats import Rejected, Row
from spinreg_core.data.load import Loaded
from spinreg_core.data.mixing import load_mixture, take_shares
from spinreg_core.data.row_file import take_rows
from spinreg_core.errors import BadInput
from spinreg_core.models.messages import THOUGHTS

REASONS = {
    "answer_too_short": "the answer has fewer than data.min_answer_characters characters",
    "answer_too_long": "the answer has more than data.max_answer_characters characters",
    "pattern": "prompt or answer match one of data.drop_patterns",
    "beyond_share": "its data set has more rows than its share of data.mixed_datasets",
    "contaminated": "prompt or answer share data.contamination_words words in a row with a prompt of an evaluation set",
}


@dataclass(frozen=True)
class Selected:
    """The rows to train on, and those left out for one of REASONS: as a list, and counted by reason.

    Rows beyond a share are counted and not listed. They can be millions, and nothing is wrong with them.
    """

    loaded: Loaded
    left_out: list[Rejected]
    counts: dict[str, int]


def load_training(dataset: str, config: DataConfig) -> Selected:
    """Load the training data set without the rows that the configuration leaves out. Raises BadInput."""
    loaded = load_mixture(dataset, config)
    known = {name: evaluation_prompts(name) for name in config.evaluation_sets}
    guards = {name: guarded(name, prompts) for name, prompts in known.items()}
    kept, left_out = select(loaded.rows, config, known)
    counts = by_reason_and_pattern(left_out)
    if len(kept) and config.mixed_datasets:
        kept, beyond = take_shares(kept, loaded.last, {dataset: 1.0} | config.mixed_datasets)
        counts |= {f"beyond_share {name}": count for name, count in beyond.items()}
    if len(loaded.rows) and not len(kept):
        found = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        raise BadInput(f"dataset {dataset}", f"has no row that the filters keep ({found})", "filters that keep some")
    return Selected(replace(loaded, rows=kept, guards=guards), left_out, counts)


def select(
    rows: Sequence[Row], config: DataConfig, known: dict[str, list[str]]
) -> tuple[Sequence[Row], list[Rejected]]:
    """Return the rows to train on, and the others. `known`: prompts of the evaluation sets, by name of the set."""
    patterns = [re.compile(pattern) for pattern in config.drop_patterns]
    guard = Guard(known, config.contamination_words)
    kept = array("q")
    left_out: list[Rejected] = []
    for index, row in enumerate(rows):
        problem = _problem(row, config, patterns) or _overlap(row, guard)
        if problem is None:
            kept.append(index)
        else:
            left_out.append(Rejected(row.source_row, *problem))
    return take_rows(rows, kept), left_out


def by_reason_and_pattern(left_out: Iterable[Rejected]) -> dict[str, int]:
    """Count rows by reason, and by pattern where that is the reason."""
    return dict(Counter(f"{one.reason} {one.detail}" if one.reason == "pattern" else one.reason for one in left_out))


def _problem(row: Row, config: DataConfig, patterns: Sequence[re.Pattern[str]]) -> tuple[str, str] | None:
    # Thoughts count: they are part of the answer that is trained on.
    size = len(row.answer) + sum(len(row.extras[name]) for name in THOUGHTS if name in row.extras)
    most = config.max_answer_characters
    if size < config.min_answer_characters and "tool_calls" not in row.extras:
        return "answer_too_short", f"{size} characters"
    if most is not None and size > most:
        return "answer_too_long", f"{size} characters"
    for pattern in patterns:
        if any(pattern.search(text) for text in _texts(row)):
            return "pattern", pattern.pattern
    return None


def _overlap(row: Row, guard: Guard) -> tuple[str, str] | None:
    found = next((shared for text in _texts(row) if (shared := guard.shared(text))), None)
    return None if found is None else ("contaminated", found)


def _texts(row: Row) -> Iterator[str]:
    """Yield every text of a row, including thoughts and the arguments of calls."""
    for message in (*row.messages, row.reply):
        yield message["content"]
        yield from (message[name] for name in THOUGHTS if name in message)
        if "tool_calls" in message:
            yield json.dumps(message["tool_calls"], ensure_ascii=False)
