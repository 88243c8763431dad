"""Sequence log-probabilities of answers under a policy: the one code path behind scoring, training and evaluation.

Decides: whether a model is packed, and that the vocabulary projection runs on answer positions only, in pieces.
Leaves out: loading (`logprobs.policy`), batches of a data set (`logprobs.scoring`), the loss (`selfplay.loss`), the
packed row (`logprobs.packing`) and its attention (`logprobs.packed_attention`).

A model that cannot be packed gets padded batches: prompt and answer of each row, right-padded to the longest row.
Positions count from 0 in every row and attention is causal, so a real token never sees the padding behind it. Without
an attention mask SDPA stays on its fast causal path.
"""

from __future__ import annotations

import itertools
import math
import operator
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from spinreg_core.formatting import first_line
from spinreg_core.logprobs.packed_attention import NAME, PackedRow
from spinreg_core.logprobs.packing import PackedLayout, PromptGroup, group, layout
from spinreg_core.logprobs.projection import LmHead, lm_head_of, token_logprobs
from spinreg_core.models.loading import Precision

T = TypeVar("T")
# A row shorter than this share of a group's longest row starts another group (CPU only).
_UNLIKE = 0.85


def compute_format(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context of a forward pass: bfloat16 autocast for `mixed`, nothing otherwise.

    Around several calls of `answer_logprobs` with unchanged weights, autocast keeps its bfloat16 copies of the weights
    from call to call.
    """
    return torch.autocast(device.type, torch.bfloat16) if precision == "mixed" else nullcontext()


def answer_logprobs(
    model: PreTrainedModel, prompts: list[list[int]], answers: list[list[int]], *, precision: Precision
) -> Tensor:
    """Return log π(answer | prompt) in nats, float32 [batch], differentiable.

    The sum runs over all given answer tokens (with end-of-turn where there is one) and over no prompt token; an empty
    answer has log-probability 0. The log-softmax is float32 in every precision. All rows go through the model at once;
    equal prompts, and equal answers to them, are computed once.

    Raises:
        ValueError: a prompt is empty, so that no position predicts the first answer token.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers")
    if not all(prompts):
        raise ValueError("an empty prompt has no position that predicts the first answer token")
    with compute_format(precision, model.device):
        packed = max(map(len, map(operator.add, prompts, answers)), default=0) <= longest_packed(model)
        return _as_forward(model, _packed_logprobs if packed else padded_logprobs, prompts, answers)


def _as_forward(model: PreTrainedModel, function: Callable[..., T], *arguments: object) -> T:
    """Call function(model, ...); for a sharded model as one forward pass, during which its weights are gathered."""
    if isinstance(model, FSDPModule):
        # `fsdp.shard` adds the method.
        as_forward: Any = model.as_forward
        found: T = as_forward(function, *arguments)
        return found
    return function(model, *arguments)


def _packed_logprobs(model: PreTrainedModel, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
    groups, numbers = group(prompts, answers)
    if not groups and not isinstance(model, FSDPModule):
        return torch.zeros(len(answers), device=model.device)
    # The other ranks need this rank's shard of the weights, so it takes part with a dummy row.
    return _row_logprobs(model, layout(groups or [PromptGroup((0,), ((0,),))], model.device), numbers)


def _row_logprobs(model: PreTrainedModel, row: PackedLayout, numbers: list[int]) -> Tensor:
    head = lm_head_of(model)
    if head is None:
        raise AssertionError("a model is packed only where its projection is known")
    by_token = token_logprobs(head, _packed_hidden(model, PackedRow(row))[row.predictors], row.targets)
    # The last place stays 0 and is that of empty answers, which have the number -1.
    sums = torch.zeros(sum(len(sizes) - 1 for sizes in row.sizes) + 1, device=model.device)
    return sums.index_add(0, row.owners, by_token)[torch.tensor(numbers, device=model.device)]


def _packed_hidden(model: PreTrainedModel, row: PackedRow) -> Tensor:
    """Return the hidden states [T, width] of a packed row."""
    given = {"input_ids": row.layout.tokens, "position_ids": row.layout.positions}
    return model.base_model(**given, use_cache=False, packed=row).last_hidden_state[0]


_longest_packed: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()


def packs(model: PreTrainedModel) -> bool:
    """Return True if a packed row of the model gives the same results as its sequences alone.

    No architecture is listed by name. Once per model, a small packed row is compared with the plain forward of its
    sequences. A model that differs, or that has no exchangeable attention, gets padded batches and a warning.
    """
    return longest_packed(model) > 0


def longest_packed(model: PreTrainedModel) -> float:
    """Return the longest sequence (prompt and answer, tokens) in a packed row of the model; 0 means that it has none.

    It is finite only where the configuration names a window or chunk that the model does not pass to its attention.
    """
    if model not in _longest_packed:
        try:
            _longest_packed[model] = _as_forward(model, _probe_packing)
        except _CannotPack as reason:
            _longest_packed[model] = 0
            warnings.warn(
                f"{type(model).__name__}: {reason}; its batches are padded and prompts are computed once per answer, "
                "which is slower but gives the same results",
                stacklevel=3,
            )
    return _longest_packed[model]


class _CannotPack(Exception):
    pass


@torch.no_grad()
def _probe_packing(model: PreTrainedModel) -> float:
    head = lm_head_of(model)
    if head is None:
        raise _CannotPack("this version cannot repeat its vocabulary projection")
    before = model.config._attn_implementation
    vocabulary = model.get_output_embeddings().weight.shape[0]
    groups = _probe_groups(vocabulary)
    pairs = [(list(g.prompt), list(answer)) for g in groups for answer in g.answers]
    row = PackedRow(layout(groups, model.device))
    with torch.autocast(model.device.type, enabled=False):
        expected = _by_token(model, head, [prompt for prompt, _ in pairs], [answer for _, answer in pairs])
        try:
            model.set_attn_implementation(NAME)
            hidden = _packed_hidden(model, row)
            if not row.windows:
                raise _CannotPack("its attention does not go through transformers' attention interface")
            _require_independent_groups(model, row.layout, hidden)
            found = token_logprobs(head, hidden[row.layout.predictors], row.layout.targets)
            _require_equal(found, expected, row.layout.owners, exact=hidden.dtype == torch.float32)
        except (_CannotPack, TypeError, ValueError, NotImplementedError, RuntimeError) as error:
            model.set_attn_implementation(before)
            if isinstance(error, _CannotPack):
                raise
            raise _CannotPack(f"it cannot be packed ({type(error).__name__}: {first_line(error)})") from error
    config = model.config.get_text_config()
    # Qwen 2 MoE writes 0 for "no window".
    declared = [getattr(config, name, None) or None for name in ("sliding_window", "attention_chunk_size")]
    return min((size for size in declared if size is not None and size not in row.windows), default=math.inf)


def _probe_groups(vocabulary: int) -> list[PromptGroup]:
    """Return two prompts with several answers, of 129 tokens in the row: more than one block of a GPU's attention."""
    tokens = itertools.cycle((7 * i * i + 3 * i + 1) % vocabulary for i in range(vocabulary))
    return [
        PromptGroup(tuple(itertools.islice(tokens, prompt)), tuple(tuple(itertools.islice(tokens, n)) for n in answers))
        for prompt, answers in ((20, (24, 1, 40)), (12, (17, 20)))
    ]


def _require_independent_groups(model: PreTrainedModel, row: PackedLayout, hidden: Tensor) -> None:
    """Raise _CannotPack if the hidden states of one group depend on the tokens of another.

    One group's embeddings become nan, which survives sums and products in every number format. So a state or a
    convolution that runs from group to group shows, however weak it is. `hidden` are the states without the nan.
    """
    broken = hidden.isnan().any(-1)
    embeddings = model.get_input_embeddings()
    for group_number in range(len(row.sizes)):
        spoiled = row.groups == group_number

        def spoil(_module: nn.Module, _inputs: Any, output: Tensor, spoiled: Tensor = spoiled) -> Tensor:
            return output.masked_fill(spoiled[None, :, None], torch.nan)

        hook = embeddings.register_forward_hook(spoil)
        try:
            # Piece by piece, because a masked position would spread its nan: 0 times nan is nan.
            reached = _packed_hidden(model, PackedRow(row, pieces=True)).isnan().any(-1)
        finally:
            hook.remove()
        if not reached[spoiled].all():
            raise _CannotPack("its input embeddings are not the only way from tokens to hidden states")
        if (reached & ~broken)[~spoiled].any():
            raise _CannotPack("one sequence of a packed row changes the next (a state or a convolution)")


def _require_equal(found: Tensor, expected: Tensor, owners: Tensor, *, exact: bool) -> None:
    """Raise _CannotPack if packed log-probabilities of tokens differ from the plain ones by more than rounding.

    In bfloat16 rounding may send a token to another expert, which changes it by a nat. A wrong position changes most
    tokens of an answer, so there the median of each longer answer counts.
    """
    off = (found - expected).abs().masked_fill(found.isnan() & expected.isnan(), 0)
    if exact:
        worst, limit = float(off.max()), 1e-3
    else:
        answers = [off[owners == owner] for owner in owners.unique()]
        worst, limit = max(float(answer.median()) for answer in answers if len(answer) > 1), 0.25
    if not worst <= limit:
        raise _CannotPack(f"its packed log-probabilities of tokens differ from the plain ones by {worst:.3g} nats")


def padded_logprobs(model: PreTrainedModel, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
    """Compute `answer_logprobs` by right-padded batches, for every model, in the number format of the context."""
    sizes = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    sums: list[Tensor] = [torch.empty(0)] * len(answers)
    head = lm_head_of(model)
    # Ranks that share weights must run the same number of forward passes.
    sharded = isinstance(model, FSDPModule)
    for rows in _groups(sizes, split=model.device.type == "cpu" and not sharded):
        found = _group_logprobs(model, head, [prompts[i] for i in rows], [answers[i] for i in rows])
        for i, value in zip(rows, found.unbind(), strict=True):
            sums[i] = value
    return torch.stack(sums) if sums else torch.zeros(0, device=model.device)


def _groups(sizes: list[int], *, split: bool) -> list[list[int]]:
    """Return groups of rows that go through the model together.

    On a CPU rows of different lengths go apart, because padding costs more there than a larger batch gains. On a GPU
    the larger batch gains more.
    """
    if not split:
        return [list(range(len(sizes)))] if sizes else []
    groups: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if groups and sizes[i] >= _UNLIKE * sizes[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _group_logprobs(
    model: PreTrainedModel, head: LmHead | None, prompts: list[list[int]], answers: list[list[int]]
) -> Tensor:
    """Return float32 [batch] sums of answer-token log-probabilities, from one forward pass."""
    device = model.device
    sums = torch.zeros(len(answers), device=device, dtype=torch.float32)
    owners = [i for i, answer in enumerate(answers) for _ in answer]
    if not owners and not isinstance(model, FSDPModule):
        return sums
    by_token = _by_token(model, head, prompts, answers)
    return sums.index_add(0, torch.tensor(owners, dtype=torch.int64, device=device), by_token)


def answer_token_logprobs(
    model: PreTrainedModel, prompt: list[int], answer: list[int], *, precision: Precision
) -> Tensor:
    """Return log π(token | prompt, tokens before it) in nats for each token of one answer, float32 [tokens].

    Their sum is `answer_logprobs`. Meant for inspecting single answers: each takes a forward pass on every rank.
    """
    with compute_format(precision, model.device):
        return _as_forward(model, lambda m: _by_token(m, lm_head_of(m), [prompt], [answer]))


def _by_token(
    model: PreTrainedModel, head: LmHead | None, prompts: list[list[int]], answers: list[list[int]]
) -> Tensor:
    """Return the log-probabilities of all answers' tokens, float32 [tokens], from one right-padded forward pass."""
    device = model.device
    # The last answer token is predicted and never conditioned on, so it is no input.
    rows = [prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
    length = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)
    # Flat index (row * length + position) of the hidden state that predicts each answer token.
    at = [
        i * length + len(prompt) - 1 + k
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        for k in range(len(answer))
    ]
    positions = torch.tensor(at, dtype=torch.int64, device=device)
    targets = torch.tensor([token for answer in answers for token in answer], dtype=torch.int64, device=device)
    if head is None:
        logits = model.forward(input_ids=tokens, use_cache=False).logits.flatten(0, 1)[positions]
        return -F.cross_entropy(logits.float(), targets, reduction="none")
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state  # [batch, length, width]
    return token_logprobs(head, hidden.flatten(0, 1)[positions], targets)
