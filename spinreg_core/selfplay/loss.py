"""The regularised self-play loss on sequence log-probabilities.

Decides: the implicit reward, the margin of a pair, and the three links from a margin to a loss.
To add a link, name it in `LINKS` and in `ObjectiveConfig.link` (`config.groups`). A term with a field of its own also
needs that field in the key of training (`runs.plans`) and its value in `training.trainer`.

Leaves out: log-probabilities (`logprobs`), the opponent's answers (`selfplay.opponent`), batch means (`training`).

Convention: alpha is the weight of the PREVIOUS iterate in the reference, so alpha = 1 is SPIN (arXiv 2401.01335) and
alpha = 0 is DPO against the base model (arXiv 2305.18290). Texts about alpha-SPIN (arXiv 2404.04291) differ on this.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spinreg_core.errors import BadInput
from spinreg_core.selfplay import TIE_NATS

LINKS = ("logistic", "hinge", "squared")


def implicit_reward(policy: Tensor, previous: Tensor | None, base: Tensor | None, *, alpha: float) -> Tensor:
    """Return r(x, y) = log pi_theta(y|x) - alpha log pi_t(y|x) - (1 - alpha) log pi_0(y|x), up to a function of x.

    The reference is the geometric mixture of arXiv 2404.04291. Its normaliser log Z_t(x) does not depend on y and
    cancels in every comparison of two answers to one prompt, so it is left out.

    Args:
        policy: log pi_theta(y|x) in nats, summed over the answer's tokens (end-of-turn included), [batch].
        previous: log pi_t(y|x) in nats, [batch], a constant; may be None at alpha = 0.
        base: log pi_0(y|x) in nats, [batch], a constant; may be None at alpha = 1.
        alpha: weight of the previous iterate, in [0, 1].

    Returns:
        r in nats, [batch], differentiable in `policy` only.

    Raises:
        BadInput: alpha is outside [0, 1], a needed reference is missing, shapes differ, or `policy` holds integers.
    """
    if not 0.0 <= alpha <= 1.0:
        raise BadInput("alpha", alpha, "a number in [0, 1] (1 is SPIN, 0 is DPO against the base)")
    if not policy.is_floating_point():
        raise BadInput("policy log-probabilities", policy.dtype, "a floating-point tensor")
    # A mixture of two log-ratios is exactly 0 where the three policies are equal. A reference of weight 0 is skipped,
    # because 0 * nan and 0 * inf are nan.
    reward: Tensor | None = None
    for name, weight, reference in (("previous", alpha, previous), ("base", 1.0 - alpha, base)):
        if weight == 0.0:
            continue
        if reference is None:
            raise BadInput(f"{name} log-probabilities", "None", f"a tensor, which alpha = {alpha} needs")
        if reference.shape != policy.shape:
            raise BadInput(
                f"{name} log-probabilities",
                f"shape {list(reference.shape)}",
                f"the policy's shape {list(policy.shape)}, one number per answer",
            )
        term = weight * (policy - reference.detach())
        reward = term if reward is None else reward + term
    assert reward is not None  # the weights sum to 1
    return reward


def rewards(
    policy_real: Tensor,
    policy_generated: Tensor,
    previous_real: Tensor | None,
    previous_generated: Tensor | None,
    base_real: Tensor | None,
    base_generated: Tensor | None,
    *,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """Return r(x, y) and r(x, y') of each pair in nats, each [batch]; arguments and errors as in `self_play_loss`.

    Their difference is the margin m of the pair.
    """
    if policy_real.shape != policy_generated.shape:
        raise BadInput(
            "policy_generated",
            f"shape {list(policy_generated.shape)}",
            f"the shape of policy_real {list(policy_real.shape)}: one real and one generated answer per pair",
        )
    real = implicit_reward(policy_real, previous_real, base_real, alpha=alpha)
    return real, implicit_reward(policy_generated, previous_generated, base_generated, alpha=alpha)


def guarded(real: Tensor) -> Tensor:
    """Return a mask [batch] of the human answers with a reward r(x, y) of at most 0, up to rounding."""
    return real.detach() <= TIE_NATS


def self_play_loss(
    policy_real: Tensor,
    policy_generated: Tensor,
    previous_real: Tensor | None,
    previous_generated: Tensor | None,
    base_real: Tensor | None,
    base_generated: Tensor | None,
    *,
    alpha: float,
    beta: float,
    link: str = "logistic",
    guard: float = 1.0,
) -> Tensor:
    """Return the loss of each pair: SPIN's loss with the geometric-mixture reference of arXiv 2404.04291.

    With m = r(x, y) - r(x, y') (see `implicit_reward`), y the real and y' the generated answer:

        logistic   -log sigmoid(beta m)       SPIN (2401.01335, eq. 4.7), DPO (2305.18290, eq. 7)
        hinge      max(0, 1 - beta m)         as in SPIN's official code
        squared    (m - 1 / (2 beta))^2       IPO (2310.12036, eq. 17)

    With a guard g > 1, m = g r(x, y) - r(x, y') while r(x, y) <= 0 (up to `TIE_NATS`): a human answer that is less
    likely than under the reference counts g times. DPO-Positive (2402.13228, eq. 3) with lambda = g - 1.

    Args:
        policy_real, policy_generated: log pi_theta of the two answers in nats, sums over answer tokens, [batch].
        previous_real, previous_generated: log pi_t in nats, [batch], constants; may be None at alpha = 0.
        base_real, base_generated: log pi_0 in nats, [batch], constants; may be None at alpha = 1.
        alpha: weight of the previous iterate in the reference, in [0, 1].
        beta: total scale, 1/nat, positive. SPIN with scale beta_prev and an added KL term to the base of weight beta_0
            is beta = beta_prev + beta_0 with alpha = beta_prev / beta.
        link: one of LINKS.
        guard: weight of r(x, y) while it is <= 0, at least 1; 1 is off.

    Returns:
        Losses [batch], in the widest dtype among the tensors in use. Gradients flow to the policy's arguments only.
        The logistic link is accurate for |beta m| up to 1e4 and beyond.

    Raises:
        BadInput: a number is out of range, the link is unknown, a needed reference is missing, or shapes differ
            (nothing is broadcast).
    """
    if not (math.isfinite(beta) and beta > 0):
        raise BadInput("beta", beta, "a positive finite number (1/nat)")
    if link not in LINKS:
        raise BadInput("link", repr(link), f"one of {', '.join(LINKS)}")
    if not (math.isfinite(guard) and guard >= 1):
        raise BadInput("guard", guard, "a finite number of at least 1")
    real, generated = rewards(
        policy_real, policy_generated, previous_real, previous_generated, base_real, base_generated, alpha=alpha
    )
    m = (real if guard == 1 else torch.where(guarded(real), guard * real, real)) - generated
    if link == "logistic":
        return -logsigmoid(beta * m)
    if link == "hinge":
        return torch.relu(1.0 - beta * m)
    return (m - 1.0 / (2.0 * beta)) ** 2
