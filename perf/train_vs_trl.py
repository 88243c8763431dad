"""Compare training steps of spinreg and of TRL's DPOTrainer, in turn, on the same model, pairs and optimiser.

    pip install trl==1.16.0
    python perf/train_vs_trl.py [--answers 1] [--steps 6] [--model FOLDER] [--precision fp32] [--quick]

Both use the same token ids, loss (DPO with cached reference scores), RMSprop and pairs per optimiser step. TRL has its
best settings: precomputed reference log-probabilities, its own batching and fused projection, no gradient
checkpointing. Both use bfloat16 if the machine multiplies it faster than float32; `--precision` overrides this. Each
is a process of its own and takes its steps in turn, A B A B, because machines change their speed within minutes. The
first step of each is left out. The ratio is that of the sums over equal steps.

Lengths are drawn like those of chat data (`work.py`). Token ids are random, and so are the weights without
`--model`, which does not change the work.

After the last turn, one more step of spinreg is profiled by operator.

Model FLOPs are the necessary work, the same number for both: forward and backward of every prompt and every answer
once, the vocabulary projection on answer tokens only, attention between tokens that see each other. The last line is
one JSON object with every figure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from work import SHAPES, load_config, measured_peak, memory, model_flops, processor, rows, write_model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b" if torch.cuda.is_available() else "135m")
    parser.add_argument("--model", help="a Hugging Face folder instead of random weights of that shape")
    parser.add_argument("--answers", type=int, default=1, help="generated answers per prompt (K)")
    parser.add_argument("--prompts", type=int, default=64 if torch.cuda.is_available() else 8, help="per step")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each")
    parser.add_argument("--precision", choices=["fp32", "mixed", "bf16"], help="default: the faster one here")
    parser.add_argument(
        "--trl-batch",
        type=int,
        default=8 if torch.cuda.is_available() else 1,
        help="TRL's pairs per forward pass; one needs no padding to the longest pair",
    )
    parser.add_argument("--tokens-per-pass", type=int, default=16384 if torch.cuda.is_available() else 3072)
    parser.add_argument("--quick", action="store_true", help="a smaller model, three steps each")
    parser.add_argument("--worker", choices=["spinreg", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.shape = 3, "0.5b" if torch.cuda.is_available() else "30m"
    return arguments


def turn() -> None:
    """Let the worker take one step and wait for it."""
    sys.stdin.readline()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def tell(**figures: Any) -> None:
    print("figures " + json.dumps(figures), flush=True)


def timed_spinreg(arguments: argparse.Namespace) -> None:
    from spinreg_core.config import ObjectiveConfig, TrainingConfig
    from spinreg_core.logprobs.policy import load_for
    from spinreg_core.logprobs.sequence import packs
    from spinreg_core.runtime.distributed import Ranks
    from spinreg_core.training.trainer import RoundTrainer

    gpu = torch.cuda.is_available()
    config = load_config(arguments.folder)
    pairs = rows(arguments.prompts * (arguments.steps + 2), arguments.answers, config.vocab_size)
    training = TrainingConfig(batch_size=arguments.prompts * arguments.answers, precision=arguments.precision,
                              schedule="constant", learning_rate=1e-7, optimizer="rmsprop")  # fmt: skip
    ranks = Ranks(torch.device("cuda" if gpu else "cpu"), compile=gpu)  # as a run does it
    model = load_for(ranks, arguments.folder, arguments.precision)
    round_ = RoundTrainer(model, pairs, objective=ObjectiveConfig(alpha=1.0, beta=0.1), training=training, seed=0,
                   round_number=1, tokens_per_pass=arguments.tokens_per_pass)  # fmt: skip
    size = arguments.prompts * arguments.answers  # the order of the rows, so that both train on the same batches
    round_.batches = [(0, list(range(start, start + size))) for start in range(0, len(pairs), size)]
    for _ in range(arguments.steps + 1):
        turn()
        synchronize()
        begin = time.perf_counter()
        round_.step()
        synchronize()
        tell(seconds=time.perf_counter() - begin, memory_gib=memory(), packed=packs(model))
    turn()
    tell(profile=profiled(round_))


def profiled(round_: Any) -> dict[str, float]:
    """Return the shares of one step's time of the ten slowest operators; `other` is the rest."""
    from torch.profiler import ProfilerActivity, profile

    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as found:
        round_.step()
    times = {e.key: e.self_device_time_total if gpu else e.self_cpu_time_total for e in found.key_averages()}
    total = sum(times.values())
    largest = dict(sorted(times.items(), key=lambda item: -item[1])[:10])
    return {name: time / total for name, time in largest.items()} | {"other": 1 - sum(largest.values()) / total}


def timed_trl(arguments: argparse.Namespace) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    config = load_config(arguments.folder)
    pairs = rows(arguments.prompts * (arguments.steps + 1), arguments.answers, config.vocab_size)
    size = arguments.prompts * arguments.answers
    per_pass = min(arguments.trl_batch, size)
    dataset = Dataset.from_list(
        [{"prompt_ids": p["prompt_ids"], "chosen_ids": p["real_ids"], "rejected_ids": p["generated_ids"],
          "ref_chosen_logps": p["previous_real"], "ref_rejected_logps": p["previous_generated"]} for p in pairs]
    )  # fmt: skip

    class Prepared(DPOTrainer):
        """Accept token ids and reference scores as they are, because preparing them is not measured."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turn()
            synchronize()
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            tell(seconds=time.perf_counter() - self.begin, memory_gib=memory())

    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as output:
        settings = DPOConfig(
            output_dir=output, per_device_train_batch_size=per_pass, gradient_accumulation_steps=size // per_pass,
            max_steps=arguments.steps + 1, learning_rate=1e-7, lr_scheduler_type="constant", optim="rmsprop",
            beta=0.1, max_length=None, bf16=arguments.precision != "fp32", use_cpu=not gpu,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "bfloat16" if arguments.precision == "bf16" else "float32"},
            precompute_ref_log_probs=True, report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=gpu,
        )  # fmt: skip
        trainer = Prepared(
            model=arguments.folder, args=settings, train_dataset=dataset, callbacks=[Clock()],
            processing_class=AutoTokenizer.from_pretrained(arguments.folder),
        )  # fmt: skip
        trainer.train()


class Worker:
    """One of the two trainers, in a process of its own."""

    def __init__(self, name: str, arguments: argparse.Namespace, folder: str) -> None:
        passed = [f"--{key.replace('_', '-')}={value}" for key, value in vars(arguments).items()
                  if key not in ("worker", "folder", "model", "quick") and value is not None]  # fmt: skip
        command = [sys.executable, __file__, *passed, "--worker", name, "--folder", folder]
        self.name, self.steps = name, list[dict[str, Any]]()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print("go", file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("figures "):
                found: dict[str, Any] = json.loads(line.removeprefix("figures "))
                if "seconds" in found:
                    self.steps.append(found)
                    print(f"{self.name}: {found['seconds']:.2f} s", file=sys.stderr, flush=True)
                return found
        raise SystemExit(f"{self.name} ended with status {self.process.wait()}")


def main() -> None:
    arguments = parse()
    if arguments.worker:
        torch.set_flush_denormal(True)  # as the stage does; see spinreg_core/stages/train.py
        {"spinreg": timed_spinreg, "trl": timed_trl}[arguments.worker](arguments)
        return
    peaks = [measured_peak()]
    if arguments.precision is None:
        arguments.precision = "mixed" if peaks[0]["bf16"] > 1.2 * peaks[0]["fp32"] else "fp32"
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(arguments.model) if arguments.model else write_model(arguments.shape, Path(temporary))
        config = load_config(folder)
        workers = [Worker(name, arguments, folder) for name in ("spinreg", "trl")]
        for number in range(arguments.steps + 1):
            for worker in workers:
                worker.step()
            if number:
                peaks.append(measured_peak())
        profile = workers[0].step()["profile"]
        for worker in workers:
            worker.process.wait(60)
    peak = {name: max(found[name] for found in peaks) for name in peaks[0]}
    pairs = rows(arguments.prompts * (arguments.steps + 1), arguments.answers, config.vocab_size)
    size = arguments.prompts * arguments.answers
    flops = [model_flops(pairs[start : start + size], config) for start in range(size, len(pairs), size)]
    figures: dict[str, Any] = {"answers_per_prompt": arguments.answers, "pairs_per_step": size, "peak_flops": peak}
    print(f"{'':10} {'pairs/s':>9} {'model GFLOP/s':>14} {'of peak':>8} {'memory GiB':>11}   seconds of each step")
    for worker in workers:
        seconds = [step["seconds"] for step in worker.steps[1:]]
        rate, speed = size * len(seconds) / sum(seconds), sum(flops) / sum(seconds)
        gib = max(step["memory_gib"] for step in worker.steps)
        figures[worker.name] = {"pairs_per_s": rate, "model_flops_per_s": speed, "memory_gib": gib, "seconds": seconds,
                                "peak_fraction": speed / max(peak.values())}  # fmt: skip
        print(f"{worker.name:10} {rate:9.3f} {speed / 1e9:14.1f} {speed / max(peak.values()):8.1%} {gib:11.2f}   "
              + ", ".join(f"{x:.1f}" for x in seconds))  # fmt: skip
    ours, trl = (figures[worker.name] for worker in workers)
    figures["ratio"] = ours["pairs_per_s"] / trl["pairs_per_s"]
    figures["ratio_of_each_step"] = [b / a for a, b in zip(ours["seconds"], trl["seconds"], strict=True)]
    figures |= {"pairs_per_s": ours["pairs_per_s"], "peak_fraction": ours["peak_fraction"]}
    figures["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    figures |= {"precision": arguments.precision, "trl_batch": arguments.trl_batch, "shape": arguments.shape}
    print(f"ratio {figures['ratio']:.2f} ({arguments.precision}, {arguments.answers} generated answers per prompt, "
          f"{figures['device']})")  # fmt: skip
    figures["profile"] = profile
    print("where a step of spinreg goes: " + ", ".join(f"{name} {share:.0%}" for name, share in profile.items()))
    print("of each step: " + ", ".join(f"{x:.2f}" for x in figures["ratio_of_each_step"]))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
