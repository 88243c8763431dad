"""Packed = prefix-shared = padded = one by one, for log-probabilities and gradients, family by family."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spinreg_core.logprobs import packed_attention
from spinreg_core.logprobs.packed_attention import PackedRow, block_mask, by_pieces
from spinreg_core.logprobs.packing import PackedLayout, group, layout
from spinreg_core.logprobs.sequence import answer_logprobs, longest_packed, packs, padded_logprobs
from spinreg_core.models.loading import load_policy
from tests.support.plain_logprobs import gradients, plain
from tests.support.recorded_calls import recorded_calls
from tests.support.tiny_models import random_rows, tiny_model, write_policy

FAMILIES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "cohere", "granite", "olmo2",
    "gpt2",
]  # fmt: skip


def shared_rows() -> tuple[list[list[int]], list[list[int]]]:
    """Three prompts, with one, three and four answers: one of a single token, one twice."""
    prompts, answers = random_rows(8, 5, longest=14)
    prompts = [prompts[i] for i in (0, 1, 1, 1, 2, 2, 2, 2)]
    answers[2] = answers[2][-1:]
    answers[6] = answers[5]
    return prompts, answers


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_padded_rows_and_single_rows(tmp_path: Path, family: str) -> None:
    folder = write_policy(tmp_path / "p", 3, family)
    reference, model = (load_policy(folder, "fp32", "cpu") for _ in range(2))
    prompts, answers = shared_rows()
    assert max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)) > 9, "longer than the windows"
    expected = plain(reference, prompts, answers)
    exact = gradients(reference, expected)
    assert longest_packed(model) == float("inf")
    with recorded_calls(by_pieces) as calls:
        found = answer_logprobs(model, prompts, answers, precision="fp32")
    assert calls, "the packed attention was not used"
    tokens = sum(map(sum, calls[0][1]["sizes"]))
    assert tokens < sum(len(p) + len(a) - 1 for p, a in zip(prompts, answers, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(padded_logprobs(reference, prompts, answers), expected, rtol=1e-5, atol=1e-4)
    for name, gradient in gradients(model, found).items():
        torch.testing.assert_close(gradient, exact[name], rtol=1e-4, atol=2e-4, msg=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen2"])
def test_flex_attention_on_a_gpu_is_the_cpus_pieces(tmp_path: Path, family: str) -> None:
    folder = write_policy(tmp_path / "p", 3, family)
    cpu, gpu = load_policy(folder, "fp32", "cpu"), load_policy(folder, "fp32", "cuda")
    prompts, answers = shared_rows()
    a = answer_logprobs(cpu, prompts, answers, precision="fp32")
    b = answer_logprobs(gpu, prompts, answers, precision="fp32")
    assert packs(gpu)
    torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-3)
    expected = gradients(cpu, a)
    weights = torch.linspace(-1, 2, len(b), device="cuda")
    (b * weights).sum().backward()
    for name, parameter in gpu.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.cpu(), expected[name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_packed_bfloat16_is_close_without_a_bias(tmp_path: Path, family: str) -> None:
    folder = write_policy(tmp_path / "p", 1, family)
    prompts, answers = random_rows(120, 3)
    prompts = [prompts[i // 3] for i in range(120)]
    with torch.no_grad():
        exact = padded_logprobs(load_policy(folder, "fp32", "cpu"), prompts, answers)
    for precision in ("mixed", "bf16"):
        model = load_policy(folder, precision, "cpu")  # type: ignore[arg-type]
        found = answer_logprobs(model, prompts, answers, precision=precision)  # type: ignore[arg-type]
        assert packs(model)
        gradients_agree(model, found, prompts, answers)
        residual = found.detach() - exact
        assert 0 < residual.abs().max() < 1.0
        assert abs(residual.mean()) < 3 * residual.std() / 120**0.5


def gradients_agree(model: PreTrainedModel, found: Tensor, prompts: list[list[int]], answers: list[list[int]]) -> None:
    """Gradients of packed rows in bfloat16 are those of rows one by one in float32, up to a noise without direction."""
    exact = copy.deepcopy(model).float()
    exact.set_attn_implementation("sdpa" if exact.config.model_type != "gemma2" else "eager")
    expected = gradients(exact, padded_logprobs(exact, prompts, answers))
    for name, gradient in gradients(model, found).items():
        a, b = gradient.float().flatten(), expected[name].flatten()
        assert float(a @ b / (a.norm() * b.norm())) > 0.98, name
        assert 0.92 < float(a.norm() / b.norm()) < 1.08, name


def dense(row: PackedLayout, window: int | None) -> Tensor:
    """Which token sees which, from the definition: one sequence per answer."""
    length = row.tokens.numel()
    seen = torch.zeros(length, length, dtype=torch.bool)
    for q in range(length):
        for k in range(q + 1):
            one_sequence = row.segments[k] in (0, row.segments[q]) and row.groups[q] == row.groups[k]
            near = window is None or row.positions[0, q] - row.positions[0, k] < window
            seen[q, k] = bool(one_sequence and near)
    return seen


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_by_pieces_and_block_mask_equal_masked_attention(window: int | None, softcap: float | None) -> None:
    torch.manual_seed(0)
    row = layout(group(*shared_rows())[0])
    length, width = row.tokens.numel(), 16
    q = torch.randn(1, 4, length, width, requires_grad=True)
    k, v = (torch.randn(1, 2, length, width, requires_grad=True) for _ in range(2))
    weights = torch.randn(1, 4, length, width)
    seen = dense(row, window)

    def outcome(result: Tensor) -> list[Tensor]:
        return [result, *torch.autograd.grad((result * weights).sum(), (q, k, v))]

    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    expected = outcome(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1))
    found = outcome(by_pieces(q, k, v, row.sizes, 0.3, window, softcap))

    def capped(score: Tensor, *_where: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    packed = PackedRow(row)
    mask = block_mask(packed, window)
    with warnings.catch_warnings():  # FlexAttention has no backward on CPUs
        warnings.simplefilter("ignore")  # that it is slow without torch.compile
        flexible: Any = flex_attention(
            q.detach(), k.detach(), v.detach(), score_mod=capped, block_mask=mask, enable_gqa=True, scale=0.3
        )
    torch.testing.assert_close(flexible, expected[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert block_mask(packed, window) is mask, "made once for all layers"


def test_packs_model_with_states_is_padded_with_a_warning() -> None:
    model = tiny_model("mamba")
    prompts, answers = shared_rows()
    with pytest.warns(UserWarning, match="MambaForCausalLM: .* batches are padded"):
        found = answer_logprobs(model, prompts, answers, precision="fp32")
    torch.testing.assert_close(found, plain(model, prompts, answers), rtol=1e-5, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert not packs(model)


def test_longest_packed_ends_at_a_window_unknown_to_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = tiny_model("mistral"), tiny_model("mistral")
    for each in (model, reference):
        each.config.sliding_window = 100  # longer than what the probe tries
    attend = packed_attention.packed_attention

    def told_nothing(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
        return attend(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, packed_attention.NAME, told_nothing)
    assert longest_packed(model) == 100
    prompts, answers = [[3, 4, 5] * 30], [[6, 7, 8] * 5]
    with recorded_calls(layout) as calls:
        found = answer_logprobs(model, prompts, answers, precision="fp32")
        assert not calls
    torch.testing.assert_close(found, plain(reference, prompts, answers), rtol=1e-5, atol=1e-4)
    with recorded_calls(layout) as calls:
        answer_logprobs(model, [[3, 4, 5]], [[6, 7, 8]], precision="fp32")
        assert len(calls) == 1


def test_packed_model_still_generates_like_transformers(tmp_path: Path) -> None:
    for family in ("llama", "gemma2", "mistral"):
        folder = write_policy(tmp_path / family, 3, family)
        reference, model = (load_policy(folder, "fp32", "cpu") for _ in range(2))
        assert packs(model)
        tokens = torch.tensor([[2, 2, 5, 9, 8, 4, 3, 7, 6, 5], [5, 9, 8, 4, 3, 7, 6, 5, 11, 12]])
        mask = (tokens != 2).long()
        torch.testing.assert_close(
            model(tokens, attention_mask=mask).logits[mask.bool()],
            reference(tokens, attention_mask=mask).logits[mask.bool()],
        )
        options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
        assert torch.equal(model.generate(tokens, **options), reference.generate(tokens, **options))
