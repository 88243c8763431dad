"""Prompts, samplers and small models for tests of engines, with reference probabilities by plain forward passes."""

from __future__ import annotations

from collections import Counter

import torch
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from spinreg_core.generation.engine import Answer, Sampling

PAD = 0
VOCABULARY, CONTEXT = 11, 64  # of tiny_model
NEAR_GREEDY = 1e-4
PROMPTS = [[3], [5, 1, 4, 1, 9], [2, 7], [8, 8, 8, 8, 8, 8, 8, 8], [10, 6, 2], [4, 4], [1]]
SEEDS = range(7)


def plain(answers: list[Answer]) -> list[tuple[list[int], str]]:
    return [(a.token_ids, a.finish) for a in answers]


def sampling(temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, new: int = 6, stop: int = 99) -> Sampling:
    return Sampling(temperature, top_p, top_k, new, (stop,))  # 99 is never sampled


@torch.no_grad()
def next_probabilities(model: LlamaForCausalLM, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """float64 [vocabulary]: one plain forward, no cache, no padding."""
    return (model(torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1)


def kept(p: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The distribution after top-k, then top-p, by its definition."""
    order = sorted(range(len(p)), key=lambda i: -p[i])
    order = order[: top_k or len(p)]
    mass = sum(p[i] for i in order)
    chosen, reached = [], 0.0
    for i in order:
        chosen.append(i)
        reached += float(p[i] / mass)
        if reached >= top_p:
            break
    q = torch.zeros_like(p)
    q[chosen] = p[chosen]
    return q / q.sum()


def p_value(counts: Counter[int], q: torch.Tensor) -> float:
    """Chi-square of counts against q; outcomes that q excludes must not occur."""
    assert all(q[i] > 0 for i in counts)
    n = sum(counts.values())
    support = [i for i in range(len(q)) if q[i] * n >= 5]
    rare = [i for i in range(len(q)) if i not in support]
    observed = [counts[i] for i in support] + [sum(counts[i] for i in rare)]
    expected = [float(q[i]) * n for i in support] + [float(sum(q[i] for i in rare)) * n]
    if expected[-1] == 0:
        observed.pop(), expected.pop()
    if len(observed) < 2:
        return 1.0
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    # The upper tail of the chi-square distribution is a regularised incomplete gamma function.
    halves = torch.tensor([(len(observed) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))


FAMILIES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "cohere", "granite", "olmo2",
    "gpt2",
]  # fmt: skip


def small(seed: int, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.4, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def shared_layers() -> PreTrainedModel:
    """The upper two of four layers use the keys and values of the lower two."""
    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        vocab_size=61, vocab_size_per_layer_input=61, hidden_size=32, hidden_size_per_layer_input=8,
        intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=5,
        laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4, max_position_embeddings=256,
        pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    return Gemma3nForCausalLM(config).eval()
