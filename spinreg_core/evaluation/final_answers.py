"""Numeric final answers in texts: the final number of an answer, and exact matches with the reference."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from spinreg_core.errors import BadInput


def require_final_answers(mode: str, references: list[str | None]) -> None:
    """Raise BadInput where `evaluation.final_answer` is gsm8k and no held-out answer ends in `#### <number>`."""
    if mode == "gsm8k" and not any(text is not None and reference_number(text) is not None for text in references):
        raise BadInput("evaluation.final_answer", "is gsm8k, but no held-out answer ends in `####` and a number",
                       "use auto or none")  # fmt: skip


def exact_match(reference: str | None, answer: str) -> bool | None:
    """Return whether the final numbers of reference and answer are equal; None for a reference without a number."""
    number = None if reference is None else reference_number(reference)
    return None if number is None else answered_number(answer) == number


# A minus sign counts unless a digit, letter or bracket precedes it: "10-5" holds 10 and 5.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(?:\d(?:[\d,]*\d)?(?:\.\d+)?|\.\d+)")


def _number(text: str) -> Decimal | None:
    match = _NUMBER.search(text)
    if match is None:
        return None
    try:
        return Decimal(match.group().replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def reference_number(text: str) -> Decimal | None:
    """Return the final number of a reference: the one after `####`, else the only number of the text.

    Thousands separators, `$` and trailing zeros are ignored. None where the text does not define a number.
    """
    _, marker, tail = text.rpartition("####")
    if marker:
        return _number(tail)
    numbers = _NUMBER.findall(text)
    return _number(numbers[0]) if len(numbers) == 1 else None


# A line with only a number and its unit: "#### 72", "#### $5 dollars.", not "#### Step 1: add".
# The possessive quantifiers keep a line of many blanks from being tried in every way.
_NUMBER_LINE = re.compile(rf"\s*+{_NUMBER.pattern}\s*+(?:%\s*+)?[^\W\d]*+[.!]?\s*+$")


def answered_number(text: str) -> Decimal | None:
    """Return the final number of an answer; None where it has no number.

    It is the first number that stands alone after a `####`, else the first number after the last `####`, else the last
    number of the answer.
    """
    tails = text.split("####")[1:]
    for tail in tails:
        if _NUMBER_LINE.match(line := tail.split("\n", 1)[0]):
            return _number(line)
    if tails and (number := _number(tails[-1])) is not None:
        return number
    numbers = _NUMBER.findall(text)
    return _number(numbers[-1]) if numbers else None
