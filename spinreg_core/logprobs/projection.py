"""The vocabulary projection on answer positions: log-probabilities of target tokens without the full logits.

Decides: which models' projection can be repeated outside their own forward pass, the size of its pieces, and that one
buffer of logits becomes the gradient in place. Leaves out: the hidden states (`logprobs.sequence`).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# float32 logits that may exist at once (elements): 512 MiB. More answer tokens than that are taken in pieces.
LOGITS_AT_ONCE = 2**27


def token_logprobs(head: LmHead, hidden: Tensor, targets: Tensor, *, logits_at_once: int = LOGITS_AT_ONCE) -> Tensor:
    """Return the log-probability (nats) of each target: hidden [tokens, width], targets [tokens] -> float32 [tokens].

    More than `logits_at_once` logits are taken in pieces, and the backward pass computes each piece's logits again.
    """

    def piece(h: Tensor, t: Tensor) -> Tensor:
        if head.plain:
            dtype = torch.get_autocast_dtype(h.device.type) if torch.is_autocast_enabled(h.device.type) else h.dtype
            found: Tensor = TargetLogprobs.apply((h * head.scale).to(dtype), head.linear.weight.to(dtype), t)
            return found
        return -F.cross_entropy(head(h), t, reduction="none")

    size = max(1, logits_at_once // head.vocabulary)
    if len(targets) <= size:
        return piece(hidden, targets)
    pieces = zip(hidden.split(size), targets.split(size), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(piece, h, t, use_reentrant=False) for h, t in pieces])
    return torch.cat([piece(h, t) for h, t in pieces])


class TargetLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target]: hidden [tokens, width], weight [vocabulary, width] -> float32 [tokens].

    One float32 buffer of logits becomes log-probabilities, and then their gradient, in place. Autograd would keep three
    such buffers, each as large as all activations of a small model. The backward pass can run only once.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        table = (hidden @ weight.T).float()
        torch.ops.aten._log_softmax.out(table, 1, False, out=table)
        if any(ctx.needs_input_grad):
            # `checkpoint` drops and recomputes saved tensors only; an attribute of ctx would stay in memory.
            ctx.save_for_backward(hidden, weight, targets, table)
        return table.gather(1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (gradient,) = gradients  # [tokens]
        hidden, weight, targets, table = ctx.saved_tensors
        # d log p(target) / d logit = [is the target] - p
        table.exp_().mul_(-gradient[:, None])
        table.scatter_add_(1, targets[:, None], gradient[:, None])
        table = table.to(hidden.dtype)
        # With an adapter the projection is frozen, and its gradient would be wasted.
        return table @ weight, table.T @ hidden if ctx.needs_input_grad[1] else None, None


class LmHead:
    """Hidden states [tokens, width] -> float32 logits [tokens, vocabulary], as the model's own forward does."""

    def __init__(self, linear: Any, config: Any) -> None:
        self.linear = linear
        self.vocabulary = int(linear.weight.shape[0])
        # Cohere multiplies by logit_scale, Granite divides by logits_scaling, Gemma 2 caps.
        self.scale = float(getattr(config, "logit_scale", None) or 1) / float(
            getattr(config, "logits_scaling", None) or 1
        )
        self.cap = getattr(config, "final_logit_softcapping", None)
        self.plain = not self.cap and getattr(linear, "bias", None) is None

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.linear(hidden).float()
        if self.scale != 1:
            logits = logits * self.scale
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits


_found: weakref.WeakKeyDictionary[nn.Module, LmHead | None] = weakref.WeakKeyDictionary()


def lm_head_of(model: PreTrainedModel) -> LmHead | None:
    """Return the model's vocabulary projection, or None where `LmHead` cannot repeat it.

    No architecture is listed by name. Once per model, the projection of the backbone's output is compared with the
    logits of the model's own forward. Where they differ, callers use that forward with all its logits.
    """
    if model not in _found:
        _found[model] = _agreeing_head(model)
    return _found[model]


@torch.no_grad()
def _agreeing_head(model: PreTrainedModel) -> LmHead | None:
    linear, backbone = model.get_output_embeddings(), model.base_model
    if linear is None or backbone is model or getattr(linear, "weight", None) is None:
        return None
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found = getattr(output, "last_hidden_state", None)
        if found is not None:
            seen.append(found)

    tokens = torch.arange(1, 9, device=model.device)[None] % linear.weight.shape[0]
    hook = backbone.register_forward_hook(keep)
    try:
        with torch.autocast(model.device.type, enabled=False):
            expected = model.forward(input_ids=tokens, use_cache=False).logits[0].float()
            if len(seen) != 1 or seen[0].shape[:2] != tokens.shape:
                return None
            head = LmHead(linear, model.config.get_text_config())
            found = head(seen[0][0])
    finally:
        hook.remove()
    tolerance = 1e-4 if linear.weight.dtype == torch.float32 else 3e-2
    same = found.shape == expected.shape and torch.allclose(
        found, expected, rtol=tolerance, atol=tolerance, equal_nan=True
    )
    return head if same else None
