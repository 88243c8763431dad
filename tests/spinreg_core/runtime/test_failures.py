"""Messages of failed stages."""

from __future__ import annotations

import pytest

from spinreg_core.config import RunConfig
from spinreg_core.runtime.failures import describe_error


@pytest.mark.parametrize(
    ("stage", "helps"),
    [
        ("mix-opponent", "resources.tokens_per_pass"),
        ("generate", "resources.kv_cache_tokens"),
        ("mt-bench-answers", "resources.kv_cache_tokens"),
        ("benchmark", "resources.kv_cache_tokens"),
        ("lm-eval", "benchmarks.batch_size below 8"),
    ],
)
def test_describe_error_without_memory_names_the_fields_of_the_stage(stage: str, helps: str) -> None:
    text = describe_error(MemoryError(), stage, RunConfig())[1]
    assert helps in text
    assert ("tokens_per_pass" in text) is (stage == "mix-opponent")
