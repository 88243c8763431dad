"""The formulas of what a run needs: hand-computed values, what grows with what, and real tensors of real models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from spinreg_core.config import RunConfig
from spinreg_core.config.resolve import merge
from spinreg_core.logprobs import cpu_attention, packed_attention, projection
from spinreg_core.logprobs.sequence import answer_logprobs
from spinreg_core.models.lora import add_adapter
from spinreg_core.planning.cost_model import (
    LOGITS_AT_ONCE,
    LONGEST,
    WATCHED_PAIRS,
    Shape,
    Sizes,
    activation_bytes,
    checkpoints_bytes,
    logits_bytes,
    pairs,
    prompts,
    round_store,
    round_work,
    stage_memory,
    steps,
    trained_parameters,
)
from spinreg_core.training import trainer as training
from spinreg_core.training.optimizer import _KEPT, make_optimizer
from tests.support.builders import make_config

# SmolLM2-135M, and rows with round numbers.
SMOLLM = Shape(
    parameters=134_515_008, layers=30, width=576, mlp_width=1536, heads=9, kv_width=192, vocabulary=49_152,
    stored_bytes=2,
)  # fmt: skip
SIZES = Sizes(
    train_rows=100, heldout_rows=10, prompt=20, answer=30, clipped=30, generated=40, longest_prompt=50,
    longest_answer=70,
)  # fmt: skip
N = SMOLLM.parameters


def configured(**groups: Any) -> RunConfig:
    stated = {"data": {"prompts_per_round": 64}, "generation": {"dtype": "bfloat16", "max_new_tokens": 96}}
    return make_config(**merge(stated, groups))


def work(config: RunConfig, round_number: int, sizes: Sizes = SIZES) -> dict[str, tuple[float, float]]:
    """(tokens, FLOPs) per stage."""
    return {
        stage: (sum(w.tokens for w in works), sum(w.flops for w in works))
        for stage, works in round_work(config, SMOLLM, sizes, round_number).items()
    }


# Work


def test_round_work_of_the_base_is_its_evaluation() -> None:
    # 10 rows: sampled (20 + 40), then scored: the prompt once, real and sampled answer.
    tokens = 10 * 60 + 10 * (20 + 30 + 40)
    assert work(configured(), 0) == {"evaluate": (tokens, 2 * N * tokens)}


def test_round_work_of_round_1_matches_a_hand_count() -> None:
    config = configured(data={"prompts_per_round": 64}, objective={"alpha": 0.5}, training={"epochs": 2})
    found = work(config, 1)
    assert found["generate"] == (64 * 60, 2 * N * 64 * 60)
    # The previous policy is the base: one policy scores both answers.
    assert found["mix-opponent"] == (64 * 90, 2 * N * 64 * 90)
    watched = 32 * 50
    assert found["train"] == (2 * 64 * 90 + watched, 6 * N * 2 * 64 * 90 + 2 * N * watched)
    # policy: real, its own sample, the previous one's sample; base: the sample.
    evaluated = 10 * (20 + 30 + 40 + 40 + 60)
    assert found["evaluate"] == (10 * 60 + evaluated, 2 * N * (10 * 60 + evaluated))


def test_round_work_of_round_3_counts_uncached_scores() -> None:
    config = configured(data={"prompts_per_round": 40}, objective={"alpha": 0.5}, opponent={"history": "all"})
    # Round 3: 120 pairs under pi_2; under pi_0 the new pairs' answers and the human ones not seen before: the third
    # piece of 40 of the permutation of 100 rows has 20 new prompts.
    tokens = 120 * 90 + 40 * 60 + 20 * 30
    assert work(config, 3)["mix-opponent"] == (tokens, 2 * N * tokens)
    same = configured(data={"prompts_per_round": 40, "round_prompts": "same"}, objective={"alpha": 0.5})
    tokens = 120 * 90 + 40 * 60
    assert work(same, 3)["mix-opponent"][0] == tokens
    assert work(config, 2)["evaluate"][0] == 10 * 60 + 10 * (20 + 30 + 40 + 40 + 2 * 60)


@pytest.mark.parametrize("round_number", [1, 2, 5])
def test_round_work_at_alpha_0_or_1_scores_one_policy(round_number: int) -> None:
    def scored(alpha: float) -> float:
        return work(configured(objective={"alpha": alpha}, opponent={"history": 1}), round_number)["mix-opponent"][0]

    assert scored(1.0) == 64 * 90  # never the base
    assert scored(0.0) <= 64 * 90  # never the previous policy; human answers may be cached
    if round_number == 1:
        assert scored(0.5) == scored(1.0)
    else:
        assert scored(0.5) == scored(1.0) + scored(0.0)


def test_round_work_with_checkpointing_adds_a_forward_pass() -> None:
    plain = work(configured(), 1)["train"][1]
    again = work(configured(training={"activation_checkpointing": "full"}), 1)["train"][1]
    assert again - plain == 2 * N * 64 * 90


@given(st.integers(1, 8), st.integers(1, 100), st.sampled_from(["fresh", "same"]), st.sampled_from([0.0, 0.3, 1.0]))
def test_round_work_takes_two_to_six_flops_per_token(
    round_number: int, per_round: int, mode: str, alpha: float
) -> None:
    config = configured(data={"prompts_per_round": per_round, "round_prompts": mode}, objective={"alpha": alpha})
    for tokens, flops in work(config, round_number).values():
        assert tokens > 0
        assert 2 * N * tokens <= flops * (1 + 1e-12)
        assert flops <= 6 * N * tokens * (1 + 1e-12)


# Pairs and steps


@pytest.mark.parametrize(
    ("opponent", "counts"),
    [
        ({"history": 1}, [64, 64, 64, 64]),
        ({"history": 2}, [64, 128, 128, 128]),
        ({"history": "all"}, [64, 128, 192, 256]),
        ({"history": "all", "source": "regenerate"}, [64, 64, 64, 64]),
        ({"history": "all", "weighting": "recency", "decay": 0.5}, [64, 96, 112, 121]),  # 64 + 32 + 16 + 8 rounded
        ({"history": "all", "max_pairs": 128}, [64, 128, 128, 128]),
        ({"history": 2, "weighting": [3, 1]}, [64, 85, 85, 85]),
    ],
)
def test_pairs_follow_history_and_source(opponent: dict[str, Any], counts: list[int]) -> None:
    config = configured(opponent=opponent, data={"prompts_per_round": 64})
    found = [pairs(config, SIZES, number) for number in (1, 2, 3, 4)]
    assert all(abs(a - b) <= 1 for a, b in zip(found, counts, strict=True)), found
    assert [steps(config, SIZES, n) for n in (1, 2)] == [-(-found[0] // 8), -(-found[1] // 8)]


@pytest.mark.parametrize(("asked", "given_"), [(64, 64), (100, 100), (500, 100), (None, 100)])
def test_prompts_are_at_most_the_rows(asked: int | None, given_: int) -> None:
    assert prompts(configured(data={"prompts_per_round": asked}), SIZES) == given_


# Memory


@pytest.mark.parametrize(
    ("precision", "optimizer", "per_parameter"),
    [("mixed", "adamw", 18), ("mixed", "rmsprop", 14), ("bf16", "adamw", 8), ("bf16", "rmsprop", 6),
     ("fp32", "adamw", 16), ("fp32", "rmsprop", 12)],
)  # fmt: skip
def test_stage_memory_of_train_matches_a_hand_count(precision: str, optimizer: str, per_parameter: int) -> None:
    config = configured(training={"precision": precision, "optimizer": optimizer}, resources={"tokens_per_pass": 900})
    parts = stage_memory(config, SMOLLM, SIZES, engine="hf", device="cuda")["train"]
    activations = parts.pop("activations")
    assert sum(parts.values()) == per_parameter * N
    tokens = 900
    per_layer = {"mixed": 32 * 576 + 4 * 192 + 8 * 1536, "bf16": 22 * 576 + 4 * 192 + 8 * 1536,
                 "fp32": 36 * 576 + 8 * 192 + 16 * 1536}[precision] + 5 * 9  # fmt: skip
    assert activations == 31 * tokens * per_layer + 10 * 900 * 49_152


def test_stage_memory_of_7b_with_rmsprop_is_87_gigabytes() -> None:
    # Counted elsewhere for 7.24 B parameters: bf16 weights 14.5, gradients 14.5, one moment 28.96, fp32 master 29.0.
    # Here gradients are fp32 (autocast), 14.5 GB more.
    shape = replace(SMOLLM, parameters=7_240_000_000)
    mixed = configured(training={"precision": "mixed"})
    parts = stage_memory(mixed, shape, SIZES, engine="hf", device="cuda")["train"]
    fixed = sum(size for name, size in parts.items() if name != "activations")
    assert fixed == pytest.approx(87e9 + 14.5e9, rel=0.01)


def test_stage_memory_of_generate_is_weights_and_cache() -> None:
    config = configured(generation={"max_new_tokens": 96}, data={"prompts_per_round": 40})
    columns = 50 + 96 + (50 + 96) // 8
    few = configured(generation={"max_new_tokens": 96}, resources={"kv_cache_tokens": 8 * columns + 7})

    def parts(engine: str, device: str, config: RunConfig = config) -> dict[str, int]:
        return stage_memory(config, SMOLLM, SIZES, engine=engine, device=device)["generate"]

    token = 2 * 2 * 30 * 192  # keys and values, bfloat16
    assert parts("hf", "cpu", few) == {"weights": 2 * N, "KV cache": 8 * columns * token}
    assert parts("hf", "cpu")["KV cache"] == 40 * columns * token, "all answers of a round, fewer than 8192 tokens"
    assert parts("vllm", "cuda")["KV cache"] == 40 * (50 + 96) * token
    mixed = configured(generation={"max_new_tokens": 96}, opponent={"geometric_share": 0.5})
    assert parts("hf", "cpu", mixed)["weights"] == 4 * N, "the base is there too"
    assert parts("vllm", "cpu")["KV cache"] == 2**30  # resources.cpu_kv_cache_gib


@pytest.mark.parametrize("precision", ["mixed", "bf16", "fp32"])
@given(layers=st.integers(1, 80), tokens=st.integers(1, 4096))
def test_stage_memory_grows_with_every_size(precision: str, layers: int, tokens: int) -> None:
    shape = replace(SMOLLM, layers=layers)

    def needed(shape: Shape, tokens: int, checkpointing: Any) -> int:
        return activation_bytes(shape, precision, tokens, checkpointing)

    for checkpointing in ("none", "selective", "full"):
        base = needed(shape, tokens, checkpointing)
        assert needed(shape, tokens + 1, checkpointing) > base
        assert needed(replace(shape, layers=layers + 1), tokens, checkpointing) > base
        assert needed(replace(shape, width=shape.width + 64), tokens, checkpointing) > base
    assert needed(shape, tokens, "full") < needed(shape, tokens, "selective") < needed(shape, tokens, "none")


def test_logits_bytes_of_many_tokens_are_bounded() -> None:
    assert logits_bytes(SMOLLM, 100) == 10 * 100 * 49_152
    assert logits_bytes(SMOLLM, 10**6) == 10 * LOGITS_AT_ONCE


def test_constants_equal_those_of_the_code() -> None:
    assert LOGITS_AT_ONCE == projection.LOGITS_AT_ONCE
    assert LONGEST == cpu_attention.LONGEST
    assert WATCHED_PAIRS == training.WATCHED_PAIRS


# Real tensors


def llama(layers: int, precision: str) -> tuple[LlamaForCausalLM, Shape]:
    config = LlamaConfig(
        vocab_size=300, hidden_size=96, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    shape = Shape(
        parameters=model.num_parameters(), layers=layers, width=96, mlp_width=256, heads=6, kv_width=32,
        vocabulary=300, stored_bytes=4,
    )  # fmt: skip
    return model, shape


def saved_for_backward(model: LlamaForCausalLM, rows: int, prompt: int, answer: int, precision: Any) -> tuple[int, Any]:
    """Bytes of distinct tensors that autograd keeps, weights not counted, and the result to differentiate."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    answer_logprobs(model, [[2] * 4], [[3] * 4], precision=precision)  # the head is found out once, without gradients
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prompts = [[2 + row] * prompt for row in range(rows)]  # unlike, so that none is shared
        sums = answer_logprobs(model, prompts, [[3] * answer] * rows, precision=precision)
    return sum(storage.nbytes() for storage in kept.values()), sums


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj", "k_proj"]])
def test_trained_parameters_equal_those_of_the_adapter(targets: Any) -> None:
    model, shape = llama(3, "fp32")
    config = configured(training={"lora_rank": 5, "lora_targets": targets})
    add_adapter(model, config.training)
    real = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained_parameters(config, shape) == real
    full = configured()
    assert trained_parameters(full, shape) == shape.parameters
    assert round_store(config, shape, SIZES, 1)["policy"] == 4 * shape.parameters + 4 * real
    assert checkpoints_bytes(config, shape, SIZES, 1) * shape.parameters == (
        checkpoints_bytes(full, shape, SIZES, 1) * real
    )
    memory, whole = (stage_memory(c, shape, SIZES, engine="hf", device="cpu")["train"] for c in (config, full))
    assert memory["weights"] == whole["weights"] + 4 * real
    assert (memory["gradients"], memory["optimiser"]) == (4 * real, 4 * real)


@pytest.mark.parametrize("precision", ["mixed", "bf16"])
def test_stage_memory_with_quantisation_changes_train_only(precision: str) -> None:
    """Scores and samples are made with the published policies, whose weights are whole."""
    lora = {"precision": precision, "lora_rank": 8}

    def parts(stage: str, **more: Any) -> dict[str, int]:
        return stage_memory(configured(training=lora | more), SMOLLM, SIZES, engine="hf", device="cuda")[stage]

    assert parts("mix-opponent", lora_quantize="4bit") == parts("mix-opponent")
    embeddings, each = 2 * 49_152 * 576, {"mixed": 4, "bf16": 2}[precision]
    whole, few = parts("train"), parts("train", lora_quantize="4bit")
    assert whole["weights"] - few["weights"] == pytest.approx((each - 0.5625) * (N - embeddings), rel=1e-6)
    assert few["compute copies"] == (2 * embeddings if precision == "mixed" else 0)
    assert few["gradients"] == whole["gradients"]


def test_round_work_with_lora_skips_base_gradients() -> None:
    scored = work(configured(), 1)["train"][1] - 6 * N * 64 * 90
    assert work(configured(training={"lora_rank": 8}), 1)["train"][1] == 4 * N * 64 * 90 + scored
    again = configured(training={"lora_rank": 8, "activation_checkpointing": "full"})
    assert work(again, 1)["train"][1] == 6 * N * 64 * 90 + scored


@pytest.fixture
def attention_keeps_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's kernels, as on a GPU."""
    monkeypatch.setattr(packed_attention, "LONGEST", 0)


@pytest.mark.usefixtures("attention_keeps_no_table")
@pytest.mark.parametrize("precision", ["mixed", "bf16", "fp32"])
def test_activation_bytes_match_a_real_model(precision: str) -> None:
    rows, prompt, answer = 4, 60, 40
    tokens = rows * (prompt + answer - 1)
    found = {}
    for layers in (2, 6):
        model, shape = llama(layers, precision)
        found[layers] = saved_for_backward(model, rows, prompt, answer, precision)[0]
    # Autocast's copies of the weights are kept too; they are counted on their own.
    copies = 4 * 2 * (96 * 96 * 2 + 96 * 32 * 2 + 96 * 256 * 3) if precision == "mixed" else 0
    per_layer = (found[6] - found[2] - copies) / 4
    expected = activation_bytes(replace(shape, layers=1), precision, tokens) / 2
    assert per_layer == pytest.approx(expected, rel=0.05)


@pytest.mark.usefixtures("attention_keeps_no_table")
@pytest.mark.parametrize("precision", ["mixed", "bf16", "fp32"])
def test_activation_bytes_selective_match_a_real_model(precision: str) -> None:
    """The input of every layer, which autograd saves, and the results that the policy says to keep."""

    class Kept(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if str(func).removeprefix("aten.").partition(".")[0] in _KEPT:
                first = out if isinstance(out, torch.Tensor) else out[0]
                self.total += first.nbytes
            return out

    tokens, found = 4 * 99, {}
    for layers in (2, 6):
        model, shape = llama(layers, precision)
        answer_logprobs(model, [[2] * 4], [[3] * 4], precision=precision)  # type: ignore[arg-type]
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with Kept() as kept:
            saved, _ = saved_for_backward(model, 4, 60, 40, precision)
        found[layers] = saved + kept.total
    per_layer = (found[6] - found[2]) / 4  # copies of weights are not kept here
    whole = activation_bytes(replace(shape, layers=0), precision, tokens)
    expected = activation_bytes(replace(shape, layers=1), precision, tokens, "selective") - whole
    assert per_layer == pytest.approx(expected, rel=0.07)


@pytest.mark.parametrize("precision", ["mixed", "bf16", "fp32"])
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_stage_memory_of_train_is_close_to_a_real_step(precision: str, optimizer: str) -> None:
    """Weights, gradients, states, copies and what autograd keeps, of a model of ten layers."""
    config = configured(
        training={"precision": precision, "optimizer": optimizer, "batch_size": 2}, resources={"tokens_per_pass": 396},
        data={"max_prompt_tokens": 60, "max_length": 100}, generation={"max_new_tokens": 40},
    )  # fmt: skip
    model, shape = llama(10, precision)
    kept, sums = saved_for_backward(model, 4, 60, 40, precision)
    sums.sum().backward()
    updating = make_optimizer(model, config.training)
    for group in updating.param_groups:
        group["lr"] = 1e-6
    updating.step()
    held = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    held += [t for state in updating.state.values() for t in state.values()]
    measured = kept + sum(tensor.nbytes for tensor in held)
    sizes = replace(SIZES, longest_prompt=60, longest_answer=40)
    estimate = sum(stage_memory(config, shape, sizes, engine="hf", device="cpu")["train"].values())
    assert measured <= estimate <= 1.2 * measured


# Disk


def test_round_store_matches_a_hand_count() -> None:
    config = configured(data={"prompts_per_round": 64}, opponent={"history": 1}, training={"checkpoint_every_steps": 3})
    # 8 steps: checkpoints after 3 and 6, each of weights and one state, float32.
    assert round_store(config, SMOLLM, SIZES, 1) == {
        "policy": 4 * N,
        "generations": 64 * (4 * 20 + 12 * 40),
        "pairs": 64 * (4 * (20 + 30 + 40) + 100),
        "evaluation": 10 * (4 * 20 + 8 * 40),
    }
    assert round_store(config, SMOLLM, SIZES, 0)["base model"] == 2 * N


@pytest.mark.parametrize(
    ("precision", "save_dtype", "number"),
    [("mixed", "master", 4), ("bf16", "master", 2), ("mixed", "bfloat16", 2), ("bf16", "float32", 4)],
)
def test_round_store_of_a_policy_follows_save_dtype(precision: str, save_dtype: str, number: int) -> None:
    config = configured(training={"precision": precision, "save_dtype": save_dtype})
    assert round_store(config, SMOLLM, SIZES, 1)["policy"] == number * N


@pytest.mark.parametrize(
    ("every", "minutes", "kept"),
    [(None, None, 0), (8, None, 0), (7, None, 1), (4, None, 1), (1, None, 3), (100, None, 0), (None, 5.0, 3)],
)
def test_checkpoints_bytes_count_those_kept_at_once(every: int | None, minutes: float | None, kept: int) -> None:
    training = {"checkpoint_every_steps": every, "checkpoint_every_minutes": minutes, "optimizer": "adamw"}
    config = configured(training=training, opponent={"history": 1})
    assert steps(config, SIZES, 1) == 8
    assert checkpoints_bytes(config, SMOLLM, SIZES, 1) == kept * 12 * N


def test_stage_memory_of_shards_splits_weights_and_states() -> None:
    one, four = (
        stage_memory(configured(training={"precision": "mixed"}), SMOLLM, SIZES, engine="hf", device="cuda", shards=n)[
            "train"
        ]
        for n in (1, 4)
    )
    for part in ("weights", "gradients", "optimiser"):
        assert four[part] == one[part] // 4
    assert four["activations"] == one["activations"]
    assert 0 < four["compute copies"] < one["compute copies"]


def test_round_work_counts_clipped_human_answers() -> None:
    clipped, whole = replace(SIZES, clipped=10), SIZES
    for stage, fewer in (("train", 2 * 64 * 20 + WATCHED_PAIRS * 20), ("mix-opponent", 64 * 20)):
        config = configured(training={"epochs": 2}, objective={"alpha": 1.0})
        assert work(config, 1, whole)[stage][0] - work(config, 1, clipped)[stage][0] == fewer
        config = configured(training={"epochs": 2}, objective={"alpha": 1.0}, opponent={"truncated": "keep"})
        assert work(config, 1, whole)[stage] == work(config, 1, clipped)[stage]


@pytest.mark.parametrize(
    ("prompts_", "answers", "same", "watched"),
    [(9, 2, False, (9, 18, 27)), (9, 2, True, (9, 9, 9)), (64, 1, False, (32,))],
)
def test_round_work_watches_different_human_answers(
    prompts_: int, answers: int, same: bool, watched: tuple[int, ...]
) -> None:
    config = configured(
        data={"prompts_per_round": prompts_, "round_prompts": "same" if same else "fresh"},
        generation={"answers_per_prompt": answers}, opponent={"history": "all", "source": "replay"},
        objective={"alpha": 1.0},
    )  # fmt: skip
    for number, count in enumerate(watched, start=1):
        scored = [w for w in round_work(config, SMOLLM, SIZES, number)["train"] if w.kind == "score"]
        assert sum(w.tokens for w in scored) == count * (20 + 30)
