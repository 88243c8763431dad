"""A base in 4 or 8 bits: the folder of the run is what the few bits say, and training starts where its scores are."""

from __future__ import annotations

import importlib.util
import math
import statistics
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from spinreg_core.errors import BadInput
from spinreg_core.models.lora import add_adapter, start_adapter
from spinreg_core.models.quantization import load_quantized, round_weights
from tests.support.lora_rounds import a_round, finished, publish, scored, settings
from tests.support.tiny_models import random_pairs, write_policy

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is missing")
CPU = torch.device("cpu")
Bits = Literal["4bit", "8bit"]


@pytest.fixture(scope="module", name="source", params=["float32", "bfloat16"])
def _source(tmp_path_factory: pytest.TempPathFactory, request: Any) -> Path:
    """Rows as long as a block, as those of real models are."""
    folder = tmp_path_factory.mktemp("quantize") / "source"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.15, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, request.param)).save_pretrained(folder)
    return folder


def rounded(source: Path, folder: Path, bits: Bits) -> Path:
    folder.mkdir()
    round_weights(source, folder, bits, CPU)
    for path in source.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_round_weights_twice_equals_rounding_once(source: Path, tmp_path: Path, bits: Bits) -> None:
    once = rounded(source, tmp_path / "once", bits)
    again = rounded(once, tmp_path / "again", bits)
    before, after, twice = (load_file(folder / "model.safetensors") for folder in (source, once, again))
    assert before.keys() == after.keys()
    for name, value in before.items():
        matrix = "_proj" in name
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], value.float()) != matrix, name
        assert torch.equal(after[name], twice[name]), name
        error = float((after[name] - value.float()).norm() / value.float().norm())
        assert error == 0 if not matrix else 0.001 < error < {"4bit": 0.12, "8bit": 0.02}[bits]
    # transformers and bitsandbytes, from the original and from the rounded folder, hold the same numbers.
    for folder in (source, once):
        held = load_quantized(folder, "fp32", CPU, bits).dequantize().state_dict()  # type: ignore[operator]
        for name, value in after.items():
            torch.testing.assert_close(held[name], value, rtol=0, atol=1e-6 if bits == "4bit" else 1e-4, msg=name)


@pytest.mark.parametrize(("bits", "nats"), [("4bit", 1e-3), ("8bit", 5.0)])
def test_quantized_round_starts_at_its_reference(source: Path, tmp_path: Path, bits: Bits, nats: float) -> None:
    """8bit rounds activations too, in training alone: its answers' log-probabilities are off by that."""
    base, training = rounded(source, tmp_path / "base", bits), settings(lora_quantize=bits)
    model = load_quantized(base, "fp32", CPU, bits)
    add_adapter(model, training)
    start_adapter(model, 3)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    pairs: list[Any] = random_pairs(12, 1)
    here, there = scored(model, pairs, "real"), scored(base, pairs, "real")
    assert here == pytest.approx(there, abs=nats)
    assert statistics.correlation(here, there) > 0.999
    assert scored(base, pairs, "real") != pytest.approx(scored(source, pairs, "real"), abs=0.05), "rounding matters"
    round_ = finished(a_round(model, base, base, training, 1))
    assert round_.state.metrics[0]["loss"] == pytest.approx(math.log(2), abs=nats / 10)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, kept[name]) != (".lora_" in name), name
    out = publish(model, base, tmp_path / "out", training)
    assert scored(out / "policy", pairs, "real") == pytest.approx(scored(model, pairs, "real"), abs=nats)


def test_require_library_without_bitsandbytes_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        BadInput, match=r"training\.lora_quantize is 4bit, but bitsandbytes is not installed; run `pip install"
    ):
        round_weights(write_policy(tmp_path / "base"), tmp_path / "out", "4bit", CPU)
