"""The loss against formulas written out a second time; first-step values, symmetries, gradients, refusals."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from spinreg_core.errors import BadInput
from spinreg_core.selfplay.loss import LINKS, implicit_reward, rewards, self_play_loss

BATCH = 64


def margin(*arguments: torch.Tensor, alpha: float) -> torch.Tensor:
    real, generated = rewards(*arguments, alpha=alpha)
    return real - generated


def log_probabilities(seed: int, count: int = 6, batch: int = BATCH) -> list[torch.Tensor]:
    """`count` tensors [batch] of plausible sums: -1 to -400 nats, float64."""
    generator = torch.Generator().manual_seed(seed)
    return [-1.0 - 399.0 * torch.rand(batch, generator=generator, dtype=torch.float64) for _ in range(count)]


def by_hand(link: str, m: float, beta: float) -> float:
    z = beta * m
    if link == "logistic":
        return math.log1p(math.exp(-z)) if z > 0 else -z + math.log1p(math.exp(z))
    if link == "hinge":
        return 1.0 - z if z < 1.0 else 0.0
    return m * m - m / beta + 1.0 / (4.0 * beta * beta)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("beta", [0.02, 0.1, 5.0])
def test_links_equal_their_closed_forms(link: str, alpha: float, beta: float) -> None:
    pr, pg, tr, tg, br, bg = arguments = log_probabilities(seed=1)
    losses = self_play_loss(*arguments, alpha=alpha, beta=beta, link=link)
    assert losses.shape == (BATCH,)
    assert losses.dtype == torch.float64
    for i in range(BATCH):
        reward_real = pr[i].item() - alpha * tr[i].item() - (1 - alpha) * br[i].item()
        reward_generated = pg[i].item() - alpha * tg[i].item() - (1 - alpha) * bg[i].item()
        expected = by_hand(link, reward_real - reward_generated, beta)
        assert losses[i].item() == pytest.approx(expected, rel=1e-10, abs=1e-9)


def test_logistic_is_the_default_link() -> None:
    arguments = log_probabilities(seed=2)
    assert torch.equal(
        self_play_loss(*arguments, alpha=0.5, beta=0.1),
        self_play_loss(*arguments, alpha=0.5, beta=0.1, link="logistic"),
    )


@pytest.mark.parametrize(("link", "value"), [("logistic", math.log(2)), ("hinge", 1.0), ("squared", None)])
@pytest.mark.parametrize("beta", [0.1, 0.7, 5.0])
def test_first_step_values_where_reference_and_policy_coincide(link: str, value: float | None, beta: float) -> None:
    pr, pg, br, bg = log_probabilities(seed=3, count=4)
    expected = torch.full_like(pr, 1 / (4 * beta**2) if value is None else value)
    plain = self_play_loss(pr, pg, pr, pg, br, bg, alpha=1.0, beta=beta, link=link)
    torch.testing.assert_close(plain, expected, rtol=1e-15, atol=0)
    for alpha in (0.0, 0.1, 1 / 3, 0.5, 0.9):  # round 1: pi_t = pi_0
        first_round = self_play_loss(pr, pg, pr, pg, pr, pg, alpha=alpha, beta=beta, link=link)
        torch.testing.assert_close(first_round, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.9])
def test_first_step_of_a_later_round_is_the_pull_towards_the_base(alpha: float) -> None:
    tr, tg, br, bg = log_probabilities(seed=4, count=4)
    beta = 0.1
    losses = self_play_loss(tr, tg, tr, tg, br, bg, alpha=alpha, beta=beta)
    z = beta * (1 - alpha) * ((tr - br) - (tg - bg))
    torch.testing.assert_close(losses, torch.log1p(torch.exp(-z)), rtol=1e-11, atol=1e-12)
    assert (losses - math.log(2)).abs().min() > 1e-4  # and is not the value of round 1


@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_alpha_one_is_the_official_spin_loss(beta: float) -> None:
    pr, pg, opponent_real, opponent_generated = log_probabilities(seed=5, count=4)
    # uclaml/SPIN, spin/alignment/trainer.py, `spin_loss`
    logits = (pr - pg) - (opponent_real - opponent_generated)
    ours = [
        self_play_loss(pr, pg, opponent_real, opponent_generated, None, None, alpha=1.0, beta=beta, link=link)
        for link in ("logistic", "hinge")
    ]
    torch.testing.assert_close(ours[0], -logsigmoid(beta * logits), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours[1], torch.relu(1 - beta * logits), rtol=1e-11, atol=1e-11)


def test_alpha_zero_is_dpo_and_ipo_against_the_base() -> None:
    pr, pg, br, bg = log_probabilities(seed=6, count=4)
    beta = 0.1
    h = (pr - br) - (pg - bg)
    dpo = self_play_loss(pr, pg, None, None, br, bg, alpha=0.0, beta=beta)
    ipo = self_play_loss(pr, pg, None, None, br, bg, alpha=0.0, beta=beta, link="squared")
    torch.testing.assert_close(dpo, -torch.log(torch.sigmoid(beta * h)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ipo, (h - 1 / (2 * beta)) ** 2, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("link", LINKS)
def test_any_function_of_the_prompt_may_be_added_to_the_reward(link: str) -> None:
    pr, pg, tr, tg, br, bg, f, g, h = log_probabilities(seed=7, count=9)
    alpha, beta = 0.4, 0.1
    plain = self_play_loss(pr, pg, tr, tg, br, bg, alpha=alpha, beta=beta, link=link)
    # f, g, h stand for log Z_t(x) and the like: one number per prompt, the same for both of its answers.
    shifted = self_play_loss(pr + f, pg + f, tr + g, tg + g, br - h, bg - h, alpha=alpha, beta=beta, link=link)
    torch.testing.assert_close(shifted, plain, rtol=1e-9, atol=1e-9)
    not_shared = self_play_loss(pr + f, pg, tr, tg, br, bg, alpha=alpha, beta=beta, link=link)
    assert (not_shared - plain).abs().max() > 0.1


@pytest.mark.parametrize("beta_base", [0.0, 0.02, 0.3])
def test_an_added_kl_term_is_a_larger_beta_and_a_smaller_alpha(beta_base: float) -> None:
    """Maximise E_pi f - beta_prev KL(pi || pi_t) - beta_0 KL(pi || pi_0) over a table of answers: the maximiser's
    margin, scaled by the total beta, is f(y) - f(y') with alpha = beta_prev / beta, so the losses are those of f."""
    generator = torch.Generator().manual_seed(8)
    previous, base = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    f = torch.randn(6, generator=generator, dtype=torch.float64)
    beta_previous = 0.1
    beta = beta_previous + beta_base
    alpha = beta_previous / beta

    policy = (f / beta + alpha * previous + (1 - alpha) * base).log_softmax(-1)
    logits = policy.clone().requires_grad_()
    log_pi = logits.log_softmax(-1)
    gain = log_pi.exp() @ (f - beta_previous * (log_pi - previous) - beta_base * (log_pi - base))
    (gradient,) = torch.autograd.grad(gain, logits)
    assert gradient.abs().max() < 1e-12

    y, other = torch.cartesian_prod(torch.arange(6), torch.arange(6)).T
    losses = self_play_loss(
        policy[y], policy[other], previous[y], previous[other], base[y], base[other], alpha=alpha, beta=beta
    )
    torch.testing.assert_close(losses, -logsigmoid(f[y] - f[other]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_loss_gradient_equals_finite_differences(link: str, alpha: float) -> None:
    generator = torch.Generator().manual_seed(9)
    arguments = [torch.randn(8, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(6)]
    references = [reference.detach() for reference in arguments[2:]]

    def loss(real: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
        return self_play_loss(real, generated, *references, alpha=alpha, beta=0.7, link=link)

    assert (0.7 * margin(*arguments, alpha=alpha) - 1).abs().min() > 1e-3  # no pair sits on the hinge's kink
    assert torch.autograd.gradcheck(loss, arguments[:2])


def test_gradients_reach_the_policy_and_nothing_else() -> None:
    arguments = [tensor.requires_grad_() for tensor in log_probabilities(seed=10)]
    beta, alpha = 0.1, 0.5
    self_play_loss(*arguments, alpha=alpha, beta=beta).sum().backward()
    weight = beta * torch.sigmoid(-beta * margin(*arguments, alpha=alpha).detach())
    torch.testing.assert_close(arguments[0].grad, -weight, rtol=1e-12, atol=0)
    torch.testing.assert_close(arguments[1].grad, weight, rtol=1e-12, atol=0)
    assert all(reference.grad is None for reference in arguments[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logistic_link_is_stable_and_accurate_at_large_margins(dtype: torch.dtype) -> None:
    z = torch.tensor([-1e4, -50.0, -25.0, 0.0, 19.0, 21.0, 30.0, 80.0, 1e4], dtype=dtype)
    policy = z.clone().requires_grad_()
    zero = torch.zeros_like(z)
    losses = self_play_loss(policy, zero, zero, zero, None, None, alpha=1.0, beta=1.0)
    expected = [max(-v, 0.0) + math.log1p(math.exp(-abs(v))) for v in z.tolist()]
    # Relative accuracy, so that a softplus that switches to its asymptote at 20 (torch's does) is noticed.
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=dtype), rtol=8 * torch.finfo(dtype).eps, atol=0)
    losses.sum().backward()
    slopes = [-1.0 / (1.0 + math.exp(v)) if v < 700 else 0.0 for v in z.tolist()]
    torch.testing.assert_close(policy.grad, torch.tensor(slopes, dtype=dtype), rtol=1e-5, atol=0)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("link", LINKS)
def test_a_reference_of_weight_zero_is_not_read(junk: float, link: str) -> None:
    pr, pg, rr, rg = log_probabilities(seed=11, count=4)
    poison = torch.full_like(pr, junk)
    spin, spin_poisoned = (
        self_play_loss(pr, pg, rr, rg, *base, alpha=1.0, beta=0.1, link=link)
        for base in ((None, None), (poison, poison))
    )
    dpo, dpo_poisoned = (
        self_play_loss(pr, pg, *previous, rr, rg, alpha=0.0, beta=0.1, link=link)
        for previous in ((None, None), (poison, poison))
    )
    assert torch.equal(spin, spin_poisoned)
    assert torch.equal(dpo, dpo_poisoned)
    assert torch.equal(spin, dpo)  # the same reference under either name
    assert spin.isfinite().all()


def test_float64_scores_keep_their_precision_with_a_float32_policy() -> None:
    wide = log_probabilities(seed=12)
    policy = [tensor.float().requires_grad_() for tensor in wide[:2]]
    losses = self_play_loss(*policy, *wide[2:], alpha=0.5, beta=0.1)
    exact = self_play_loss(*(tensor.detach().double() for tensor in policy), *wide[2:], alpha=0.5, beta=0.1)
    torch.testing.assert_close(losses, exact, rtol=1e-14, atol=0)
    losses.sum().backward()
    assert policy[0].grad is not None
    assert policy[0].grad.dtype == torch.float32


def test_margin_is_the_difference_of_implicit_rewards() -> None:
    pr, pg, tr, tg, br, bg = log_probabilities(seed=13)
    real = implicit_reward(pr, tr, br, alpha=0.3)
    torch.testing.assert_close(real, pr - 0.3 * tr - 0.7 * br, rtol=1e-12, atol=1e-10)
    generated = implicit_reward(pg, tg, bg, alpha=0.3)
    assert torch.equal(margin(pr, pg, tr, tg, br, bg, alpha=0.3), real - generated)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"alpha": -0.01}, "alpha"),
        ({"alpha": 1.01}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"beta": 0.0}, "beta"),
        ({"beta": -0.1}, "beta"),
        ({"beta": math.inf}, "beta"),
        ({"beta": math.nan}, "beta"),
        ({"link": "sigmoid"}, "logistic, hinge, squared"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, named: str) -> None:
    with pytest.raises(BadInput, match=named):
        self_play_loss(*log_probabilities(seed=14), **{"alpha": 0.5, "beta": 0.1, **settings})


@pytest.mark.parametrize(
    ("missing", "alpha", "named"),
    [(2, 0.5, "previous"), (3, 1.0, "previous"), (4, 0.5, "base"), (5, 0.0, "base")],
)
def test_a_missing_reference_that_is_needed_is_named(missing: int, alpha: float, named: str) -> None:
    arguments: list[torch.Tensor | None] = [*log_probabilities(seed=15)]
    arguments[missing] = None
    with pytest.raises(BadInput, match=f"{named}.*None.*alpha = {alpha}"):
        self_play_loss(*arguments, alpha=alpha, beta=0.1)


@pytest.mark.parametrize("position", range(6))
@pytest.mark.parametrize("shape", [(1,), (), (BATCH, 1), (1, BATCH), (BATCH - 1,)])
def test_loss_refuses_shapes_that_would_broadcast(position: int, shape: tuple[int, ...]) -> None:
    arguments = log_probabilities(seed=16)
    arguments[position] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(BadInput, match="shape"):
        self_play_loss(*arguments, alpha=0.5, beta=0.1)


def test_integer_log_probabilities_are_refused() -> None:
    arguments = [tensor.long() for tensor in log_probabilities(seed=17)]
    with pytest.raises(BadInput, match="floating-point"):
        self_play_loss(*arguments, alpha=0.5, beta=0.1)


# --- the guard ---


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_guard_of_1_is_off(link: str, alpha: float) -> None:
    arguments = log_probabilities(seed=21)
    found = self_play_loss(*arguments, alpha=alpha, beta=0.3, link=link, guard=1.0)
    assert torch.equal(found, self_play_loss(*arguments, alpha=alpha, beta=0.3, link=link))


@pytest.mark.parametrize("guard", [1.5, 6.0])
def test_guard_equals_dpo_positive(guard: float) -> None:
    """arXiv 2402.13228, eq. 3: -log sigmoid(beta [m - lambda max(0, log ratio of the reference to the policy)])."""
    pr, pg, _, _, br, bg = log_probabilities(seed=22)
    found = self_play_loss(pr, pg, None, None, br, bg, alpha=0.0, beta=0.05, guard=guard)
    penalty = (guard - 1) * torch.clamp(br - pr, min=0)
    expected = -torch.nn.functional.logsigmoid(0.05 * ((pr - br) - (pg - bg) - penalty))
    torch.testing.assert_close(found, expected)
    assert 0 < (pr < br).sum() < BATCH, "some pairs are guarded, and some are not"


def test_guard_raises_the_gradient_of_human_answers_alone() -> None:
    pr, pg, tr, tg, br, bg = log_probabilities(seed=23)
    pr = torch.minimum(pr, torch.minimum(tr, br) - 1)  # every pair is guarded
    gradients = []
    for guard in (1.0, 4.0):
        policy = [tensor.clone().requires_grad_() for tensor in (pr, pg)]
        self_play_loss(*policy, tr, tg, br, bg, alpha=0.5, beta=1e-9, guard=guard).sum().backward()
        gradients.append([tensor.grad for tensor in policy])
    torch.testing.assert_close(gradients[1][0], 4 * gradients[0][0])
    torch.testing.assert_close(gradients[1][1], gradients[0][1])


@pytest.mark.parametrize("guard", [0.99, -1.0, math.inf, math.nan])
def test_guard_below_1_raises(guard: float) -> None:
    with pytest.raises(BadInput, match="guard"):
        self_play_loss(*log_probabilities(seed=24), alpha=0.5, beta=0.1, guard=guard)
