"""Continuous decoding, of one policy and of mixtures: cached = uncached, and every probability by enumeration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from spinreg_core.errors import BadInput
from spinreg_core.generation.engine import Answer
from spinreg_core.generation.hf import HfEngine
from spinreg_core.generation.kv_slots import Slots, has_slots
from spinreg_core.generation.sampler import distribution, draw, uniforms
from tests.support.decoding import (
    FAMILIES,
    PAD,
    PROMPTS,
    VOCABULARY,
    kept,
    next_probabilities,
    p_value,
    plain,
    sampling,
    shared_layers,
    small,
)
from tests.support.recorded_calls import recorded_calls
from tests.support.tiny_models import tiny_model


def mixture(policies: Sequence[LlamaForCausalLM], weights: Sequence[float], ids: list[int]) -> torch.Tensor:
    """float64 [vocabulary], from plain forward passes: the product of powers, normalised."""
    product_ = torch.ones(VOCABULARY, dtype=torch.float64)
    for policy, weight in zip(policies, weights, strict=True):
        product_ *= next_probabilities(policy, ids) ** weight
    return product_ / product_.sum()


@torch.no_grad()
def uncached(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> list[float]:
    """Log-probability of each token of the answer, from one plain forward pass."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1)[range(len(answer)), answer].tolist()


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3n"])
def test_cached_is_uncached_while_slots_are_refilled(family: str) -> None:
    """Answers begin beside others, all is moved back to the left, and to the right, slots are added and dropped."""
    model = shared_layers() if family == "gemma3n" else tiny_model(family, 5).eval()
    # A few short ones, one much longer than all that began before it, then shorter and shorter ones.
    sizes = [2, 3, 2, 1, 30, 9, 12, 7, *(1 + (i * 7) % 6 for i in range(112))]
    prompts = [[(3 * i + 5 * k) % 61 for k in range(size)] for i, size in enumerate(sizes)]
    assert has_slots(model)
    engine = HfEngine([model], tokens=240, pad_id=PAD)
    with recorded_calls(Slots._move, Slots.keep, Slots.fill) as calls:
        answers = engine.generate(prompts, sampling(new=12, stop=1), range(len(prompts)))
    assert len({len(a.token_ids) for a in answers}) > 3
    # Slots were filled while others were in use, dropped, and moved back to the left.
    filled = [given["slots"] for name, given in calls if name == "fill"]
    assert any(slots != list(range(len(slots))) for slots in filled)
    assert any(name == "keep" for name, _ in calls)
    assert any(name == "_move" and given["by"] < 0 for name, given in calls)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.logprobs == pytest.approx(uncached(model, prompt, answer.token_ids), abs=2e-4)


@pytest.mark.parametrize("place", [0, 20])
def test_decode_with_one_long_prompt_equals_uncached(place: int) -> None:
    """Its columns are free again when slots are added after it; where it comes later, the others make room for it."""
    model = LlamaForCausalLM(LlamaConfig(**small(3).config.to_dict() | {"max_position_embeddings": 400})).eval()
    prompts = [[1 + k % 9] * 6 for k in range(200)]
    prompts.insert(place, [1 + i % 9 for i in range(300)])
    engine = HfEngine([model], tokens=1000 if place == 0 else 4000, pad_id=PAD)
    with recorded_calls(Slots._move) as calls:
        answers = engine.generate(prompts, sampling(new=12, stop=1), range(201))
    assert place == 0 or max(given["by"] for _, given in calls) > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.logprobs == pytest.approx(uncached(model, prompt, answer.token_ids), abs=2e-4)


def test_decode_model_with_states_uses_transformers_loop() -> None:
    model = tiny_model("mamba", 5).eval()
    assert not has_slots(model)
    own = sampling(new=8, stop=1)
    one_by_one = [HfEngine([model], tokens=1, pad_id=PAD).generate([p], own, [i])[0] for i, p in enumerate(PROMPTS)]
    for prompt, answer in zip(PROMPTS, one_by_one, strict=True):
        assert answer.logprobs == pytest.approx(uncached(model, prompt, answer.token_ids), abs=2e-4)
    pairs = [PROMPTS[1]] * 5
    together = HfEngine([model], tokens=1000, pad_id=PAD).generate(pairs, own, range(5))
    alone = [HfEngine([model], tokens=1, pad_id=PAD).generate([p], own, [i])[0] for i, p in enumerate(pairs)]
    assert plain(together) == plain(alone)
    with pytest.raises(BadInput, match="policies of a mixture are MambaForCausalLM"):
        HfEngine([model, model], weights=[0.5, 0.5], tokens=1000, pad_id=PAD)


def answers_of(
    policies: list[LlamaForCausalLM], weights: list[float], count: int, new: int = 2, top_p: float = 1.0, top_k: int = 0
) -> list[Answer]:
    """Beside other prompts of other lengths, through refilled slots."""
    engine = HfEngine(policies, weights=weights, tokens=2000, pad_id=PAD)
    prompts = [prompt for _ in range(count) for prompt in ([5, 1], [9, 9, 2, 6, 1, 3])]
    return engine.generate(prompts, sampling(1.0, top_p, top_k, new=new), range(2 * count))[::2]


@pytest.mark.parametrize("weights", [[0.3, 0.7], [0.5, 0.2, 0.3], [1.4, -0.4]])
def test_mixture_answers_have_the_enumerated_probabilities(weights: list[float]) -> None:
    policies = [small(seed) for seed in range(1, 1 + len(weights))]
    answers = answers_of(policies, weights, 4000)
    first = mixture(policies, weights, [5, 1])
    then = {i: mixture(policies, weights, [5, 1, i]) for i in range(VOCABULARY)}
    for answer in answers[:200]:  # exact
        a, b = answer.token_ids
        expected = [float(first[a].log()), float(then[a][b].log())]
        assert answer.logprobs == pytest.approx(expected, abs=2e-5)
    joint = torch.stack([first[a] * then[a][b] for a, b in product(range(VOCABULARY), repeat=2)])
    counts = Counter(a.token_ids[0] * VOCABULARY + a.token_ids[1] for a in answers)
    assert p_value(counts, joint) > 1e-3
    even = [1 / len(weights)] * len(weights)  # other weights are told apart by the same counts
    wrong = torch.stack(
        [mixture(policies, even, [5, 1])[a] * mixture(policies, even, [5, 1, a])[b]
         for a, b in product(range(VOCABULARY), repeat=2)]
    )  # fmt: skip
    assert p_value(counts, wrong) < 1e-6


def test_all_weight_on_one_policy_is_that_policy() -> None:
    policies = [small(1), small(2)]
    for weights, pure in (([1.0, 0.0], policies[0]), ([0.0, 1.0], policies[1])):
        found, expected = (answers_of(p, w, 50, new=8) for p, w in ((policies, weights), ([pure], [1.0])))
        assert plain(found) == plain(expected)
        for a, b in zip(found, expected, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


@pytest.mark.parametrize(("top_p", "top_k"), [(0.9, 0), (1.0, 3), (0.8, 5)])
def test_top_p_and_top_k_cut_the_mixture_not_its_parts(top_p: float, top_k: int) -> None:
    policies, weights = [small(1), small(2)], [0.4, 0.6]
    counts = Counter(a.token_ids[0] for a in answers_of(policies, weights, 4000, 1, top_p, top_k))
    q = mixture(policies, weights, [5, 1])
    assert p_value(counts, kept(q, top_k, top_p)) > 1e-3
    parts = torch.ones(VOCABULARY, dtype=torch.float64)
    for policy, weight in zip(policies, weights, strict=True):
        parts *= kept(next_probabilities(policy, [5, 1]), top_k, top_p) ** weight
    # the order of cutting matters for these policies
    assert not torch.allclose(parts / parts.sum(), kept(q, top_k, top_p), atol=1e-3)


def test_every_policy_takes_one_batched_step_per_token() -> None:
    policies = [small(1), small(2)]
    shapes: dict[int, list[tuple[int, ...]]] = {0: [], 1: []}
    for which, policy in enumerate(policies):

        def noted(_model: Any, _arguments: Any, given: dict[str, Any], which: int = which) -> None:
            shapes[which].append(tuple(given["input_ids"].shape))

        policy.register_forward_pre_hook(noted, with_kwargs=True)
    HfEngine(policies, weights=[0.5, 0.5], tokens=1000, pad_id=PAD).generate(PROMPTS, sampling(new=6), range(7))
    assert shapes[0] == shapes[1] == [(7, 8)] + [(7, 1)] * 5


def test_other_vocabularies_do_not_mix() -> None:
    with pytest.raises(BadInput, match=r"policies of a mixture have vocabularies of \[11, 12\] tokens"):
        HfEngine([small(1), small(2, 12)], weights=[0.5, 0.5], tokens=100, pad_id=PAD)


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).repeat(5, 1)
    numbers = torch.tensor([0.0, 0.49999, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(probabilities, numbers).tolist() == [1, 1, 3, 3, 3]


def test_uniforms_depend_on_the_seed_alone() -> None:
    def numbers(seed: int, count: int) -> torch.Tensor:
        uniform = uniforms(seed)
        return torch.tensor([uniform() for _ in range(count)], dtype=torch.float64)

    # A version that draws all numbers of an answer at once gives the same ones, as stored answers rely on.
    at_once = torch.from_numpy(np.random.Generator(np.random.Philox(key=7)).random(10))
    assert torch.equal(numbers(7, 10), at_once)
    assert not torch.equal(numbers(8, 10), at_once)
    many = torch.cat([numbers(seed, 10) for seed in range(2000)])
    assert abs(float(many.mean()) - 0.5) < 4 * (1 / 12 / 20000) ** 0.5
    firsts = torch.stack([numbers(seed, 2) for seed in range(5000)])
    assert (
        abs(float(torch.corrcoef(torch.stack([firsts[:-1, 0], firsts[1:, 0]]))[0, 1])) < 0.06
    )  # of neighbouring seeds


def test_distribution_of_nan_logits_is_refused() -> None:
    with pytest.raises(BadInput, match="policy has logits that are not finite"):
        distribution(torch.tensor([[0.0, float("nan")]]), sampling())
