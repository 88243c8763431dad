"""The contamination guard: which texts share words with the prompts of an evaluation.

Decides: what of an evaluation set counts as a prompt, what a word is, and what overlap is.
Leaves out: what is done with a row that overlaps (`filters.py`).
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

# Evaluation prompts of fewer words match only as a whole, and not at all below this: "What is it?" is in many prompts.
_FEWEST_WORDS = 5
# Scripts that put no spaces between words (Thai, Lao, Burmese, Khmer, kana, Han): every character is a word.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


class Guard:
    """Runs of words to look for. known: prompts by the name of their evaluation set; length: words in a row that count,
    a shorter prompt counting as a whole."""

    def __init__(self, known: dict[str, list[str]], length: int) -> None:
        self._grams: dict[tuple[str, ...], str] = {}
        for name, prompts in known.items():
            for words in map(_words, prompts):
                if len(words) >= _FEWEST_WORDS:
                    for gram in _runs(words, min(length, len(words))):
                        self._grams.setdefault(gram, name)
        self._lengths = sorted({len(gram) for gram in self._grams})

    def shared(self, text: str) -> str | None:
        """The evaluation set that a text shares words with, and the first of these words; None where it shares none."""
        words = _words(text) if self._grams else []
        for length in self._lengths:
            for gram in _runs(words, length):
                if gram in self._grams:
                    return f"{self._grams[gram]}: {shorten(' '.join(gram), 120)}"
        return None


def evaluation_prompts(name: str) -> list[str]:
    """What users say in an evaluation set, whether or not it has answers. `name`: as of any data set, for one on the
    hub also `owner/name:subset`. Its layout is found by its columns; of its splits the first there is of `test`,
    `validation` and `train`.

    Raises BadInput for a set that cannot be read, or has no prompt.
    """
    dataset, subset = name, None
    if ":" in name and "://" not in name and not Path(name).expanduser().exists() and not name.startswith("builtin:"):
        dataset, _, subset = name.rpartition(":")
    records = _read_any(dataset, subset)
    columns = {str(key) for record in records if isinstance(record.content, dict) for key in record.content}
    layout = choose_layout(columns, DataConfig(), f"evaluation set {name}", prompts_only=True)
    found = [text for record in records for text in user_texts(record.content, layout)]
    if not found:
        raise BadInput(f"data.evaluation_sets, {name}", f"{len(records)} records and no prompt", "prompts to guard")
    return found


def _read_any(dataset: str, subset: str | None) -> list[Record]:
    for split in ("test", "validation"):
        try:
            return list(read_records(dataset, split, subset))
        except BadInput as error:
            if "data.split" not in str(error):
                raise
    return list(read_records(dataset, "train", subset))


def guarded(name: str, prompts: Sequence[str]) -> dict[str, int]:
    """How many prompts of a set are looked for, and how many are too short to be. Raises BadInput where all are."""
    short = sum(len(_words(prompt)) < _FEWEST_WORDS for prompt in prompts)
    if short == len(prompts):
        raise BadInput(f"data.evaluation_sets, {name}", f"{short} prompts, all of fewer than {_FEWEST_WORDS} words",
                       "prompts to guard")  # fmt: skip
    return {"prompts": len(prompts) - short, "too_short": short}


def _runs(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + length]) for i in range(len(words) - length + 1))


def _words(text: str) -> list[str]:
    """Without case and punctuation."""
    return _WORD.findall(text.lower())
