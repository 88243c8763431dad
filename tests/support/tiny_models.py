"""Tiny random policies and rows for tests of scoring and training."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from spinreg_core.runtime.distributed import Ranks
from spinreg_core.selfplay.pairs import Pair

VOCABULARY = 61

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # far from uniform, so that a wrong token or position shows
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# The ranks of a single process.
ALONE = Ranks(torch.device("cpu"))


_KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
    "llama-dropout": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False, "attention_dropout": 0.1}),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    # Caps so low that leaving one out shows, a window shorter than the rows.
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {"head_dim": 8, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 0.5, "sliding_window": 7},
    ),
    "cohere": (CohereConfig, CohereForCausalLM, {"logit_scale": 0.25}),
    # Windows shorter than the rows.
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 6}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"sliding_window": 9}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"head_dim": 8, "sliding_window": 5, "num_hidden_layers": 6}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {"head_dim": 8}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "phi": (PhiConfig, PhiForCausalLM, {}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128}),
    # A state that runs through the whole row: it cannot be packed.
    "mamba": (MambaConfig, MambaForCausalLM, {}),
    "granite": (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
}


def tiny_model(kind: str = "llama", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config_class, model_class, changes = _KINDS[kind]
    return model_class(config_class(**_SHAPE | changes)).eval()


def write_policy(folder: Path, seed: int = 0, kind: str = "llama") -> Path:
    """A policy folder: a random model and files that stand for a tokenizer's."""
    tiny_model(kind, seed).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"version":  "1.0"}\n')
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("kept")
    return folder


def random_rows(count: int, seed: int, longest: int = 12) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and answers of many lengths (answers end with token 1)."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, longest))] for _ in range(count)]
    answers = [[*(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(0, longest))), 1] for _ in range(count)]
    return prompts, answers


def random_pairs(count: int, seed: int, round_number: int = 1) -> list[Pair]:
    """Pairs without scores."""
    prompts, real = random_rows(count, seed)
    _, generated = random_rows(count, seed + 1000)
    return [
        {
            "pair_id": f"{round_number}:{i:016x}",
            "round": round_number,
            "iterate": round_number - 1,
            "answer": 0,
            "geometric": False,
            "prompt_id": f"{i:016x}",
            "prompt_ids": prompts[i],
            "real_ids": real[i],
            "generated_ids": generated[i],
            "real_truncated": False,
            "generated_truncated": False,
            "previous_real": None,
            "previous_generated": None,
            "base_real": None,
            "base_generated": None,
        }
        for i in range(count)
    ]
