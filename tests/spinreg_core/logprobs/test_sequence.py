"""Sequence log-probabilities against a brute-force loop and against plain full logits."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from spinreg_core.errors import BadInput
from spinreg_core.logprobs import projection
from spinreg_core.logprobs import sequence as logprobs
from spinreg_core.logprobs.projection import lm_head_of
from spinreg_core.logprobs.sequence import answer_logprobs, padded_logprobs
from spinreg_core.models.loading import load_policy
from tests.support.plain_logprobs import gradients, plain
from tests.support.recorded_calls import recorded_calls
from tests.support.tiny_models import random_rows, tiny_model, write_policy

KINDS = ["llama", "llama-tied", "qwen2", "gemma2", "cohere", "granite"]


@torch.no_grad()
def one_token_at_a_time(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> float:
    total = 0.0
    for k, token in enumerate(answer):
        logits = model(input_ids=torch.tensor([prompt + answer[:k]]), use_cache=False).logits[0, -1]
        total += float(torch.log_softmax(logits.double(), -1)[token])
    return total


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_answer_logprobs_equal_a_loop_over_tokens(tmp_path: Path, kind: str, padded: bool) -> None:
    model = load_policy(write_policy(tmp_path / "p", 3, kind), "fp32", "cpu")
    assert lm_head_of(model) is not None  # the test is about the projection on answer positions
    prompts, answers = random_rows(9, 5)
    with torch.no_grad():
        if padded:
            found = padded_logprobs(model, prompts, answers)
        else:
            found = answer_logprobs(model, prompts, answers, precision="fp32")
    assert found.dtype == torch.float32
    assert found.shape == (9,)
    expected = [one_token_at_a_time(model, p, a) for p, a in zip(prompts, answers, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=2e-4)
    assert max(expected) - min(expected) > 10  # the rows differ, so a mixed-up order would show


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_full_logits(tmp_path: Path, kind: str) -> None:
    model = load_policy(write_policy(tmp_path / "p", 4, kind), "fp32", "cpu")
    prompts, answers = random_rows(6, 8)
    expected = gradients(model, plain(model, prompts, answers))
    found = gradients(model, answer_logprobs(model, prompts, answers, precision="fp32"))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-4, msg=name)


def test_projection_in_pieces_changes_nothing() -> None:
    torch.manual_seed(0)
    head = projection.LmHead(torch.nn.Linear(8, 30, bias=False), SimpleNamespace())
    hidden, targets = torch.randn(10, 8, requires_grad=True), torch.arange(10)

    def outcome(**given: int) -> list[Tensor]:
        found = projection.token_logprobs(head, hidden, targets, **given)
        return [found, *torch.autograd.grad(found.square().sum(), [hidden, head.linear.weight])]

    whole = outcome()
    with recorded_calls(projection.TargetLogprobs.forward) as calls:
        pieces = outcome(logits_at_once=4 * 30)
    for one, other in zip(pieces, whole, strict=True):
        torch.testing.assert_close(one, other)
    # Each piece is computed again in the backward pass.
    assert [len(given["hidden"]) for _, given in calls] == [4, 4, 2, 2, 4, 4]


def test_full_logits_never_exist() -> None:
    """Pieces of 8 MB, 160 MB in all: neither what is kept for the backward pass nor its peak holds them together."""
    words, tokens = 40_000, 1000
    head = projection.LmHead(torch.nn.Linear(8, words, bias=False), SimpleNamespace())
    hidden = torch.randn(tokens, 8, requires_grad=True)
    process = psutil.Process()
    # M_MMAP_THRESHOLD: what is freed goes back at once, as it does where pieces have their real size of 512 MiB.
    ctypes.CDLL(None).mallopt(-3, 2**20)
    projection.token_logprobs(head, hidden[:60], torch.arange(60), logits_at_once=50 * words).sum().backward()
    before = process.memory_info().rss
    sums = projection.token_logprobs(head, hidden, torch.arange(tokens), logits_at_once=50 * words).sum()
    kept = process.memory_info().rss - before
    sums.backward()
    assert kept < 60e6
    assert process.memory_info().rss - before < 60e6
    assert hidden.grad is not None


def test_unknown_projection_falls_back_to_the_models_own_logits() -> None:
    model = tiny_model("llama")
    prompts, answers = random_rows(5, 2)
    before = answer_logprobs(model, prompts, answers, precision="fp32")
    forward = type(model).forward

    class Unheard(type(model)):  # an architecture whose logits are not what its configuration suggests
        def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            output = forward(self, *args, **kwargs)
            output.logits = output.logits.roll(1, -1)
            return output

    other = tiny_model("llama")
    other.__class__ = Unheard
    assert lm_head_of(other) is None
    found = answer_logprobs(other, prompts, answers, precision="fp32")
    torch.testing.assert_close(found, plain(other, prompts, answers), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, before)


def test_empty_answer_scores_zero_and_empty_prompt_raises() -> None:
    model = tiny_model()
    found = answer_logprobs(model, [[4, 5], [6], [7]], [[], [8, 1], []], precision="fp32")
    assert found[[0, 2]].tolist() == [0.0, 0.0]
    assert found[1].item() == pytest.approx(one_token_at_a_time(model, [6], [8, 1]), abs=1e-4)
    found.sum().backward()
    assert answer_logprobs(model, [], [], precision="fp32").shape == (0,)
    assert answer_logprobs(model, [[4]], [[]], precision="fp32").tolist() == [0.0]
    with pytest.raises(ValueError, match="empty prompt"):
        answer_logprobs(model, [[]], [[3]], precision="fp32")
    with pytest.raises(ValueError, match="2 prompts but 1 answers"):
        answer_logprobs(model, [[3], [4]], [[3]], precision="fp32")


@pytest.mark.parametrize("precision", ["mixed", "bf16"])
def test_bfloat16_is_close_without_a_bias(tmp_path: Path, precision: logprobs.Precision) -> None:
    folder = write_policy(tmp_path / "p", 1)
    prompts, answers = random_rows(60, 3)
    with torch.no_grad():
        exact = answer_logprobs(load_policy(folder, "fp32", "cpu"), prompts, answers, precision="fp32")
        model = load_policy(folder, precision, "cpu")
        found = answer_logprobs(model, prompts, answers, precision=precision)
    assert model.dtype == (torch.float32 if precision == "mixed" else torch.bfloat16)
    difference = found - exact
    assert 0 < difference.abs().max() < 1.0  # it is bfloat16, and it is the same model
    assert abs(difference.mean()) < 3 * difference.std() / 60**0.5


def test_loading_turns_dropout_off_and_keeps_attention_caps(tmp_path: Path) -> None:
    llama = load_policy(write_policy(tmp_path / "llama", 0, "llama-dropout"), "fp32", "cpu")
    assert llama.config._attn_implementation == "sdpa"
    prompts, answers = random_rows(4, 1)
    with torch.no_grad():
        evaluating = answer_logprobs(llama, prompts, answers, precision="fp32")
        training = answer_logprobs(llama.train(), prompts, answers, precision="fp32")
    torch.testing.assert_close(training, evaluating, rtol=0, atol=0)
    assert load_policy(write_policy(tmp_path / "g", 0, "gemma2"), "fp32", "cpu").config._attn_implementation == "eager"


def test_load_policy_of_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="policy folder"):
        load_policy(tmp_path / "nothing", "fp32", "cpu")
    folder = write_policy(tmp_path / "p")
    # Weights in pickle are not read even where they are all there is.
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match="safetensors"):
        load_policy(folder, "fp32", "cpu")
    (folder / "config.json").write_text(json.dumps({"model_type": "nobody-knows"}))
    with pytest.raises(BadInput, match="nobody-knows"):
        load_policy(folder, "fp32", "cpu")


@pytest.mark.parametrize("change", ["drop", "rename", "shape"])
def test_a_policy_that_lacks_weights_is_refused(tmp_path: Path, change: str) -> None:
    """transformers makes up what is missing, another time another way; that is no policy."""
    folder = write_policy(tmp_path / "p", 0, "llama")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = tensors.pop(name)
    tensors |= {"rename": {f"base_model.{name}": tensor}, "shape": {name: tensor[:-1].clone()}}.get(change, {})
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"layers\.1\.mlp\.up_proj"):
        load_policy(folder, "fp32", "cpu")
