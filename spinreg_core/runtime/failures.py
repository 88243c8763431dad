"""The message and exit status of a failed stage, and the rank at fault among several.

Decides: the message and exit status of every error, and the error that they stand for in the process that waits;
which of several failed ranks was the first cause.
Leaves out: the consequences of an error (`tasks.run_stage`).
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from spinreg_core.config import RunConfig
from spinreg_core.errors import (
    EXIT_BAD_INPUT,
    EXIT_DAMAGED,
    EXIT_JUDGE_AWAY,
    EXIT_PREEMPTED,
    BadInput,
    Damaged,
    JudgeAway,
    SpinregError,
    StageFailed,
    StagePreempted,
    without_credentials,
)

# The folder in the job's workdir with rank-N.log, rank-N.err, failure-N.json, stack-N.txt and alive-N.
RANKS = "ranks"
# The errors that a process reports by its exit status, and the first words of their messages.
_REPORTED: tuple[tuple[type[SpinregError], int, str], ...] = (
    (BadInput, EXIT_BAD_INPUT, "bad input: "),
    (Damaged, EXIT_DAMAGED, "damaged: "),
    (JudgeAway, EXIT_JUDGE_AWAY, "error: "),
)
_PREFIXES = tuple(prefix for _, _, prefix in _REPORTED)
# Lines of output that a process's message may have: a listing of bad rows is longer than the end of a traceback.
MESSAGE_LINES = 200
_SHOWN_LINES = 20
# gloo and NCCL raise plain RuntimeErrors, so only their texts tell that another rank ended or kept this one waiting.
_GONE = re.compile(r"Connection closed by peer|Connection reset|Broken pipe|Connection refused|remote process exited")
_TIMED_OUT = re.compile(r"Timed out waiting|Timeout|timeout", re.ASCII)
# The limit in messages of `rank_watch`, which would look like a timeout of a collective.
_LIMIT = re.compile(r"\(resources\.collective_timeout_seconds: [\d.e+]+\)")
_COMMUNICATION = re.compile(r"gloo|nccl|NCCL|DistBackendError|DistNetworkError|ProcessGroup|TCPStore|collective")
# Stages that hold only a policy and its KV cache. With engine hf, MT-Bench is answered in the `benchmark` process.
_SAMPLING = ("generate", "mt-bench-answers", "benchmark")
_NO_MEMORY = re.compile("can't allocate memory|not enough memory")


@dataclass(frozen=True)
class RankFailure:
    """A failed rank's report to the process that started it, as JSON in `failure-RANK.json`."""

    rank: int
    time: float
    status: int
    message: str

    def text(self) -> str:
        """Return the message for the log."""
        if self.message.startswith(_PREFIXES):
            return self.message
        return f"rank {self.rank} failed:\n{self.message}"


def describe_error(error: BaseException, stage: str, config: RunConfig) -> tuple[int, str]:
    """Return (exit status, message) for an error of a stage."""
    for kind, status, prefix in _REPORTED:
        if isinstance(error, kind):
            return status, f"{prefix}{error}"
    if isinstance(error, SpinregError):
        return 1, f"error: {error}"
    if is_out_of_memory(error):
        return 1, f"error: {_memory_message(error, stage, config)}"
    where = without_credentials("".join(traceback.format_exception(error)).rstrip())
    if isinstance(error, SystemExit):
        where = f"a call in {stage} ended the process with status {error.code!r}:\n{where}"
    return 1, where


def process_error(name: str, status: int, output: Sequence[str], log_file: Path | None = None) -> SpinregError:
    """Return the error that a process ended with.

    Args:
        name: the process in messages, such as its stage.
        output: the last lines of its output.
        log_file: the file with all of its output.
    """
    for kind, own, prefix in _REPORTED:
        if status == own:
            start = max((i for i, line in enumerate(output) if line.startswith(prefix)), default=None)
            text = "no message" if start is None else "\n".join(output[start:]).removeprefix(prefix)
            return kind.from_message(text)
    if status in (EXIT_PREEMPTED, -signal.SIGTERM):
        return StagePreempted(
            f"{name}: stopped from outside (SIGTERM); its committed parts stay, and a retry continues"
        )
    how = f"exit status {status}" if status >= 0 else f"killed by {_signal_text(-status)}"
    place = "the end of its output" if log_file is None else f"whole output in {log_file}, its end"
    end = "\n".join(f"  {line}" for line in output[-_SHOWN_LINES:]) or "  (no output)"
    return StageFailed(f"{name}: {how}; {place}:\n{end}")


def _signal_text(number: int) -> str:
    if number != signal.SIGKILL:
        return signal.Signals(number).name
    return (
        "SIGKILL, often the kernel's out-of-memory killer (see dmesg): set a smaller resources.tokens_per_pass (or "
        "kv_cache_tokens for answers), training.activation_checkpointing full, or training.lora_rank; `spinreg plan` "
        "shows the memory of each stage"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return True where a GPU or the host has no memory left for a tensor."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        # Torch's allocator for the host raises plain RuntimeErrors.
        or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None)
    )


def _memory_message(error: BaseException, stage: str, config: RunConfig) -> str:
    text = str(error)
    asked = "an unnamed amount"
    if found := re.search(r"[Tt]ried to allocate ([\d.]+) ?([KMG]iB)", text):
        asked = f"{found[1]} {found[2]}"
    elif found := re.search(r"tried to allocate (\d+) bytes", text):
        asked = f"{int(found[1]) / 2**30:.2f} GiB"
    training, resources = config.training, config.resources
    helps = [f"resources.tokens_per_pass below {resources.tokens_per_pass}"]
    if stage in _SAMPLING:
        helps = ["a smaller resources.kv_cache_tokens (hf)",
                 "resources.gpu_memory_utilization (vllm)"]  # fmt: skip
    if stage == "lm-eval":
        helps = [f"benchmarks.batch_size below {config.benchmarks.batch_size} (hf)",
                 "resources.gpu_memory_utilization (vllm)"]  # fmt: skip
    if stage == "train":
        if training.activation_checkpointing != "full":
            helps.append(f"training.activation_checkpointing full (now {training.activation_checkpointing})")
        if training.lora_rank is None:
            helps.append("training.lora_rank (gradients and optimiser state of an adapter only)")
        if training.optimizer == "adamw":
            helps.append("training.optimizer rmsprop (half of adamw's state)")
        helps.append("more resources.processes (they share the weights)")
    # The hf backend of lm-eval keeps float32 weights with mixed too.
    if stage not in (*_SAMPLING, "lm-eval") and training.precision == "fp32":
        helps.append("training.precision mixed")
    return (
        f"out of memory in {stage}: it asked for {asked} more. Any of these helps: {'; '.join(helps)}. "
        f"`spinreg plan` shows the memory each needs. ({text.splitlines()[0] if text else type(error).__name__})"
    )


def record(folder: Path, rank: int, status: int, message: str) -> None:
    """Record a rank's failure for the process that started it."""
    failure = RankFailure(rank, time.time(), status, message)
    path = folder / f"failure-{rank}.json"
    # Renamed into place, so that a reader never sees half of it.
    path.with_suffix(".tmp").write_text(json.dumps(asdict(failure)))
    path.with_suffix(".tmp").replace(path)


def alive(folder: Path) -> dict[int, float]:
    """Return the ranks of this node that have not finished, with the time of their last sign of life (`rank_watch`)."""
    found = {}
    for path in folder.glob("alive-*"):
        # A rank removes its file when it finishes, also between these two lines.
        with contextlib.suppress(FileNotFoundError):
            found[int(path.name.removeprefix("alive-"))] = path.stat().st_mtime
    return found


def any_recorded(folder: Path) -> bool:
    """Return True if a rank of this node has failed."""
    return any(folder.glob("failure-*.json"))


def root_failure(folder: Path, statuses: Mapping[int, int]) -> tuple[int, str]:
    """Return (exit status, message) of a stage with failed ranks. `statuses`: exit statuses by rank, negative signals.

    The rank at fault is, in this order: one that was killed; the earliest with an error of its own; one that left with
    status 0 before its end; one that never arrived where the others waited.
    """
    paths = folder.glob("failure-*.json")
    failures = sorted((RankFailure(**json.loads(path.read_text())) for path in paths), key=lambda failure: failure.time)
    reported = {failure.rank for failure in failures}
    for rank, status in sorted(statuses.items()):
        # SIGTERM makes a rank write its stack, so one with a stack was told to stop and is no cause.
        ended = bool(_stack(folder, rank))
        if status < 0 and rank not in reported and not ended and -status not in (signal.SIGTERM, signal.SIGABRT):
            if status == -signal.SIGKILL and any(_TIMED_OUT.search(failure.message) for failure in failures):
                # torchrun killed it, because it answered neither the other ranks nor SIGTERM.
                return 1, (
                    f"error: rank {rank} did not answer for resources.collective_timeout_seconds, nor when it was told "
                    f"to stop, and was killed: it was suspended, or hung outside Python{_last_words(folder, rank)}"
                )
            return 1, f"error: rank {rank} was killed by {_signal_text(-status)}{_last_words(folder, rank)}"
    own = [failure for failure in failures if not is_secondary_failure(failure.message)]
    if own:
        return own[0].status, own[0].text()
    left = [rank for rank in alive(folder) if rank not in {*reported, *statuses} and not _stack(folder, rank)]
    if failures and left:
        return 1, (
            f"error: rank {left[0]} left with exit status 0 before its work was done: a call in it ended the "
            f"process{_last_words(folder, left[0])}"
        )
    waited = [failure for failure in failures if not _GONE.search(failure.message)]
    missing = [rank for rank in _ranks_here(folder) if rank not in reported]
    if waited and missing:
        where = "\n".join(f"rank {rank} was here:\n{_stack(folder, rank) or '(unknown)'}" for rank in missing)
        return 1, (
            f"error: {'ranks' if len(missing) > 1 else 'rank'} {', '.join(map(str, missing))} did not arrive where the "
            f"others waited (resources.collective_timeout_seconds).\n{where}"
        )
    if failures:
        return 1, failures[0].text()
    rank, status = next(iter(sorted(statuses.items())), (0, 1))
    return (status if status > 0 else 1), f"error: rank {rank} ended with status {status}{_last_words(folder, rank)}"


def is_secondary_failure(message: str) -> bool:
    """Return True for a failure that only says that another rank went away or did not answer."""
    text = _LIMIT.sub("", message)
    if text.startswith("error: "):
        # The lines after the first are a stack, which may hold any of these words.
        text = text.splitlines()[0]
    return bool(_COMMUNICATION.search(text) and (_GONE.search(text) or _TIMED_OUT.search(text)))


def _ranks_here(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("stack-")) for path in folder.glob("stack-*.txt"))


def _stack(folder: Path, rank: int) -> str:
    path = folder / f"stack-{rank}.txt"
    return path.read_text().strip() if path.exists() else ""


def _last_words(folder: Path, rank: int) -> str:
    paths = [folder / f"rank-{rank}.{kind}" for kind in ("log", "err")]
    lines = [line for path in paths if path.exists() for line in path.read_text(errors="replace").splitlines()[-10:]]
    return "".join(["; the end of its output:"] + [f"\n  {line}" for line in lines]) if lines else ""
