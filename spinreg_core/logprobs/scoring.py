"""Log-probabilities of many answers under one policy, without gradients.

Decides: what goes through the model together (`packing.passes`) and that the given order comes back.
Leaves out: the forward pass (`sequence.py`), what is scored and what is reused (`stages/mix_opponent.py`).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from spinreg_core.logprobs.packing import passes
from spinreg_core.logprobs.policy import load_for
from spinreg_core.logprobs.sequence import answer_logprobs, compute_format, packs
from spinreg_core.models.loading import Precision
from spinreg_core.runtime.distributed import Ranks, resolve_device
from spinreg_core.runtime.progress import Progress


def score(
    policy: str | Path | PreTrainedModel,
    prompts: list[list[int]],
    answers: list[list[int]],
    *,
    precision: Precision,
    tokens_per_pass: int,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """log π(answer | prompt) in nats of each row, in the rows' order.

    `policy` is a folder or a model already loaded (for these ranks). Every rank is given all rows, computes its share
    and returns all scores. Rows of one prompt go together, and the longest come first, so that what is too large for
    the memory shows at once. `progress` is told of every finished row. Values may be -inf or nan where the policy says
    so; whether that is an error is the caller's to say.
    """
    ranks = ranks or Ranks(
        policy.device if isinstance(policy, PreTrainedModel) else torch.device(resolve_device("auto"))
    )
    if not prompts:
        return []
    model = policy if isinstance(policy, PreTrainedModel) else load_for(ranks, policy, precision)
    single = [[answer] for answer in answers]
    shares = passes(prompts, single, tokens_per_pass, shared=packs(model), ranks=ranks.size)
    own = shares[ranks.rank]
    found = torch.zeros(len(prompts), dtype=torch.float64)
    with torch.no_grad(), compute_format(precision, model.device):
        for k in range(max(map(len, shares))):
            if k < len(own):
                sums = answer_logprobs(
                    model, [prompts[i] for i in own[k]], [answers[i] for i in own[k]], precision=precision
                )
                found[own[k]] = sums.double().cpu()
            elif isinstance(model, FSDPModule):  # the others' weights are needed to the end
                answer_logprobs(model, [[0]], [[]], precision=precision)
            if progress is not None:
                progress.update(sum(len(share[k]) for share in shares if k < len(share)))
    return ranks.sum(found).tolist()
