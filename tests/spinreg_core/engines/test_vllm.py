"""The vllm engine, really run once: the same answers as hf where nothing is random, the softmax where it is."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from test_hf import NEAR_GREEDY, PAD, PROMPTS, kept, next_probabilities, p_value, sampling
from transformers import LlamaForCausalLM

from spinreg_core.engines.hf import HfEngine
from spinreg_core.engines.vllm import _Ended

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
LOWEST = 0.01  # vLLM's
CALLS: dict[str, dict[str, Any]] = {}


def call(name: str, prompts: list[list[int]], seed: int, **settings: Any) -> None:
    CALLS[name] = {"prompts": prompts, "seed": seed, "sampling": asdict(sampling(**settings))}


call("sampled", PROMPTS * 8, 1)
call("greedy", PROMPTS, 0, temperature=LOWEST)
call("softmax", [[3]] * 4000, 2, new=1)
call("filtered", [[3]] * 4000, 3, new=1, temperature=1.3, top_k=6, top_p=0.8)
call("sampled again", PROMPTS * 8, 1)
call("sampled otherwise", PROMPTS * 8, 4)
for stop in range(11):
    call(f"stop {stop}", PROMPTS, 0, temperature=LOWEST, stop=stop, new=4)
call("too long", [[1] * 60], 0)
call("too cold", PROMPTS, 0, temperature=NEAR_GREEDY)


@pytest.fixture(scope="module")
def outcome(tiny_model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("vllm")
    # A checkpoint with settings of its own, which must not matter.
    plain = tiny_model.generation_config
    tiny_model.generation_config = type(plain)(
        repetition_penalty=5.0, temperature=0.3, top_k=2, do_sample=True, eos_token_id=1
    )
    try:
        tiny_model.save_pretrained(folder / "policy")
    finally:
        tiny_model.generation_config = plain
    request, result = folder / "request.json", folder / "answers.json"
    request.write_text(json.dumps({"policy": str(folder / "policy"), "longest": 64, "calls": list(CALLS.values())}))
    script = Path(__file__).with_name("vllm_calls.py")
    subprocess.run([sys.executable, str(script), str(request), str(result)], check=True, timeout=300)
    found = json.loads(result.read_text())
    return {"children": found["children"], **dict(zip(CALLS, found["answers"], strict=True))}


def test_no_process_is_left_to_outlive_this_one(outcome: dict[str, Any]) -> None:
    assert outcome["children"] == []


def test_agrees_with_hf_where_nothing_is_random(outcome: dict[str, Any], tiny_model: LlamaForCausalLM) -> None:
    engine = HfEngine(tiny_model, batch_size=4, pad_id=PAD)
    for name in ("greedy", *(f"stop {stop}" for stop in range(11))):
        wanted = CALLS[name]["sampling"]
        settings = sampling(LOWEST, new=wanted["max_new_tokens"], stop=wanted["stop_ids"][0])
        expected = [[a.token_ids, a.finish] for a in engine.generate(PROMPTS, settings, seed=0)]
        same = sum(a == b for a, b in zip(outcome[name], expected, strict=True))
        assert same >= len(PROMPTS) - 1, (name, outcome[name], expected)  # one near-tie may fall the other way


def test_answers_end_at_the_stop_token_and_are_flagged(outcome: dict[str, Any]) -> None:
    seen = set()
    for stop in range(11):
        for ids, finish in outcome[f"stop {stop}"]:
            assert finish == ("stop" if stop in ids else "length")
            assert ids.count(stop) == (finish == "stop")
            assert ids[-1] == stop if finish == "stop" else len(ids) == 4
            seen.add((finish, len(ids)))
    assert {("stop", 1), ("stop", 4), ("length", 4)} <= seen  # empty, finished at the limit, cut off


def test_draws_follow_the_softmax(outcome: dict[str, Any], tiny_model: LlamaForCausalLM) -> None:
    for name, temperature, top_k, top_p in (("softmax", 1.0, 0, 1.0), ("filtered", 1.3, 6, 0.8)):
        counts = Counter(ids[0] for ids, _ in outcome[name])
        assert p_value(counts, kept(next_probabilities(tiny_model, [3], temperature), top_k, top_p)) > 1e-3
        off = kept(next_probabilities(tiny_model, [3], temperature * 1.4), top_k, top_p)
        assert p_value(counts, off) < 1e-6


def test_a_seed_fixes_a_call_whatever_the_engine_did_before(outcome: dict[str, Any]) -> None:
    assert outcome["sampled"] == outcome["sampled again"]
    assert outcome["sampled"] != outcome["sampled otherwise"]


def test_refusals(outcome: dict[str, Any]) -> None:
    assert outcome["too long"].startswith("prompt 0: found 60 tokens plus max_new_tokens 6; expected at most 64")
    assert outcome["too cold"].startswith("generation.temperature: found 0.0001; expected 0.01 to 2.0 with engine vllm")


def test_progress_is_told_even_where_progress_bars_are_switched_off() -> None:
    """TQDM_DISABLE=1 reaches tqdm as disable=True; vLLM divides by the bar's elapsed time."""
    told: list[int] = []
    bar = _Ended(told.append, total=3, desc="Processed prompts", disable=True)
    bar.update(1)
    bar.update(2)
    assert told == [1, 2]
    assert bar.n == 3
    assert bar.format_dict["elapsed"] > 0
    silent = _Ended(told.append, total=3, desc="Adding requests")
    silent.update(3)
    assert told == [1, 2]
