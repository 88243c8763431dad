"""Measure the cost of a training step over pairs, answers per prompt, lengths and ranks.

    python perf/scaling.py [--shape 135m] [--precision mixed] [--quick]

The cost should be linear in tokens. The middle point is 8 prompts of 100 tokens with one human and one generated answer
of 150 tokens; one dimension is varied at a time. The points are measured in turn, `--repeats` times, and the fastest of
each counts, because machines change their speed within minutes. Tokens are the computed ones: a prompt once, each
answer once. `cost` is the time per token relative to the middle point. It includes attention, which is quadratic in the
length of a sequence.

Ranks: the same step on one rank and on two, one thread each, in turn; efficiency is t(1) / (2 t(2)).

The last line is one JSON object; `ratio` is the largest cost over the smallest (1: exactly linear).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from work import SHAPES, load_config, measured_peak, processor, rows, write_model

from spinreg_core.config import ObjectiveConfig, ResourcesConfig, TrainingConfig
from spinreg_core.logprobs.packing import group
from spinreg_core.logprobs.policy import load_for
from spinreg_core.runtime.distributed import Ranks, init_ranks
from spinreg_core.training.trainer import RoundTrainer

MIDDLE = {"prompts": 8, "answers": 1, "prompt": 100, "answer": 150}
VARIED = {"prompts": [2, 4, 16, 32], "answers": [2, 4], "prompt": [25, 400], "answer": [40, 75, 300, 600]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--shape", choices=SHAPES, default="0.5b" if gpu else "135m")
    parser.add_argument("--precision", choices=["fp32", "mixed", "bf16"], help="default: the faster one here")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens-per-pass", type=int, default=16384 if gpu else 3072)
    parser.add_argument("--quick", action="store_true", help="a smaller model, two repeats, fewer points")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shape, arguments.repeats = "0.5b" if gpu else "30m", 2
    return arguments


def points(quick: bool) -> list[dict[str, int]]:
    found = [MIDDLE]
    for name, values in VARIED.items():
        found += [MIDDLE | {name: value} for value in (values[::3] if quick and len(values) > 2 else values)]
    return found


def a_round(
    arguments: argparse.Namespace, folder: str, point: dict[str, int], model: Any, ranks: Ranks
) -> RoundTrainer:
    """Return a round trainer with all pairs in every step."""
    vocabulary = load_config(folder).vocab_size
    lengths = (point["prompt"], point["answer"], point["answer"])
    pairs = rows(point["prompts"], point["answers"], vocabulary, lengths=lengths)
    training = TrainingConfig(batch_size=len(pairs), epochs=99, precision=arguments.precision, schedule="constant",
                              learning_rate=1e-9, optimizer="rmsprop")  # fmt: skip
    return RoundTrainer(model, pairs, objective=ObjectiveConfig(alpha=1.0, beta=0.1), training=training, seed=0,
                 round_number=1, tokens_per_pass=arguments.tokens_per_pass, ranks=ranks)  # fmt: skip


def tokens_of(round_: RoundTrainer) -> int:
    prompts = [p["prompt_ids"] for p in round_.pairs] * 2
    groups, _ = group(prompts, [p["real_ids"] for p in round_.pairs] + [p["generated_ids"] for p in round_.pairs])
    return sum(g.tokens for g in groups)


def measure(arguments: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    gpu = torch.cuda.is_available()
    alone = Ranks(torch.device("cuda" if gpu else "cpu"), compile=gpu)  # as a run does it
    model = load_for(alone, folder, arguments.precision)
    rounds = [(point, a_round(arguments, folder, point, model, alone)) for point in points(arguments.quick)]
    rounds[0][1].step()  # warm
    seconds: list[list[float]] = [[] for _ in rounds]
    for _ in range(arguments.repeats):
        for i, (_, round_) in enumerate(rounds):
            begin = time.perf_counter()
            round_.step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the optimiser's work is in it
            seconds[i].append(time.perf_counter() - begin)
    return [
        point | {"tokens": tokens_of(round_), "seconds": min(times)}
        for (point, round_), times in zip(rounds, seconds, strict=True)
    ]


def on_ranks(arguments: argparse.Namespace, folder: str) -> None:
    """Time steps of the middle point; every rank runs this."""
    ranks = init_ranks(ResourcesConfig())
    round_ = a_round(arguments, folder, MIDDLE, load_for(ranks, folder, arguments.precision), ranks)
    times = [round_.step()["seconds"] for _ in range(3)]
    if ranks.first:
        print(json.dumps(times[1:]), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def ranked(arguments: argparse.Namespace, folder: str, count: int) -> list[float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), __file__,
               "--shape", arguments.shape, "--precision", arguments.precision, "--worker", folder]  # fmt: skip
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    arguments = parse()
    if arguments.worker:
        on_ranks(arguments, arguments.worker)
        return
    torch.set_flush_denormal(True)
    begin, peak = time.monotonic(), measured_peak()
    if arguments.precision is None:
        arguments.precision = "mixed" if peak["bf16"] > 1.2 * peak["fp32"] else "fp32"
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_model(arguments.shape, Path(temporary))
        found = measure(arguments, folder)
        gpus = torch.cuda.device_count()
        times: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(1 if arguments.quick else 2):
            for count in times if gpus != 1 else ():
                times[count] += ranked(arguments, folder, count)
    cost = found[0]["seconds"] / found[0]["tokens"]
    print(
        f"{'prompts':>8} {'answers':>8} {'prompt':>7} {'answer':>7} {'tokens':>8} {'seconds':>8} {'tokens/s':>9} cost"
    )
    for point in found:
        point["cost"] = point["seconds"] / point["tokens"] / cost
        print(f"{point['prompts']:8} {point['answers']:8} {point['prompt']:7} {point['answer']:7} {point['tokens']:8} "
              f"{point['seconds']:8.2f} {point['tokens'] / point['seconds']:9.0f} {point['cost']:.2f}")  # fmt: skip
    costs = [point["cost"] for point in found]
    slope = statistics.linear_regression([p["tokens"] for p in found], [p["seconds"] for p in found])
    correlation = statistics.correlation([p["tokens"] for p in found], [p["seconds"] for p in found])
    figures: dict[str, Any] = {
        "ratio": max(costs) / min(costs), "points": found, "correlation": correlation, "seconds_per_token": slope.slope,
        "fixed_seconds": slope.intercept, "shape": arguments.shape, "precision": arguments.precision,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "took_seconds": round(time.monotonic() - begin),
    }  # fmt: skip
    print(f"cost per token between {min(costs):.2f} and {max(costs):.2f}; correlation of seconds and tokens "
          f"{correlation:.4f}, {slope.intercept:.2f} s whatever the tokens")  # fmt: skip
    if times[2]:
        one, two = min(times[1]), min(times[2])
        figures |= {"ranks_seconds": {"1": one, "2": two}, "ranks_efficiency": one / (2 * two)}
        print(f"one rank {one:.2f} s, two ranks {two:.2f} s, a thread each: efficiency {one / (2 * two):.2f}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
