"""Bad input ends in one clear error of spinreg, before sampling or training where that is possible."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import pytest

from spinreg_core.errors import BadInput, LeaseHeld, LeaseLost, SpinregError, StoreFailed
from tests.bad_input.cases import NOTICED, Case
from tests.bad_input.write_page import AREAS, CASES, PAGE, outcome, page
from tests.support.servers import S3Server

# Noticed late although nothing changed after the start: what only meets when two rounds are mixed.
LATE = {"a policy and a base with different vocabularies", "an adapter for another base"}
# As `spinreg_core.errors.problem_text` joins the place and the problem.
PROBLEM = ": .*found| is| are| has| have| does| cannot| holds| names| needs"
Fed = Callable[[Case], tuple[SpinregError, str]]


@pytest.fixture(scope="module")
def fed(request: pytest.FixtureRequest) -> Fed:
    """The outcome of a case, which is fed once."""

    def server() -> S3Server:
        found: S3Server = request.getfixturevalue("s3_server")
        return found

    return cache(lambda case: outcome(case, server))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_bad_input_ends_with_one_clear_error(case: Case, fed: Fed) -> None:
    error, text = fed(case)
    assert type(error) is case.error
    assert case.noticed in NOTICED
    if isinstance(error, BadInput) and text.startswith("the run configuration is not valid"):
        for line in text.splitlines()[1:]:
            assert re.match(r"  - [\w.]+(:| is not) \S", line), "where"
            assert (
                "found" in line
                or " is not " in line
                or re.match(r"  - (benchmarks|configuration|data|judge|opponent|tracking|training): .*\w[._]\w", line)
            )
    elif not isinstance(error, LeaseHeld | LeaseLost) and case.error.__name__ not in ("ConfigChanged", "Removed"):
        sentence = r"\S.*: .*kept failing" if case.error is StoreFailed else rf"\S.*({PROBLEM}) .*\S; \S"
        assert re.match(sentence, text, re.DOTALL), "where, the problem, the remedy"


def test_page_shows_the_outcome_of_every_case(fed: Fed) -> None:
    assert len(CASES) >= 60
    assert len({case.what for case in CASES}) == len(CASES)
    assert all(len(module.CASES) >= 25 for module in AREAS.values())
    assert page(lambda case: fed(case)[1]) == PAGE.read_text(), "python -m tests.bad_input.write_page writes it again"
    promise = (PAGE.parent / "reliability.md").read_text()
    assert f"| `tests/bad_input`, a scene of `make chaos` too | | | {len(CASES)} | | 0 |" in promise


def test_bad_input_is_noticed_as_early_as_possible() -> None:
    for area in ("Configuration", "Data", "Models"):
        late = {case.what for case in AREAS[area].CASES if case.noticed == "use"}
        assert all(what in LATE or what.startswith("an adapter ") for what in late)
