"""Flows on a terminal: exit statuses, signals, and settings that are checked before a flow starts.

Leaves out: the commands (`cli.py`), their arguments (`cli_parser.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from spinreg_core.errors import (
    EXIT_BAD_INPUT,
    EXIT_DAMAGED,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    BadInput,
    Damaged,
    LeaseHeld,
    SpinregError,
)

EXIT_HELD = 75  # EX_TEMPFAIL


def run_command(flow: Callable[..., object], argv: list[str]) -> int:
    """Advance a run with a flow, from the arguments of `spinreg run`. Returns the exit status."""
    from flows.cli_parser import parser

    arguments = parser().parse_args(["run", *argv])

    def command() -> int:
        require_settings()
        return advance(flow, parameters(arguments), arguments.config)

    return exit_status(command)


def parameters(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line says, as nested mappings of RunConfig fields."""
    from spinreg_core.config.resolve import assignments, merge

    names = ("run", "rounds", "until_round", "model", "dataset", "store", "seed")
    values: dict[str, Any] = {n: v for n in names if (v := getattr(arguments, n, None)) is not None}
    return merge(values, assignments(arguments.param))


def advance(flow: Callable[..., object], given: dict[str, Any], config: str | None) -> int:
    """Advance a run with a flow. Raises BadInput for a wrong field before a flow run exists."""
    from flows.checks import resolve_parameters

    resolve_parameters(config, given)
    return run_flow(lambda: flow(config=config, **given))


def exit_status(command: Callable[[], int]) -> int:
    """Run a command. Returns its exit status, or that of its error, whose message goes to stderr."""
    try:
        return command()
    except BadInput as error:
        print(f"spinreg: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except LeaseHeld as error:
        print(f"spinreg: {error}", file=sys.stderr)
        return EXIT_HELD
    except Damaged as error:
        print(f"spinreg: {error}", file=sys.stderr)
        return EXIT_DAMAGED
    except SpinregError as error:
        print(f"spinreg: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, less) has had enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (else the interpreter complains when it ends)
        return 0


def require_settings() -> None:
    """Raise BadInput where Prefect's own settings or our cache's are none. Before anything imports a flow."""
    import pydantic

    from spinreg_core.store.cache import require_cache

    require_cache()
    try:
        from prefect.settings import get_current_settings

        get_current_settings()
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        names = ["prefect", error.title.removesuffix("Settings"), *map(str, first["loc"])]
        where = "_".join(filter(None, names)).upper() if first["loc"] else "Prefect's settings"
        raise BadInput(f"{where} (in the environment or Prefect's profile)", "what cannot be used",
                       f"a value it takes ({first['msg'].removeprefix('Value error, ')})") from None  # fmt: skip
    except (ValueError, OSError) as error:  # a profile that is no TOML, a field that is no JSON, a folder in the way
        found = f"what cannot be read ({type(error).__name__})"
        raise BadInput("Prefect's settings (in the environment or Prefect's profile)", found,
                       "settings as `prefect config` writes them") from None  # fmt: skip


def run_flow(call: Callable[[], object]) -> int:
    """Call a flow so that what ends it from outside shows as what it is."""
    from prefect.exceptions import CancelledRun, TerminationSignal

    from tasks.server import require_server, stopped_by

    require_server()

    seen: list[BaseException] = []

    def stopped(signum: int, _frame: object) -> NoReturn:
        seen.append(KeyboardInterrupt() if signum == signal.SIGINT else TerminationSignal(signum))
        raise seen[-1]

    # Prefect hands SIGTERM on to the handler it found before it tells the server of the outermost flow run: Python's
    # own would end the process there, and the flow run would show as running for good.
    signal.signal(signal.SIGTERM, stopped)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a shell has it ignored
        signal.signal(signal.SIGINT, stopped)
    try:
        call()
    except CancelledRun as error:
        raise SpinregError(f"the run was cancelled: {error}") from error
    except BaseException as error:  # what libraries make of an interruption is anything
        stop = stopped_by(error) or next(iter(seen), None)
        if stop is None:
            raise
        for signum in (signal.SIGINT, signal.SIGTERM):  # what is left is the end of the embedded server
            signal.signal(signum, signal.SIG_IGN)
        text, status = stop_message(stop)
        print(text, file=sys.stderr)
        return status
    finally:
        if signal.getsignal(signal.SIGINT) is stopped:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return 0


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """Nothing interrupts the block: people press Ctrl-C twice."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, signal.SIG_IGN) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def stop_message(stop: BaseException) -> tuple[str, int]:
    """What is said of a run that a signal ended, and its exit status."""
    interrupted = isinstance(stop, KeyboardInterrupt)
    by = "Ctrl-C" if interrupted else "SIGTERM"
    text = f"spinreg: stopped by {by}; what was committed stays, the same command goes on from it"
    return text, EXIT_INTERRUPTED if interrupted else EXIT_PREEMPTED
