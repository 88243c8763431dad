"""The command-line parser of `spinreg`.

Decides: the names of commands and options. Leaves out: the commands.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from spinreg_core import __version__

STATUSES = (
    "exit status: 0 done, 1 failed, 2 wrong usage, 65 bad input, 74 damaged, 75 another process advances the run, "
    "143 stopped by SIGTERM"
)
_STORE = "local folder or s3://bucket/prefix"


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; the name of the chosen one is in `command`."""
    top = argparse.ArgumentParser(
        prog="spinreg", description="Regularised self-play alignment of language models.", epilog=STATUSES
    )
    top.add_argument("--version", action="version", version=f"spinreg {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    # Options that several commands share.
    store, one_run, json, fields, config, verbose = (argparse.ArgumentParser(add_help=False) for _ in range(6))
    store.add_argument("--store", default="spinreg-store", help=_STORE)
    one_run.add_argument("run", help="name of the run")
    json.add_argument("--json", action="store_true", help="print JSON")
    fields.add_argument("-p", "--param", action="append", default=[], metavar="GROUP.FIELD=VALUE",
                        help="any other field, e.g. -p objective.alpha=0.5 (VALUE is JSON, or text)")  # fmt: skip
    verbose.add_argument("--verbose", action="store_true", help="also show known warnings of libraries")
    config.add_argument("--config", help="run configuration file (YAML or JSON; path or URI)")
    config.add_argument("--run", help="name of the run")
    config.add_argument("--model", help="base model: hub id, folder, package:NAME or random:tiny")
    config.add_argument("--store", help=_STORE)
    config.add_argument("--seed", type=int, help="seed of splits, draws, sampling and data order")
    dataset = argparse.ArgumentParser(add_help=False)
    dataset.add_argument("--dataset", help="data set: hub id, file or folder, or builtin:demo")

    run = commands.add_parser(
        "run", parents=[config, dataset, fields, verbose], epilog=STATUSES,
        help="advance a run in this process, as `prefect deployment run spin/iterate` does in a worker",
    )  # fmt: skip
    run.add_argument("--rounds", type=int, help="number of rounds to advance by (default: 1)")
    run.add_argument("--until-round", type=int, help="advance until this round is complete")

    plan = commands.add_parser("plan", parents=[config, dataset, fields, json],
                               help="estimate memory, disk, tokens, FLOPs and time of a configuration")  # fmt: skip
    plan.add_argument("--rounds", type=int, help="number of rounds to plan for (default: the configuration's)")
    plan.add_argument("--tflops", type=float, help="speed of the machine in TFLOP/s (default: measured here)")

    status = commands.add_parser("status", parents=[store, json], help="show the progress and the lease holder of runs")
    status.add_argument("run", nargs="?", help="name of the run (default: all runs of the store)")

    commands.add_parser(
        "resume", parents=[one_run, store, verbose], epilog=STATUSES, help="finish the pending advance of a run"
    )

    verify = commands.add_parser(
        "verify", parents=[one_run, store], epilog="exit status: 0 all as committed (or repaired), 74 damaged",
        help="read every file of a run and compare it with its checksum",
    )  # fmt: skip
    either = verify.add_mutually_exclusive_group()
    either.add_argument("--repair", action="store_true", help="make damaged objects again, and nothing else")
    either.add_argument("--json", action="store_true", help="print JSON")

    gc = commands.add_parser("gc", parents=[store, json], help="list, or remove, objects that no run needs")
    gc.add_argument("--run", action="append", metavar="RUN", help="use the rules of this run only (may be repeated)")
    gc.add_argument("-p", "--param", action="append", default=[], metavar="keep.FIELD=VALUE",
                    help="a rule that replaces the runs' own, e.g. -p keep.policies=2")  # fmt: skip
    gc.add_argument("--delete", action="store_true", help="remove the listed objects (default: only list them)")

    commands.add_parser("report", parents=[one_run, store, json], help="write a run's report and print its table")

    export = commands.add_parser("export", parents=[one_run, store],
                                 help="write a policy as an ordinary model folder with a model card")  # fmt: skip
    export.add_argument("--round", type=int, help="iterate to export; 0 is the base (default: the last trained one)")
    export.add_argument("--to", type=Path, help="new or empty folder to write (default: ./RUN-round-N)")
    export.add_argument("--shard-size", metavar="SIZE", help="largest weights file, e.g. 5GB (default: as committed)")
    export.add_argument("--push", metavar="TARGET", help="then copy it to the hub (name/model; private) or a folder")

    compare = commands.add_parser("compare", parents=[store, json], help="compare finished runs on one page")
    compare.add_argument("runs", nargs="+", metavar="RUN",
                         help="runs of one store; runs that differ only in their seed form one variant")  # fmt: skip
    compare.add_argument("--against", metavar="RUN", help="reference of the comparison (default: the first run)")
    compare.add_argument("--name", help="name of the comparison (default: the runs' names joined)")

    grid = commands.add_parser("grid", parents=[fields, verbose], epilog=STATUSES,
                               help="run variations of one configuration and compare them")  # fmt: skip
    grid.add_argument("--name", default="grid", help="name of the comparison and prefix of its runs (default: grid)")
    grid.add_argument("--config", help="configuration of all members (YAML or JSON; path or URI)")
    grid.add_argument("--until-round", type=int, help="last round of every member (default: the configuration's)")
    grid.add_argument("--alpha", type=float, nargs="+", help="values at the configured total beta (default: 1 0.5 0)")
    grid.add_argument("--beta-0", type=float, nargs="+",
                      help="instead of --alpha: weights of a KL to the base, added to the configured beta")  # fmt: skip
    grid.add_argument("--history", type=_history, nargs="+", help="numbers of iterates, or all (default: 1 all)")
    grid.add_argument("--reference", nargs="+", choices=["previous", "iterate"],
                      help="values of objective.reference (default: the configuration's)")  # fmt: skip
    grid.add_argument("--seeds", type=int, nargs="+", help="seeds of every variation (default: the configuration's)")
    grid.add_argument("--variations", metavar="FILE", help="instead of the three axes above: fields by variation name")
    grid.add_argument("--against", metavar="RUN", help="reference of the comparison (default: plain SPIN)")
    grid.add_argument("--model", help="base model of all members")
    grid.add_argument("--dataset", help="data set of all members")
    grid.add_argument("--store", help=_STORE)
    grid.add_argument(
        "--deployment", help="deployment that runs the members, e.g. spin/iterate (default: this process)"
    )

    join = commands.add_parser("join", parents=[one_run], help="work on a run as a further machine (resources.nodes)")
    join.add_argument("--store", required=True, help="the run's store, reachable from all machines")

    agreement = commands.add_parser("judge-agreement", parents=[config, dataset, fields, json],
                                    help="compare the configured judge with published human preferences")  # fmt: skip
    agreement.add_argument("votes", help="human or gpt4_pair (of lmsys/mt_bench_human_judgments), or a file like them")
    agreement.add_argument("--limit", type=int, help="number of votes to use, the first ones (default: all)")

    win_rate = commands.add_parser("win-rate", parents=[store, json],
                                   help="let a judge compare the held-out answers of two runs")  # fmt: skip
    win_rate.add_argument("run", help="name of the run to count wins of")
    win_rate.add_argument("other", help="name of the run to compare it with, in the same store")
    win_rate.add_argument("--round", type=int, help="iterate of both (default: the last that both have evaluated)")
    win_rate.add_argument("-p", "--param", action="append", default=[], metavar="GROUP.FIELD=VALUE",
                          help="a field that replaces the first run's own, e.g. -p judge.model=NAME")  # fmt: skip

    data = commands.add_parser("data", help="look at a data set").add_subparsers(dest="action", required=True)
    inspect = data.add_parser("inspect", parents=[config, fields, json],
                              help="show counts, lengths, rendered examples and rejected rows")  # fmt: skip
    inspect.add_argument("dataset", nargs="?", help="data set, as the parameter (default: the configuration's)")
    return top


def _history(text: str) -> int | str:
    return text if text == "all" else int(text)
