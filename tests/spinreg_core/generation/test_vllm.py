"""The vllm engine, really run once: the same answers as hf where nothing is random, the softmax where it is."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from spinreg_core.generation.hf import HfEngine
from tests.support.decoding import NEAR_GREEDY, PAD, PROMPTS, kept, next_probabilities, p_value, sampling

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
LOWEST = 0.01  # vLLM's
CALLS: dict[str, dict[str, Any]] = {}


def call(name: str, prompts: list[list[int]], seed: int, order: int = 1, **settings: Any) -> None:
    """Seeds count from `seed`; order -1 turns prompts and seeds round."""
    seeds = [seed + i for i in range(len(prompts))]
    CALLS[name] = {"prompts": prompts[::order], "seeds": seeds[::order], "sampling": asdict(sampling(**settings))}


call("sampled", PROMPTS * 8, 1)
call("greedy", PROMPTS, 0, temperature=LOWEST)
call("softmax", [[3]] * 4000, 2, new=1)
call("filtered", [[3]] * 4000, 3, new=1, temperature=1.3, top_k=6, top_p=0.8)
call("sampled again", PROMPTS * 8, 1)
call("turned round", PROMPTS * 8, 1, order=-1)
call("a piece", (PROMPTS * 8)[:5], 1)
call("sampled otherwise", PROMPTS * 8, 1000)
# More prompt tokens than vLLM reads in one step: the one that does not fit must wait whole.
call("many", [[1 + i % 10] * 50 for i in range(300)], 5, new=2)
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
    subprocess.run(
        [sys.executable, "-m", "tests.support.vllm_calls", str(request), str(result)], check=True, timeout=300
    )
    found = json.loads(result.read_text())
    return {"children": found["children"], **dict(zip(CALLS, found["answers"], strict=True))}


def test_no_process_is_left_to_outlive_this_one(outcome: dict[str, Any]) -> None:
    assert outcome["children"] == []


def test_agrees_with_hf_where_nothing_is_random(outcome: dict[str, Any], tiny_model: LlamaForCausalLM) -> None:
    engine = HfEngine([tiny_model], tokens=56, pad_id=PAD)
    for name in ("greedy", *(f"stop {stop}" for stop in range(11))):
        wanted = CALLS[name]["sampling"]
        settings = sampling(LOWEST, new=wanted["max_new_tokens"], stop=wanted["stop_ids"][0])
        expected = [[a.token_ids, a.finish] for a in engine.generate(PROMPTS, settings, range(7))]
        same = sum(a[:2] == b for a, b in zip(outcome[name], expected, strict=True))
        assert same >= len(PROMPTS) - 1, (name, outcome[name], expected)  # one near-tie may fall the other way


def test_answers_end_at_the_stop_token_and_are_flagged(outcome: dict[str, Any]) -> None:
    seen = set()
    for stop in range(11):
        for ids, finish, _ in outcome[f"stop {stop}"]:
            assert finish == ("stop" if stop in ids else "length")
            assert ids.count(stop) == (finish == "stop")
            assert ids[-1] == stop if finish == "stop" else len(ids) == 4
            seen.add((finish, len(ids)))
    assert {("stop", 1), ("stop", 4), ("length", 4)} <= seen  # empty, finished at the limit, cut off


def test_draws_follow_the_softmax(outcome: dict[str, Any], tiny_model: LlamaForCausalLM) -> None:
    for name, temperature, top_k, top_p in (("softmax", 1.0, 0, 1.0), ("filtered", 1.3, 6, 0.8)):
        counts = Counter(ids[0] for ids, _, _ in outcome[name])
        assert p_value(counts, kept(next_probabilities(tiny_model, [3], temperature), top_k, top_p)) > 1e-3
        off = kept(next_probabilities(tiny_model, [3], temperature * 1.4), top_k, top_p)
        assert p_value(counts, off) < 1e-6


def test_an_answer_depends_on_its_seed_and_on_no_neighbour(outcome: dict[str, Any]) -> None:
    tokens = {name: [answer[:2] for answer in outcome[name]] for name in CALLS if isinstance(outcome[name], list)}
    assert tokens["sampled"] == tokens["sampled again"] == tokens["turned round"][::-1]
    assert tokens["sampled"][:5] == tokens["a piece"]
    assert tokens["sampled"] != tokens["sampled otherwise"]
    assert len(tokens["many"]) == 300


def test_log_probabilities_are_the_policys_whatever_the_sampler(
    outcome: dict[str, Any], tiny_model: LlamaForCausalLM
) -> None:
    for name in ("sampled", "greedy"):
        for prompt, (ids, _, logprobs) in zip(CALLS[name]["prompts"], outcome[name], strict=True):
            expected = [
                float(next_probabilities(tiny_model, prompt + ids[:k]).log()[token]) for k, token in enumerate(ids)
            ]
            assert logprobs == pytest.approx(expected, abs=1e-3)


def test_vllm_refuses_long_prompts_and_low_temperatures(outcome: dict[str, Any]) -> None:
    assert outcome["too long"].startswith("prompt 0 has 60 tokens plus max_new_tokens 6; expected at most 64")
    assert outcome["too cold"].startswith("generation.temperature is 0.0001, outside of 0.01 to 2.0; use engine hf")
