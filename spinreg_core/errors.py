"""Errors that a user can meet, and the exit statuses of the stage processes that they end.

Decides: the failures that are worth a retry, and the sentence of an error about input. Leaves out: catching errors,
which is up to the caller that can act on them.
"""

from __future__ import annotations

import re
from typing import Self

EXIT_BAD_INPUT = 65  # EX_DATAERR: the same input fails again, so it is not retried
EXIT_JUDGE_AWAY = 69  # EX_UNAVAILABLE: the stage has waited for it already
EXIT_DAMAGED = 74  # EX_IOERR: the next attempt would find the same damaged file
EXIT_INTERRUPTED = 130  # 128 + SIGINT: Ctrl-C
EXIT_PREEMPTED = 143  # 128 + SIGTERM: stopped from outside, resumable
_CREDENTIALS = re.compile(r"://(?:[^\s/@:]*:[^\s@]*|[^\s/@]+)@")
_SIGNED = re.compile(
    r"([?&][\w.-]*(?:token|key|secret|signature|credential|password|sig)[\w.-]*=)[^&\s'\"]+", re.IGNORECASE
)
# The first words by which `problem_text` recognises a predicate and an instruction.
_PREDICATES = {"is", "are", "has", "have", "does", "cannot", "holds", "names", "needs"}
_INSTRUCTIONS = {
    "set", "use", "give", "name", "choose", "install", "remove", "free", "run", "write", "check", "ask", "wait",
    "start", "copy", "put",
}  # fmt: skip


def without_credentials(text: str) -> str:
    """Return a text without the user, password and signature of any address in it.

    Libraries quote addresses in their messages, and AWS_ENDPOINT_URL or the address of a proxy may hold credentials.
    """
    return _SIGNED.sub(r"\1***", _CREDENTIALS.sub("://***@", text))


class SpinregError(Exception):
    """Base of the errors that spinreg raises deliberately. The text is a message for a person, without credentials."""

    def __init__(self, *texts: object) -> None:
        super().__init__(*(without_credentials(text) if isinstance(text, str) else text for text in texts))

    @classmethod
    def from_message(cls, message: str) -> Self:
        """Return the error of a stage process that has ended, from the message that it printed."""
        error = cls.__new__(cls)
        # A subclass may take other arguments, from which it forms its message.
        SpinregError.__init__(error, message)
        return error


def problem_text(where: str, found: object, expected: str) -> str:
    """Return the sentence of a `BadInput`: what is wrong at `where`, then what to do about it.

    `found` is a noun phrase or a predicate, and `expected` is a noun phrase or an instruction:

        problem_text("beta", "-1", "a positive number")     beta: found -1; expected a positive number
        problem_text("seed", "is not set", "an integer")    seed is not set; expected an integer
        problem_text("seed", "is not set", "set it")        seed is not set; set it

    A predicate begins with a word of `_PREDICATES`, an instruction with a verb of `_INSTRUCTIONS`.
    """
    found = str(found)
    problem = f"{where} {found}" if found.partition(" ")[0] in _PREDICATES else f"{where}: found {found}"
    remedy = expected if expected.partition(" ")[0] in _INSTRUCTIONS else f"expected {expected}"
    return f"{problem}; {remedy}"


class BadInput(SpinregError):
    """A configuration, data set or model that cannot be used. Never retried.

    Keeps `where` (the field or row), `found` (what is wrong there) and `expected` (what would do) as data; its text is
    their `problem_text`.
    """

    where, found, expected = "", "", ""

    def __init__(self, where: str, found: object, expected: str) -> None:
        self.where, self.found, self.expected = where, str(found), expected
        # A message may quote input that is not UTF-8, and logs must be able to write it.
        super().__init__(problem_text(where, found, expected).encode(errors="backslashreplace").decode())


class ConfigChanged(BadInput):
    """An existing run was started with another configuration."""

    def __init__(self, run: str, differences: list[str]) -> None:
        listing = "\n".join(f"  - {line}" for line in differences)
        SpinregError.__init__(
            self,
            f"run {run!r} exists with another configuration; nothing was changed. Differences:\n"
            f"{listing}\nUse another run name, or the stored values.",
        )


class LeaseHeld(SpinregError):
    """Another process holds the lease of this run. The text names it."""


class LeaseLost(SpinregError):
    """This process no longer holds the lease of the run, and must not commit."""


class Damaged(SpinregError):
    """A committed file is missing, truncated or altered."""


class Removed(Damaged):
    """The user's retention rules removed a committed file."""


class StageFailed(SpinregError):
    """A stage process ended with an error that a retry may cure."""


class JudgeAway(StageFailed):
    """The judge's endpoint did not respond within the time that a stage waits for it. A later start may succeed."""


class StagePreempted(StageFailed):
    """A stage process was stopped from outside. A retry resumes from its last commit."""


class StoreFailed(SpinregError):
    """The store did not respond within the retry window. A later attempt may succeed."""


class StoreRefused(StoreFailed):
    """The store or its disk refused: missing permission, expired credentials, a wrong clock, no space."""


class Conflict(SpinregError):
    """A create-only key exists with other content, or another writer won a compare-and-swap."""


def redacted(url: str) -> str:
    """Return an address without user, password and query, which may hold a signature."""
    # A secret key may contain slashes: remove everything from a user name with its colon up to the "@".
    url = re.sub(r"://(?:[^/@:]*:[^@]*|[^/@]*)@", "://***@", url)
    return re.sub(r"(://[^?]*)\?.+", r"\1?***", url, flags=re.DOTALL)
