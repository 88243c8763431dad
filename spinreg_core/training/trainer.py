"""One round of training: π_θ from π_t on pairs with cached reference scores.

Decides: the step (accumulated gradient of the batch mean, clipping, update), its metrics, and when to refuse to go on,
on one rank or many. Leaves out: the loss (`selfplay.loss`), optimiser, schedule and order (`training.optimizer`), the
store and checkpoints (`training.step_checkpoints`), how ranks share the weights (`models.fsdp`).

Every rank holds all pairs, takes its share of each step's pairs, and ends each step with the numbers of all of them.

No second model is in memory and nothing is random: dropout is off and the order comes from hashes. A round resumed
from a checkpoint therefore equals an uninterrupted one: bit for bit on a CPU, up to the order of sums on a GPU.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel

from spinreg_core.config import ObjectiveConfig, TrainingConfig, of_round
from spinreg_core.errors import BadInput
from spinreg_core.logprobs.packing import passes
from spinreg_core.logprobs.scoring import score
from spinreg_core.logprobs.sequence import answer_logprobs, compute_format, packs
from spinreg_core.models.fsdp import full_tensor
from spinreg_core.runtime.distributed import Ranks
from spinreg_core.selfplay import REMEDIES, win
from spinreg_core.selfplay.loss import guarded, rewards, self_play_loss
from spinreg_core.selfplay.pairs import IDS, SCORE_COLUMNS, SCORES, SIDES, Pair, Reference, ScoreColumn, keyed
from spinreg_core.training.optimizer import batches, data_order, learning_rate, make_optimizer, recomputing
from spinreg_core.training.records import RoundState, RoundSummary, StepMetrics

# The numbers of each pair in a step.
_VALUES = ("loss", "margin", "guarded", "real", "generated")
# Pairs with human answers that are scored at both ends of a round.
WATCHED_PAIRS = 32


class NotFinite(Exception):
    """A loss or gradient is infinite or not a number."""

    def __init__(self, found: str, pairs: Sequence[Pair]) -> None:
        super().__init__(found)
        self.found, self.pair_ids = found, [pair["pair_id"] for pair in pairs]


class RoundTrainer:
    """A round in training. `model` holds π_t at first and is trained in place.

    Args:
        pairs: with all scores that the loss reads.
        round_number: counted from 1.
        tokens_per_pass: tokens of one forward pass at most; a pair that is longer has a pass of its own.
        kl_from: the references that sampled the answers of their iterate themselves.
        starts_at_previous: the cached previous scores are those of `model` at first.

    Raises:
        BadInput: there are no pairs, or they lack scores.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pairs: Sequence[Pair],
        *,
        objective: ObjectiveConfig,
        training: TrainingConfig,
        seed: int,
        round_number: int,
        tokens_per_pass: int,
        ranks: Ranks | None = None,
        kl_from: Sequence[Reference] = ("previous", "base"),
        starts_at_previous: bool = True,
    ) -> None:
        self.model, self.pairs, self.objective, self.training = model, pairs, objective, training
        self.tokens_per_pass, self.ranks = tokens_per_pass, ranks or Ranks(model.device)
        iterates: dict[Reference, int] = {"previous": round_number - 1, "base": 0}
        self._samplers = {name: iterates[name] for name in kl_from}
        self.beta = of_round(objective.beta, round_number)
        self.peak = of_round(training.learning_rate, round_number)
        if not pairs:
            raise BadInput(f"pairs of round {round_number}", "none", "at least one pair")
        self.columns = [name for name in SCORE_COLUMNS if all(pair[name] is not None for pair in pairs)]
        needed = [
            name
            for reference, weight in (("previous", objective.alpha), ("base", 1 - objective.alpha))
            for name in SCORE_COLUMNS
            if weight > 0 and name.startswith(reference)
        ]
        if set(needed) - set(self.columns):
            raise BadInput(f"pairs of round {round_number}", f"the scores {self.columns}",
                           f"{needed}, which the loss reads at alpha = {objective.alpha}")  # fmt: skip
        self.batches = batches(
            pairs, batch_size=training.batch_size, epochs=training.epochs, seed=seed, round_number=round_number
        )
        self.optimizer = make_optimizer(model, training)
        self.state = RoundState()
        order = [pairs[i] for i in data_order(pairs, seed=seed, round_number=round_number, epoch=-1)]
        # Each human answer once: with `round_prompts: same` pairs of several rounds share it.
        self.watched = list({keyed(pair, "real"): pair for pair in reversed(order)}.values())[::-1][:WATCHED_PAIRS]
        # In round 1 π_t is π_0, so the scores under the base are those of π_t.
        start: ScoreColumn | None = (
            "previous_real" if "previous_real" in self.columns else "base_real" if round_number == 1 else None
        )
        self._watched_column = start if starts_at_previous else None
        torch.manual_seed(seed)
        # Evaluation mode turns dropout off. transformers checkpoints activations in training mode only, so a model with
        # checkpointing is put into that mode; its dropout was set to 0 when it was loaded.
        model.train(training.activation_checkpointing != "none")
        if training.activation_checkpointing != "none":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=recomputing(training))

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole round."""
        return len(self.batches)

    def watch_start(self) -> None:
        """Note log π_t of the watched human answers, cached or scored now. Call it before the first step."""
        if self._watched_column is None:
            self.state.watched_start = self._score_watched()
        else:
            self.state.watched_start = [_cached(pair, self._watched_column) for pair in self.watched]

    def _score_watched(self) -> list[float]:
        return score(
            self.model,
            [pair["prompt_ids"] for pair in self.watched],
            [pair["real_ids"] for pair in self.watched],
            precision=self.training.precision,
            tokens_per_pass=self.tokens_per_pass,
            ranks=self.ranks,
        )

    def step(self) -> StepMetrics:
        """Take one optimiser step. Returns its metrics, which `state` keeps too.

        A step with a loss or gradient that is not finite is skipped: weights and optimiser stay as they are.

        Raises:
            BadInput: `training.max_nonfinite_steps` steps in a row were skipped. The text names their pairs.
        """
        begin = time.monotonic()
        number = self.state.done
        epoch, rows = self.batches[number]
        batch = [self.pairs[i] for i in rows]
        rate = learning_rate(
            number, self.steps, peak=self.peak, warmup=self.training.warmup, schedule=self.training.schedule
        )
        try:
            values = self.gradient(batch)
            norm = full_tensor(get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]))
            grad_norm = float(norm)
            if not math.isfinite(grad_norm):
                raise NotFinite(f"a gradient norm of {grad_norm}", batch)
        except NotFinite as problem:
            return self._skip(epoch, batch, problem)
        if self.training.max_grad_norm is not None:
            clip_grads_with_norm_(self.model.parameters(), self.training.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        seconds = time.monotonic() - begin
        tokens = sum(2 * len(p["prompt_ids"]) + len(p["real_ids"]) + len(p["generated_ids"]) for p in batch)
        numbers = _step_metrics(batch, values, self.columns) | self._kl(batch, values["generated"])
        if self.objective.guard != 1:
            numbers["guarded"] = math.fsum(values["guarded"]) / len(batch)
        metrics: StepMetrics = {
            "step": number + 1, "epoch": epoch + 1, "pairs": len(batch), **cast(StepMetrics, numbers),
            "grad_norm": grad_norm, "learning_rate": rate, "beta": self.beta, "tokens": tokens,
            "seconds": seconds, "tokens_per_second": tokens / seconds,
        }  # fmt: skip
        self.state.metrics.append(metrics)
        return metrics

    def _kl(self, batch: Sequence[Pair], logps: Sequence[float]) -> dict[str, float]:
        found = {}
        for name, iterate in self._samplers.items():
            column = SCORES[name]["generated"]
            if column in self.columns:
                # An answer of the mixture says nothing about the iterate's own distribution.
                own = [_cached(pair, column) - value for value, pair in zip(logps, batch, strict=True)
                       if pair["iterate"] == iterate and not pair["geometric"]]  # fmt: skip
                if own:
                    found[f"kl_from_{name}"] = math.fsum(own) / len(own)
        return found

    def _skip(self, epoch: int, batch: Sequence[Pair], problem: NotFinite) -> StepMetrics:
        self.optimizer.zero_grad(set_to_none=True)
        metrics: StepMetrics = {
            "step": self.state.done + 1, "epoch": epoch + 1, "pairs": len(batch), "skipped": problem.found,
            "skipped_pairs": problem.pair_ids,
        }  # fmt: skip
        recent = [*self.state.metrics, metrics][-self.training.max_nonfinite_steps :]
        if len(recent) == self.training.max_nonfinite_steps and all("skipped" in m for m in recent):
            names = [name for m in recent for name in m["skipped_pairs"]]
            raise BadInput(
                f"training, steps {recent[0]['step']} to {metrics['step']}, pairs {', '.join(dict.fromkeys(names))}",
                problem.found,
                f"finite numbers; use a learning rate below {self.peak:g}, or precision fp32",
            )
        self.state.metrics.append(metrics)
        return metrics

    def gradient(self, batch: Sequence[Pair]) -> dict[str, list[float]]:
        """Compute the gradient of the batch's mean loss into the parameters, in as many passes as the tokens need.

        Returns:
            `loss`, `margin` (nats), `guarded` (1 where r(x, y) <= 0), `real` and `generated` (log π_θ, nats) of each
            pair, in the order of `batch`.

        Raises:
            NotFinite: a loss is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        precision = self.training.precision
        shares = passes(
            [p["prompt_ids"] for p in batch],
            [[p["real_ids"], p["generated_ids"]] for p in batch],
            self.tokens_per_pass,
            shared=packs(self.model),
            ranks=self.ranks.size,
        )
        own, longest = shares[self.ranks.rank], max(map(len, shares))
        table = torch.zeros(len(_VALUES), len(batch), dtype=torch.float64)
        # Autocast keeps its bfloat16 copies of the weights while its context is open: one conversion for all passes.
        with compute_format(precision, self.model.device):
            for k in range(longest):
                if isinstance(self.model, FSDPModule):
                    # With HSDP the replicas exchange gradients once a step, in the last pass.
                    self.model.set_requires_all_reduce(k == longest - 1)
                if k < len(own):
                    table[:, own[k]] = self._backward([batch[i] for i in own[k]], len(batch))
                else:
                    # FSDP gathers weights in every pass, so a rank without work joins the other ranks' passes.
                    answer_logprobs(self.model, [[0]], [[]], precision=precision).sum().backward()
        found = dict(zip(_VALUES, self.ranks.sum(table).tolist(), strict=True))
        bad = [pair for pair, loss in zip(batch, found["loss"], strict=True) if not math.isfinite(loss)]
        if bad:
            raise NotFinite("a loss that is not finite", bad)
        return found

    def _backward(self, pairs: Sequence[Pair], count: int) -> Tensor:
        """Add the gradient of these pairs' share of a mean over `count` pairs. Returns [_VALUES, pairs] on the CPU."""
        sums = answer_logprobs(
            self.model,
            [p["prompt_ids"] for p in pairs] * 2,
            [p["real_ids"] for p in pairs] + [p["generated_ids"] for p in pairs],
            precision=self.training.precision,
        )
        with torch.autocast(self.model.device.type, enabled=False):
            values = self._losses(sums.double(), pairs)
            # FSDP averages gradients over ranks. Each rank has other pairs, so the sum is wanted.
            (values["loss"].sum() / count * self.ranks.size).backward()
        return torch.stack([values[name].detach() for name in _VALUES]).cpu()

    def _losses(self, sums: Tensor, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        real, generated = sums.chunk(2)
        references = [
            torch.tensor([p[name] for p in pairs], dtype=torch.float64, device=sums.device)
            if name in self.columns
            else None
            for name in SCORE_COLUMNS
        ]
        alpha = self.objective.alpha
        link, guard = self.objective.link, self.objective.guard
        loss = self_play_loss(real, generated, *references, alpha=alpha, beta=self.beta, link=link, guard=guard)
        human, own = (reward.detach() for reward in rewards(real, generated, *references, alpha=alpha))
        return {
            "loss": loss, "margin": human - own, "guarded": guarded(human).double(), "real": real.detach(),
            "generated": generated.detach(),
        }  # fmt: skip

    def summary(self) -> RoundSummary:
        """Summarise the round; scores the watched human answers once more.

        Raises:
            BadInput: every step was skipped, or the trained policy's own log-probabilities are not finite.
        """
        metrics = [m for m in self.state.metrics if "skipped" not in m]
        skipped = [m for m in self.state.metrics if "skipped" in m]
        if not metrics:
            raise BadInput(f"training of {len(skipped)} steps", f"{skipped[0]['skipped']} in each", "finite numbers")
        last = [m for m in metrics if m["epoch"] == metrics[-1]["epoch"]]
        weight = sum(m["pairs"] for m in last)
        seconds = sum(m["seconds"] for m in metrics)
        start = self.state.watched_start
        if start is None:
            raise ValueError("watch_start was not called before the first step")
        end = self._score_watched()
        if bad := [value for value in end if not math.isfinite(value)]:
            raise BadInput(
                f"training of {self.steps} steps, the trained policy",
                f"has log-probabilities that are not finite for {len(bad)} of {len(end)} human answers",
                f"use a learning rate below {self.peak:g}, or precision fp32",
            )
        change, error = mean_and_error([b - a for a, b in zip(start, end, strict=True)])
        found: RoundSummary = {
            "steps": self.steps,
            "skipped_steps": len(skipped),
            "pairs": len(self.pairs),
            "first_loss": metrics[0]["loss"],
            "last_loss": metrics[-1]["loss"],
            "loss": sum(m["loss"] * m["pairs"] for m in last) / weight,
            "accuracy": sum(m["accuracy"] * m["pairs"] for m in last) / weight,
            "margin": sum(m["margin"] * m["pairs"] for m in last) / weight,
            "real_logprob_change": change,
            "real_logprob_change_error": error,
            "watched_pairs": len(start),
            "seconds": seconds,
            "tokens_per_second": sum(m["tokens"] for m in metrics) / seconds,
            "alarms": [],
        }
        if skipped:
            names = ", ".join(dict.fromkeys(name for m in skipped for name in m["skipped_pairs"][:4]))
            found["alarms"].append(
                f"{len(skipped)} of {self.steps} steps were skipped, because a loss or gradient was not finite (pairs "
                f"{names}): the policy did not learn from these pairs."
            )
        if fell(change, error):
            found["alarms"].append(
                f"The log-probability of the HUMAN answers fell over this round: {change:+.2f} nats/answer "
                f"(standard error {error:.2f}, {len(start)} training pairs; {statistics.fmean(start):.1f} before, "
                f"{statistics.fmean(end):.1f} after). The loss only asks that human answers gain on generated ones, "
                f"and both may sink: {REMEDIES}."
            )
        return found


def _step_metrics(
    batch: Sequence[Pair], values: dict[str, list[float]], columns: Sequence[ScoreColumn]
) -> dict[str, float]:
    n = len(batch)
    found = {
        "loss": math.fsum(values["loss"]) / n,
        "margin": math.fsum(values["margin"]) / n,
        "accuracy": math.fsum(map(win, values["margin"])) / n,
    }
    for side in SIDES:
        total = math.fsum(values[side])
        found[f"{side}_logp"] = total / n
        found[f"{side}_logp_per_token"] = total / max(sum(len(pair[IDS[side]]) for pair in batch), 1)
    for column in columns:
        own = values[column.partition("_")[2]]
        found[f"log_ratio_{column}"] = (
            math.fsum(value - _cached(pair, column) for value, pair in zip(own, batch, strict=True)) / n
        )
    return found


def _cached(pair: Pair, column: ScoreColumn) -> float:
    score = pair[column]
    assert score is not None, f"pair {pair['pair_id']} has no {column}"
    return score


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error. A single value counts as its own error, so that it proves nothing."""
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else abs(mean)


def fell(change: float, error: float) -> bool:
    """Return True for a mean change (nats/answer) that is worth an alarm: below both -0.1 nats and -2 errors."""
    return change < -max(2 * error, 0.1)
