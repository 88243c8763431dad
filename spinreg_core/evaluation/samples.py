"""The held-out samples that an evaluation shows, as its `samples.json` holds them."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class ShownSample(TypedDict):
    """One held-out prompt with the human answer and the sample of the iterate.

    `finish` says how the sample ended ("stop" or "length"). `credit` has, for "answer" and "sample", the text and the
    implicit reward of every token (`evaluation/diagnostics.py`); the base has none.
    """

    prompt_id: str
    messages: list[dict[str, str]]
    answer: str
    sample: str
    finish: str
    credit: NotRequired[dict[str, list[tuple[str, float]]]]
