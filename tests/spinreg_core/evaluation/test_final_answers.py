"""Numeric final answers in texts of models and in references."""

from __future__ import annotations

from decimal import Decimal

import pytest

from spinreg_core.evaluation import final_answers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 48/2 = 24.\n#### 72", "72"),
        ("#### 1,234.50", "1234.5"),
        ("####$ 5", "5"),
        ("#### -3 degrees", "-3"),
        ("#### 70\nThen again: #### 80", "70"),  # what follows the first answer is not the answer
        ("#### seventy, that is 70", "70"),
        ("#### Step 1: add\n2+70\n#### 72", "72"),  # a heading, and then the answer
        ("#### 72 apples.\n#### 5", "72"),
        ("#### Step 1: 2\n#### so it is 70 or so", "70"),
        ("she has 3 left, 10-5", "5"),
        ("The answer is $18.00.", "18"),
        ("about .5", "0.5"),
        ("no number", None),
        ("", None),
    ],
)
def test_answered_number_of_text_is_the_final_answer(text: str, number: str | None) -> None:
    assert final_answers.answered_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", "72"),
        ("work 1 + 2\n#### 3", "3"),
        ("$1,000", "1000"),
        ("3 or 4", None),
        ("red", None),
        ("#### red", None),
    ],
)
def test_reference_number_of_text_is_its_only_or_marked_number(text: str, number: str | None) -> None:
    assert final_answers.reference_number(text) == (None if number is None else Decimal(number))


def test_answered_number_before_100000_blanks_is_found() -> None:
    assert final_answers.answered_number("#### 5" + " " * 100_000 + ",") == Decimal(5)
