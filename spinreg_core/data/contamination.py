"""Contamination guard: texts that share words with the prompts of an evaluation set.

Decides: the prompts of an evaluation set, the meaning of a word, and the meaning of overlap.
Leaves out: the treatment of rows that overlap (`filters`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from spinreg_core.config import DataConfig
from spinreg_core.data.formats import choose_layout, user_texts
from spinreg_core.data.load import shorten
from spinreg_core.data.readers import Record
from spinreg_core.data.sources import read_records
from spinreg_core.errors import BadInput

# Prompts of fewer words are not guarded: many innocent prompts contain "What is it?".
_FEWEST_WORDS = 5
# Scripts without spaces between words (Thai, Lao, Burmese, Khmer, kana, Han). Each of their characters is a word.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


class Guard:
    """Word n-grams of the prompts of evaluation sets."""

    def __init__(self, known: dict[str, list[str]], length: int) -> None:
        """`known`: prompts by the name of their set; `length`: words of an n-gram. Shorter prompts count as a whole."""
        self._grams: dict[tuple[str, ...], str] = {}
        for name, prompts in known.items():
            for words in map(_words, prompts):
                if len(words) >= _FEWEST_WORDS:
                    for gram in _runs(words, min(length, len(words))):
                        self._grams.setdefault(gram, name)
        self._lengths = sorted({len(gram) for gram in self._grams})

    def shared(self, text: str) -> str | None:
        """Return the first evaluation set that shares an n-gram with a text, with the n-gram; or None."""
        words = _words(text) if self._grams else []
        for length in self._lengths:
            for gram in _runs(words, length):
                if gram in self._grams:
                    return f"{self._grams[gram]}: {shorten(' '.join(gram), 120)}"
        return None


def evaluation_prompts(name: str) -> list[str]:
    """Return the user's texts in an evaluation set, with or without answers.

    `name` is that of any data set, or `owner/name:subset` on the hub. The columns decide the layout. The first existing
    split of `test`, `validation` and `train` is read. Raises BadInput for a set that cannot be read or has no prompt.
    """
    dataset, subset = name, None
    if ":" in name and "://" not in name and not Path(name).expanduser().exists() and not name.startswith("builtin:"):
        dataset, _, subset = name.rpartition(":")
    records = _read_any(dataset, subset)
    columns = {str(key) for record in records if isinstance(record.content, dict) for key in record.content}
    layout = choose_layout(columns, DataConfig(), f"evaluation set {name}", prompts_only=True)
    found = [text for record in records for text in user_texts(record.content, layout)]
    if not found:
        raise BadInput(f"data.evaluation_sets, {name}", f"has {len(records)} records and no prompt", "prompts to guard")
    return found


def _read_any(dataset: str, subset: str | None) -> list[Record]:
    for split in ("test", "validation"):
        try:
            return list(read_records(dataset, split, subset))
        except BadInput as error:
            # The hub's error for an absent split names the field as the remedy, that of a local file as the place.
            if "data.split" not in str(error):
                raise
    return list(read_records(dataset, "train", subset))


def guarded(name: str, prompts: Sequence[str]) -> dict[str, int]:
    """Count the prompts of a set that are guarded, and those too short for it. Raises BadInput if all are too short."""
    short = sum(len(_words(prompt)) < _FEWEST_WORDS for prompt in prompts)
    if short == len(prompts):
        raise BadInput(f"data.evaluation_sets, {name}", f"has {short} prompts, all of fewer than {_FEWEST_WORDS} words",
                       "longer prompts to guard")  # fmt: skip
    return {"prompts": len(prompts) - short, "too_short": short}


def _runs(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + length]) for i in range(len(words) - length + 1))


def _words(text: str) -> list[str]:
    """Return the words of a text without case and punctuation."""
    return _WORD.findall(text.lower())
