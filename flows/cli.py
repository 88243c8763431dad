"""The command `spinreg`: a thin front over the functions that the flows and the library offer.

Decides: exit statuses (0 done, 1 failed, 2 usage, 65 bad input, 74 damaged, 75 held by another process, 130 Ctrl-C, 143
stopped). Leaves out: what can be said (`cli_parser.py`), and doing anything itself; whatever it prints comes from a
function anyone can call.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli_parser import parser
from flows.terminal import advance, exit_status, parameters, require_settings, run_flow
from spinreg_core.errors import EXIT_DAMAGED, EXIT_PREEMPTED, BadInput

if TYPE_CHECKING:
    from spinreg_core.store.base import Store


def _spin() -> Callable[..., object]:
    require_settings()  # before a flow is imported: Prefect reads its settings then
    from flows.spin import spin

    return spin


def _run(arguments: argparse.Namespace) -> int:
    return advance(_spin(), parameters(arguments), arguments.config)


def _resume(arguments: argparse.Namespace) -> int:
    from spinreg_core.reports.status import run_status

    found = run_status(_existing_store(arguments.store), arguments.run)
    given = {"run": arguments.run, "store": arguments.store}
    if found["pending"] is not None:
        return advance(_spin(), given, None)
    if found["repair"] is not None:
        return advance(_spin(), given | {"until_round": 0}, None)  # which adds nothing
    print(f"{arguments.run}: round {found['complete_round']} is complete and nothing is pending; "
          f"`spinreg run --run {arguments.run} --rounds 1` goes on")  # fmt: skip
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from spinreg_core.maintenance.verify import format_verdict, verify
    from tasks.server import require_server

    if arguments.repair:
        require_settings()
        require_server()  # not after an hour of reading
    store = _existing_store(arguments.store)
    found = verify(store, arguments.run, say=lambda line: print(line, file=sys.stderr, flush=True))
    if arguments.json:
        document = {name: value for name, value in asdict(found).items() if name != "documents"}
        print(json.dumps(document | {"damaged": found.damaged}, indent=1))
    else:
        print(format_verdict(found))
    if not found.problems and not found.unfinished:
        return 0
    if not arguments.repair:
        return EXIT_DAMAGED
    from flows.repair import repair

    status = run_flow(lambda: repair(store, arguments.run, found.damaged, say=lambda line: print(line, flush=True)))
    if status:
        return status
    left = verify(store, arguments.run)
    print(format_verdict(left))
    others = [one for one in found.damaged if left.content.get(one) != found.content.get(one)]
    if others and not left.problems:
        print(f"with another content than before, as what was made from it: {', '.join(others)}")
    return EXIT_DAMAGED if left.problems or left.unfinished else 0


def _gc(arguments: argparse.Namespace) -> int:
    from spinreg_core.config.resolve import assignments
    from spinreg_core.maintenance.gc import as_json, find_removable, format_items, remove_items
    from spinreg_core.maintenance.retention import Needs, store_needs
    from spinreg_core.runs.head import require_head

    store, given = _existing_store(arguments.store), assignments(arguments.param)
    if given.keys() - {"keep"}:
        raise BadInput("--param", ", ".join(sorted(given.keys() - {"keep"})), "fields of the group keep")
    for run in arguments.run or ():
        require_head(store, run)

    def needs_now() -> Needs:
        return store_needs(store, arguments.run, given.get("keep"))

    needs = needs_now()
    items = find_removable(store, needs, rules_only=bool(arguments.run))
    if arguments.delete:
        items = remove_items(store, items, needs_now, say=lambda line: print(line, file=sys.stderr, flush=True))
    if arguments.json:
        print(json.dumps(as_json(items, needs.notes, removed=arguments.delete), indent=1))
    else:
        print(format_items(items, needs.notes, store.url, removed=arguments.delete))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from spinreg_core.config.resolve import resolve
    from spinreg_core.planning.plan import plan

    text, document = plan(resolve(parameters(arguments), arguments.config), tflops=arguments.tflops)
    print(json.dumps(document, indent=1) if arguments.json else text)
    return 0


def _existing_store(url: str) -> Store:
    """A store that can be read. Raises BadInput."""
    from spinreg_core.store.folder import FolderStore
    from spinreg_core.store.open import open_store

    if not url:
        raise BadInput("store", "''", "a local folder, file:///path or s3://bucket/prefix")
    store = open_store(url)
    if not isinstance(store, FolderStore):  # for reading, a folder need not be there
        store.check()
    elif Path(store.url).exists() and not Path(store.url).is_dir():
        raise BadInput("store", f"{url}, which is not a folder", "a folder or s3://bucket/prefix")
    return store


def _status(arguments: argparse.Namespace) -> int:
    from spinreg_core.reports.status import format_status

    text, document = format_status(_existing_store(arguments.store), arguments.run)
    print(json.dumps(document, indent=1) if arguments.json else text)
    return EXIT_DAMAGED if any("damaged" in one for one in document["runs"]) else 0


def _report(arguments: argparse.Namespace) -> int:
    from spinreg_core.reports.run_report import write_report
    from spinreg_core.reports.tables import metrics_table

    store = _existing_store(arguments.store)
    report = write_report(store, arguments.run)
    if arguments.json:
        print(json.dumps(report["data"], indent=1))
    else:
        print(f"{metrics_table(report['data'])}\nreport: {store.uri(report['html'])}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from spinreg_core.reports.export import check_push, export, push

    store = _existing_store(arguments.store)
    if arguments.push:
        check_push(arguments.push)
    folder = export(store, arguments.run, arguments.to, round_number=arguments.round, shard_size=arguments.shard_size)
    print(f"exported to {folder}")
    if arguments.push:
        print(f"pushed to {push(folder, arguments.push)}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from spinreg_core.comparison.page import write_comparison
    from spinreg_core.comparison.text import comparison_table

    store = _existing_store(arguments.store)
    written = write_comparison(store, arguments.runs, arguments.name, arguments.against)
    if arguments.json:
        print(json.dumps(written["data"], indent=1))
    else:
        print(f"{comparison_table(written['data'])}\ncomparison: {store.uri(written['html'])}")
    return 0


def _grid(arguments: argparse.Namespace) -> int:
    require_settings()
    from flows.compare import compare, resolve_grid
    from spinreg_core.config.resolve import assignments, load_config_file

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
    status = run_flow(lambda: found.update(compare(**given, deployment=arguments.deployment)))
    for run, why in found.get("failed", {}).items():
        print(f"spinreg: {run} failed: {why}", file=sys.stderr)
    return status or (1 if found.get("failed") else 0)


def _join(arguments: argparse.Namespace) -> int:
    from flows.join import join_run

    join_run(arguments.store, arguments.run, say=lambda line: print(line, flush=True))
    return 0


def _end_on_sigterm() -> None:
    """As on Ctrl-C: what a judge was asked is waited for and kept."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_PREEMPTED))


def _judge_agreement(arguments: argparse.Namespace) -> int:
    from spinreg_core.benchmarks.judge_agreement import agreement
    from spinreg_core.config.resolve import resolve
    from spinreg_core.store.open import open_store

    config = resolve(parameters(arguments), arguments.config)
    store = open_store(config.store)
    store.check()
    _end_on_sigterm()
    with contextlib.redirect_stdout(sys.stderr):  # progress
        text, document = agreement(store, config, arguments.votes, arguments.limit)
    print(json.dumps(document, indent=1) if arguments.json else text)
    return 0


def _win_rate(arguments: argparse.Namespace) -> int:
    from spinreg_core.benchmarks.win_rate import win_rate_of_runs
    from spinreg_core.config.resolve import assignments, resolve
    from spinreg_core.runs.head import require_config

    store = _existing_store(arguments.store)
    config = resolve(assignments(arguments.param), stored=require_config(store, arguments.run))
    _end_on_sigterm()
    with contextlib.redirect_stdout(sys.stderr):  # progress
        text, document = win_rate_of_runs(store, config, arguments.run, arguments.other, arguments.round)
    print(json.dumps(document, indent=1) if arguments.json else text)
    return 0


def _data(arguments: argparse.Namespace) -> int:
    from spinreg_core.config.resolve import resolve
    from spinreg_core.data.inspect import inspect

    config = resolve(parameters(arguments), arguments.config)
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

    def command() -> int:
        _require_run_names(arguments)
        return commands[arguments.command](arguments)

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
