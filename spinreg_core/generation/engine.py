"""The contract of engines, which answer prompts: token ids in, sampled token ids out.

Decides: the promises of every engine (below), and which prompts are refused.
Leaves out: the engines (`generation.hf`, `generation.vllm`), rendering (`models.chat_template`), shards and commits
(`generation.worker`). Loads neither torch nor vllm, because the flow process imports it.

An answer is exactly the ids that were sampled. It ends with the first of `stop_ids` ("stop"), or after
`max_new_tokens` ids without a stop id ("length"); a stop id in the very last place is "stop". The checkpoint's own
generation_config has no influence: temperature 1, top-p 1 and top-k 0 sample the model's softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from spinreg_core.config import GenerationConfig
from spinreg_core.errors import BadInput, SpinregError
from spinreg_core.models.context import context_of


@dataclass(frozen=True)
class Sampling:
    """The distribution of each next token, and the end of an answer.

    top_p   smallest set of most likely tokens with at least this mass; 1 is off
    top_k   number of most likely tokens, applied before top_p; 0 is off
    """

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]

    @classmethod
    def of(cls, generation: GenerationConfig, stop_ids: Sequence[int]) -> Sampling:
        g = generation
        return cls(g.temperature, g.top_p, g.top_k, g.max_new_tokens, tuple(stop_ids))

    @property
    def is_the_policy(self) -> bool:
        """Return True for the neutral sampler, which samples the policy itself."""
        return self.temperature == 1 and self.top_p == 1 and self.top_k == 0


@dataclass(frozen=True)
class Answer:
    """A sampled answer.

    token_ids   with end-of-turn where finish is "stop"
    logprobs    log-probability of each token in nats under the sampled policy or mixture, at temperature 1, before
                top-k and top-p
    """

    token_ids: list[int]
    finish: Literal["stop", "length"]
    logprobs: list[float]


class Engine(Protocol):
    """A policy, or a mixture of policies, ready to answer."""

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        on_answer: Callable[[int, Answer], None] = ...,
    ) -> list[Answer]:
        """Return one answer per prompt, in the order of the prompts.

        The draws of a prompt depend on its own seed (0 <= seed < 2**63) and on no other prompt, call or batch. Only
        rounding may differ: another batch sums in another order, which changes a token where its draw falls that close
        to the border between two tokens. The same call repeats exactly on one CPU with as many threads, and on a GPU
        with kernels that add in a fixed order. Answers begin in the order of the prompts; `on_answer(index, answer)`
        is called as each one ends.

        Raises:
            BadInput: before any work, for an empty prompt, one that leaves no room for max_new_tokens in the model's
                context, or an id outside its vocabulary.
        """

    def close(self) -> None:
        """Free the engine's memory, except for models that the caller holds. The engine cannot be used afterwards."""


def columns_for(longest: int) -> int:
    """Return the columns of keys and values that engine hf keeps for an answer of `longest` tokens, prompt included.

    The columns beyond `longest` let it move everything back to the first column less often.
    """
    return longest + max(16, longest // 8)


def kv_width(text_config: Any) -> int:
    """Return the width of the keys, or values, of one token in one layer: key-value heads times their size."""
    heads: int = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    size: int = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    return heads * size


def check_prompts(
    prompts: list[list[int]], sampling: Sampling, model_config: Any, names: Sequence[str] | None = None
) -> None:
    """Refuse prompts that the model cannot answer in full; see `Engine.generate`.

    Args:
        model_config: the transformers configuration of the model.
        names: the prompts' names in messages (None: their indices).

    Raises:
        BadInput: a prompt is empty or too long, or has ids outside the vocabulary.
    """
    (longest, why), vocabulary = context_of(model_config), model_config.get_text_config().vocab_size
    for i, prompt in enumerate(prompts):
        where = f"prompt {names[i] if names else i}"
        if not prompt:
            raise BadInput(where, "has no tokens", "at least one")
        if longest is not None and len(prompt) + sampling.max_new_tokens > longest:
            raise BadInput(
                where,
                f"has {len(prompt)} tokens plus max_new_tokens {sampling.max_new_tokens}",
                f"at most {longest}, {why}",
            )
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise BadInput(where, f"has token ids {min(prompt)} to {max(prompt)}", f"ids from 0 to {vocabulary - 1}")


def cut(tokens: Sequence[int], sampling: Sampling, logprobs: Sequence[float]) -> Answer:
    """Return the answer in a row of sampled ids; everything after the first stop id is padding.

    Raises:
        SpinregError: the row is shorter than max_new_tokens and has no stop id.
    """
    for i, token in enumerate(tokens):
        if token in sampling.stop_ids:
            return Answer(list(tokens[: i + 1]), "stop", list(logprobs[: i + 1]))
    if len(tokens) != sampling.max_new_tokens:
        raise SpinregError(f"the engine ended an answer after {len(tokens)} tokens without a stop token")
    return Answer(list(tokens), "length", list(logprobs))
