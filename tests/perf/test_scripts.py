"""The benchmarks answer --help, offer --quick, and count the work by the formula they state. (Their figures are not
tested: timed assertions do not belong here.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[2] / "perf"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.name != "work.py")
sys.path.insert(0, str(FOLDER))


def test_perf_has_scripts() -> None:
    assert {"train_vs_trl.py", "scaling.py", "checkpoints.py"} <= {path.name for path in SCRIPTS}


# All in one process: each alone imports torch and transformers.
HELP = """
import contextlib, io, json, runpy, sys
said = {}
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        runpy.run_path(path, run_name="__main__")
    said[path] = out.getvalue()
print(json.dumps(said))
"""


def test_scripts_help_names_quick() -> None:
    command = [sys.executable, "-c", HELP, *map(str, SCRIPTS)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(FOLDER)}
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert [path for path, text in said.items() if "--quick" not in text] == []
    assert len(said) == len(SCRIPTS)


@pytest.mark.slow
@pytest.mark.long
def test_a_quick_run_ends_with_one_line_of_figures() -> None:
    """Run the fastest script only. Its figures are not checked."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / "prompts.py"), "--quick"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *table, last = done.stdout.strip().splitlines()
    figures = json.loads(last)
    assert [row["prompts"] for row in figures["curve"]] == [2_000, 20_000]
    assert figures["ratio"] > 0
    assert len(table) == 3
    assert "memory MB" in table[0]


def test_model_flops_equal_a_count_by_hand() -> None:
    """One layer of width 2 and MLP width 3, vocabulary 5; a prompt of 4 tokens, answers of 3 and 2."""
    from work import model_flops

    config = SimpleNamespace(
        hidden_size=2,
        intermediate_size=3,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=5,
    )
    pair = {"prompt_ids": [1, 2, 3, 4], "real_ids": [5, 6, 7], "generated_ids": [8, 9]}
    weights = 4 * 2 * 2 + 3 * 2 * 3
    tokens, answers = 4 + 2 + 1, 3 + 2  # the last token of an answer is no input
    seen = 4**2 / 2 + 3 * (4 + 3 / 2) + 2 * (4 + 2 / 2)
    assert model_flops([pair], config) == 6 * (weights * tokens + 2 * 5 * answers) + 12 * 2 * seen
    # Further answers to the prompt cost themselves alone.
    other = pair | {"generated_ids": [9, 9]}
    more = 6 * (weights * 1 + 2 * 5 * 2) + 12 * 2 * 2 * (4 + 1)
    assert model_flops([pair, other], config) - model_flops([pair], config) == more
