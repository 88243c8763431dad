"""Exact self-play on a table: one prompt, n answers, every distribution a vector of log-probabilities, float64.

A helper of test_dynamics. Uses the project's own loss and opponent weights, nothing of its training.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spinreg_core.selfplay.loss import self_play_loss
from spinreg_core.selfplay.opponent import mixture_weights


def distribution(seed: int, n: int = 5, spread: float = 1.0) -> Tensor:
    """Log-probabilities [n] of a random distribution of full support; `spread` in nats."""
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(n, generator=generator, dtype=torch.float64)).log_softmax(-1)


def centred(x: Tensor) -> Tensor:
    """Without its mean: log-probabilities matter up to a constant, and the errors are linear maps only up to one."""
    return x - x.mean(-1, keepdim=True)


def opponent(newest_first: Tensor, round_index: int, history: int | str) -> Tensor:
    """log q_t [n] of the iterates [k, n], newest first (older ones than `history` are not read)."""
    weights = torch.tensor(mixture_weights(round_index, history), dtype=torch.float64)
    return torch.logsumexp(weights.log()[:, None] + newest_first[: len(weights)], 0)


def population_loss(
    logits: Tensor,
    previous: Tensor,
    base: Tensor,
    real: Tensor,
    opponent_: Tensor,
    *,
    alpha: float,
    beta: float,
    link: str,
) -> Tensor:
    """E over y ~ real, y' ~ opponent of `self_play_loss`, by enumeration of all n^2 pairs."""
    n = len(logits)
    y, other = torch.cartesian_prod(torch.arange(n), torch.arange(n)).T
    policy = logits.log_softmax(-1)
    losses = self_play_loss(
        policy[y], policy[other], previous[y], previous[other], base[y], base[other], alpha=alpha, beta=beta, link=link
    )
    return ((real[y] + opponent_[other]).exp() * losses).sum()


def next_iterate(
    newest_first: Tensor, round_index: int, base: Tensor, real: Tensor, *, alpha: float, beta: float, history: int | str
) -> Tensor:
    """log pi_{t+1} [n]: the exact minimiser of a round with the logistic link, from the iterates [k, n]."""
    log_ratio = real - opponent(newest_first, round_index, history)
    return (alpha * newest_first[0] + (1 - alpha) * base + log_ratio / beta).log_softmax(-1)


def next_matched_iterate(
    newest_first: Tensor, round_index: int, base: Tensor, real: Tensor, *, alpha: float, beta: float, history: int | str
) -> Tensor:
    """Return log pi_{t+1} [n] by numerical minimisation; each pair's reference is the iterate that sampled it.

    The loss is convex in the logits. With one iterate it is that of `next_iterate`.
    """
    weights = mixture_weights(round_index, history)
    logits = newest_first[0].clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=4000, tolerance_grad=1e-13, tolerance_change=1e-16, history_size=30,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = torch.stack([
            weight * population_loss(logits, own, base, real, own, alpha=alpha, beta=beta, link="logistic")
            for weight, own in zip(weights, newest_first, strict=False)
        ]).sum()  # fmt: skip
        found.backward()  # type: ignore[no-untyped-call]
        return found

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return logits.detach().log_softmax(-1)


def fixed_point(base: Tensor, real: Tensor, *, alpha: float, beta: float) -> Tensor:
    """log pi* [n], pi* proportional to base^w real^(1-w), w = beta (1 - alpha) / (1 + beta (1 - alpha))."""
    w = beta * (1 - alpha) / (1 + beta * (1 - alpha))
    return (w * base + (1 - w) * real).log_softmax(-1)


def play(
    rounds: int,
    base: Tensor,
    real: Tensor,
    *,
    alpha: float,
    beta: float,
    history: int | str,
    start: Sequence[Tensor] | None = None,
) -> Tensor:
    """Errors log pi_t - log pi*, centred, [rounds + 1, n], from pi_0 = base.

    `start` gives other first iterates, oldest first, instead: to begin near the fixed point.
    """
    first = [base] if start is None else list(start)
    size = rounds + len(first)
    iterates = torch.empty(size, len(base), dtype=torch.float64)  # newest first, filled from the end
    for age, iterate in enumerate(first):
        iterates[size - 1 - age] = iterate
    for at in range(size - len(first), 0, -1):
        round_index = size - at - 1
        iterates[at - 1] = next_iterate(iterates[at:], round_index, base, real, alpha=alpha, beta=beta, history=history)
    return centred(iterates.flip(0) - fixed_point(base, real, alpha=alpha, beta=beta))[len(first) - 1 :]


def round_jacobian(base: Tensor, real: Tensor, *, alpha: float, beta: float, history: int) -> Tensor:
    """d(state after a round) / d(state before) at the fixed point; the state is the last `history` centred iterates.

    By automatic differentiation of the round itself; the direction of constants, which centring removes, has
    eigenvalue 0. Shape [history n, history n].
    """
    n = len(base)
    star = fixed_point(base, real, alpha=alpha, beta=beta)

    def step(errors: Tensor) -> Tensor:
        iterates = (star + centred(errors.reshape(history, n))).log_softmax(-1)
        new = next_iterate(iterates, history - 1, base, real, alpha=alpha, beta=beta, history=history)
        return centred(torch.cat([(new - star)[None], (iterates - star)[:-1]])).flatten()

    return torch.autograd.functional.jacobian(step, torch.zeros(history * n, dtype=torch.float64))


def spectral_radius(matrix: Tensor) -> float:
    return torch.linalg.eigvals(matrix).abs().max().item()


def decay_exponent(errors: Tensor, first: int, last: int, octaves: int) -> float:
    """-d log|e| / d log t between rounds `first` and `last`, by least squares over the maxima of `octaves` windows
    that are equally long in log t (so that an oscillation does not matter while several periods fit in each)."""
    size = errors.abs().amax(-1)
    edges = [round(first * (last / first) ** (i / octaves)) for i in range(octaves + 1)]
    peaks = [a + size[a:b].argmax().item() for a, b in itertools.pairwise(edges)]
    x = [math.log(t) for t in peaks]
    y = [math.log(size[t].item()) for t in peaks]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return -sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
