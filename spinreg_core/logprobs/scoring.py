"""Log-probabilities of many answers under one policy, without gradients.

Decides: the rows of each forward pass (`packing.passes`), and that results have the order of the rows.
Leaves out: the forward pass (`logprobs.sequence`), the choice of rows and the reuse of scores (`stages`).
"""

from __future__ import annotations

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from spinreg_core.logprobs.packing import passes
from spinreg_core.logprobs.sequence import answer_logprobs, compute_format, packs
from spinreg_core.models.loading import Precision
from spinreg_core.runtime.distributed import Ranks
from spinreg_core.runtime.progress import Progress


def score(
    model: PreTrainedModel,
    prompts: list[list[int]],
    answers: list[list[int]],
    *,
    precision: Precision,
    tokens_per_pass: int,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Return log π(answer | prompt) in nats for each row, in the order of the rows.

    Every rank gets all rows, computes its share and returns all scores. Rows of one prompt go together. The longest
    rows come first, so that running out of memory shows at once. Values may be -inf or nan, which the caller judges.

    Args:
        model: the policy, loaded for these ranks.
        prompts, answers: token ids, one list per row.
        tokens_per_pass: tokens of one forward pass at most; a longer row has a pass of its own.
        progress: counts every finished row.
    """
    ranks = ranks or Ranks(model.device)
    if not prompts:
        return []
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
            elif isinstance(model, FSDPModule):
                # FSDP gathers weights in every pass, so a rank without work joins the other ranks' passes.
                answer_logprobs(model, [[0]], [[]], precision=precision)
            if progress is not None:
                progress.update(sum(len(share[k]) for share in shares if k < len(share)))
    return ranks.sum(found).tolist()
