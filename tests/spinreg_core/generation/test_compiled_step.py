"""A compiled decoding step computes what plain forward passes do, with few graphs; what cannot be compiled is said."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
from transformers import PreTrainedModel

from spinreg_core.generation import kv_slots as slots
from spinreg_core.generation.compiled_step import AFTER_STEPS, Step
from spinreg_core.generation.hf import HfEngine
from spinreg_core.generation.kv_slots import Slots
from tests.support.decoding import FAMILIES, PAD, sampling, shared_layers, small
from tests.support.tiny_models import tiny_model

# Short ones, and one that is longer than a window of columns and makes all others move.
PROMPTS = [[(3 * i + 5 * k) % 61 for k in range(1 + (i * 7) % 6)] for i in range(60)]
PROMPTS.insert(30, [1 + k % 9 for k in range(60)])


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """See few columns at once, and begin with no graph of another test."""
    monkeypatch.setattr(slots, "_WINDOW", 16)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def compiled_soon(backend: Any = "eager") -> Step:
    """A step that is compiled after a few: with "eager" it is traced, and run as it was traced."""
    return Step(compile=True, after=5, compiler=partial(torch.compile, backend=backend))


@torch.no_grad()
def mixed(models: list[PreTrainedModel], weights: list[float], prompt: list[int], answer: list[int]) -> list[float]:
    """Log-probability of each token of the answer under the token-level mixture, from plain forward passes."""
    ids = torch.tensor([prompt + answer])
    tables = [w * m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m, w in zip(models, weights, strict=True)]
    return sum(tables).log_softmax(-1)[range(len(answer)), answer].tolist()  # type: ignore[union-attr]


def check(models: list[PreTrainedModel], tokens: int = 340, backend: str = "eager") -> None:
    weights = [1.0] if len(models) == 1 else [0.3, 0.7]
    engine = HfEngine(models, weights=weights, tokens=tokens, pad_id=PAD, step=compiled_soon(backend))
    answers = engine.generate(PROMPTS, sampling(new=12, stop=1), range(len(PROMPTS)))
    answers += engine.generate(PROMPTS[:1], sampling(new=12, stop=1), [99])  # in one slot
    assert len({len(a.token_ids) for a in answers}) > 1
    for prompt, answer in zip([*PROMPTS, PROMPTS[0]], answers, strict=True):
        assert answer.logprobs == pytest.approx(mixed(models, weights, prompt, answer.token_ids), abs=2e-4)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 4 * len(models), f"{graphs} graphs"
    assert not torch._dynamo.utils.counters["graph_break"]


# Gemma 3 has layers with and without a window, and Gemma 3n some that share keys and values.
@pytest.mark.parametrize(
    "family",
    ["gemma3", *(pytest.param(f, marks=pytest.mark.long) for f in [*FAMILIES, "gemma3n"] if f != "gemma3")],
)
def test_step_of_every_family_and_length_is_one_graph(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traced graph that is not compiled has the same limits as with a real compiler."""
    moved: list[int] = []
    move = Slots._move
    monkeypatch.setattr(Slots, "_move", lambda self, by: (moved.append(by), move(self, by)))
    check([(shared_layers() if family == "gemma3n" else tiny_model(family, 5)).eval()])
    assert max(moved) > 0 > min(moved), "to the right and to the left"


@pytest.mark.slow
@pytest.mark.long
def test_step_with_the_real_compiler_agrees() -> None:
    """The model has layers with a sliding window and layers without."""
    check([tiny_model("gemma3", 5).eval()], backend="inductor")


@pytest.mark.long
def test_step_of_a_mixture_is_one_graph_per_model() -> None:
    check([tiny_model("llama", 5).eval(), tiny_model("qwen3", 6).eval()])
    check([tiny_model("llama", 5).eval(), tiny_model("llama", 6).eval()])


def test_step_of_short_work_is_not_compiled() -> None:
    assert AFTER_STEPS > 1000
    step = Step(compile=True)
    HfEngine([small(3)], tokens=240, pad_id=PAD, step=step).generate([[1, 2]], sampling(), [0])
    assert not step.compiled
    assert not torch._dynamo.utils.counters["stats"]


def test_step_that_fails_to_compile_runs_eagerly(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(_graph: Any, _inputs: Any) -> Any:
        raise ValueError("no compiler on this machine")

    model = tiny_model("llama", 5).eval()
    prompts = PROMPTS[:20]
    expected = HfEngine([model], tokens=240, pad_id=PAD).generate(prompts, sampling(new=12), range(20))
    engine = HfEngine([model], tokens=240, pad_id=PAD, step=compiled_soon(fails))
    found = engine.generate(prompts, sampling(new=12), range(20))
    assert [a.token_ids for a in found] == [a.token_ids for a in expected]
    output = capsys.readouterr().out
    assert output.count("the decoding step of LlamaForCausalLM cannot be compiled") == 1
    assert "no compiler on this machine" in output
