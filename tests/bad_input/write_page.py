"""docs/bad-input.md, out of what the cases come to. `python -m tests.bad_input.write_page` writes it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from spinreg_core.errors import SpinregError
from tests.bad_input import cases, configuration_cases, data_cases, model_cases, run_cases, store_cases
from tests.bad_input.cases import NOTICED, Case, Place, message
from tests.support.servers import S3Server, s3_server

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/bad-input.md"


AREAS: dict[str, ModuleType] = {
    "Configuration": configuration_cases,
    "Data": data_cases,
    "Models": model_cases,
    "Store": store_cases,
    "Runs": run_cases,
}
CASES: list[Case] = [case for module in AREAS.values() for case in module.CASES]

HEAD = f"""\
<!-- Made by `python -m tests.bad_input.write_page` from the outcomes of its cases. Change the code or the cases. -->
# What is refused, and how

Every row was fed to spinreg by a test, and the message is what came out: to the letter, but for HERE (where it was
started), FOLDER (where the test worked), HOST, PORT, PID, TIME, SIZE, SHA256 and FINGERPRINT. A message names where
something is wrong, what was found there, and what was expected.

When something is noticed:

- **start**: by {NOTICED["start"]};
- **prepare**: by {NOTICED["prepare"]}, which reads data and model on the CPU. Nothing has been sampled, scored or
  trained;
- **use**: by {NOTICED["use"]}, because it came to be wrong after the run had begun.

What ends a command or a stage is one of these errors, on a line that begins with `spinreg:` or `error:` (Prefect's log
before it may show where a flow run was when it met it): `BadInput` and `ConfigChanged` (exit status 65; nobody retries
them), `Damaged` and `Removed` (74; `spinreg verify` tells more), `LeaseHeld` (75), `LeaseLost`, and
`StoreRefused` and `StoreFailed` (1; retried, because credentials are renewed and disks are emptied).
"""


def cell(text: str) -> str:
    """Verbatim, in a cell of a Markdown table."""
    lines = []
    for line in text.splitlines():
        ticks = "``" if "`" in line else "`"
        pad = " " if line.startswith(("`", " ")) or line.endswith("`") else ""
        lines.append(ticks + pad + line.replace("|", "\\|") + pad + ticks)
    return "<br>".join(lines)


def row(case: Case, text: str) -> str:
    return f"| {case.what} | {case.noticed} | {case.error.__name__} | {cell(text)} |"


def page(told: Callable[[Case], str]) -> str:
    """`told`: the message of a case."""
    parts = [HEAD]
    for area, module in AREAS.items():
        parts += [f"\n## {area}\n\n| Given | Noticed | Error | Message |\n|---|---|---|---|\n"]
        parts += [row(case, told(case)) + "\n" for case in module.CASES]
    return "".join(parts)


def outcome(case: Case, server: Callable[[], S3Server]) -> tuple[SpinregError, str]:
    """The error a case ends with, and its message. Any other error, or none, is raised."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        place = Place(Path(folder), patch, server)
        try:
            found = case.feed(place)
        except SpinregError as error:
            return error, message(error, place)
    raise AssertionError(f"{case.what}: nothing was noticed; {found!r}"[:300])


@contextlib.contextmanager
def lazily() -> Iterator[Callable[[], S3Server]]:
    """A real S3 server that starts when it is asked for."""
    with contextlib.ExitStack() as stack:
        yield cache(lambda: stack.enter_context(s3_server(Path(stack.enter_context(tempfile.TemporaryDirectory())))))


def main() -> None:
    with lazily() as server:
        told: dict[Any, str] = {case: outcome(case, server)[1] for case in CASES}
    PAGE.write_text(page(told.__getitem__))
    print(f"{len(CASES)} cases are in {os.path.relpath(PAGE)}")


if __name__ == "__main__":
    assert cases.Case is Case
    main()
