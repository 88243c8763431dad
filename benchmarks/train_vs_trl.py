"""Training: spinreg against TRL's DPOTrainer, on the same model, pairs, optimiser and machine, A B A B.

    pip install trl==1.16.0
    python benchmarks/train_vs_trl.py [--answers 1] [--steps 4] [--model FOLDER] [--precision fp32] [--quick]

Both take the same token ids, loss (DPO with cached reference scores), RMSprop and pairs per optimiser step. TRL has its
best settings: reference log-probabilities computed beforehand, its own batching and fused projection, no gradient
checkpointing, and the number format that is faster for it here (`--trl-bf16` takes its default instead). Each block is
a process of its own; its first step is left out.

Lengths are drawn like those of chat data (log-normal, seed 0): prompts around 100 tokens, human answers 150, generated
ones 200 and at most 256. Token ids are random, and so are the weights unless a folder is given: neither changes the
work.

Model FLOPs are the work that had to be done, the same number for both: forward and backward of every prompt once and
of every answer once, the vocabulary projection on answer tokens only, attention between tokens that see each other. The
last line is one JSON object with every figure.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from spinreg_core.packing import group

SHAPES = {
    # SmolLM2-135M, and a model of half a billion parameters (Qwen2-0.5B's shape) for GPUs.
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
}  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b" if torch.cuda.is_available() else "135m")
    parser.add_argument("--model", help="a Hugging Face folder instead of random weights of that shape")
    parser.add_argument("--answers", type=int, default=1, help="generated answers per prompt (K)")
    parser.add_argument("--prompts", type=int, default=64 if torch.cuda.is_available() else 8, help="per step")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a block")
    parser.add_argument("--precision", choices=["fp32", "mixed", "bf16"], help="of ours; default: the faster one here")
    parser.add_argument("--trl-bf16", action="store_true", help="TRL in bfloat16 (its default) also without a GPU")
    parser.add_argument("--trl-batch", type=int, default=8, help="TRL's pairs per forward pass")
    parser.add_argument("--tokens-per-pass", type=int, default=16384 if torch.cuda.is_available() else 3072)
    parser.add_argument("--quick", action="store_true", help="one block each, two steps")
    parser.add_argument("--worker", choices=["spinreg", "trl", "peak"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps = 2
    if arguments.precision is None:
        arguments.precision = "mixed" if torch.cuda.is_available() else "fp32"
    return arguments


def rows(arguments: argparse.Namespace, vocabulary: int) -> list[dict[str, Any]]:
    """The pairs of all steps, step after step, in an order that no batching improves on by luck."""
    draw = random.Random(0)

    def ids(median: float, low: int, high: int) -> list[int]:
        size = max(low, min(high, round(median * math.exp(0.6 * draw.gauss(0, 1)))))
        return [draw.randrange(10, vocabulary) for _ in range(size)]

    found = []
    for number in range(arguments.prompts * (arguments.steps + 1)):
        prompt, real = ids(100, 20, 400), ids(150, 10, 400)
        found += [
            {"pair_id": f"{k + 1}:{number:016x}", "round": 1, "iterate": 0, "prompt_id": f"{number:016x}",
             "prompt_ids": prompt, "real_ids": real, "generated_ids": ids(200, 10, 256), "real_truncated": False,
             "generated_truncated": False, "base_real": None, "base_generated": None}
            for k in range(arguments.answers)
        ]  # fmt: skip
    for pair in found:  # what a policy that knows nothing says, so that margins start near zero as in a real round
        for which in ("real", "generated"):
            pair[f"previous_{which}"] = -math.log(vocabulary) * len(pair[f"{which}_ids"])
    return found


def model_flops(batch: list[dict[str, Any]], config: Any) -> float:
    """Forward and backward of one step, see the module's text."""
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    width = d // config.num_attention_heads
    kv = width * config.num_key_value_heads
    body = layers * (d * (2 * d + 2 * kv) + 3 * d * f)
    groups, _ = group([r["prompt_ids"] for r in batch] * 2,
                      [r["real_ids"] for r in batch] + [r["generated_ids"] for r in batch])  # fmt: skip
    tokens = sum(g.tokens for g in groups)
    answers = sum(len(answer) for g in groups for answer in g.answers)
    seen = sum(
        len(g.prompt) ** 2 / 2 + sum(len(a) * (len(g.prompt) + len(a) / 2) for a in g.answers) for g in groups
    )  # pairs of tokens that see each other
    return 6 * (body * tokens + d * config.vocab_size * answers) + 3 * 4 * layers * d * seen


def load_config(folder: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def memory() -> float:
    """Peak memory of this process: the GPU's where there is one, else the resident set (GiB)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def timed_spinreg(arguments: argparse.Namespace) -> dict[str, Any]:
    from spinreg_core.config import ObjectiveConfig, TrainingConfig
    from spinreg_core.logprobs import load_policy, packs
    from spinreg_core.training import Round

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = load_config(arguments.folder)
    pairs = rows(arguments, config.vocab_size)
    training = TrainingConfig(batch_size=arguments.prompts * arguments.answers, precision=arguments.precision,
                              schedule="constant", learning_rate=1e-7, optimizer="rmsprop")  # fmt: skip
    model = load_policy(arguments.folder, arguments.precision, device)
    round_ = Round(model, pairs, objective=ObjectiveConfig(alpha=1.0, beta=0.1), training=training, seed=0,
                   round_number=1, tokens_per_pass=arguments.tokens_per_pass)  # fmt: skip
    size = arguments.prompts * arguments.answers  # the order of the rows, so that both train on the same batches
    round_.batches = [(0, list(range(start, start + size))) for start in range(0, len(pairs), size)]
    seconds = [round_.step()["seconds"] for _ in range(arguments.steps + 1)]
    return {"seconds": seconds[1:], "memory_gib": memory(), "packed": packs(model), "threads": torch.get_num_threads()}


def timed_trl(arguments: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    config = load_config(arguments.folder)
    pairs = rows(arguments, config.vocab_size)
    size = arguments.prompts * arguments.answers
    per_pass = min(arguments.trl_batch, size)
    dataset = Dataset.from_list(
        [{"prompt_ids": p["prompt_ids"], "chosen_ids": p["real_ids"], "rejected_ids": p["generated_ids"],
          "ref_chosen_logps": p["previous_real"], "ref_rejected_logps": p["previous_generated"]} for p in pairs]
    )  # fmt: skip

    class Prepared(DPOTrainer):
        """Takes token ids and reference scores as they are: making them is not what is measured."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append(time.perf_counter() - self.begin)
            print(f"step of {self.times[-1]:.1f} s", file=sys.stderr, flush=True)

    clock = Clock()
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as output:
        settings = DPOConfig(
            output_dir=output, per_device_train_batch_size=per_pass, gradient_accumulation_steps=size // per_pass,
            max_steps=arguments.steps + 1, learning_rate=1e-7, lr_scheduler_type="constant", optim="rmsprop",
            beta=0.1, max_length=None, bf16=gpu or arguments.trl_bf16, use_cpu=not gpu, gradient_checkpointing=False,
            precompute_ref_log_probs=True, report_to="none", save_strategy="no", logging_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=gpu,
        )  # fmt: skip
        trainer = Prepared(
            model=arguments.folder, args=settings, train_dataset=dataset, callbacks=[clock],
            processing_class=AutoTokenizer.from_pretrained(arguments.folder),
        )  # fmt: skip
        trainer.train()
    return {"seconds": clock.times[1:], "memory_gib": memory(), "threads": torch.get_num_threads()}


def measured_peak() -> dict[str, float]:
    """Best rate of a square matrix product (FLOP/s), by number format."""
    found = {}
    size = 8192 if torch.cuda.is_available() else 3072
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(size, size, device=device).to(dtype)
        times = []
        for _ in range(6):
            begin = time.perf_counter()
            a @ a
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        found[name] = 2 * size**3 / min(times)
    return found


def write_model(arguments: argparse.Namespace, folder: Path) -> str:
    """A folder both can load: random weights, and a tokenizer that TRL wants to see."""
    if arguments.model:
        return str(arguments.model)
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPES[arguments.shape], max_position_embeddings=4096)).save_pretrained(folder)
    words = {"<eos>": 0, "a": 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    return str(folder)


def block(worker: str, arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """One block in a process of its own."""
    passed = [f"--{name.replace('_', '-')}={value}" for name, value in vars(arguments).items()
              if name not in ("worker", "folder", "model", "quick", "trl_bf16") and value is not None]  # fmt: skip
    passed += ["--trl-bf16"] if arguments.trl_bf16 else []
    command = [sys.executable, __file__, *passed, "--worker", worker, "--folder", folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{worker}: {found}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    arguments = parse()
    if arguments.worker:
        torch.set_flush_denormal(True)  # as the stage does; see spinreg_core/stages/train.py
        work = {"spinreg": timed_spinreg, "trl": timed_trl, "peak": lambda _: measured_peak()}
        print(json.dumps(work[arguments.worker](arguments)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_model(arguments, Path(temporary))
        peak = block("peak", arguments, folder)
        order = ["spinreg", "trl"] if arguments.quick else ["spinreg", "trl", "spinreg", "trl"]
        blocks = [(worker, block(worker, arguments, folder)) for worker in order]
        config = load_config(folder)
        later = block("peak", arguments, folder)
        peak = {name: max(rate, later[name]) for name, rate in peak.items()}
    pairs = rows(arguments, config.vocab_size)
    size = arguments.prompts * arguments.answers
    flops = [model_flops(pairs[start : start + size], config) for start in range(size, len(pairs), size)]
    figures: dict[str, Any] = {"answers_per_prompt": arguments.answers, "pairs_per_step": size, "peak_flops": peak}
    print(f"{'':10} {'pairs/s':>9} {'model GFLOP/s':>14} {'of peak':>8} {'memory GiB':>11}   pairs/s of each block")
    for worker in ("spinreg", "trl"):
        mine = [b for name, b in blocks if name == worker]
        per_block = [size * len(b["seconds"]) / sum(b["seconds"]) for b in mine]
        rate = statistics.median(per_block)
        speed = rate * sum(flops) / (size * len(flops))
        share = speed / max(peak.values())
        gib = max(b["memory_gib"] for b in mine)
        figures[worker] = {"pairs_per_s": rate, "model_flops_per_s": speed, "peak_fraction": share, "memory_gib": gib,
                           "blocks": per_block}  # fmt: skip
        print(f"{worker:10} {rate:9.3f} {speed / 1e9:14.1f} {share:8.1%} {gib:11.2f}   "
              + ", ".join(f"{x:.3f}" for x in per_block))  # fmt: skip
    figures["ratio"] = figures["spinreg"]["pairs_per_s"] / figures["trl"]["pairs_per_s"]
    gpu = torch.cuda.is_available()
    figures["device"] = torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads"
    figures["precision"] = {"spinreg": arguments.precision, "trl": "bf16" if gpu or arguments.trl_bf16 else "fp32"}
    print(f"ratio {figures['ratio']:.2f} on {figures['device']}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
