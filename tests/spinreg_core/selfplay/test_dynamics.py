"""Self-play on a table, solved exactly round by round: what docs/concepts.md says of stability is computed here.

The minimiser of a round, the fixed point, the exact h = 1 ratio, spectral radii, and the decay with the whole history.
Everything is float64 and in log space: at beta = 0.1 errors pass 1e100 nats before anything overflows.
"""

import itertools
import math

import pytest
import torch

from spinreg_core.selfplay.loss import LINKS
from tests.support.tabular_dynamics import (
    centred,
    decay_exponent,
    distribution,
    fixed_point,
    next_iterate,
    next_matched_iterate,
    opponent,
    play,
    population_loss,
    round_jacobian,
    spectral_radius,
)

BASE, REAL = distribution(2), distribution(1)
ALPHAS = [0.0, 0.25, 0.5, 0.75, 0.9, 1.0]


def size(errors: torch.Tensor) -> torch.Tensor:
    return errors.abs().amax(-1)


def near(target: torch.Tensor, distance: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (target + distance * torch.randn(len(target), generator=generator, dtype=torch.float64)).log_softmax(-1)


# --- the minimiser of one round ---


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("history", [1, 2, "all"])
def test_population_gradient_is_zero_at_the_closed_form_and_only_there(alpha, beta, history) -> None:
    iterates = torch.stack([distribution(seed) for seed in (3, 4)] + [BASE])  # t = 2, newest first
    q = opponent(iterates, 2, history)

    def gradient(log_policy: torch.Tensor, link: str) -> float:
        logits = log_policy.clone().requires_grad_()
        loss = population_loss(logits, iterates[0], BASE, REAL, q, alpha=alpha, beta=beta, link=link)
        return torch.autograd.grad(loss, logits)[0].abs().max().item()

    logistic = next_iterate(iterates, 2, BASE, REAL, alpha=alpha, beta=beta, history=history)
    assert gradient(logistic, "logistic") < 1e-14
    assert gradient(near(logistic, 0.1, seed=5), "logistic") > 1e-5
    assert gradient(near(logistic, 0.1, seed=6), "logistic") > 1e-5

    # The squared link's population loss is a parabola in the logits. With c = 1 / (2 beta) its minimiser has
    # r = (p c + q (D - c)) / (p + q) + const, D = 2 c X / (1 + X), X = sum (p - q)^2 / (2 (p + q)).
    p_, q_, c = REAL.exp(), q.exp(), 1 / (2 * beta)
    x = ((p_ - q_) ** 2 / (2 * (p_ + q_))).sum()
    reward = (p_ * c + q_ * (2 * c * x / (1 + x) - c)) / (p_ + q_)
    squared = (reward + alpha * iterates[0] + (1 - alpha) * BASE).log_softmax(-1)
    assert gradient(squared, "squared") < 1e-12
    assert gradient(logistic, "squared") > 1e-3
    assert size(centred(squared - logistic)) > 0.1 / beta


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_population_loss_minimum_is_the_closed_form(alpha: float) -> None:
    iterates = torch.stack([distribution(3), BASE])
    q = opponent(iterates, 1, "all")
    logits = iterates[0].clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = population_loss(logits, iterates[0], BASE, REAL, q, alpha=alpha, beta=1.0, link="logistic")
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = next_iterate(iterates, 1, BASE, REAL, alpha=alpha, beta=1.0, history="all")
    torch.testing.assert_close(logits.detach().log_softmax(-1), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("link", LINKS)
def test_a_policy_that_is_the_data_stays_where_it_is(link: str) -> None:
    """pi_t = pi_0 = p_data is stationary for every link: then no answer tells who gave it."""
    logits = REAL.clone().requires_grad_()
    loss = population_loss(logits, REAL, REAL, REAL, REAL, alpha=0.5, beta=0.1, link=link)
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-14


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("history", [1, 2, 5, "all"])
def test_dynamics_end_at_the_fixed_point(alpha, beta, history) -> None:
    star = fixed_point(BASE, REAL, alpha=alpha, beta=beta)
    stays = next_iterate(star.expand(7, -1), 6, BASE, REAL, alpha=alpha, beta=beta, history=history)
    torch.testing.assert_close(stays, star, rtol=0, atol=1e-13)


# --- h = 1 ---


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("beta", [0.1, 0.45, 0.8, 2.0, 10.0])
def test_history_one_multiplies_the_error_by_alpha_minus_one_over_beta(alpha: float, beta: float) -> None:
    ratio = alpha - 1 / beta
    errors = play(6, BASE, REAL, alpha=alpha, beta=beta, history=1)
    for before, after in itertools.pairwise(errors):
        # Exact up to rounding, which 1 / beta amplifies, however far the start is.
        torch.testing.assert_close(after, ratio * before, rtol=1e-9, atol=1e-13 * (1 + 1 / beta))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_history_one_is_stable_exactly_above_its_threshold(alpha: float) -> None:
    threshold = 1 / (1 + alpha)
    below = size(play(200, BASE, REAL, alpha=alpha, beta=0.95 * threshold, history=1))
    above = size(play(200, BASE, REAL, alpha=alpha, beta=1.05 * threshold, history=1))
    assert below[-1] > 1e2 * below[0]
    assert above[-1] < 1e-2 * above[0]


# --- spectral radii ---


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("beta", [0.1, 0.3, 0.49, 0.51, 0.7, 1.0, 5.0])
def test_spectral_radii_for_history_one_and_two(alpha: float, beta: float) -> None:
    one = spectral_radius(round_jacobian(BASE, REAL, alpha=alpha, beta=beta, history=1))
    assert one == pytest.approx(abs(alpha - 1 / beta), abs=1e-7)
    assert (one < 1) == (beta > 1 / (1 + alpha))

    # Linearised: log q_t moves by the mean of the last two errors, so every direction of the error obeys
    # e_{t+1} = (alpha - s) e_t - s e_{t-1} with s = 1 / (2 beta).
    s = 1 / (2 * beta)
    companion = torch.tensor([[alpha - s, -s], [1.0, 0.0]], dtype=torch.float64)
    two = spectral_radius(round_jacobian(BASE, REAL, alpha=alpha, beta=beta, history=2))
    assert two == pytest.approx(spectral_radius(companion), abs=1e-6)
    assert (two < 1) == (beta > 0.5)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("beta", [0.48, 0.52])
def test_history_two_moves_at_the_spectral_radius_near_the_fixed_point(alpha: float, beta: float) -> None:
    star = fixed_point(BASE, REAL, alpha=alpha, beta=beta)
    start = [near(star, 1e-7, seed=7), near(star, 1e-7, seed=8)]
    errors = size(play(400, BASE, REAL, alpha=alpha, beta=beta, history=2, start=start))
    # Complex eigenvalues of modulus sqrt(1 / (2 beta)): maxima of two windows of 100 rounds each,
    # whose phases may differ, give the rate up to a small part of 1 / 200.
    rate = (errors[300:400].max() / errors[100:200].max()) ** (1 / 200)
    assert rate.item() == pytest.approx(math.sqrt(1 / (2 * beta)), abs=2e-3)
    assert (rate < 1) == (beta > 0.5)


@pytest.mark.parametrize(("history", "threshold"), [(1, 1 / 2), (2, 1 / 2), (3, 2 / 3), (4, 0.8536), (5, 1.0472)])
def test_longer_finite_histories_need_a_larger_beta_at_alpha_one(history: int, threshold: float) -> None:
    below, above = (
        spectral_radius(round_jacobian(BASE, REAL, alpha=1.0, beta=factor * threshold, history=history))
        for factor in (0.99, 1.01)
    )
    assert below > 1 > above


@pytest.mark.parametrize("history", [1, 2, 3, 5, 12])
def test_longer_finite_histories_need_a_smaller_beta_at_alpha_zero(history: int) -> None:
    below, above = (
        spectral_radius(round_jacobian(BASE, REAL, alpha=0.0, beta=factor / history, history=history))
        for factor in (0.99, 1.01)
    )
    assert below > 1 > above


# --- the usual beta = 0.1 ---


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("history", [1, 2])
def test_at_beta_one_tenth_short_histories_diverge(alpha: float, history: int) -> None:
    far = size(play(80, BASE, REAL, alpha=alpha, beta=0.1, history=history))
    assert far[-1] > 1e20
    star = fixed_point(BASE, REAL, alpha=alpha, beta=0.1)
    start = [near(star, 1e-9, seed=9)] * history
    close = size(play(80, BASE, REAL, alpha=alpha, beta=0.1, history=history, start=start))
    assert close[0] < 1e-8
    assert close[-1] > 1e3


@pytest.mark.parametrize("alpha", ALPHAS[:-1])
@pytest.mark.parametrize("seed", [10, 20, 30])
def test_fictitious_play_with_kl_converges_at_beta_one_tenth(alpha: float, seed: int) -> None:
    base, real = distribution(seed), distribution(seed + 1)
    errors = size(play(600, base, real, alpha=alpha, beta=0.1, history="all"))
    assert errors[0] > 0.5
    assert errors[1] == pytest.approx((10 - alpha) * errors[0].item())  # round 1 has no history: |alpha - 1/beta|
    assert errors[-1] < 1e-6


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (0.0, 2.0), (0.5, 1.0), (0.5, 2.0), (0.75, 4.0)])
def test_fictitious_play_with_kl_decays_with_the_predicted_exponent(alpha: float, beta: float) -> None:
    errors = play(1200, BASE, REAL, alpha=alpha, beta=beta, history="all")
    predicted = 1 + 1 / (beta * (1 - alpha))
    assert decay_exponent(errors, 300, 1200, octaves=4) == pytest.approx(predicted, rel=0.02)


def test_fictitious_play_without_kl_decays_like_the_fourth_root() -> None:
    beta, rounds = 0.1, 4000
    errors = play(rounds, near(REAL, 1e-3, seed=11), REAL, alpha=1.0, beta=beta, history="all")
    assert decay_exponent(errors, 250, rounds, octaves=8) == pytest.approx(0.25, abs=0.01)
    # t A'' ~ -A / beta for the summed error A: its phase is 2 sqrt(t / beta), and each half turn is a change of sign.
    flips = (errors[1:].sign() != errors[:-1].sign()).sum(0)
    assert (flips - 2 * math.sqrt(rounds / beta) / math.pi).abs().max() <= 2


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("beta", [0.04, 0.05, 0.1])
def test_fictitious_play_first_grows_for_the_predicted_rounds(alpha, beta) -> None:
    star = fixed_point(BASE, REAL, alpha=alpha, beta=beta)
    start = near(star, 1e-11, seed=12)  # stays linear while it grows up to 10^7-fold
    errors = size(play(40, BASE, REAL, alpha=alpha, beta=beta, history="all", start=[start]))[: round(1.5 / beta)]
    assert abs(errors.argmax().item() - 1 / (2 * beta * (1 + alpha))) <= 2


# --- the reference of each pair is the iterate that sampled it ---


def play_matched(rounds: int, base: torch.Tensor, real: torch.Tensor, *, alpha: float, beta: float) -> torch.Tensor:
    """As `play` with the whole history."""
    iterates = base[None]
    for t in range(rounds):
        new = next_matched_iterate(iterates, t, base, real, alpha=alpha, beta=beta, history="all")
        iterates = torch.cat([new[None], iterates])
    return centred(iterates.flip(0) - fixed_point(base, real, alpha=alpha, beta=beta))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_matched_round_of_one_iterate_is_the_closed_form(alpha: float) -> None:
    iterates = torch.stack([distribution(4), BASE])
    found = next_matched_iterate(iterates, 1, BASE, REAL, alpha=alpha, beta=0.5, history=1)
    expected = next_iterate(iterates, 1, BASE, REAL, alpha=alpha, beta=0.5, history=1)
    assert size(found - expected) < 1e-6


def test_matched_fictitious_play_stays_at_the_data() -> None:
    iterates = torch.stack([REAL, REAL, REAL])
    assert size(next_matched_iterate(iterates, 2, BASE, REAL, alpha=1.0, beta=0.1, history="all") - REAL) < 1e-6


@pytest.mark.parametrize("seed", [1, 10, 20, 30, 40, 50])
def test_matched_fictitious_play_without_kl_converges_at_beta_one_tenth(seed: int) -> None:
    """With the previous policy as reference, the error oscillates and falls only like t^(-1/4)."""
    base, real = distribution(seed + 1), distribution(seed)
    errors = size(play_matched(30, base, real, alpha=1.0, beta=0.1))
    before = size(play(30, base, real, alpha=1.0, beta=0.1, history="all"))
    assert errors[1] == pytest.approx(before[1].item(), rel=1e-6), "round 1 has no history"
    assert errors[30] < 1e-3 * errors[0]
    assert before[30] > errors[0]
