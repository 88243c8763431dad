"""The hf engine samples the model's softmax and nothing else, whatever the batch looks like."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig as HfGenerationConfig
from transformers import LlamaForCausalLM

from spinreg_core.config import GenerationConfig, ResourcesConfig
from spinreg_core.errors import BadInput
from spinreg_core.generation.engine import Answer
from spinreg_core.generation.hf import HfEngine
from spinreg_core.generation.open import open_engine
from tests.support.decoding import (
    CONTEXT,
    NEAR_GREEDY,
    PAD,
    PROMPTS,
    SEEDS,
    VOCABULARY,
    kept,
    next_probabilities,
    p_value,
    plain,
    sampling,
)


@pytest.fixture
def engine(tiny_model: LlamaForCausalLM) -> HfEngine:
    return HfEngine([tiny_model], tokens=42, pad_id=PAD)


def greedy(model: LlamaForCausalLM, prompt: list[int], new: int) -> list[int]:
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(next_probabilities(model, ids).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.7, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.7), (1.3, 6, 0.8)],
)
def test_single_tokens_follow_the_softmax(
    tiny_model: LlamaForCausalLM, temperature: float, top_k: int, top_p: float
) -> None:
    prompt, n = [3], 6000
    engine = HfEngine([tiny_model], tokens=14 * 1500, pad_id=PAD)
    answers = engine.generate([prompt] * n, sampling(temperature, top_p, top_k, new=1), range(n))
    counts = Counter(a.token_ids[0] for a in answers)
    p = next_probabilities(tiny_model, prompt, temperature)
    assert p_value(counts, kept(p, top_k, top_p)) > 1e-3
    # The test would notice: another temperature is refused by the same counts.
    assert p_value(counts, kept(next_probabilities(tiny_model, prompt, temperature * 1.4), top_k, top_p)) < 1e-6


def test_answers_of_two_tokens_follow_the_chain_rule(tiny_model: LlamaForCausalLM) -> None:
    """Through the KV cache and left padding: half of each batch is another, longer prompt."""
    prompt, n = [5, 1], 6000
    engine = HfEngine([tiny_model], tokens=14 * 1000, pad_id=PAD)
    prompts = [prompt, [9, 9, 2, 6, 1, 3]] * n
    answers = engine.generate(prompts, sampling(new=2), range(2 * n))
    first = next_probabilities(tiny_model, prompt)
    joint = torch.cat([first[i] * next_probabilities(tiny_model, [*prompt, i]) for i in range(VOCABULARY)])
    counts = Counter(a.token_ids[0] * VOCABULARY + a.token_ids[1] for a in answers[::2])
    assert p_value(counts, joint) > 1e-3


def test_low_temperature_is_a_brute_force_argmax_loop(engine: HfEngine, tiny_model: LlamaForCausalLM) -> None:
    answers = engine.generate(PROMPTS, sampling(NEAR_GREEDY), SEEDS)
    assert plain(answers) == [(greedy(tiny_model, prompt, 6), "length") for prompt in PROMPTS]


def test_an_answer_does_not_depend_on_its_neighbours(tiny_model: LlamaForCausalLM) -> None:
    """Nor on how many are decoded at once, their order, or which were answered before: on its seed alone."""
    own = sampling(new=9, stop=3)
    prompts, seeds = PROMPTS * 3, list(range(21))
    one_by_one = [
        HfEngine([tiny_model], tokens=1, pad_id=PAD).generate([p], own, [seed])[0]
        for p, seed in zip(prompts, seeds, strict=True)
    ]
    assert len({tuple(a.token_ids) for a in one_by_one}) > 15
    assert len({len(a.token_ids) for a in one_by_one}) > 4, "they end at different times"
    for tokens in (1, 40, 70, 1000):
        engine = HfEngine([tiny_model], tokens=tokens, pad_id=PAD)
        assert plain(engine.generate(prompts, own, seeds)) == plain(one_by_one)
        assert plain(engine.generate(prompts[::-1], own, seeds[::-1])) == plain(one_by_one[::-1])
        found = engine.generate(prompts[4:9], own, seeds[4:9])
        assert plain(found) == plain(one_by_one[4:9])
        for a, b in zip(found, one_by_one[4:9], strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_log_probabilities_are_the_policys_whatever_the_sampler(engine: HfEngine, tiny_model: LlamaForCausalLM) -> None:
    for found, prompt in zip(engine.generate(PROMPTS, sampling(1.7, 0.9, 5), SEEDS), PROMPTS, strict=True):
        expected = [
            float(next_probabilities(tiny_model, prompt + found.token_ids[:k]).log()[token])
            for k, token in enumerate(found.token_ids)
        ]
        assert found.logprobs == pytest.approx(expected, abs=1e-4)


def stops(model: LlamaForCausalLM, new: int) -> Iterator[tuple[list[int], list[int], int, int]]:
    """(prompt, greedy tokens, a token among them, where it first occurs)"""
    for prompt in PROMPTS:
        tokens = greedy(model, prompt, new)
        for token in set(tokens):
            yield prompt, tokens, token, tokens.index(token)


def test_answers_stop_at_the_first_stop_token(engine: HfEngine, tiny_model: LlamaForCausalLM) -> None:
    places = set()
    for prompt, tokens, token, at in stops(tiny_model, 6):
        places.add(at)
        # Beside a row that goes on to the limit, so that this one is padded.
        for new, expected in (
            (6, (tokens[: at + 1], "stop")),
            (at + 1, (tokens[: at + 1], "stop")),  # at exactly the limit
            (at, (tokens[:at], "length")),
        ):
            if new:
                found = engine.generate([prompt, PROMPTS[0]], sampling(NEAR_GREEDY, new=new, stop=token), [0, 1])
                assert plain(found)[0] == expected
    assert {0, 1} <= places  # an answer that is the stop token alone, and longer ones


def test_padding_token_may_be_the_stop_token_or_an_ordinary_one(tiny_model: LlamaForCausalLM) -> None:
    prompt, tokens, token, at = max(stops(tiny_model, 6), key=lambda found: found[3])
    for pad in (token, tokens[0]):
        engine = HfEngine([tiny_model], tokens=14 * 7, pad_id=pad)
        answers = engine.generate([prompt, *PROMPTS], sampling(NEAR_GREEDY, stop=token), range(8))
        assert plain(answers)[0] == (tokens[: at + 1], "stop")


def test_seeds_reproduce_and_calls_do_not_depend_on_each_other(engine: HfEngine) -> None:
    first = engine.generate(PROMPTS, sampling(), SEEDS)
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    assert plain(engine.generate(PROMPTS, sampling(), range(7, 14))) != plain(first)
    assert engine.generate(PROMPTS, sampling(), SEEDS) == first
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's draws go on as if nothing had been


def test_equal_prompts_get_independent_answers(engine: HfEngine) -> None:
    answers = engine.generate([PROMPTS[0]] * 12, sampling(new=12), range(12))
    assert len({tuple(a.token_ids) for a in answers}) == 12


def test_generation_config_of_the_checkpoint_has_no_effect(engine: HfEngine, tiny_model: LlamaForCausalLM) -> None:
    expected = engine.generate(PROMPTS, sampling(), SEEDS)
    plain = tiny_model.generation_config
    odd = HfGenerationConfig(
        repetition_penalty=9.0, temperature=0.01, top_k=1, top_p=0.1, min_p=0.5, suppress_tokens=[1, 2, 3],
        min_new_tokens=6, no_repeat_ngram_size=1, eos_token_id=4, max_length=2, num_beams=3, do_sample=False,
        num_return_sequences=2, return_dict_in_generate=True, forced_eos_token_id=5,
    )  # fmt: skip
    tiny_model.generation_config = odd
    try:
        assert engine.generate(PROMPTS, sampling(), SEEDS) == expected
        assert tiny_model.generation_config is odd
    finally:
        tiny_model.generation_config = plain


def test_progress_counts_every_prompt_once(engine: HfEngine) -> None:
    done: list[tuple[int, Answer]] = []
    answers = engine.generate(PROMPTS, sampling(), SEEDS, lambda i, answer: done.append((i, answer)))
    assert sorted(i for i, _ in done) == list(range(7))
    assert all(answers[i] is answer for i, answer in done)


def test_too_long_a_prompt_is_refused_before_work_starts(engine: HfEngine) -> None:
    done: list[int] = []
    fits = [1] * (CONTEXT - 6)
    with pytest.raises(BadInput, match=rf"prompt 1 has {CONTEXT - 5} tokens"):
        engine.generate([fits, [*fits, 1]], sampling(), [0, 1], lambda i, _: done.append(i))
    assert not done
    assert len(engine.generate([fits], sampling(), [0])[0].token_ids) == 6


def test_decode_out_of_memory_continues_with_half_the_tokens(
    tiny_model: LlamaForCausalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    model, most = copy.deepcopy(tiny_model), 2
    expected = HfEngine([model], tokens=1000, pad_id=PAD).generate(PROMPTS, sampling(), SEEDS)

    def tight(_model: Any, _arguments: Any, given: dict[str, Any]) -> None:
        if len(given["input_ids"]) > most:
            raise torch.OutOfMemoryError("tried to allocate 3 TiB")

    tightness = model.register_forward_pre_hook(tight, with_kwargs=True)
    done: list[int] = []
    engine = HfEngine([model], tokens=100, pad_id=PAD)
    assert plain(engine.generate(PROMPTS, sampling(), SEEDS, lambda i, _: done.append(i))) == plain(expected)
    assert sorted(done) == list(range(7)), "no answer is counted twice"
    assert "out of memory (tried to allocate 3 TiB); continuing with 50 tokens at once" in capsys.readouterr().out
    most = 0
    with pytest.raises(BadInput, match=r"resources.kv_cache_tokens cannot be met: memory is too small for one answer"):
        engine.generate(PROMPTS, sampling(), SEEDS)

    def broken(*_: object) -> None:
        raise RuntimeError("something else")

    tightness.remove()
    model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="something else"):
        engine.generate(PROMPTS, sampling(), SEEDS)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_folder_is_opened_in_the_configured_format(
    tiny_model: LlamaForCausalLM, tmp_path: Path, dtype: str, expected: torch.dtype
) -> None:
    tiny_model.save_pretrained(tmp_path)
    generation = GenerationConfig.model_validate({"dtype": dtype})
    resources = ResourcesConfig(device="cpu", kv_cache_tokens=60)
    engine = open_engine("hf", [tmp_path], generation, resources, pad_id=PAD)
    assert isinstance(engine, HfEngine)
    assert engine._models[0].dtype == expected
    answers = engine.generate(PROMPTS, sampling(NEAR_GREEDY), SEEDS)
    if dtype == "float32":
        assert [a.token_ids for a in answers] == [greedy(tiny_model, p, 6) for p in PROMPTS]
    engine.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_cuda_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"resources\.device is cuda, but torch sees no GPU"):
        open_engine("hf", [tmp_path], GenerationConfig(), ResourcesConfig(device="cuda"), pad_id=PAD)
