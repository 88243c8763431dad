"""The log of a run: Prefect's inside a flow run, standard logging outside."""

from __future__ import annotations

import logging
from collections.abc import Callable

log_line = logging.getLogger("spinreg")


def run_log() -> Callable[[str], None]:
    """Return the function that logs a line of the current flow run, or to standard logging outside one."""
    from prefect.exceptions import MissingContextError
    from prefect.logging import get_run_logger

    try:
        return get_run_logger().info
    except MissingContextError:
        return log_line.info
