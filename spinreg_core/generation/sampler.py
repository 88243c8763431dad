"""The next token: from logits to a distribution, from a distribution and a uniform number to a token.

Decides: the order of temperature, top-k and top-p, the mixture of policies, and that each answer's random numbers are a
function of its seed alone, so that no answer depends on its neighbours.
Leaves out: logits (`generation.decode`, `generation.hf`) and seeds (`generation.shards`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from spinreg_core.errors import BadInput
from spinreg_core.generation.engine import Sampling


def uniforms(seed: int) -> Callable[[], float]:
    """Return the source of the numbers in [0, 1) that draw the tokens of the answer with this seed, in order."""
    # The seed is Philox's key, so neighbouring seeds have independent streams. Torch's generators would make answers
    # depend on the device, because those of CPUs and GPUs give different numbers for one seed.
    return np.random.Generator(np.random.Philox(key=seed)).random


def mixed_logits(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the log of the token-level geometric mixture, up to a constant: sum_k w_k log softmax(logits_k).

    This is Nash-MD's sampler (arXiv 2312.00886, section 5). The loss's reference is another mixture, of *sequence*
    probabilities, which is not renormalised at each token.

    Args:
        logits: one [rows, vocabulary] per policy.
        weights: one per policy. A policy of weight 0 has no influence, also where it gives a token probability 0.

    Returns:
        float32 [rows, vocabulary].
    """
    if len(logits) == 1:
        return logits[0].float()
    return torch.stack([w * x.float().log_softmax(-1) for x, w in zip(logits, weights, strict=True) if w != 0]).sum(0)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return probabilities after temperature, then top-k, then top-p: float32 [rows, vocabulary].

    top-k keeps ties with its last token; top-p keeps the smallest set of most likely tokens with at least that mass.

    Raises:
        BadInput: logits are not finite.
    """
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        last = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < last, -torch.inf)
    probabilities = logits.softmax(-1)
    if not bool(probabilities.sum(-1).isfinite().all()):
        raise BadInput("policy", "has logits that are not finite", "check its weights and their number format")
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # mass of the tokens ahead of each
        ordered = ordered.masked_fill(before >= sampling.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
        probabilities /= probabilities.sum(-1, keepdim=True)
    return probabilities


def draw(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Draw tokens by inversion: the interval of the cumulated probabilities (float64) that holds each uniform number.

    A token of probability 0 has an empty interval and is never drawn.

    Returns:
        int64 [rows].
    """
    # In float32 the sums over a vocabulary would lose the tokens of small probability.
    reached = probabilities.double().cumsum(-1)
    wanted = numbers.to(reached)[:, None] * reached[:, -1:]
    # At most the last token with an interval, because the product may round up to the whole mass.
    last = (probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).int().argmax(-1)).long()
    return torch.minimum(torch.searchsorted(reached, wanted, right=True)[:, 0], last)


def sample(logits: Tensor, sampling: Sampling, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token per row. Returns [rows] tokens and [rows] log-probabilities (nats, see `engine.Answer`)."""
    tokens = draw(distribution(logits, sampling), numbers)
    return tokens, logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
