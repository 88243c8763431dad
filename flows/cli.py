"""The command `spinreg`: a thin front over the functions that the flows and the library offer.

Decides: the names of sub-commands and exit statuses (0 done, 1 failed, 2 usage, 65 bad input, 75 held by another
process). Leaves out: doing anything itself; whatever it prints comes from a function anyone can call.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from spinreg_core import __version__
from spinreg_core.errors import EXIT_BAD_INPUT, EXIT_DAMAGED, EXIT_PREEMPTED, BadInput, Damaged, LeaseHeld, SpinregError

if TYPE_CHECKING:
    from spinreg_core.store import Store

EXIT_HELD = 75  # EX_TEMPFAIL
STATUSES = (
    "exit status: 0 done, 1 failed, 2 wrong usage, 65 bad input, 75 another process advances the run, 143 stopped by "
    "SIGTERM"
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spinreg", description="Regularised self-play alignment of language models.", epilog=STATUSES
    )
    parser.add_argument("--version", action="version", version=f"spinreg {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="advance a run, as `prefect deployment run spin/iterate` does, in this process", epilog=STATUSES
    )
    _add_configuration(run)
    run.add_argument("--rounds", type=int, help="advance by so many rounds (default 1)")
    run.add_argument("--until-round", type=int, help="go on until this round is complete")

    plan = commands.add_parser("plan", help="what a configuration will need: memory, disk, tokens, FLOPs, time")
    _add_configuration(plan)
    plan.add_argument("--rounds", type=int, help="rounds to plan for (default: what the configuration asks for)")
    plan.add_argument("--tflops", type=float, help="stated rate of the machine (TFLOP/s); default: measured here")
    plan.add_argument("--json", action="store_true", help="print JSON")

    status = commands.add_parser("status", help="what is done of a run and who advances it")
    status.add_argument("run", nargs="?", help="name of the run (default: all runs of the store)")
    status.add_argument("--store", default="spinreg-store", help="local folder or s3://bucket/prefix")
    status.add_argument("--json", action="store_true", help="print JSON")

    resume = commands.add_parser("resume", help="finish what a run was told to do and did not", epilog=STATUSES)
    _add_existing(resume)

    verify = commands.add_parser("verify", help="read every file of a run and compare it with what was committed",
                                 epilog="exit status: 0 all as committed (or repaired), 74 damaged")  # fmt: skip
    _add_existing(verify)
    verify.add_argument("--repair", action="store_true", help="make what is damaged anew, and nothing else")
    verify.add_argument("--json", action="store_true", help="print JSON")

    gc = commands.add_parser("gc", help="list what no run needs any more (docs/retention.md); --delete removes it")
    gc.add_argument("--store", default="spinreg-store", help="local folder or s3://bucket/prefix")
    gc.add_argument("--run", action="append", metavar="RUN", help="only by the rules of this run (may be repeated)")
    gc.add_argument("-p", "--param", action="append", default=[], metavar="keep.FIELD=VALUE",
                    help="a rule in place of the runs' own, e.g. -p keep.policies=2")  # fmt: skip
    gc.add_argument("--delete", action="store_true", help="remove it; without, nothing is changed")
    gc.add_argument("--json", action="store_true", help="print JSON")

    report = commands.add_parser("report", help="write a run's report anew and print its table")
    _add_existing(report)
    report.add_argument("--json", action="store_true", help="print the report's data instead of the table")

    export = commands.add_parser("export", help="write an iterate as an ordinary model folder with a model card")
    _add_existing(export)
    export.add_argument("--round", type=int, help="which iterate; 0 is the base (default: the last that was trained)")
    export.add_argument("--to", type=Path, required=True, help="folder to write, which is empty or not there yet")
    export.add_argument("--shard-size", metavar="SIZE", help="largest weights file, e.g. 5GB (default: as committed)")
    export.add_argument("--push", metavar="TARGET", help="then put it to the hub (name/model; private) or a folder")

    compare = commands.add_parser("compare", help="compare finished runs: write one page and print its table")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="runs of one store; those that differ in seed are one")
    compare.add_argument("--store", default="spinreg-store", help="local folder or s3://bucket/prefix")
    compare.add_argument("--against", metavar="RUN", help="what the others are compared with (default: the first)")
    compare.add_argument("--name", help="name of the comparison (default: the runs' names joined)")
    compare.add_argument("--json", action="store_true", help="print the comparison's data instead of the table")

    grid = commands.add_parser("grid", help="run variations over one configuration and compare them", epilog=STATUSES)
    grid.add_argument("--name", default="grid", help="name of the comparison, with which its runs' names begin")
    grid.add_argument("--config", help="configuration that all members share (YAML or JSON; path or URI)")
    grid.add_argument("--until-round", type=int, help="rounds of every member (default: the configuration's)")
    grid.add_argument("--alpha", type=float, nargs="+", help="at the configured total beta (default: 1 0.5 0)")
    grid.add_argument("--beta-0", type=float, nargs="+", help="instead: KL to the base, added to the configured beta")
    grid.add_argument("--history", type=_history, nargs="+", help="numbers of iterates, or all (default: 1 all)")
    grid.add_argument("--seeds", type=int, nargs="+", help="that every variation is run with")
    grid.add_argument(
        "--variations", metavar="FILE", help="instead of alpha and history: fields by name (YAML or JSON)"
    )
    grid.add_argument("--against", metavar="RUN", help="what the others are compared with (default: plain SPIN)")
    grid.add_argument("--model", help="base model of all members")
    grid.add_argument("--dataset", help="data set of all members")
    grid.add_argument("--store", help="local folder or s3://bucket/prefix")
    grid.add_argument("-p", "--param", action="append", default=[], metavar="GROUP.FIELD=VALUE", help="any other field")
    grid.add_argument(
        "--deployment", help="run the members by this deployment, e.g. spin/iterate (default: here, one by one)"
    )

    join = commands.add_parser("join", help="take part, as a further machine, in the stages of a run (resources.nodes)")
    join.add_argument("run", help="name of the run")
    join.add_argument("--store", required=True, help="the run's store, within reach of all machines")

    agreement = commands.add_parser(
        "judge-agreement", help="how often the configured judge agrees with published human preferences"
    )
    agreement.add_argument(
        "votes", help="human or gpt4_pair (of lmsys/mt_bench_human_judgments), or a file of that form"
    )
    _add_configuration(agreement)
    agreement.add_argument("--limit", type=int, help="only the first so many votes")
    agreement.add_argument("--json", action="store_true", help="print JSON")

    data = commands.add_parser("data", help="look at a data set").add_subparsers(dest="action", required=True)
    inspect = data.add_parser("inspect", help="counts, lengths, rendered examples and rejected rows")
    inspect.add_argument("dataset", nargs="?", help="as the parameter dataset (default: the configuration's)")
    _add_configuration(inspect, dataset=False)
    inspect.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _history(text: str) -> int | str:
    return text if text == "all" else int(text)


def _add_existing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="name of the run")
    parser.add_argument("--store", default="spinreg-store", help="local folder or s3://bucket/prefix")


def _add_configuration(parser: argparse.ArgumentParser, *, dataset: bool = True) -> None:
    parser.add_argument("--config", help="run configuration file (YAML or JSON; path or URI)")
    parser.add_argument("--run", help="name of the run")
    parser.add_argument("--model", help="base model: hub id, folder, package:NAME or random:tiny")
    if dataset:
        parser.add_argument("--dataset", help="data set: hub id, file or folder, or builtin:demo")
    parser.add_argument("--store", help="local folder or s3://bucket/prefix")
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "-p", "--param", action="append", default=[], metavar="GROUP.FIELD=VALUE",
        help="any other field, e.g. -p objective.alpha=0.5 (VALUE is JSON, or text)",
    )  # fmt: skip


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

    repair(store, arguments.run, found.damaged, say=lambda line: print(line, flush=True))
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


def _advance(parameters: dict[str, Any], config: str | None) -> int:
    from flows.spin import resolve_parameters, spin

    resolve_parameters(config, parameters)  # a wrong field ends here, before a flow run exists
    return _flow(lambda: spin(config=config, **parameters))


def _flow(call: Callable[[], object]) -> int:
    """Call a flow so that what ends it from outside shows as what it is."""
    import httpx
    from prefect.exceptions import CancelledRun, TerminationSignal

    from flows.spin import STOPPED
    from tasks.display import stopped_by

    def stopped(signum: int, _frame: object) -> NoReturn:
        raise TerminationSignal(signum)

    # Prefect hands SIGTERM on to the handler it found before it tells the server of the outermost flow run: Python's
    # own would end the process there, and the flow run would show as running for good.
    signal.signal(signal.SIGTERM, stopped)
    try:
        call()
    except CancelledRun as error:
        raise SpinregError(f"the run was cancelled: {error}") from error
    except (TerminationSignal, httpx.HTTPError) as error:
        if not isinstance(stopped_by(error), TerminationSignal):
            raise
        print(STOPPED, file=sys.stderr)
        return EXIT_PREEMPTED
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
    from spinreg_core.report import metrics_table, write_report

    store = _existing_store(arguments.store)
    report = write_report(store, arguments.run)
    if arguments.json:
        print(json.dumps(report["data"], indent=1))
    else:
        print(f"{metrics_table(report['data'])}\nreport: {store.uri(report['html'])}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from spinreg_core.export import export, push

    store = _existing_store(arguments.store)
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
    resolve_grid(**given)  # a wrong field ends here, before a flow run exists
    found: dict[str, Any] = {}
    status = _flow(lambda: found.update(compare(**given, deployment=arguments.deployment)))
    for run, why in found.get("left_out", {}).items():
        print(f"spinreg: {run} is left out: {why}", file=sys.stderr)
    return status or (1 if found.get("left_out") else 0)


def _join(arguments: argparse.Namespace) -> int:
    from tasks.join import join_run

    try:
        join_run(arguments.store, arguments.run, say=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        return 130


def _judge_agreement(arguments: argparse.Namespace) -> int:
    from spinreg_core.benchmarks.agreement import agreement
    from spinreg_core.resolve import resolve
    from spinreg_core.store import open_store

    config = resolve(_parameters(arguments), arguments.config)
    store = open_store(config.store)
    store.check()
    with contextlib.redirect_stdout(sys.stderr):  # progress
        text, document = agreement(store, config, arguments.votes, arguments.limit)
    print(json.dumps(document, indent=1) if arguments.json else text)
    return 0


def _data(arguments: argparse.Namespace) -> int:
    from spinreg_core.data.inspect import inspect
    from spinreg_core.resolve import resolve

    config = resolve(_parameters(arguments), arguments.config)
    text, document = inspect(config)
    print(json.dumps(document, indent=1) if arguments.json else text)
    return 0


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    commands = {
        "run": _run, "plan": _plan, "status": _status, "report": _report, "join": _join, "data": _data,
        "resume": _resume, "verify": _verify, "gc": _gc, "export": _export, "compare": _compare,
        "grid": _grid,
        "judge-agreement": _judge_agreement,
    }  # fmt: skip
    try:
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
    except BrokenPipeError:  # the reader of our output (head, less) has had enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (else the interpreter complains when it ends)
        return 0


if __name__ == "__main__":
    sys.exit(main())
