"""`make audit`: what pip-audit is asked about, and that silence is no clean bill."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PYTHON = """#!/bin/sh
case "$*" in
    *freeze*) printf 'torch==2.13.0+cpu\\njinja2==3.1.6\\nllm @ file:///x\\n' ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *pip_audit*) echo "$*" > "$ASKED" ; cp "$4" "$ASKED.requirements" ; exit "$AUDITED" ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the script and a virtual environment whose python only answers."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/audit.sh", tmp_path / "scripts")
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / "scratch").mkdir()
    return tmp_path


def audit(project: Path, status: int) -> subprocess.CompletedProcess[str]:
    told = {"ASKED": str(project / "asked"), "AUDITED": str(status), "TMPDIR": str(project / "scratch")}
    return subprocess.run(
        ["sh", str(project / "scripts/audit.sh")], env=os.environ | told, capture_output=True, text=True
    )


def test_audit_asks_about_installed_packages_and_leaves_no_file(project: Path) -> None:
    done = audit(project, 0)
    assert done.returncode == 0, done.stderr
    assert (project / "asked.requirements").read_text() == "torch==2.13.0\njinja2==3.1.6\n"
    assert {"--strict", "--no-deps", "--disable-pip"} <= set((project / "asked").read_text().split())
    assert list((project / "scratch").iterdir()) == []


def test_audit_fails_on_findings_and_unknown_packages(project: Path) -> None:
    done = audit(project, 1)
    assert done.returncode == 1
    assert "was not audited" in done.stderr
    assert list((project / "scratch").iterdir()) == []


def test_audit_is_a_make_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^audit: install.*\n\tsh scripts/audit\.sh \$\(VENV\)$", makefile, re.MULTILINE)
    assert re.search(r"^\.PHONY:.*\baudit\b", makefile, re.MULTILINE)
