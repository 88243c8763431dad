"""LoRA: what an adapter changes and leaves alone, its files against peft's own reading, and the start of a round."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spinreg_core.config import ResourcesConfig, RunConfig
from spinreg_core.errors import BadInput, Damaged
from spinreg_core.logprobs.sequence import answer_logprobs, packs
from spinreg_core.models.loading import load_policy
from spinreg_core.models.lora import add_adapter, read_adapter
from spinreg_core.runs.plans import plan_train
from spinreg_core.stages.prepare import require_adaptable
from tests.support.builders import make_config, make_head
from tests.support.lora_rounds import a_round, adapted, finished, publish, scored, settings
from tests.support.tiny_models import random_rows, write_policy


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2", "gemma2", "phi"])
def test_fresh_adapter_changes_nothing_and_alone_is_trained(tmp_path: Path, kind: str) -> None:
    base = write_policy(tmp_path / "base", 0, kind)
    model = adapted(base, settings())
    assert packs(model)
    prompts, answers = random_rows(6, 1)
    with torch.no_grad():
        found = answer_logprobs(model, prompts, answers, precision="fp32")
        plain = answer_logprobs(load_policy(base, "fp32", "cpu"), prompts, answers, precision="fp32")
    assert torch.equal(found, plain)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    round_ = finished(a_round(model, base, base, settings(), 1))
    assert sum(m["margin"] for m in round_.state.metrics[-3:]) > 0.3  # the second epoch
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".lora_" in name}
    assert len(moved) == 2 * 2 * (6 if kind == "phi" else 7)  # A and B, two layers, all their matrices
    assert {id(p) for group in round_.optimizer.param_groups for p in group["params"]} == {
        id(p) for name, p in model.named_parameters() if name in moved
    }


def test_adapter_gradients_are_those_of_the_sum(tmp_path: Path) -> None:
    """dL/dB = s dL/dW Aᵀ and dL/dA = s Bᵀ dL/dW, with dL/dW that of a model which holds W = W_0 + s B A."""
    base = write_policy(tmp_path / "base", 0)
    model = adapted(base, settings())
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=draw))
    whole = load_policy(publish(model, base, tmp_path / "out", settings()) / "policy", "fp32", "cpu")
    prompts, answers = random_rows(6, 1)
    for each in (model, whole):
        (answer_logprobs(each, prompts, answers, precision="fp32") * torch.linspace(-1, 2, 6)).sum().backward()
    by_name = dict(whole.named_parameters())
    checked = 0
    for name, a in model.named_parameters():
        if ".lora_A." not in name:
            continue
        b = model.get_parameter(name.replace("lora_A", "lora_B"))
        gradient = by_name[f"{name.partition('.lora_A')[0]}.weight"].grad
        assert gradient is not None
        torch.testing.assert_close(b.grad, 4 * gradient @ a.detach().T, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(a.grad, 4 * b.detach().T @ gradient, rtol=1e-3, atol=1e-3)
        checked += 1
    assert checked == 14


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "phi"])
def test_adapter_and_merged_policy_agree_with_peft(tmp_path: Path, kind: str) -> None:
    base = write_policy(tmp_path / "base", 0, kind)
    model = adapted(base, settings())
    finished(a_round(model, base, base, settings(), 1))
    out = publish(model, base, tmp_path / "out", settings())
    names = {p.relative_to(base).as_posix() for p in base.rglob("*") if p.is_file()}
    assert {p.relative_to(out / "policy").as_posix() for p in (out / "policy").rglob("*") if p.is_file()} == names
    assert {p.name for p in (out / "adapter").iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "the/base"
    weights, before = (load_file(folder / "model.safetensors") for folder in (out / "policy", base))
    assert weights.keys() == before.keys()
    changed = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert changed == {name for name in weights if "layers." in name and name.endswith("weight") and "norm" not in name}

    prompts, answers = random_rows(8, 4)
    with torch.no_grad():
        ours = answer_logprobs(model, prompts, answers, precision="fp32")
        merged = answer_logprobs(load_policy(out / "policy", "fp32", "cpu"), prompts, answers, precision="fp32")
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out / "adapter"))
        by_peft = answer_logprobs(peft.merge_and_unload(), prompts, answers, precision="fp32")  # type: ignore[operator]
        start = answer_logprobs(load_policy(base, "fp32", "cpu"), prompts, answers, precision="fp32")
    torch.testing.assert_close(merged, ours, rtol=0, atol=1e-3)
    torch.testing.assert_close(by_peft, ours, rtol=0, atol=1e-3)
    assert float((ours - start).abs().min()) > 0.01


def test_next_round_starts_from_the_published_adapter(tmp_path: Path) -> None:
    """A model with its adapter off is the base in every round, and the loss of a round
    that begins is not log 2: the classic silent error."""
    base = write_policy(tmp_path / "base", 0)
    first = adapted(base, settings())
    round_1 = finished(a_round(first, base, base, settings(), 1))
    out = publish(first, base, tmp_path / "out", settings())
    second = load_policy(base, "fp32", "cpu")
    add_adapter(second, settings())
    read_adapter(second, out / "adapter", alone=True)
    round_2 = a_round(second, out / "policy", base, settings(), 2)
    pairs = round_2.pairs
    for which in ("real", "generated"):
        result, reference = scored(first, list(pairs), which), [p[f"previous_{which}"] for p in pairs]
        assert reference == pytest.approx(result, abs=1e-3), "round 2's reference is round 1's result"
        assert scored(second, list(pairs), which) == pytest.approx(reference, abs=1e-3), "and where round 2 starts"
        assert reference != pytest.approx([p[f"base_{which}"] for p in pairs], abs=0.1), "which the base is not"
    step = round_2.step()
    assert step["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert step["margin"] == pytest.approx(0, abs=1e-3)
    for (name, a), b in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b[1]) != (".lora_" in name)  # the step moved the adapter, and only that
    assert round_1.steps == round_2.steps


@pytest.mark.parametrize("precision", ["mixed", "bf16"])
def test_add_adapter_is_float32_in_every_precision(tmp_path: Path, precision: Any) -> None:
    base = write_policy(tmp_path / "base", 0)
    training = settings(precision=precision, learning_rate=1e-3)
    model = adapted(base, training)
    assert {p.dtype for name, p in model.named_parameters() if ".lora_" in name} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if ".lora_" not in name} == {
        torch.bfloat16 if precision == "bf16" else torch.float32
    }
    round_ = finished(a_round(model, base, base, training, 1))
    assert sum(m["margin"] for m in round_.state.metrics[-3:]) > 0
    policy = publish(model, base, tmp_path / "out", training) / "policy"
    assert {t.dtype for t in load_file(policy / "model.safetensors").values()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(policy).dtype == torch.float32


def test_add_adapter_finds_its_targets(tmp_path: Path) -> None:
    base = write_policy(tmp_path / "base", 0)
    model = adapted(base, settings(lora_targets=["q_proj", "v_proj"]))
    trained = {name.partition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")}
    out = publish(model, base, tmp_path / "out", settings(lora_targets=["q_proj", "v_proj"]))
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]
    with pytest.raises(BadInput, match=r"lora_targets names q_porj, which .* not have; expected some of .*q_proj"):
        adapted(base, settings(lora_targets=["q_porj", "v_proj"]))
    with pytest.raises(BadInput, match="which includes the vocabulary projection"):
        adapted(base, settings(lora_targets=["q_proj", "lm_head"]))
    gpt2 = write_policy(tmp_path / "gpt2", 0, "gpt2")
    with pytest.raises(BadInput, match=r"training\.lora_rank is set, but the model has matrices of type Conv1D"):
        adapted(gpt2, settings())


def test_start_adapter_depends_on_the_seed_alone(tmp_path: Path) -> None:
    base = write_policy(tmp_path / "base", 0)
    one, same, other = (dict(adapted(base, settings(), seed).named_parameters()) for seed in (5, 5, 6))
    for name, value in one.items():
        assert torch.equal(value, same[name])
        assert torch.equal(value, other[name]) != (".lora_A." in name)
        if ".lora_A." in name:
            bound = 1 / math.sqrt(value.shape[1])
            assert float(value.detach().abs().max()) <= bound
            assert float(value.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.25)


def test_read_adapter_of_another_shape_raises_damaged(tmp_path: Path) -> None:
    base = write_policy(tmp_path / "base", 0)
    out = publish(adapted(base, settings()), base, tmp_path / "out", settings())
    wider = adapted(base, settings(lora_rank=4))
    with pytest.raises(Damaged, match=r"has shape \(3, \d+\) for .*lora_A\.weight; expected \(4, \d+\)"):
        read_adapter(wider, out / "adapter", alone=True)


def test_train_key_covers_every_field_of_the_result() -> None:
    def key(**training: Any) -> dict[str, Any]:
        return plan_train(make_config(training=training), make_head(2), 2).key

    assert not [name for name in key()["training"] if name.startswith("lora")], "runs without LoRA keep their names"
    assert "base" not in key()
    assert key(lora_rank=4)["base"] == "base-x"
    assert key(lora_rank=4)["training"] | {"lora_rank": 8} == key(lora_rank=8)["training"]
    assert key(lora_rank=4) != key(lora_rank=4, lora_alpha=8)


def test_require_adaptable_refuses_models_without_linear_layers(tmp_path: Path) -> None:
    def config(**training: Any) -> RunConfig:
        return make_config(training={"lora_rank": 4} | training, resources__device="cpu")

    base = write_policy(tmp_path / "base", 0)
    require_adaptable(base, config())
    with pytest.raises(BadInput, match="names q_porj"):
        require_adaptable(base, config(lora_targets=["q_porj"]))
    with pytest.raises(BadInput, match="Conv1D"):
        require_adaptable(write_policy(tmp_path / "gpt2", 0, "gpt2"), config())
    two = config(lora_quantize="4bit").model_copy(update={"resources": ResourcesConfig(device="cpu", processes=2)})
    with pytest.raises(BadInput, match=r"resources\.processes is 2 in all, with training\.lora_quantize 4bit"):
        require_adaptable(base, two)
    weights = load_file(base / "model.safetensors")
    save_file({f"renamed.{name}": value for name, value in weights.items()}, base / "model.safetensors")
    with pytest.raises(BadInput, match="under the names that transformers gives them"):
        require_adaptable(base, config())


def test_lora_in_bf16_raises() -> None:
    """It would be another policy than base and adapter, which the next round starts from."""
    with pytest.raises(ValueError, match="save_dtype bfloat16 cannot be combined with lora_rank"):
        settings(save_dtype="bfloat16")


def test_lora_settings_without_lora_rank_raise() -> None:
    with pytest.raises(BadInput, match="lora_alpha needs lora_rank, which is not set"):
        make_config(training__lora_alpha=8)
    assert make_config(training__lora_alpha=16).training.lora_rank is None, "16 is the default"
