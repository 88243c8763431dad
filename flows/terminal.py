"""Flows on a terminal: exit statuses, signals, and checks of settings before a flow starts."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

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
# The first class that an error belongs to counts.
_STATUSES = {BadInput: EXIT_BAD_INPUT, LeaseHeld: EXIT_HELD, Damaged: EXIT_DAMAGED, SpinregError: 1}


def run_command(flow: Callable[..., object], argv: list[str]) -> int:
    """Advance a run with a flow, from the arguments of `spinreg run`. Returns the exit status."""
    from flows.cli_parser import parser

    arguments = parser().parse_args(["run", *argv])
    show_warnings(arguments)

    def command() -> int:
        require_settings()
        return advance(flow, parameters(arguments), arguments.config)

    return exit_status(command)


def show_warnings(arguments: argparse.Namespace) -> None:
    """With `--verbose`, show the known warnings of libraries in the stages of this process."""
    if getattr(arguments, "verbose", False):
        os.environ["SPINREG_VERBOSE"] = "1"


def parameters(arguments: argparse.Namespace) -> dict[str, object]:
    """Return the fields of RunConfig that the command line gives, nested by group."""
    from spinreg_core.config.resolve import assignments, merge

    names = ("run", "rounds", "until_round", "model", "dataset", "store", "seed")
    values = {name: value for name in names if (value := getattr(arguments, name, None)) is not None}
    return merge(values, assignments(arguments.param))


def advance(flow: Callable[..., object], given: Mapping[str, object], config: str | None) -> int:
    """Advance a run with a flow. Raises BadInput for a wrong field before a flow run exists."""
    from flows.parameters import resolve_parameters

    resolve_parameters(config, given)
    return run_flow(lambda: flow(config=config, **given))


def exit_status(command: Callable[[], int]) -> int:
    """Run a command. Returns its exit status, or that of its error; the error's message goes to stderr."""
    try:
        return command()
    except SpinregError as error:
        print(f"spinreg: {error}", file=sys.stderr)
        return next(status for kind, status in _STATUSES.items() if isinstance(error, kind))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) has closed it. Python flushes stdout once more when it ends, and would
        # report the closed pipe again.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0


def require_settings() -> None:
    """Raise BadInput for unusable settings of Prefect or of the cache. Call it before anything imports a flow."""
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
        problem = first["msg"].removeprefix("Value error, ")
        raise BadInput(f"{where} (in the environment or Prefect's profile)", f"cannot be used ({problem})",
                       "use values that Prefect accepts") from None  # fmt: skip
    except (ValueError, OSError) as error:  # a profile that is not TOML, a field that is not JSON, a folder as profile
        # The message of the error may hold the value, which may be a secret.
        raise BadInput("Prefect's settings (in the environment or Prefect's profile)",
                       f"cannot be read ({type(error).__name__})",
                       "write them with `prefect config`") from None  # fmt: skip


def run_flow(call: Callable[[], object]) -> int:
    """Call a flow, and report a signal that ended it as such. Returns the exit status."""
    from prefect.exceptions import CancelledRun, TerminationSignal

    from tasks.server import require_server, stopped_by

    require_server()

    seen: list[BaseException] = []

    def stopped(signum: int, _frame: object) -> NoReturn:
        seen.append(KeyboardInterrupt() if signum == signal.SIGINT else TerminationSignal(signum))
        raise seen[-1]

    # On SIGTERM Prefect calls the handler that it found, and only then tells the server about the outermost flow run.
    # Python's default handler would end the process there, and the flow run would show as running forever.
    signal.signal(signal.SIGTERM, stopped)
    # A shell starts background jobs with SIGINT ignored, and it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stopped)
    try:
        call()
    except CancelledRun as error:
        raise SpinregError(f"the run was cancelled: {error}") from error
    except BaseException as error:  # libraries turn an interruption into errors of any class
        stop = stopped_by(error) or next(iter(seen), None)
        if stop is None:
            raise
        # Only the embedded server is left to be ended, which a second signal must not interrupt.
        for signum in (signal.SIGINT, signal.SIGTERM):
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
    """Ignore SIGINT and SIGTERM inside the block, because users press Ctrl-C twice."""
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
    """Return the message about a run that a signal ended, and its exit status."""
    interrupted = isinstance(stop, KeyboardInterrupt)
    by = "Ctrl-C" if interrupted else "SIGTERM"
    text = f"spinreg: stopped by {by}; committed work stays, and the same command resumes from it"
    return text, EXIT_INTERRUPTED if interrupted else EXIT_PREEMPTED
