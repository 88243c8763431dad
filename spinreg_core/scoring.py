"""Log-probabilities of many answers under one policy, without gradients.

Decides: what goes through the model together (`packing.bins`) and that the given order comes back.
Leaves out: the forward pass (`logprobs.py`), what is scored and what is reused (`stages/mix_opponent.py`).
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from spinreg_core.errors import BadInput
from spinreg_core.logprobs import Precision, answer_logprobs, compute_format, load_policy, packs
from spinreg_core.packing import bins
from spinreg_core.progress import Progress


def resolve_device(name: str) -> str:
    """`resources.device`: auto is a GPU where there is one. Raises BadInput for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("resources.device", "cuda, but torch sees no GPU", "auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def score(
    policy: str | Path | PreTrainedModel,
    prompts: list[list[int]],
    answers: list[list[int]],
    *,
    precision: Precision,
    device: str = "auto",
    tokens_per_pass: int,
    progress: Progress | None = None,
) -> list[float]:
    """log π(answer | prompt) in nats of each row, in the rows' order.

    `policy` is a folder or a model already loaded (then `device` is not used). Rows of one prompt go together, and
    the longest come first, so that what is too large for the memory shows at once. `progress` is told of every
    finished row. Values may be -inf or nan where the policy says so; whether that is an error is the caller's to say.
    """
    if not prompts:
        return []
    model = policy if isinstance(policy, PreTrainedModel) else load_policy(policy, precision, resolve_device(device))
    found = [0.0] * len(prompts)
    with torch.no_grad(), compute_format(precision, model.device):
        for rows in bins(prompts, [[answer] for answer in answers], tokens_per_pass, shared=packs(model)):
            sums = answer_logprobs(
                model, [prompts[i] for i in rows], [answers[i] for i in rows], precision=precision
            ).tolist()
            for i, value in zip(rows, sums, strict=True):
                found[i] = value
            if progress is not None:
                progress.update(len(rows))
    return found
