"""Shared parts of the training measurements: random models, pairs, model FLOPs, the machine's peak.

Lengths are drawn like those of chat data (log-normal, seed 0): prompts around 100 tokens, human answers 150, generated
ones 200 and at most 256. Token ids and weights are random, which does not change the work.
"""

from __future__ import annotations

import math
import random
import re
import resource
import time
from pathlib import Path
from typing import Any

import torch

from spinreg_core.logprobs.packing import group

SHAPES = {
    # SmolLM2-135M, and a model of half a billion parameters (Qwen2-0.5B's shape) for GPUs.
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    # A fifth of its work, for quick runs.
    "30m": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 6,
            "num_key_value_heads": 2, "vocab_size": 16384, "tie_word_embeddings": True},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
}  # fmt: skip


def rows(
    prompts: int, answers: int, vocabulary: int, *, lengths: tuple[int, int, int] | None = None
) -> list[dict[str, Any]]:
    """Return pairs, `answers` of each prompt one after another, in random order of lengths.

    `lengths`: of every prompt, human and generated answer; unset: drawn like those of chat data.
    """
    draw = random.Random(0)

    def ids(which: int, median: float, low: int, high: int) -> list[int]:
        size = lengths[which] if lengths else max(low, min(high, round(median * math.exp(0.6 * draw.gauss(0, 1)))))
        return [draw.randrange(10, vocabulary) for _ in range(size)]

    found = []
    for number in range(prompts):
        prompt, real = ids(0, 100, 20, 400), ids(1, 150, 10, 400)
        found += [
            {"pair_id": f"{k + 1}:{number:016x}", "round": 1, "iterate": 0, "answer": k,
             "geometric": False, "prompt_id": f"{number:016x}",
             "prompt_ids": prompt, "real_ids": real, "generated_ids": ids(2, 200, 10, 256), "real_truncated": False,
             "generated_truncated": False, "base_real": None, "base_generated": None}
            for k in range(answers)
        ]  # fmt: skip
    for pair in found:  # scores of a uniform policy, so that margins start near zero as in a real round
        for which in ("real", "generated"):
            pair[f"previous_{which}"] = -math.log(vocabulary) * len(pair[f"{which}_ids"])
    return found


def model_flops(batch: list[dict[str, Any]], config: Any) -> float:
    """Return the FLOPs of a step, forward and backward: prompts and answers once, the projection on answer tokens."""
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


def processor() -> str:
    """Name the processor and the number of threads, for machines without a GPU."""
    names = re.findall(r"^model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text(), re.M)
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} threads"


def memory() -> float:
    """Return the peak memory of this process in GiB: of the GPU if there is one, else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measured_peak() -> dict[str, float]:
    """Return the best rate of a square matrix product in FLOP/s, by number format."""
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


def write_model(shape: str, folder: Path) -> str:
    """Write a folder with random weights and with the tokenizer that TRL requires."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPES[shape], max_position_embeddings=4096)).save_pretrained(folder)
    words = {"<eos>": 0, "a": 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    return str(folder)
