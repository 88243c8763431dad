"""The errors a user can meet, and the exit status each one ends a stage process with.

Decides: which failures are worth a retry. Leaves out: catching them; whoever can act does that.
"""

from __future__ import annotations

import re

EXIT_BAD_INPUT = 65  # EX_DATAERR: the same input fails again, so nobody retries it
EXIT_JUDGE_AWAY = 69  # EX_UNAVAILABLE: it was waited for already
EXIT_DAMAGED = 74  # EX_IOERR: the same file is damaged for the next attempt too
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
    """A text without the user, password and signature of any address in it: those that people put into
    AWS_ENDPOINT_URL or a proxy's address come back in the messages of libraries."""
    return _SIGNED.sub(r"\1***", _CREDENTIALS.sub("://***@", text))


class SpinregError(Exception):
    """Base of every error spinreg raises on purpose; its text is one message for a person, without credentials."""

    def __init__(self, *texts: object) -> None:
        super().__init__(*(without_credentials(text) if isinstance(text, str) else text for text in texts))


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

    @classmethod
    def from_message(cls, message: str) -> BadInput:
        """The error a stage process ended with, from the message it printed."""
        error = cls.__new__(cls)
        SpinregError.__init__(error, message)
        return error


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
    """Another process advances this run; the text names it."""


class LeaseLost(SpinregError):
    """This process no longer owns the run and must not commit."""


class Damaged(SpinregError):
    """A committed file is missing, truncated or altered."""


class Removed(Damaged):
    """A committed file was removed by the retention rules that the user set."""


class StageFailed(SpinregError):
    """A stage process ended with an error that a retry may cure."""


class JudgeAway(StageFailed):
    """The judge's endpoint did not answer for as long as it is waited for; a later start may find it there."""


class StagePreempted(StageFailed):
    """A stage process was stopped from outside; a retry continues from what it committed."""


class StoreFailed(SpinregError):
    """The store did not do for minutes what it was asked to; a later attempt may find it well again."""


class StoreRefused(StoreFailed):
    """The store, or its disk, does not let us: no permission, credentials that expired, a wrong clock, no space."""


class Conflict(SpinregError):
    """A create-only key exists with other content, or a compare-and-swap lost."""


def redacted(url: str) -> str:
    """An address without the user and password some people put into it, and without a query, which signs some."""
    # A secret key may hold slashes: everything from a user name with its colon up to the "@".
    url = re.sub(r"://(?:[^/@:]*:[^@]*|[^/@]*)@", "://***@", url)
    return re.sub(r"(://[^?]*)\?.+", r"\1?***", url, flags=re.DOTALL)
