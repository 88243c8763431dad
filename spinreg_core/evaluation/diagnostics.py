"""Diagnostics of a round: the distribution of margins, and the credit of single tokens.

Decides: the histogram's bins, and how an answer's implicit reward is distributed over its tokens. Leaves out: metrics
with intervals (`heldout`), the choice of the answers (`stages`), and the figure (`reports`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from spinreg_core.evaluation.heldout import implicit_reward
from spinreg_core.evaluation.intervals import Floats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spinreg_core.models.loading import Precision


_BINS = 30


@dataclass
class Tokens:
    """Answers to inspect token by token: `found` maps a policy object to log-probabilities [answer][token], in nats."""

    prompts: list[list[int]]
    answers: list[list[int]]
    found: dict[str, list[list[float]]] = field(default_factory=dict)

    def score(self, policy: str, model: PreTrainedModel, precision: Precision) -> None:
        """Add the log-probabilities of all answers under a policy."""
        import torch

        from spinreg_core.logprobs.sequence import answer_token_logprobs

        with torch.no_grad():
            self.found[policy] = [
                answer_token_logprobs(model, prompt, answer, precision=precision).tolist() if answer else []
                for prompt, answer in zip(self.prompts, self.answers, strict=True)
            ]


def credit(
    tokens: Tokens, decode: Callable[[list[int]], str], policies: Mapping[str, str], *, alpha: float, beta: float
) -> list[list[tuple[str, float]]]:
    """Return (text, credit) of every token of every answer.

    A token's credit is beta (log p - alpha log p_previous - (1 - alpha) log p_base), with each log-probability given
    the prompt and the tokens before it. The credits sum to beta r(x, y) of arXiv 2404.04291; Rafailov et al. (arXiv
    2404.12358) interpret the sum in this way. policies: object ids of "policy", "previous", "base".
    """
    own, previous, base = (tokens.found[policies[name]] for name in ("policy", "previous", "base"))
    spread = []
    for i, ids in enumerate(tokens.answers):
        values = beta * implicit_reward(np.array(own[i]), np.array(previous[i]), np.array(base[i]), alpha)
        spread.append(list(zip(_pieces(decode, ids), values.tolist(), strict=True)))
    return spread


def _pieces(decode: Callable[[list[int]], str], ids: list[int]) -> list[str]:
    """Return the text that each token adds. A character of several tokens belongs to its last one."""
    found, shown = [], ""
    for k in range(len(ids)):
        text = decode(ids[: k + 1])
        whole = text.startswith(shown) and not text.endswith("\ufffd")
        found.append(text[len(shown) :] if whole else "")
        shown = text if whole else shown
    return found


class Histogram(TypedDict):
    """Counts in bins of equal width, one more edge than counts, and the quantiles 0.05 to 0.95 by their level."""

    edges: list[float]
    counts: list[int]
    quantiles: dict[str, float]


def histogram(margins: Floats) -> Histogram:
    """Return the histogram of margins [rows], in nats."""
    counts, edges = np.histogram(margins, bins=_BINS)
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    quantiles = dict(zip(map(str, shares), np.quantile(margins, shares).tolist(), strict=True))
    return {"edges": edges.tolist(), "counts": counts.tolist(), "quantiles": quantiles}
