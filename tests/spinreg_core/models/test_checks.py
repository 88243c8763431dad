"""Weights against config.json: what transformers leaves out on purpose passes, a model that is cut short does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, GPT2Config, GPT2LMHeadModel

from spinreg_core.errors import BadInput
from spinreg_core.models.checks import require_finite, require_loadable
from spinreg_core.models.source import resolve_model
from spinreg_core.store.cache import cache_folder
from tests.support.files import change_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the toy model to spoil."""
    return Path(shutil.copytree(resolve_model("random:tiny", cache_folder()), tmp_path / "model"))


def add(folder: Path, *names: str, shape: tuple[int, ...] = (2,)) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: torch.zeros(shape) for name in names}, path)


def test_require_loadable_prints_unknown_tensors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_loadable(folder)
    assert "warning" not in capsys.readouterr().out
    add(folder, "score.weight", "model.layers.0.mlp.strange", "model.layers.1.self_attn.rotary_emb.inv_freq")
    add(folder, "lm_head.weight", shape=(259, 64))  # of a model that ties it
    require_loadable(folder)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert told == ["warning: LlamaForCausalLM does not know these tensors and ignores them: "
                    "model.layers.0.mlp.strange, score.weight"]  # fmt: skip


def test_require_loadable_finds_layers_by_another_name(tmp_path: Path) -> None:
    """GPT-2's are `h`, counted by n_layer, and its checkpoints name them without the model's prefix."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=64, n_positions=32))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name.removeprefix("transformer."): value for name, value in load_file(path).items()}, path)
    require_loadable(tmp_path)
    change_json(tmp_path / "config.json", n_layer=1)
    with pytest.raises(BadInput, match=r"weights of transformer\.h\.1, but config\.json configures only 1"):
        require_loadable(tmp_path)
    change_json(tmp_path / "config.json", n_layer=0)
    with pytest.raises(BadInput, match=r"n_layer 0 in config\.json"):
        require_loadable(tmp_path)


def test_require_loadable_accepts_multi_token_prediction_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DeepseekV3Config(
        num_hidden_layers=2, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, vocab_size=64, first_k_dense_replace=1,
        max_position_embeddings=64,
    )  # fmt: skip
    DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    add(tmp_path, "model.layers.2.eh_proj.weight", "model.layers.2.enorm.weight", "model.layers.2.mlp.up_proj.weight")
    require_loadable(tmp_path)
    assert "model.layers.2.eh_proj.weight" in capsys.readouterr().out
    change_json(tmp_path / "config.json", num_hidden_layers=1)  # layer 1 predicts nothing ahead
    with pytest.raises(BadInput, match=r"weights of model\.layers\.1, but config\.json configures only 1"):
        require_loadable(tmp_path)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_require_finite_of_one_nan_names_the_tensor(folder: Path, kind: torch.dtype) -> None:
    path, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = {key: value.to(kind) for key, value in load_file(path).items()}
    tensors |= {"empty": torch.zeros(0, 3, dtype=kind), "ids": torch.arange(3)}
    tensors[name][1, 2] = torch.finfo(kind).max  # large, and a number
    save_file(tensors, path)
    require_finite(folder)
    for value in (torch.nan, torch.inf, -torch.inf):
        tensors[name][5, 7] = value
        save_file(tensors, path)
        with pytest.raises(BadInput, match=rf"1 of 8192 numbers of {name}"):
            require_finite(folder)
