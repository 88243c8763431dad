"""Records the calls of functions in this thread, without replacing the functions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def recorded_calls(*functions: Callable[..., Any]) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Yield a list of (name, arguments), to which every call of the functions inside the block is added."""
    wanted = {function.__code__ for function in functions}  # type: ignore[attr-defined]
    calls: list[tuple[str, dict[str, Any]]] = []

    def note(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code in wanted:
            calls.append((frame.f_code.co_name, dict(frame.f_locals)))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(before)
