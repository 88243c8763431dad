"""The log line of a run: to Prefect inside a run, to standard logging outside."""

from __future__ import annotations

import logging
from collections.abc import Callable

log_line = logging.getLogger("spinreg")


def run_log() -> Callable[[str], None]:
    """Where a line about the current run goes: its Prefect log, or standard logging outside a run."""
    from prefect.exceptions import MissingContextError
    from prefect.logging import get_run_logger

    try:
        return get_run_logger().info
    except MissingContextError:
        return log_line.info
