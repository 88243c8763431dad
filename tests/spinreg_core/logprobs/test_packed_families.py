"""Packed rows of every causal family that transformers offers, in float32 and in bfloat16.

An answer's log-probability is that of the plain forward pass, and no neighbour in the row changes it.
"""

from __future__ import annotations

import pytest
import torch

from spinreg_core.logprobs.sequence import answer_logprobs, packs
from spinreg_core.models.loading import Precision
from tests.support.families import BIDIRECTIONAL, LEFT_OUT, families, tiny_family, without_warnings
from tests.support.plain_logprobs import plain

FORMATS: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACKED = ["llama", "deepseek_v3", "qwen2_moe", "afmoe"]
# States, convolutions and linear attention run on from one sequence into the next; packed rows have no sinks.
PADDED = ["lfm2", "qwen3_next", "jamba", "falcon_h1", "granitemoehybrid", "gpt_oss"]
# In bfloat16 its recurrence amplifies rounding to half a nat.
ROUGH = {"hrm_text"}
# transformers' CPU code for these mixes float32 and bfloat16, and fails without spinreg too.
FLOAT32_ONLY = {"falcon_mamba", "mamba", "mamba2", "xlstm"}

PROMPTS = [[3, 4, 5, 6], [3, 4, 5, 6], [9, 8, 7]]
ANSWERS = [[7, 8, 9, 10, 11], [12, 13, 14, 15, 16], [20, 21, 22, 23]]
OTHER_PROMPTS = [[3, 4, 5, 6], [3, 4, 5, 6], [19, 18, 17]]
OTHER_ANSWERS = [[7, 8, 9, 10, 11], [32, 33, 34, 35, 36], [40, 41, 42, 43]]


@torch.no_grad()
def packing(family: str, precision: Precision) -> bool:
    """Return `packs`, after comparing the answer that both sets of rows have in common, first and last in the row."""
    model = tiny_family(family).to(FORMATS[precision])
    found = packs(model)
    for first in (1, -1):
        rows = [
            (prompts[::first], answers[::first])
            for prompts, answers in ((PROMPTS, ANSWERS), (OTHER_PROMPTS, OTHER_ANSWERS))
        ]
        mine, other = (answer_logprobs(model, *row, precision=precision).tolist()[::first][0] for row in rows)
        assert abs(mine - other) < (1e-5 if precision == "fp32" else 0.02), "a neighbour changes an answer"
        if precision == "fp32":
            expected = plain(tiny_family(family), PROMPTS[:1], ANSWERS[:1])[0]
            assert mine == pytest.approx(float(expected), abs=2e-4)
    return found


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("family", PACKED + PADDED)
def test_family_gives_its_plain_logprobs_beside_any_neighbour(family: str, precision: Precision) -> None:
    with without_warnings():
        assert packing(family, precision) == (family in PACKED)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3000)
def test_all_families_pack_alike_in_both_formats() -> None:
    wrong = {}
    with without_warnings():
        for family, _, _ in families():
            if family in LEFT_OUT | BIDIRECTIONAL:
                continue
            try:
                exact = packing(family, "fp32")
                if family not in FLOAT32_ONLY | ROUGH:
                    assert packing(family, "bf16") == exact, "packed in one format only"
            except Exception as error:
                wrong[family] = f"{type(error).__name__}: {error}"
    assert not wrong
