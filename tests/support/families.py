"""Tiny random models of every causal family that transformers offers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCABULARY = 61

# Applied where a configuration has the field, by whatever name.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    # Older names.
    "n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 128, "d_model": 32, "n_layers": 4, "n_heads": 4,
    "num_layers": 4, "num_heads": 4, "ffn_dim": 48, "d_inner": 48, "ffn_hidden_size": 48, "word_embed_proj_dim": 32,
    "rotary_dim": 8, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
    # Experts.
    "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "moe_num_experts": 4, "moe_k": 2,
    "shared_expert_intermediate_size": 16, "shared_intermediate_size": 48, "first_k_dense_replace": 1,
    # Latent attention.
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    # States and convolutions.
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1, "chunk_size": 8,
    "mamba_expand": 2, "mamba_chunk_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8,
    "state_size": 8, "n_groups": 1, "time_step_rank": 4, "lru_width": 32, "attention_hidden_size": 32,
    "rescale_every": 0, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "block_ff_dim": 48, "block_dim": 32,
}  # fmt: skip
_LATENT = {"num_key_value_heads": 4}
_LATENT_FAMILIES = (
    "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash",
    "minicpm3", "youtu",
)  # fmt: skip
_LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
_SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(_LATENT_FAMILIES, _LATENT),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "minimax", "olmo_hybrid"), _LINEAR),
    "bamba": {"attn_layer_indices": [1, 3]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "expand": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# Wrappers around vision or sound, encoders, and families without a small model.
LEFT_OUT = {
    "blt", "cohere_compass_text", "dbrx", "electra", "emu3", "fuyu", "gemma3", "gemma3n", "gemma3n_text", "gemma4",
    "gemma4_assistant", "gemma4_unified", "gemma4_unified_assistant", "git", "got_ocr2", "llama4", "mllama", "musicgen",
    "musicgen_melody", "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "reformer", "rembert", "roc_bert",
    "xmod", "zamba", "zamba2",
}  # fmt: skip
# Every token sees those after it.
BIDIRECTIONAL = {
    "bert", "bert-generation", "big_bird", "camembert", "cpmant", "data2vec-text", "ernie", "megatron-bert",
    "prophetnet", "roberta", "roberta-prelayernorm", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet",
}  # fmt: skip


def families() -> Iterator[tuple[str, Any, Any]]:
    """Yield model type, configuration class and model class of every causal family, each model class once."""
    seen = set()
    for config_class, classes in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        model_class = classes[0] if isinstance(classes, tuple) else classes
        if model_class not in seen:
            seen.add(model_class)
            yield config_class.model_type, config_class, model_class


def tiny_family(name: str, **changes: Any) -> PreTrainedModel:
    """A random model of a family. Its matrices are large, so that a wrong token or position shows."""
    config_class, model_class = next((c, m) for n, c, m in families() if n == name)
    default = config_class()
    known = set(vars(default)) | set(getattr(default, "attribute_map", {}))
    given = {field: value for field, value in _SIZES.items() if field in known}
    torch.manual_seed(0)
    config = config_class(**given | _SPECIAL.get(name, {}) | changes)
    # transformers' other implementations ignore a cap on attention logits (Gemma 2, VaultGemma).
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for field, weight in model.named_parameters():
            if weight.ndim >= 2 and "norm" not in field and "A_log" not in field:
                weight.copy_(torch.randn(weight.shape, generator=draw) * 0.3)
    return model


@contextmanager
def without_warnings() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(before)
