"""A process that has the slow imports behind it before it knows its stage: `python -m spinreg_core.runtime.prewarmed`.

Decides: what is imported ahead. Reads one line from standard input, the name of a stage's module and its job file
as JSON, and goes on as `python -m MODULE JOB.json`; ends where there is no line.
Leaves out: when one is started and who gets it (`tasks/spare.py`). No device is touched before the stage begins.
"""

from __future__ import annotations

import json
import runpy
import sys

from spinreg_core.runtime.supervision import die_with_parent


def main() -> None:
    die_with_parent()
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    line = sys.stdin.readline()
    if line:
        module, job_file = json.loads(line)
        sys.argv = [module, job_file]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
