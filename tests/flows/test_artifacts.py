"""Trackers and artifacts are best effort: a failure is reported and ends nothing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from flows.artifacts import track
from spinreg_core.config import RunConfig, TrackingConfig
from spinreg_core.store.open import open_store


def test_track_failing_tracker_is_logged_and_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(str(tmp_path))
    with caplog.at_level(logging.INFO):
        track(store, RunConfig())
        assert not caplog.records
        track(store, RunConfig(run="nobody", tracking=TrackingConfig(to=["tensorboard", "mlflow"])))
    first, second = caplog.messages
    assert first.startswith("run 'nobody' is not shown in tensorboard: run: found 'nobody'")
    assert second.startswith("run 'nobody' is not shown in mlflow: ")
