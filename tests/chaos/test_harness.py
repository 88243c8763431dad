"""The short form of the fault harness: a run behind a bad network, killed three times, ends as an undisturbed one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_short_form_loses_nothing() -> None:
    script = Path(__file__).with_name("harness.py")
    done = subprocess.run([sys.executable, str(script), "--short"], capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert figures["losses"] == 0, figures["lost"]
    assert figures["kills"] == 3, "each victim lived, and did not afterwards"
    assert figures["missed"] == 0
    assert figures["faults"] > 20
    assert figures["runs"] == 2
    assert figures["work_repeated_percent"] < 100
