"""The command `spinreg`: a thin front over the functions that the flows and the library offer.

Decides: exit statuses (0 done, 1 failed, 2 usage, 65 bad input, 74 damaged, 75 held by another process, 130 Ctrl-C, 143
stopped). Leaves out: what can be said (`arguments.py`), and doing anything itself; whatever it prints comes from a
function anyone can call.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flows.arguments import parser
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

if TYPE_CHECKING:
    from spinreg_core.store import Store

EXIT_HELD = 75  # EX_TEMPFAIL


def _parameters(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line says, as nested mappings of RunConfig fields."""
    from spinreg_core.resolve import assignments, merge

    names = ("run", "rounds", "until_round", "model", "dataset", "store", "seed")
    values: dict[str, Any] = {n: v for n in names if (v := getattr(arguments, n, None)) is not None}
    return merge(values, assignments(arguments.param))


def _run(arguments: argparse.Namespace) -> int:
    return _advance(_parameters(arguments), arguments.config)


def _resume(arguments: argparse.Namespace) -> int:
    from spinreg_core.status import run_status

    found = run_status(_existing_store(arguments.store), arguments.run)
    parameters = {"run": arguments.run, "store": arguments.store}
    if found["pending"] is not None:
        return _advance(parameters, None)
    if found["repair"] is not None:
        return _advance(parameters | {"until_round": 0}, None)  # which adds nothing
    print(f"{arguments.run}: round {found['complete_round']} is complete and nothing is pending; "
          f"`spinreg run --run {arguments.run} --rounds 1` goes on")  # fmt: skip
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from spinreg_core.verify import described, verify
    from tasks.server import require_server

    if arguments.repair:
        _require_settings()
        require_server()  # not after an hour of reading
    store = _existing_store(arguments.store)
    found = verify(store, arguments.run, say=lambda line: print(line, file=sys.stderr, flush=True))
    if arguments.json:
        document = {name: value for name, value in asdict(found).items() if name != "documents"}
        print(json.dumps(document | {"damaged": found.damaged}, indent=1))
    else:
        print(described(found))
    if not found.problems and not found.unfinished:
        return 0
    if not arguments.repair:
        return EXIT_DAMAGED
    from flows.repair import repair

    status = _flow(lambda: repair(store, arguments.run, found.damaged, say=lambda line: print(line, flush=True)))
    if status:
        return status
    left = verify(store, arguments.run)
    print(described(left))
    others = [one for one in found.damaged if left.content.get(one) != found.content.get(one)]
    if others and not left.problems:
        print(f"with another content than before, as what was made from it: {', '.join(others)}")
    return EXIT_DAMAGED if left.problems or left.unfinished else 0


def _gc(arguments: argparse.Namespace) -> int:
    from spinreg_core.head import require_head
    from spinreg_core.removal import as_json, described, find, remove
    from spinreg_core.resolve import assignments
    from spinreg_core.retention import Needs, store_needs

    store, given = _existing_store(arguments.store), assignments(arguments.param)
    if given.keys() - {"keep"}:
        raise BadInput("--param", ", ".join(sorted(given.keys() - {"keep"})), "fields of the group keep")
    for run in arguments.run or ():
        require_head(store, run)

    def needs_now() -> Needs:
        return store_needs(store, arguments.run, given.get("keep"))

    needs = needs_now()
    items = find(store, needs, rules_only=bool(arguments.run))
    if arguments.delete:
        items = remove(store, items, needs_now, say=lambda line: print(line, file=sys.stderr, flush=True))
    if arguments.json:
        print(json.dumps(as_json(items, needs.notes, removed=arguments.delete), indent=1))
    else:
        print(described(items, needs.notes, store.url, removed=arguments.delete))
    return 0


def _require_settings() -> None:
    """Raise BadInput where Prefect's own settings or our cache's are none. Before anything imports a flow."""
    import pydantic

    from spinreg_core.cache import require_cache

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


def _advance(parameters: dict[str, Any], config: str | None) -> int:
    _require_settings()
    from flows.spin import resolve_parameters, spin

    resolve_parameters(config, parameters)  # a wrong field ends here, before a flow run exists
    return _flow(lambda: spin(config=config, **parameters))


def _flow(call: Callable[[], object]) -> int:
    """Call a flow so that what ends it from outside shows as what it is."""
    from prefect.exceptions import CancelledRun, TerminationSignal

    from flows.spin import how_stopped
    from tasks.display import stopped_by
    from tasks.server import require_server

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
        text, status = how_stopped(stop)
        print(text, file=sys.stderr)
        return status
    finally:
        if signal.getsignal(signal.SIGINT) is stopped:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from spinreg_core.plan import plan
    from spinreg_core.resolve import resolve

    text, document = plan(resolve(_parameters(arguments), arguments.config), tflops=arguments.tflops)
    print(json.dumps(document, indent=1) if arguments.json else text)
    return 0


def _existing_store(url: str) -> Store:
    """A store that can be read. Raises BadInput."""
    from spinreg_core.store import FolderStore, open_store

    if not url:
        raise BadInput("store", "''", "a local folder, file:///path or s3://bucket/prefix")
    store = open_store(url)
    if not isinstance(store, FolderStore):  # for reading, a folder need not be there
        store.check()
    elif Path(store.url).exists() and not Path(store.url).is_dir():
        raise BadInput("store", f"{url}, which is not a folder", "a folder or s3://bucket/prefix")
    return store


def _status(arguments: argparse.Namespace) -> int:
    from spinreg_core.status import status

    text, document = status(_existing_store(arguments.store), arguments.run)
    print(json.dumps(document, indent=1) if arguments.json else text)
    return EXIT_DAMAGED if any("damaged" in one for one in document["runs"]) else 0


def _report(arguments: argparse.Namespace) -> int:
    from spinreg_core.report import write_report
    from spinreg_core.tables import metrics_table

    store = _existing_store(arguments.store)
    report = write_report(store, arguments.run)
    if arguments.json:
        print(json.dumps(report["data"], indent=1))
    else:
        print(f"{metrics_table(report['data'])}\nreport: {store.uri(report['html'])}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from spinreg_core.export import check_push, export, push

    store = _existing_store(arguments.store)
    if arguments.push:
        check_push(arguments.push)
    folder = export(store, arguments.run, arguments.to, round_number=arguments.round, shard_size=arguments.shard_size)
    print(f"exported to {folder}")
    if arguments.push:
        print(f"pushed to {push(folder, arguments.push)}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from spinreg_core.comparison_page import write_comparison
    from spinreg_core.comparison_words import comparison_table

    store = _existing_store(arguments.store)
    written = write_comparison(store, arguments.runs, arguments.name, arguments.against)
    if arguments.json:
        print(json.dumps(written["data"], indent=1))
    else:
        print(f"{comparison_table(written['data'])}\ncomparison: {store.uri(written['html'])}")
    return 0


def _grid(arguments: argparse.Namespace) -> int:
    _require_settings()
    from flows.compare import compare, resolve_grid
    from spinreg_core.resolve import assignments, load_config_file

    names = (
        "name",
        "config",
        "until_round",
        "alpha",
        "beta_0",
        "history",
        "seeds",
        "against",
        "model",
        "dataset",
        "store",
    )
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.variations is not None:
        given["variations"] = load_config_file(arguments.variations)
    given["fields"] = assignments(arguments.param)
    resolve_grid(given)  # a wrong field ends here, before a flow run exists
    found: dict[str, Any] = {}
    status = _flow(lambda: found.update(compare(**given, deployment=arguments.deployment)))
    for run, why in found.get("failed", {}).items():
        print(f"spinreg: {run} failed: {why}", file=sys.stderr)
    return status or (1 if found.get("failed") else 0)


def _join(arguments: argparse.Namespace) -> int:
    from tasks.join import join_run

    join_run(arguments.store, arguments.run, say=lambda line: print(line, flush=True))
    return 0


def _end_on_sigterm() -> None:
    """As on Ctrl-C: what a judge was asked is waited for and kept."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_PREEMPTED))


def _judge_agreement(arguments: argparse.Namespace) -> int:
    from spinreg_core.benchmarks.agreement import agreement
    from spinreg_core.resolve import resolve
    from spinreg_core.store import open_store

    config = resolve(_parameters(arguments), arguments.config)
    store = open_store(config.store)
    store.check()
    _end_on_sigterm()
    with contextlib.redirect_stdout(sys.stderr):  # progress
        text, document = agreement(store, config, arguments.votes, arguments.limit)
    print(json.dumps(document, indent=1) if arguments.json else text)
    return 0


def _win_rate(arguments: argparse.Namespace) -> int:
    from spinreg_core.benchmarks.win_rate_of_runs import win_rate_of_runs
    from spinreg_core.head import require_config
    from spinreg_core.resolve import assignments, resolve

    store = _existing_store(arguments.store)
    config = resolve(assignments(arguments.param), stored=require_config(store, arguments.run))
    _end_on_sigterm()
    with contextlib.redirect_stdout(sys.stderr):  # progress
        text, document = win_rate_of_runs(store, config, arguments.run, arguments.other, arguments.round)
    print(json.dumps(document, indent=1) if arguments.json else text)
    return 0


def _data(arguments: argparse.Namespace) -> int:
    from spinreg_core.data.inspect import inspect
    from spinreg_core.resolve import resolve

    config = resolve(_parameters(arguments), arguments.config)
    text, document = inspect(config)
    print(json.dumps(document, indent=1) if arguments.json else text)
    return 0


def _require_run_names(arguments: argparse.Namespace) -> None:
    """Raise BadInput for a run that was named and cannot be one."""
    from spinreg_core.config import RUN_NAME

    for field in ("run", "runs", "other"):
        given = getattr(arguments, field, None)
        for name in given if isinstance(given, list) else [given]:
            if name is not None and not re.fullmatch(RUN_NAME, name):
                raise BadInput("run", repr(name), f"a name that matches {RUN_NAME}")


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    commands = {
        "run": _run, "plan": _plan, "status": _status, "report": _report, "join": _join, "data": _data,
        "resume": _resume, "verify": _verify, "gc": _gc, "export": _export, "compare": _compare,
        "grid": _grid, "judge-agreement": _judge_agreement, "win-rate": _win_rate,
    }  # fmt: skip
    try:
        _require_run_names(arguments)
        return commands[arguments.command](arguments)
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


if __name__ == "__main__":
    sys.exit(main())
