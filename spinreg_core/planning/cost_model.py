"""The needs of a configuration as arithmetic: work, memory per device and bytes in the store, by stage and round.

Decides: the formulas below. Leaves out: the model's shape, the data's lengths and the machine's rate (`inputs`), and
the text of a plan (`plan`). Imports nothing heavy.

Work. N parameters and T tokens take 6 N T floating-point operations to train (8 N T if whole layers are computed again
in the backward pass), 2 N T to score and 2 N T to sample (prompt and sampled tokens alike; Kaplan et al. 2020, section
2.1). A prompt counts once for the answers that are computed with it. The vocabulary projection skips prompts, which is
not counted. Attention's own products, quadratic in length, are left out: they are below a tenth for answers of up to a
thousand tokens. Models with experts compute less than N says.

Memory of training, bytes per parameter:

                  weights   gradients   optimiser (adamw / rmsprop)   copies for computing
    mixed            4          4               8 / 4                       2   (bfloat16, made by autocast)
    bf16             2          2               4 / 2                       0
    fp32             4          4               8 / 4                       0

Activations kept for the backward pass, bytes per token and layer, for a layer of the Llama kind (width d, keys of
all heads together k, MLP width f, h heads): fp32 36 d + 8 k + 16 f, mixed 32 d + 4 k + 8 f, bf16 22 d + 4 k + 8 f,
each + 5 h. With LoRA in bf16, at most 40 d + 4 k + 10 f, because its adapters take their inputs as float32.
These were counted from the tensors that autograd saves (transformers 5.19, packed rows on a CPU). One layer is added
for gradients in flight. Activation checkpointing `full` keeps the input of every layer, and one whole layer;
`selective` keeps the results of matrix products and attention too: fp32 20 d + 8 k + 8 f, mixed 12 d + 4 k + 4 f, bf16
10 d + 4 k + 4 f, with the input.

With LoRA, gradients, optimiser and checkpoints are those of the adapter's numbers (float32), which add to the weights.
The backward pass needs no gradients of the base: 4 N T to train, 6 N T with whole layers computed again.

Ranks that share the weights hold a part of weights, gradients and optimiser each, and two layers and the embeddings
whole while they compute. Logits take ten bytes per answer token and vocabulary entry, for at most as many tokens at
once as `logprobs` computes.

Sampling takes the weights, and a KV cache of 2 k values per token and layer. Training and scoring are counted at a full
pass of `resources.tokens_per_pass`, and sampling at the longest row for every row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from spinreg_core.config import RunConfig, sampling_dtype
from spinreg_core.generation.engine import columns_for
from spinreg_core.selfplay.opponent import mixture_weights, replay_quota

# Elements; the limit of `logprobs`.
LOGITS_AT_ONCE = 2**27
# Human answers that training scores at both ends of a round.
WATCHED_PAIRS = 32
Kind = Literal["generate", "score", "train"]
_WEIGHTS = {"mixed": 4, "bf16": 2, "fp32": 4}
_COPIES = {"mixed": 2, "bf16": 0, "fp32": 0}
# Tensors as large as the weights.
_STATES = {"adamw": 2, "rmsprop": 1}
# Bytes per number; in 4 bits with a scale for every 64 numbers.
_QUANTISED = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}
# Bytes per token and layer, as factors of d, k and f.
_SAVED = {"fp32": (36, 8, 16), "mixed": (32, 4, 8), "bf16": (22, 4, 8), "bf16-lora": (40, 4, 10)}
_SAVED_SELECTIVE = {"fp32": (20, 8, 8), "mixed": (12, 4, 4), "bf16": (10, 4, 4), "bf16-lora": (28, 4, 6)}
# Keys; attention on CPUs over more of them keeps no weights.
LONGEST = 1024
# vLLM's default limit of answers that it decodes at once.
_VLLM_SEQUENCES = 256


@dataclass(frozen=True)
class Shape:
    """A causal language model: N and the sizes that memory depends on.

    `kv_width` is the number of key-value heads times their size, `stored_bytes` the bytes per stored parameter.
    """

    parameters: int
    layers: int
    width: int
    mlp_width: int
    heads: int
    kv_width: int
    vocabulary: int
    stored_bytes: int


@dataclass(frozen=True)
class Sizes:
    """Rows, and tokens per row. Answers include their end-of-turn; `generated` is the mean sampled answer.

    `clipped` is the mean human answer after `opponent.truncated: clip_real`, if sampled answers have full length.
    """

    train_rows: int
    heldout_rows: int
    prompt: float
    answer: float
    clipped: float
    generated: float
    longest_prompt: int
    longest_answer: int


@dataclass(frozen=True)
class Work:
    """Tokens that pass through a model, and their floating-point operations."""

    kind: Kind
    tokens: float
    flops: float


def prompts(config: RunConfig, sizes: Sizes) -> int:
    """Return the number of prompts of a round."""
    return min(config.data.prompts_per_round or sizes.train_rows, sizes.train_rows)


def answers(config: RunConfig, sizes: Sizes) -> int:
    """Return the number of answers of a round, with those that `opponent.replay_share` takes from earlier rounds."""
    return prompts(config, sizes) * config.generation.answers_per_prompt


def generated_share(config: RunConfig, round_number: int) -> float:
    """Return the share of a round's answers that are sampled; pairs of earlier rounds replace the others."""
    o = config.opponent
    if not o.replay_share:
        return 1.0
    newest = mixture_weights(round_number - 1, o.history, o.weighting, decay=o.decay)[0]
    return 1.0 - o.replay_share * (1.0 - newest)


def pairs(config: RunConfig, sizes: Sizes, round_number: int) -> int:
    """Return the number of pairs of a round (counted from 1), with those of earlier rounds and without any dropped."""
    return sum(_pairs_by_round(config, sizes, round_number))


def _pairs_by_round(config: RunConfig, sizes: Sizes, round_number: int) -> list[int]:
    """Return the pairs that a round takes from itself, the round before, and so on."""
    n, o = answers(config, sizes), config.opponent
    if o.source == "regenerate":
        return [n]
    weights = mixture_weights(round_number - 1, o.history, o.weighting, decay=o.decay)
    return replay_quota(weights, [n] * len(weights), o.max_pairs)


def trained_parameters(config: RunConfig, shape: Shape) -> int:
    """Return the number of trained parameters: all, or the LoRA adapter's for layers of the Llama kind."""
    rank, targets = config.training.lora_rank, config.training.lora_targets
    if rank is None:
        return shape.parameters
    d, k, f = shape.width, shape.kv_width, shape.mlp_width
    sizes = {"q_proj": d + d, "k_proj": d + k, "v_proj": d + k, "o_proj": d + d,
             "gate_proj": d + f, "up_proj": d + f, "down_proj": f + d}  # fmt: skip
    chosen = sizes if isinstance(targets, str) else targets
    return shape.layers * rank * sum(sizes.get(name, d + f) for name in chosen)


def round_work(config: RunConfig, shape: Shape, sizes: Sizes, round_number: int) -> dict[str, list[Work]]:
    """Return the work of each stage of a round; round 0 is the evaluation of the base."""
    two_n = 2.0 * shape.parameters
    sampled = sizes.prompt + sizes.generated
    m, n = sizes.heldout_rows, prompts(config, sizes)
    # Held-out: y and y' under the policy; then y'' under it too, and y' under base and previous policy. The prompt is
    # computed once for both answers.
    pair = sizes.prompt + sizes.answer + sizes.generated
    scored = m * pair
    if round_number > 0:
        scored += m * sizes.generated + m * sampled * (2 if round_number > 1 else 1)
    evaluate = [Work("generate", m * sampled, two_n * m * sampled), Work("score", scored, two_n * scored)]
    if round_number == 0:
        return {"evaluate": evaluate}
    total, per_prompt = pairs(config, sizes, round_number), config.generation.answers_per_prompt
    human = sizes.clipped if config.opponent.truncated == "clip_real" else sizes.answer
    # The prompt and the human answer are computed once for all sampled answers to a prompt.
    pair = (sizes.prompt + human) / per_prompt + sizes.generated
    made = n * (sizes.prompt + per_prompt * sizes.generated)
    seen = min(sizes.train_rows, n * (round_number - 1))
    new = min(n, sizes.train_rows - seen)
    if config.data.round_prompts == "same" and round_number > 1:
        new = 0
    alpha = config.objective.alpha
    # Replayed pairs keep the scores of their iterate.
    new_pairs = _pairs_by_round(config, sizes, round_number)[0] if config.objective.reference == "iterate" else total
    mix = new_pairs * pair if alpha > 0 else 0.0
    # In round 1 the previous policy is the base, which needs no second scoring.
    if alpha < 1 and (round_number > 1 or alpha == 0):
        mix += min(made + new * human, total * pair)  # of the chosen pairs only
    passes = config.training.epochs * total * pair
    # Watched human answers are scored at the end, and at the start too unless scores of the previous policy are cached.
    # They are different ones: pairs of a prompt share theirs, and so do rounds with the same prompts.
    different = n if config.data.round_prompts == "same" else min(sizes.train_rows, n * round_number)
    adapted = config.training.rounds_adapter and round_number > 1
    times = 1 if (alpha > 0 or round_number == 1) and not adapted else 2
    watched = min(total / per_prompt, different, WATCHED_PAIRS) * (sizes.prompt + human) * times
    factor = 6.0 if config.training.lora_rank is None else 4.0
    factor += 2.0 if config.training.activation_checkpointing == "full" else 0.0
    answered = made * generated_share(config, round_number)
    return {
        "generate": [Work("generate", answered, two_n * answered)],
        "mix-opponent": [Work("score", mix, two_n * mix)],
        "train": [Work("train", passes, factor * shape.parameters * passes), Work("score", watched, two_n * watched)],
        "evaluate": evaluate,
    }


def steps(config: RunConfig, sizes: Sizes, round_number: int) -> int:
    """Return the optimiser steps of a round."""
    return config.training.epochs * math.ceil(pairs(config, sizes, round_number) / config.training.batch_size)


def activation_bytes(
    shape: Shape, precision: str, tokens: int, checkpointing: Literal["none", "selective", "full"] = "none"
) -> int:
    """Return the bytes of tensors that the backward pass keeps and makes, for a number of tokens at once."""

    def layer(saved: tuple[int, int, int]) -> int:
        d, k, f = saved
        return tokens * (d * shape.width + k * shape.kv_width + f * shape.mlp_width + 5 * shape.heads)

    kept = layer(_SAVED[precision])
    if checkpointing == "selective":
        kept = layer(_SAVED_SELECTIVE[precision])
    if checkpointing == "full":
        kept = tokens * shape.width * (2 if precision.startswith("bf16") else 4)
    return shape.layers * kept + layer(_SAVED[precision])


def attention_bytes(
    shape: Shape, tokens: int, longest: int, checkpointing: Literal["none", "selective", "full"] = "none"
) -> int:
    """Return the bytes of attention weights that `cpu_attention` keeps for the backward pass.

    They are bfloat16, one per head, query and visible key. longest: tokens of the longest sequence; a query sees half
    of them on average.
    """
    seen = (min(longest, LONGEST) + 64) // 2
    return 2 * shape.heads * tokens * seen * (shape.layers if checkpointing == "none" else 1)


def logits_bytes(shape: Shape, answer_tokens: int) -> int:
    """Return the bytes of a batch's logits: 2 as computed, 4 as float32, 4 for their gradient or softmax."""
    return 10 * min(answer_tokens * shape.vocabulary, LOGITS_AT_ONCE)


def stage_memory(
    config: RunConfig, shape: Shape, sizes: Sizes, *, engine: str, device: str, shards: int = 1
) -> dict[str, dict[str, int]]:
    """Return the peak bytes of each stage on a rank's device, by part. shards: ranks that share the weights."""
    t, precision = config.training, config.training.precision
    weights = _WEIGHTS[precision] * shape.parameters // shards
    copies = _COPIES[precision] * shape.parameters
    if shards > 1:
        embeddings = 2 * shape.vocabulary * shape.width
        layer = (shape.parameters - embeddings) // max(shape.layers, 1)
        copies = (2 if precision != "fp32" else 4) * (embeddings + 2 * layer)
    # A pass is filled up to its limit; a pair that is longer forms a pass alone.
    tokens = max(config.resources.tokens_per_pass, sizes.longest_prompt + 2 * sizes.longest_answer)
    adapter = 0 if t.lora_rank is None else 4 * trained_parameters(config, shape) // shards
    held, made = weights, copies
    # Training quantises all weights but the embeddings.
    if t.lora_quantize is not None:
        full = 2 * shape.vocabulary * shape.width
        held = int(_WEIGHTS[precision] * full + _QUANTISED[t.lora_quantize] * (shape.parameters - full))
        made = _COPIES[precision] * full
    kind = "bf16-lora" if t.lora_rank is not None and precision == "bf16" else precision
    train = {
        "weights": held + adapter,
        "gradients": adapter or held,
        "optimiser": _STATES[t.optimizer] * (adapter or held),
        "compute copies": made,
        "activations": activation_bytes(shape, kind, tokens, t.activation_checkpointing) + logits_bytes(shape, tokens),
    }
    if device == "cpu" and precision != "fp32":
        longest = sizes.longest_prompt + sizes.longest_answer
        train["activations"] += attention_bytes(shape, tokens, longest, t.activation_checkpointing)
    one_layer = Shape(**(vars(shape) | {"layers": 0}))
    score = {
        "weights": weights,
        "compute copies": copies,
        "activations": activation_bytes(one_layer, precision, tokens) + logits_bytes(shape, tokens),
    }
    generate = _engine_memory(config, shape, sizes, engine=engine, device=device)
    larger = max(score, generate, key=lambda parts: sum(parts.values()))
    return {"generate": generate, "mix-opponent": score, "train": train, "evaluate": larger}


def _engine_memory(config: RunConfig, shape: Shape, sizes: Sizes, *, engine: str, device: str) -> dict[str, int]:
    g = config.generation
    number = 2 if sampling_dtype(config) == "bfloat16" else 4
    tokens = sizes.longest_prompt + g.max_new_tokens
    sequence = 2 * number * shape.layers * shape.kv_width * tokens
    if engine == "vllm" and device == "cpu":
        # vLLM on a CPU reserves its whole cache at the start.
        cache = int(config.resources.cpu_kv_cache_gib * 2**30)
    else:
        held = config.resources.kv_cache_tokens
        rows = _VLLM_SEQUENCES
        if engine == "hf":
            sequence = sequence // tokens * columns_for(tokens)
            rows = max(1, (8192 if held == "auto" else held) // columns_for(tokens))
        cache = sequence * min(max(answers(config, sizes), sizes.heldout_rows), rows)
    policies = 2 if config.opponent.geometric_share else 1
    return {"weights": policies * number * shape.parameters, "KV cache": policies * cache}


def checkpoints_bytes(config: RunConfig, shape: Shape, sizes: Sizes, round_number: int) -> int:
    """Return the most bytes of a round's checkpoints in the store; all of them are deleted after the round."""
    t = config.training
    if t.checkpoint_every_steps is None and t.checkpoint_every_minutes is None:
        return 0
    # One more than is kept exists while the newest is committed.
    number = t.checkpoints_kept + 1
    if t.checkpoint_every_minutes is None and t.checkpoint_every_steps is not None:
        number = min(number, (steps(config, sizes, round_number) - 1) // t.checkpoint_every_steps)
    width = _WEIGHTS[t.precision] if t.lora_rank is None else 4
    return number * width * (1 + _STATES[t.optimizer]) * trained_parameters(config, shape)


def round_store(config: RunConfig, shape: Shape, sizes: Sizes, round_number: int) -> dict[str, int]:
    """Return the bytes that a round adds to the store, by content. Round 0: the base model and the data.

    Tables are counted as token ids of four bytes and text of four bytes a token, before Parquet's compression.
    """
    sampled = int(sizes.heldout_rows * (4 * sizes.prompt + 8 * sizes.generated))
    if round_number == 0:
        rows = sizes.train_rows + sizes.heldout_rows
        data = int(rows * 8 * (sizes.prompt + sizes.answer))
        return {"base model": shape.stored_bytes * shape.parameters, "data": data, "evaluation": sampled}
    t = config.training
    master = _WEIGHTS[t.precision] if t.lora_rank is None else 4
    adapter = 0 if t.lora_rank is None else 4 * trained_parameters(config, shape)
    saved = {"master": master, "bfloat16": 2, "float32": 4}[t.save_dtype]
    return {
        "policy": saved * shape.parameters + adapter,
        "generations": int(
            answers(config, sizes) * generated_share(config, round_number) * (4 * sizes.prompt + 12 * sizes.generated)
        ),
        "pairs": int(pairs(config, sizes, round_number) * (4 * (sizes.prompt + sizes.answer + sizes.generated) + 100)),
        "evaluation": sampled,
    }
