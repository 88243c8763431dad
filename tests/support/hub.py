"""The Hugging Face hub as tests see it: out of reach, with caches in a folder of the test."""

from __future__ import annotations

from pathlib import Path

import pytest


def keep_datasets_in(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Let `datasets` prepare its data sets in a folder. It reads its environment variables only when imported."""
    import datasets.config

    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


def disconnect(cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Make the hub unreachable, and let a folder be the cache of its models and data sets."""
    import datasets.config
    from huggingface_hub import constants

    keep_datasets_in(cache, patch)
    changes = [
        (datasets.config, "HF_HUB_OFFLINE", True), (datasets.config, "HF_DATASETS_OFFLINE", True),
        (constants, "HF_HUB_OFFLINE", True), (constants, "HF_HUB_CACHE", str(cache)),
    ]  # fmt: skip
    for module, name, value in changes:
        patch.setattr(module, name, value)
