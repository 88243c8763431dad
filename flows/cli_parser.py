"""What can be said on the command line of `spinreg`.

Decides: the names of sub-commands and options. Leaves out: what they do (`cli.py`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from spinreg_core import __version__

STATUSES = (
    "exit status: 0 done, 1 failed, 2 wrong usage, 65 bad input, 74 damaged, 75 another process advances the run, "
    "143 stopped by SIGTERM"
)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="spinreg", description="Regularised self-play alignment of language models.", epilog=STATUSES
    )
    top.add_argument("--version", action="version", version=f"spinreg {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

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
    either = verify.add_mutually_exclusive_group()
    either.add_argument("--repair", action="store_true", help="make what is damaged anew, and nothing else")
    either.add_argument("--json", action="store_true", help="print JSON")

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
    export.add_argument("--to", type=Path, help="folder to write, which is empty or not there yet (default: "
                        "RUN-round-N here)")  # fmt: skip
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

    win_rate = commands.add_parser(
        "win-rate", help="have a judge compare the held-out answers of two runs, each pair in both orders"
    )
    win_rate.add_argument("run", help="name of the run whose wins are counted")
    win_rate.add_argument("other", help="name of the run that it is held against, of the same store")
    win_rate.add_argument("--store", default="spinreg-store", help="local folder or s3://bucket/prefix")
    win_rate.add_argument("--round", type=int, help="iterate of both (default: the last that both have evaluated)")
    win_rate.add_argument("-p", "--param", action="append", default=[], metavar="GROUP.FIELD=VALUE",
                          help="e.g. -p judge.model=NAME; what is not said is as the first run has it")  # fmt: skip
    win_rate.add_argument("--json", action="store_true", help="print JSON")

    data = commands.add_parser("data", help="look at a data set").add_subparsers(dest="action", required=True)
    inspect = data.add_parser("inspect", help="counts, lengths, rendered examples and rejected rows")
    inspect.add_argument("dataset", nargs="?", help="as the parameter dataset (default: the configuration's)")
    _add_configuration(inspect, dataset=False)
    inspect.add_argument("--json", action="store_true", help="print JSON")
    return top


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
