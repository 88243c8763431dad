"""Tests of this room use toy stages, which neither sync files nor look at installed packages."""

from __future__ import annotations

from tests.support.toy_runs import quick

__all__ = ["quick"]
