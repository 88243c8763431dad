"""The command `spinreg`: a thin layer over functions that the flows and the library offer.

Decides: exit statuses (0 done, 1 failed, 2 usage, 65 bad input, 74 damaged, 75 held by another process, 130 Ctrl-C, 143
stopped). Leaves out: the options, and the work; every text it prints comes from a function anyone can call.
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
from typing import TYPE_CHECKING

from flows.cli_parser import parser
from flows.terminal import advance, exit_status, parameters, require_settings, run_flow, show_warnings
from spinreg_core.errors import EXIT_DAMAGED, EXIT_PREEMPTED, BadInput

if TYPE_CHECKING:
    from spinreg_core.store.base import Store

# Every command imports the packages that it needs: `spinreg --help` answers at once, and Prefect reads its settings
# when it is imported, so `require_settings` has to come first.


def _print(arguments: argparse.Namespace, text: str, document: object) -> None:
    print(json.dumps(document, indent=1) if arguments.json else text)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say(line: str) -> None:
    print(line, flush=True)


def _spin() -> Callable[..., object]:
    require_settings()
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
        return advance(_spin(), given | {"until_round": 0}, None)  # adds no round
    print(f"{arguments.run}: round {found['complete_round']} is complete and nothing is pending; "
          f"`spinreg run --run {arguments.run} --rounds 1` adds a round")  # fmt: skip
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from spinreg_core.maintenance.verify import format_verdict, verify
    from tasks.server import require_server

    if arguments.repair:
        require_settings()
        require_server()  # reading the run may take an hour, so look for the server before
    store = _existing_store(arguments.store)
    found = verify(store, arguments.run, say=_log)
    document = {name: value for name, value in asdict(found).items() if name != "documents"}
    _print(arguments, format_verdict(found), document | {"damaged": found.damaged})
    if not found.problems and not found.unfinished:
        return 0
    if not arguments.repair:
        return EXIT_DAMAGED
    from flows.repair import repair

    status = run_flow(lambda: repair(store, arguments.run, found.damaged, say=_say))
    if status:
        return status
    left = verify(store, arguments.run)
    print(format_verdict(left))
    others = [one for one in found.damaged if left.content.get(one) != found.content.get(one)]
    if others and not left.problems:
        print(f"repaired with another content than before, like everything made from it: {', '.join(others)}")
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
        items = remove_items(store, items, needs_now, say=_log)
    text = format_items(items, needs.notes, store.url, removed=arguments.delete)
    _print(arguments, text, as_json(items, needs.notes, removed=arguments.delete))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from spinreg_core.config.resolve import resolve
    from spinreg_core.planning.plan import plan

    _print(arguments, *plan(resolve(parameters(arguments), arguments.config), tflops=arguments.tflops))
    return 0


def _existing_store(url: str) -> Store:
    """Return a store that can be read. Raises BadInput."""
    from spinreg_core.store.base import require_own_commits
    from spinreg_core.store.folder import FolderStore
    from spinreg_core.store.open import open_store

    if not url:
        raise BadInput("store", "is empty", "give a local folder, file:///path or s3://bucket/prefix")
    store = open_store(url)
    if not isinstance(store, FolderStore):
        store.check()
    elif Path(store.url).exists() and not Path(store.url).is_dir():  # a folder need not exist: it then holds no runs
        raise BadInput("store", f"is not a folder: {url}", "give a folder or s3://bucket/prefix")
    else:
        require_own_commits(store)
    return store


def _status(arguments: argparse.Namespace) -> int:
    from spinreg_core.reports.status import format_status

    text, document = format_status(_existing_store(arguments.store), arguments.run)
    _print(arguments, text, document)
    return EXIT_DAMAGED if any("damaged" in one for one in document["runs"]) else 0


def _report(arguments: argparse.Namespace) -> int:
    from spinreg_core.reports.run_report import write_report
    from spinreg_core.reports.tables import metrics_table

    store = _existing_store(arguments.store)
    report = write_report(store, arguments.run)
    _print(arguments, f"{metrics_table(report['data'])}\nreport: {store.uri(report['html'])}", report["data"])
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
    from spinreg_core.comparison.files import write_comparison
    from spinreg_core.comparison.wording import comparison_table

    store = _existing_store(arguments.store)
    written = write_comparison(store, arguments.runs, arguments.name, arguments.against)
    table = f"{comparison_table(written['data'])}\ncomparison: {store.uri(written['html'])}"
    _print(arguments, table, written["data"])
    return 0


def _grid(arguments: argparse.Namespace) -> int:
    require_settings()
    from flows.compare import compare, resolve_grid
    from spinreg_core.config.resolve import assignments, load_config_file

    others = ("command", "param", "deployment")
    given = {name: value for name, value in vars(arguments).items() if value is not None and name not in others}
    if arguments.variations is not None:
        given["variations"] = load_config_file(arguments.variations)
    given["fields"] = assignments(arguments.param)
    resolve_grid(given)  # reports a wrong field before a flow run exists
    failed: dict[str, str] = {}

    def run() -> None:
        failed.update(compare(**given, deployment=arguments.deployment)["failed"])

    status = run_flow(run)
    for name, reason in failed.items():
        print(f"spinreg: {name} failed: {reason}", file=sys.stderr)
    return status or (1 if failed else 0)


def _join(arguments: argparse.Namespace) -> int:
    from flows.join import join_run

    join_run(arguments.store, arguments.run, say=_say)
    return 0


def _end_on_sigterm() -> None:
    """End on SIGTERM as on Ctrl-C: by an exception, so that requests under way are waited for and kept."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_PREEMPTED))


def _judge_agreement(arguments: argparse.Namespace) -> int:
    from spinreg_core.benchmarks.judge_agreement import agreement
    from spinreg_core.config.resolve import resolve
    from spinreg_core.store.open import open_store

    config = resolve(parameters(arguments), arguments.config)
    store = open_store(config.store)
    store.check()
    _end_on_sigterm()
    with contextlib.redirect_stdout(sys.stderr):  # progress lines
        found = agreement(store, config, arguments.votes, arguments.limit)
    _print(arguments, *found)
    return 0


def _win_rate(arguments: argparse.Namespace) -> int:
    from spinreg_core.benchmarks.win_rate import win_rate_of_runs
    from spinreg_core.config.resolve import assignments, resolve
    from spinreg_core.runs.head import require_config

    store = _existing_store(arguments.store)
    config = resolve(assignments(arguments.param), stored=require_config(store, arguments.run))
    _end_on_sigterm()
    with contextlib.redirect_stdout(sys.stderr):  # progress lines
        found = win_rate_of_runs(store, config, arguments.run, arguments.other, arguments.round)
    _print(arguments, *found)
    return 0


def _data(arguments: argparse.Namespace) -> int:
    from spinreg_core.config.resolve import resolve
    from spinreg_core.data.inspect import inspect

    _print(arguments, *inspect(resolve(parameters(arguments), arguments.config)))
    return 0


def _require_run_names(arguments: argparse.Namespace) -> None:
    """Raise BadInput for a given name that cannot be a run's."""
    from spinreg_core.config import RUN_NAME

    for field in ("run", "runs", "other"):
        given = getattr(arguments, field, None)
        for name in given if isinstance(given, list) else [given]:
            if name is not None and not re.fullmatch(RUN_NAME, name):
                raise BadInput("run", repr(name), f"a name that matches {RUN_NAME}")


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns its exit status."""
    arguments = parser().parse_args(argv)
    show_warnings(arguments)
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
