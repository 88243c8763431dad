"""The text and the fields of the errors that a user meets."""

import pytest

from spinreg_core.errors import BadInput


@pytest.mark.parametrize(
    ("found", "expected", "text"),
    [
        ("-1", "a positive number", "beta: found -1; expected a positive number"),
        (-1, "a positive number", "beta: found -1; expected a positive number"),
        ("is not set", "a positive number", "beta is not set; expected a positive number"),
        ("is not set", "set it in the configuration", "beta is not set; set it in the configuration"),
        ("-1", "use a positive number", "beta: found -1; use a positive number"),
        ("island", "useful numbers", "beta: found island; expected useful numbers"),
        ("'is not set'", "a number", "beta: found 'is not set'; expected a number"),
    ],
)
def test_bad_input_of_three_fields_reads_as_a_sentence(found: object, expected: str, text: str) -> None:
    error = BadInput("beta", found, expected)
    assert str(error) == text
    assert (error.where, error.found, error.expected) == ("beta", str(found), expected)


def test_bad_input_that_quotes_no_utf8_can_be_written() -> None:
    str(BadInput("dataset", "a name \udcff", "a name of UTF-8")).encode()


def test_bad_input_from_message_keeps_the_text() -> None:
    assert str(BadInput.from_message("beta is not set; set it")) == "beta is not set; set it"
