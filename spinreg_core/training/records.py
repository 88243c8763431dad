"""The records of a round in training: metrics of a step, the round's summary, and the state in a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TypedDict


class StepMetrics(TypedDict, total=False):
    """A line of `metrics.jsonl`: the numbers of one step before its update.

    Means are over the step's pairs. A skipped step has `skipped` and `skipped_pairs` instead of numbers.

    step, epoch                         counted from 1
    loss                                mean loss
    margin                              mean m, nats
    accuracy                            share of pairs with m > 0; ties (within 0.001 nats) count half
    guarded                             share of pairs with r(x, y) <= 0; only with a guard above 1
    real_logp, generated_logp           mean log π_θ(y|x), nats/answer; `_per_token`: nats/token
    log_ratio_{previous,base}_{side}    mean log π_θ(y|x) - log π_t(y|x), or - log π_0(y|x), nats/answer; only where
                                        these scores are cached
    kl_from_{previous,base}             mean log π_t(y'|x) - log π_θ(y'|x), or with π_0, over the answers that this
                                        policy sampled, nats/answer: an estimate of KL(π_t‖π_θ). It is unbiased while
                                        training has not seen the answers (first epoch, this round's own answers,
                                        neutral sampler), and too high afterwards.
    grad_norm                           l2, before clipping
    learning_rate, beta                 of this step
    tokens                              prompts and answers, without padding
    seconds, tokens_per_second          of this step
    """

    step: int
    epoch: int
    pairs: int
    loss: float
    margin: float
    accuracy: float
    guarded: float
    real_logp: float
    real_logp_per_token: float
    generated_logp: float
    generated_logp_per_token: float
    log_ratio_previous_real: float
    log_ratio_previous_generated: float
    log_ratio_base_real: float
    log_ratio_base_generated: float
    kl_from_previous: float
    kl_from_base: float
    grad_norm: float
    learning_rate: float
    beta: float
    tokens: int
    seconds: float
    tokens_per_second: float
    skipped: str
    skipped_pairs: list[str]


class RoundSummary(TypedDict):
    """`summary.json` of a round.

    loss, accuracy, margin              means over the last epoch's pairs, each before its update
    real_logprob_change                 mean of log π_{t+1} - log π_t over `watched_pairs` human answers, nats/answer,
                                        and its standard error
    alarms                              texts that a user must see
    """

    steps: int
    skipped_steps: int
    pairs: int
    first_loss: float
    last_loss: float
    loss: float
    accuracy: float
    margin: float
    real_logprob_change: float
    real_logprob_change_error: float
    watched_pairs: int
    seconds: float
    tokens_per_second: float
    alarms: list[str]


@dataclass
class RoundState:
    """The part of a checkpoint that is no tensor: one entry per finished step, and log π_t (nats) of the watched
    human answers."""

    metrics: list[StepMetrics] = field(default_factory=list)
    watched_start: list[float] | None = None

    @property
    def done(self) -> int:
        """Finished steps."""
        return len(self.metrics)

    def to_json(self) -> str:
        return json.dumps({"metrics": self.metrics, "watched_start": self.watched_start})

    @classmethod
    def from_json(cls, text: str) -> RoundState:
        return cls(**json.loads(text))
