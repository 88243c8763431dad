"""A round of training: first-step values, accumulation, one step by hand, learning, refusing, and the alarm."""

from __future__ import annotations

import math
import statistics
from typing import Any, Literal

import pytest
import torch
from transformers import PreTrainedModel

from spinreg_core.config import ObjectiveConfig, TrainingConfig
from spinreg_core.errors import BadInput
from spinreg_core.logprobs import packed_attention
from spinreg_core.logprobs.scoring import score
from spinreg_core.logprobs.sequence import answer_logprobs
from spinreg_core.selfplay.pairs import Pair
from spinreg_core.training.trainer import RoundTrainer, fell, mean_and_error
from tests.support.tiny_models import random_pairs, tiny_model

Precision = Literal["mixed", "bf16", "fp32"]


def scored(
    pairs: list[Pair], previous: PreTrainedModel | None, base: PreTrainedModel | None, precision: Precision = "fp32"
) -> list[Pair]:
    """The pairs with the scores that mix-opponent would cache."""
    found = [dict(pair) for pair in pairs]
    for name, model in (("previous", previous), ("base", base)):
        for which in ("real", "generated") if model is not None else ():
            values = score(model, [p["prompt_ids"] for p in pairs], [p[f"{which}_ids"] for p in pairs],
                           precision=precision, tokens_per_pass=100)  # fmt: skip
            for pair, value in zip(found, values, strict=True):
                pair[f"{name}_{which}"] = value
    return found


def a_round(model: PreTrainedModel, pairs: list[Pair], alpha: float = 1.0, **settings: Any) -> RoundTrainer:
    objective = {"alpha": alpha, "beta": settings.pop("beta", 0.1), "link": settings.pop("link", "logistic"),
                 "guard": settings.pop("guard", 1.0)}  # fmt: skip
    number, tokens = settings.pop("round_number", 2), settings.pop("tokens_per_pass", 2048)
    training = {"precision": "fp32", "learning_rate": 1e-3} | settings
    return RoundTrainer(model, pairs, objective=ObjectiveConfig(**objective), training=TrainingConfig(**training),
    seed=3,
                 round_number=number, tokens_per_pass=tokens)  # fmt: skip


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("link", "value"), [("logistic", math.log(2)), ("hinge", 1.0), ("squared", 25.0)])
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_first_loss_where_the_three_policies_are_one(alpha: float, link: str, value: float) -> None:
    model = tiny_model("qwen2")
    pairs = scored(random_pairs(24, 1), model, model)
    found = a_round(model, pairs, alpha, link=link).gradient(pairs)
    assert max(abs(m) for m in found["margin"]) < 1e-3
    tolerance = 10 * 1e-3 if link == "squared" else 0.1 * 1e-3  # the loss's slope at m = 0, times 1e-3
    assert found["loss"] == pytest.approx([value] * 24, abs=tolerance)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9])
def test_first_loss_where_the_previous_policy_left_the_base(alpha: float) -> None:
    previous, base = tiny_model(seed=1), tiny_model(seed=2)
    pairs = scored(random_pairs(24, 1), previous, base)
    found = a_round(tiny_model(seed=1), pairs, alpha).gradient(pairs)
    for pair, margin, loss in zip(pairs, found["margin"], found["loss"], strict=True):
        d_real = pair["previous_real"] - pair["base_real"]
        d_generated = pair["previous_generated"] - pair["base_generated"]
        expected = (1 - alpha) * (d_real - d_generated)
        assert margin == pytest.approx(expected, abs=1e-3)
        assert loss == pytest.approx(math.log1p(math.exp(-0.1 * expected)), abs=1e-3)
    assert max(abs(m) for m in found["margin"]) > 1


@pytest.mark.parametrize("precision", ["mixed", "bf16"])
def test_first_margin_in_bfloat16_is_zero_up_to_noise(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen2")
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    with monkeypatch.context() as patch:  # another attention than training's, so that rounding differs
        patch.setattr(packed_attention, "LONGEST", 0)
        pairs = scored(random_pairs(120, 6), model, None, precision)
    margins = a_round(model, pairs, precision=precision, batch_size=120, tokens_per_pass=700).gradient(pairs)["margin"]
    assert any(m != 0 for m in margins)
    mean, error = mean_and_error(margins)
    assert abs(mean) < 3 * error
    assert error < 0.05


@pytest.mark.parametrize("precision", ["fp32", "mixed"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_one_batch_is_its_passes(precision: Precision, checkpointing: str) -> None:
    pairs = scored(random_pairs(8, 2), tiny_model(seed=1), tiny_model(seed=2))
    whole, parts = tiny_model(), tiny_model()
    a = a_round(whole, pairs, 0.5, precision=precision).gradient(pairs)
    other = a_round(parts, pairs, 0.5, precision=precision, tokens_per_pass=1, activation_checkpointing=checkpointing)
    b = other.gradient(pairs)
    tolerance = 1e-4 if precision == "fp32" else 0.05
    assert b["loss"] == pytest.approx(a["loss"], abs=tolerance)
    expected, found = gradients(whole), gradients(parts)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < tolerance, name


def test_a_short_last_batch_is_averaged_over_its_own_pairs() -> None:
    pairs = scored(random_pairs(11, 2), tiny_model(seed=1), tiny_model(seed=2))
    model = tiny_model()
    round_ = a_round(model, pairs, 0.5, batch_size=8, tokens_per_pass=60, epochs=2)
    assert [len(rows) for _, rows in round_.batches] == [8, 3, 8, 3]
    batch = [pairs[i] for i in round_.batches[1][1]]
    round_.gradient(batch)
    found = gradients(model)
    mean = {name: torch.zeros_like(g) for name, g in found.items()}
    for pair in batch:
        round_.gradient([pair])
        for name, gradient in gradients(model).items():
            mean[name] += gradient / 3
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, mean[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_steps_equal_a_loop_written_out(max_norm: float | None) -> None:
    """Two RMSprop steps with warm-up, clipping and decay, from plain log-probabilities."""
    previous, base = tiny_model(seed=1), tiny_model(seed=2)
    pairs = scored(random_pairs(6, 5), previous, base)
    model, reference = tiny_model(seed=1), tiny_model(seed=1)
    round_ = a_round(model, pairs, 0.25, beta=[9.0, 0.2], learning_rate=[9.0, 0.01], warmup=0.5, batch_size=3,
                     tokens_per_pass=1, max_grad_norm=max_norm, weight_decay=0.01)  # fmt: skip
    squares = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    for number in range(2):
        batch = [pairs[i] for i in round_.batches[number][1]]
        reference.zero_grad()
        loss = torch.zeros(())
        for p in batch:
            real, generated = (
                answer_logprobs(reference, [p["prompt_ids"]], [p[f"{w}_ids"]], precision="fp32")
                for w in ("real", "generated")
            )
            r_real = real - 0.25 * p["previous_real"] - 0.75 * p["base_real"]
            r_generated = generated - 0.25 * p["previous_generated"] - 0.75 * p["base_generated"]
            loss = loss + torch.nn.functional.softplus(-0.2 * (r_real - r_generated)).sum() / 3
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in reference.parameters()))  # type: ignore[union-attr]
        metrics = round_.step()
        assert metrics["loss"] == pytest.approx(float(loss.detach()), abs=1e-4)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert metrics["learning_rate"] == pytest.approx(0.01)  # one of two steps warms up; the second is at the peak
        assert metrics["beta"] == 0.2
        scale = min(1.0, max_norm / norm) if max_norm else 1.0
        with torch.no_grad():
            for name, p in reference.named_parameters():
                gradient = p.grad * scale + (0.01 * p if p.ndim == 2 else 0.0)  # type: ignore[operator]
                squares[name] = 0.99 * squares[name] + 0.01 * gradient**2
                p -= 0.01 * gradient / (squares[name].sqrt() + 1e-8)
        for (name, p), q in zip(reference.named_parameters(), model.parameters(), strict=True):
            # RMSprop's first step is +-10 rates per weight whatever the gradient: near 0, signs may differ.
            far = ((p - q).abs() > 1e-3).float().mean()
            assert far < 0.01, name
    assert max_norm is None or norm > max_norm  # clipping did something


def test_metrics_of_the_first_step_against_the_scores() -> None:
    previous, base = tiny_model(seed=1), tiny_model(seed=2)
    pairs = [pair | {"iterate": 1} for pair in scored(random_pairs(5, 5), previous, base)]
    metrics = a_round(tiny_model(seed=1), pairs, 0.5).step()
    n = 5
    assert (metrics["step"], metrics["epoch"], metrics["pairs"]) == (1, 1, n)
    for which in ("real", "generated"):
        mean = statistics.fmean(p[f"previous_{which}"] for p in pairs)  # the policy is still the previous one
        tokens = sum(len(p[f"{which}_ids"]) for p in pairs)
        assert metrics[f"{which}_logp"] == pytest.approx(mean, abs=1e-3)
        assert metrics[f"{which}_logp_per_token"] == pytest.approx(mean * n / tokens, abs=1e-3)
        assert metrics[f"log_ratio_previous_{which}"] == pytest.approx(0, abs=1e-3)
        drift = statistics.fmean(p[f"previous_{which}"] - p[f"base_{which}"] for p in pairs)
        assert metrics[f"log_ratio_base_{which}"] == pytest.approx(drift, abs=1e-3)
    assert metrics["kl_from_previous"] == pytest.approx(0, abs=1e-3)  # round 2, and iterate 1 sampled all of them
    assert "kl_from_base" not in metrics
    assert metrics["tokens"] == sum(2 * len(p["prompt_ids"]) + len(p["real_ids"] + p["generated_ids"]) for p in pairs)
    assert metrics["tokens_per_second"] == pytest.approx(metrics["tokens"] / metrics["seconds"])
    spin = scored(random_pairs(5, 5), previous, None)  # at alpha = 1 there are no scores under the base
    assert not [name for name in a_round(previous, spin).step() if name.startswith("log_ratio_base")]


@torch.no_grad()
def test_kl_of_a_step_is_that_of_the_softmax() -> None:
    """Answers of one token: KL(π_t‖π_θ) is a sum over the vocabulary. Half of the answers come from the base."""
    policy, base, previous = tiny_model(seed=1), tiny_model(seed=2), tiny_model(seed=3)
    draw, prompt = torch.Generator().manual_seed(0), [5, 6, 7]

    def log_softmax(model: PreTrainedModel) -> torch.Tensor:
        return model(input_ids=torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)

    here, samplers = log_softmax(policy), {0: log_softmax(base), 1: log_softmax(previous)}
    pairs = []
    for number in range(4000):
        iterate = number % 2
        token = int(torch.multinomial(samplers[iterate].exp(), 1, generator=draw))
        pair = random_pairs(1, number, 2)[0]
        pairs.append(pair | {"prompt_ids": prompt, "generated_ids": [token], "iterate": iterate})
        for name, table in (("base", samplers[0]), ("previous", samplers[1])):
            pairs[-1] |= {f"{name}_generated": float(table[token]), f"{name}_real": 0.0}
    found = a_round(policy, pairs)._kl(pairs, [float(here[pair["generated_ids"][0]]) for pair in pairs])
    for name, iterate in (("base", 0), ("previous", 1)):
        p = samplers[iterate].exp()
        exact = float((p * (samplers[iterate] - here)).sum())
        spread = float((p * (samplers[iterate] - here - exact) ** 2).sum()) ** 0.5
        assert found[f"kl_from_{name}"] == pytest.approx(exact, abs=4 * spread / 2000**0.5)
        assert exact > 0.5


def test_a_round_lowers_the_loss_and_raises_the_margin() -> None:
    model = tiny_model("qwen2")
    pairs = scored(random_pairs(16, 4), model, None)
    round_ = a_round(model, pairs, epochs=6, schedule="cosine", optimizer="adamw", learning_rate=3e-3)
    round_.watch_start()
    while round_.state.done < round_.steps:
        round_.step()
    first, last = round_.state.metrics[0], round_.state.metrics[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["accuracy"] == 0.5, "a policy ties with itself, as in the evaluation"
    assert last["loss"] < 0.4
    assert last["margin"] > 5
    summary = round_.summary()
    assert (summary["steps"], summary["pairs"], summary["first_loss"]) == (12, 16, first["loss"])
    assert summary["last_loss"] == last["loss"]
    assert summary["accuracy"] > 0.9
    assert summary["loss"] == pytest.approx(statistics.fmean(m["loss"] for m in round_.state.metrics[-2:]))


def test_a_guarded_round_reports_its_share_of_guarded_pairs() -> None:
    model = tiny_model("qwen2")
    pairs = scored(random_pairs(16, 4), model, None)
    plain = a_round(model, pairs, learning_rate=1e-9).step()
    assert "guarded" not in plain
    guarded = a_round(tiny_model("qwen2"), pairs, guard=6.0, learning_rate=1e-9).step()
    assert guarded["guarded"] == 1, "the policy is its own reference"
    assert guarded["loss"] == pytest.approx(plain["loss"], abs=1e-4)
    assert guarded["grad_norm"] > 1.5 * plain["grad_norm"]


@pytest.mark.parametrize("round_number", [1, 2])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_fall_of_human_answers_is_measured_and_reported(alpha: float, round_number: int) -> None:
    """At alpha = 0 after round 1 no score under the previous policy is cached, and it is measured all the same."""
    model, base = tiny_model(seed=1), tiny_model(seed=1 if round_number == 1 else 2)
    pairs = scored(random_pairs(20, 4), model if alpha else None, None if alpha else base)
    round_ = a_round(model, pairs, alpha, round_number=round_number, learning_rate=1e-12)
    round_.watch_start()
    answers = [p["prompt_ids"] for p in pairs], [p["real_ids"] for p in pairs]
    before = score(model, *answers, precision="fp32", tokens_per_pass=200)
    assert sorted(round_.state.watched_start or []) == pytest.approx(sorted(before), abs=1e-3)
    round_.step()
    calm = round_.summary()
    assert calm["real_logprob_change"] == pytest.approx(0, abs=1e-3)
    assert calm["alarms"] == []
    with torch.no_grad():  # surer of its own tokens, which the human answers are not
        model.lm_head.weight *= 2
    after = score(model, *answers, precision="fp32", tokens_per_pass=200)
    change = statistics.fmean(b - a for a, b in zip(before, after, strict=True))
    found = round_.summary()
    assert found["real_logprob_change"] == pytest.approx(change, abs=1e-3)
    assert found["watched_pairs"] == 20
    assert change < -10
    assert f"{change:+.2f} nats/answer" in found["alarms"][0]


def test_fell_ignores_noise() -> None:
    mean, error = mean_and_error([-1.0, 1.0, -2.0, 1.5])
    assert mean == pytest.approx(-0.125)
    assert error == pytest.approx(statistics.stdev([-1.0, 1.0, -2.0, 1.5]) / 2)
    assert not fell(mean, error)
    assert fell(*mean_and_error([-1.0, -1.1, -0.9, -1.0]))
    assert not fell(*mean_and_error([-0.01, -0.011, -0.009]))  # sure, but nothing to speak of
    assert not fell(*mean_and_error([-5.0]))  # one value says nothing about noise


def test_a_loss_that_is_not_finite_is_skipped_and_changes_nothing() -> None:
    model = tiny_model()
    pairs = scored(random_pairs(6, 4), model, None)
    pairs[3]["previous_generated"] = math.nan
    round_ = a_round(model, pairs, tokens_per_pass=50, batch_size=2)
    round_.watch_start()
    (at,) = [n for n, (_, rows) in enumerate(round_.batches) if 3 in rows]
    for number in range(3):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        metrics = round_.step()
        same = all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert same is (number == at)
        assert ("skipped" in metrics) is (number == at)
    skipped = round_.state.metrics[at]
    assert skipped["skipped"] == "a loss that is not finite"
    assert skipped["skipped_pairs"] == [pairs[3]["pair_id"]]
    summary = round_.summary()
    assert summary["skipped_steps"] == 1
    assert any("1 of 3 steps were skipped" in text and pairs[3]["pair_id"] in text for text in summary["alarms"])
    assert math.isfinite(summary["loss"])


def test_a_gradient_that_is_not_finite_stops_and_changes_nothing() -> None:
    model = tiny_model()
    pairs = scored(random_pairs(3, 4), model, None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    round_ = a_round(model, pairs, epochs=4, max_nonfinite_steps=3)
    assert ["skipped" in round_.step() for _ in range(2)] == [True, True]
    with pytest.raises(BadInput, match=r"steps 1 to 3, pairs 1:.*found a gradient norm of (inf|nan)"):
        round_.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not round_.optimizer.state


def test_pairs_without_the_scores_the_loss_reads_are_refused() -> None:
    model = tiny_model()
    pairs = scored(random_pairs(3, 4), model, None)
    assert a_round(model, pairs, 1.0).columns == ["previous_real", "previous_generated"]
    with pytest.raises(BadInput, match="base_real"):
        a_round(model, pairs, 0.5)
    with pytest.raises(BadInput, match="at least one pair"):
        a_round(model, [], 1.0)
