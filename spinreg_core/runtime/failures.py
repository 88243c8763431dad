"""How a stage process says why it ended, and which of many ranks is to be heard.

Decides: the message and exit status of every error; of several failed ranks, the one at fault and not those that its
end brought down. Leaves out: what follows from an exit status (`tasks/process.py`).
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spinreg_core.config import RunConfig
from spinreg_core.errors import (
    EXIT_BAD_INPUT,
    EXIT_DAMAGED,
    EXIT_JUDGE_AWAY,
    BadInput,
    Damaged,
    JudgeAway,
    SpinregError,
    without_credentials,
)

# What a rank says when another one went away or kept it waiting; the texts are those of gloo and NCCL.
_GONE = re.compile(r"Connection closed by peer|Connection reset|Broken pipe|Connection refused|remote process exited")
_TIMED_OUT = re.compile(r"Timed out waiting|Timeout|timeout", re.ASCII)
_LIMIT = re.compile(r"\(resources\.collective_timeout_seconds: [\d.e+]+\)")  # said of a rank's own silence
_COMMUNICATION = re.compile(r"gloo|nccl|NCCL|DistBackendError|DistNetworkError|ProcessGroup|TCPStore|collective")


def describe_error(error: BaseException, stage: str, config: RunConfig) -> tuple[int, str]:
    """(exit status, what is printed) for an error of a stage."""
    if isinstance(error, BadInput):
        return EXIT_BAD_INPUT, f"bad input: {error}"
    if isinstance(error, Damaged):
        return EXIT_DAMAGED, f"damaged: {error}"
    if isinstance(error, JudgeAway):
        return EXIT_JUDGE_AWAY, f"error: {error}"
    if isinstance(error, SpinregError):
        return 1, f"error: {error}"
    if isinstance(error, SystemExit):
        where = "".join(traceback.format_exception(error)).rstrip()
        return 1, f"something {stage} called left the process with status {error.code!r}:\n{where}"
    if _out_of_memory(error):
        return 1, f"error: {_memory_message(error, stage, config)}"
    return 1, without_credentials("".join(traceback.format_exception(error)).rstrip())


def _out_of_memory(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _memory_message(error: BaseException, stage: str, config: RunConfig) -> str:
    text = str(error)
    asked = "an amount it does not name"
    if found := re.search(r"[Tt]ried to allocate ([\d.]+) ?([KMG]iB)", text):
        asked = f"{found[1]} {found[2]}"
    elif found := re.search(r"tried to allocate (\d+) bytes", text):
        asked = f"{int(found[1]) / 2**30:.2f} GiB"
    training, resources = config.training, config.resources
    helps = [f"resources.tokens_per_pass below {resources.tokens_per_pass}"]
    if stage == "generate":
        helps = ["a smaller resources.kv_cache_tokens (hf)",
                 "resources.gpu_memory_utilization (vllm)"]  # fmt: skip
    if stage == "train":
        if training.activation_checkpointing != "full":
            helps.append(f"training.activation_checkpointing full (now {training.activation_checkpointing})")
        if training.lora_rank is None:
            helps.append("training.lora_rank (gradients and optimiser of an adapter alone)")
        if training.optimizer == "adamw":
            helps.append("training.optimizer rmsprop (half of adamw's state)")
        helps.append("more resources.processes (the weights are spread over them)")
    if stage != "generate" and training.precision == "fp32":
        helps.append("training.precision mixed")
    return (
        f"out of memory in {stage}: it asked for {asked} more. What would help: {'; '.join(helps)}. "
        f"`spinreg plan` says what each needs. ({text.splitlines()[0] if text else type(error).__name__})"
    )


MEMORY_HELPS = (
    "what would help is a smaller resources.tokens_per_pass (or kv_cache_tokens for answers), "
    "training.activation_checkpointing full, training.lora_rank; `spinreg plan` says what each stage needs"
)


def record(folder: Path, rank: int, status: int, message: str) -> None:
    """Leave a rank's failure for the process that started it."""
    entry = {"rank": rank, "time": time.time(), "status": status, "message": message}
    path = folder / f"failure-{rank}.json"
    path.with_suffix(".tmp").write_text(json.dumps(entry))
    path.with_suffix(".tmp").replace(path)


def alive(folder: Path) -> dict[int, float]:
    """Ranks of this node that have not come to their proper end, and when each last said that it runs
    (`rank_watch.py`)."""
    found = {}
    for path in folder.glob("alive-*"):
        with contextlib.suppress(FileNotFoundError):  # it ends just now
            found[int(path.name.removeprefix("alive-"))] = path.stat().st_mtime
    return found


def any_recorded(folder: Path) -> bool:
    """Whether a rank of this node has failed."""
    return any(folder.glob("failure-*.json"))


def verdict(folder: Path, statuses: Mapping[int, int]) -> tuple[int, str]:
    """(exit status, what to print) of a stage whose ranks failed. `statuses`: exit statuses by rank, negative signals.

    A rank that was killed comes first, then one with an error of its own (the earliest), then one that left with
    status 0 before its end, then one that never arrived where the others waited.
    """
    records = sorted((json.loads(path.read_text()) for path in folder.glob("failure-*.json")), key=lambda r: r["time"])
    told = {entry["rank"] for entry in records}
    for rank, status in sorted(statuses.items()):
        ended = bool(_stack(folder, rank))  # by us: it had been told to stop
        if status < 0 and rank not in told and not ended and -status not in (signal.SIGTERM, signal.SIGABRT):
            name = signal.Signals(-status).name
            if name == "SIGKILL" and any(_TIMED_OUT.search(entry["message"]) for entry in records):
                # Ours: it had not answered the others, nor SIGTERM, which would have left its stack.
                return 1, (
                    f"error: rank {rank} did not answer for resources.collective_timeout_seconds, nor when it was told "
                    f"to stop, and was killed: it was suspended, or hung outside Python{_last_words(folder, rank)}"
                )
            hint = f", often the kernel's out-of-memory killer (see dmesg): {MEMORY_HELPS}" if name == "SIGKILL" else ""
            return 1, f"error: rank {rank} was killed by {name}{hint}{_last_words(folder, rank)}"
    own = [entry for entry in records if not is_secondary_failure(entry["message"])]
    if own:
        return own[0]["status"], _said(own[0])
    left = [rank for rank in alive(folder) if rank not in told and rank not in statuses and not _stack(folder, rank)]
    if records and left:
        return 1, (
            f"error: rank {left[0]} left with exit status 0 before its work was done: something it called ended the "
            f"process{_last_words(folder, left[0])}"
        )
    waited = [entry for entry in records if not _GONE.search(entry["message"])]
    missing = [rank for rank in _ranks_here(folder) if rank not in told]
    if waited and missing:
        where = "\n".join(f"rank {rank} was here:\n{_stack(folder, rank) or '(it could not say)'}" for rank in missing)
        return 1, (
            f"error: {'ranks' if len(missing) > 1 else 'rank'} {', '.join(map(str, missing))} did not arrive where the "
            f"others waited (resources.collective_timeout_seconds).\n{where}"
        )
    if records:
        return 1, _said(records[0])
    rank, status = next(iter(sorted(statuses.items())), (0, 1))
    return (status if status > 0 else 1), f"error: rank {rank} ended with status {status}{_last_words(folder, rank)}"


def _said(entry: dict[str, Any]) -> str:
    if entry["message"].startswith(("bad input: ", "damaged: ", "error: ")):
        return entry["message"]
    return f"rank {entry['rank']} failed:\n{entry['message']}"


def is_secondary_failure(message: str) -> bool:
    """Whether a failure is only that another rank went away or did not answer."""
    text = _LIMIT.sub("", message)
    if text.startswith("error: "):
        text = text.splitlines()[0]  # what follows is where it happened
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
