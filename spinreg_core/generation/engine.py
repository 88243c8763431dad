"""Engines answer prompts: token ids in, sampled token ids out.

Decides: what every engine promises (below), which one `auto` means, and which prompts are refused.
Leaves out: how an engine works (`hf.py`, `vllm.py`), rendering (`models/chat_template.py`), what is done with answers
(`stages/generate.py`). Loads neither torch nor vllm: the flow process asks here what `auto` means.

An answer is exactly the ids that were sampled. It ends with the first of `stop_ids` ("stop"), or after
`max_new_tokens` ids none of which is a stop id ("length"); a stop id in the very last place still is "stop".
Nothing of the checkpoint's own generation_config takes part: temperature 1, top-p 1 and top-k 0 sample the
model's softmax itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from spinreg_core.config import GenerationConfig
from spinreg_core.errors import BadInput, SpinregError


@dataclass(frozen=True)
class Sampling:
    """How each next token is drawn, and where an answer ends."""

    temperature: float
    top_p: float  # smallest set of most likely tokens with at least this mass; 1 is off
    top_k: int  # so many most likely tokens; 0 is off. Applied before top_p.
    max_new_tokens: int
    stop_ids: tuple[int, ...]

    @classmethod
    def of(cls, generation: GenerationConfig, stop_ids: Sequence[int]) -> Sampling:
        g = generation
        return cls(g.temperature, g.top_p, g.top_k, g.max_new_tokens, tuple(stop_ids))

    @property
    def is_the_policy(self) -> bool:
        """Whether this samples the policy itself, and no sharpened or cut-off version of it."""
        return self.temperature == 1 and self.top_p == 1 and self.top_k == 0


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]  # end-of-turn included where finish is "stop"
    finish: Literal["stop", "length"]
    # log-probability of each token in nats, at temperature 1 and before top-k and top-p: under the policy, or under the
    # mixture that was sampled
    logprobs: list[float]


class Engine(Protocol):
    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        on_answer: Callable[[int, Answer], None] = ...,
    ) -> list[Answer]:
        """One answer per prompt, in the order of the prompts.

        What is drawn for a prompt depends on its own seed (0 <= seed < 2**63) and on no other prompt, call or batch,
        as far as the arithmetic does: sums are rounded otherwise in another batch, which changes an answer where a
        draw falls within that of the border between two tokens. The same call gives the same answers as far as the
        arithmetic repeats: always on one CPU with as many threads, on a GPU only where its kernels add up in a fixed
        order. Answers begin in the order of the prompts; `on_answer(index, answer)` is called as each one ends.
        Raises BadInput, before any work, for an empty prompt, one that leaves no room for max_new_tokens in
        the model's context, or an id outside its vocabulary.
        """

    def close(self) -> None:
        """Give memory back, but for models that others hold. The engine cannot be used afterwards."""


def columns_for(longest: int) -> int:
    """Places for keys and values that the hf engine keeps for an answer of so many tokens, prompt included: some more,
    so that it seldom has to move everything back."""
    return longest + max(16, longest // 8)


def check_prompts(
    prompts: list[list[int]], sampling: Sampling, model_config: Any, names: Sequence[str] | None = None
) -> None:
    """Refuse prompts that the model cannot answer in full; see `Engine.generate`.

    `model_config`: the transformers configuration of the model. `names`: what messages call the prompts (unset:
    their indices).
    """
    text = model_config.get_text_config()
    context, vocabulary = getattr(text, "max_position_embeddings", None), text.vocab_size
    for i, prompt in enumerate(prompts):
        where = f"prompt {names[i] if names else i}"
        if not prompt:
            raise BadInput(where, "no tokens", "at least one")
        if context is not None and len(prompt) + sampling.max_new_tokens > context:
            raise BadInput(
                where,
                f"{len(prompt)} tokens plus max_new_tokens {sampling.max_new_tokens}",
                f"at most {context}, the model's context (max_position_embeddings)",
            )
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise BadInput(where, f"token ids {min(prompt)} to {max(prompt)}", f"ids from 0 to {vocabulary - 1}")


def cut(tokens: Sequence[int], sampling: Sampling, logprobs: Sequence[float]) -> Answer:
    """The answer in a row of sampled ids, of which everything behind the first stop id is padding."""
    for i, token in enumerate(tokens):
        if token in sampling.stop_ids:
            return Answer(list(tokens[: i + 1]), "stop", list(logprobs[: i + 1]))
    if len(tokens) != sampling.max_new_tokens:
        raise SpinregError(f"the engine ended an answer after {len(tokens)} tokens without a stop token")
    return Answer(list(tokens), "length", list(logprobs))
