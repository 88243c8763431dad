"""Functions that tests run on each of several ranks: `torchrun tests/support/rank_processes.py FUNCTION FOLDER JSON`.

`ranked(...)` starts it from a test. A function gets its Ranks and the folder, and leaves files there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


def ranked(processes: int, function: str, folder: Path, *, timeout: float = 240, **arguments: Any) -> str:
    """Run a function of this file on so many ranks. Returns what they printed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               str(Path(__file__)), function, str(folder), json.dumps(arguments)]  # fmt: skip
    paths = str(TESTS.parent)
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=timeout, check=False,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-20000:]
    return done.stdout


def a_ranked_round(ranks: Any, policy: str, pairs: list[Any], training: dict[str, Any], tokens: int) -> Any:
    from spinreg_core.config import ObjectiveConfig, TrainingConfig
    from spinreg_core.logprobs.policy import load_for
    from spinreg_core.models.lora import add_adapter, start_adapter
    from spinreg_core.training.trainer import RoundTrainer

    settings = TrainingConfig(**{"precision": "fp32", "learning_rate": 1e-3, "batch_size": 8} | training)
    change = partial(add_adapter, training=settings) if settings.lora_rank else lambda model: None
    model = load_for(ranks, policy, settings.precision, change)
    if settings.lora_rank:
        start_adapter(model, 4)
    return RoundTrainer(model, pairs, objective=ObjectiveConfig(alpha=0.5, beta=0.1), training=settings, seed=3,
                 round_number=2, tokens_per_pass=tokens, ranks=ranks)  # fmt: skip


def gradient(ranks: Any, folder: Path, kind: str, tokens: int, **training: Any) -> None:
    """The gradient of eight pairs, and what it came with."""
    from safetensors.torch import save_file

    from spinreg_core.logprobs.sequence import longest_packed
    from spinreg_core.models.fsdp import full_tensor

    pairs = json.loads((folder.parent / "pairs.json").read_text())
    round_ = a_ranked_round(ranks, str(folder.parent / kind), pairs, training, tokens)
    found = round_.gradient(pairs)
    named = round_.model.named_parameters()
    grads = {name: full_tensor(p.grad).contiguous() for name, p in named if p.requires_grad}
    if ranks.mesh is not None:  # no rank holds much more than its share
        held = sum(p.to_local().numel() for p in round_.model.parameters())
        share = sum(p.numel() for p in round_.model.parameters()) / ranks.mesh.shape[-1]
        assert held <= 1.25 * share, (held, share)
    if ranks.first:
        save_file(grads, folder / "gradient.safetensors")
        (folder / "values.json").write_text(json.dumps(found))
        (folder / "longest_packed.json").write_text(json.dumps(longest_packed(round_.model)))


def steps(ranks: Any, folder: Path, kind: str, tokens: int, **training: Any) -> None:
    """A whole round: its metrics and the policy it publishes."""
    import torch
    import torch.distributed as dist

    from spinreg_core.models.fsdp import full_tensor
    from spinreg_core.models.lora import read_adapter
    from spinreg_core.training.checkpoint_files import publish_adapted, publish_policy

    pairs = json.loads((folder.parent / "pairs.json").read_text())
    round_ = a_ranked_round(ranks, str(folder.parent / kind), pairs, training, tokens)
    round_.watch_start()
    while round_.state.done < round_.steps:
        round_.step()
    summary = round_.summary()
    if training.get("lora_rank"):
        publish_adapted(round_.model, folder.parent / kind, folder, round_.training, "base", ranks)
        if ranks.size > 1:
            dist.barrier()
        # Another round's start has the same numbers.
        again = a_ranked_round(ranks, str(folder.parent / kind), pairs, training, tokens)
        read_adapter(again.model, folder / "adapter", alone=ranks.size == 1)
        for (name, a), b in zip(round_.model.named_parameters(), again.model.parameters(), strict=True):
            assert torch.equal(full_tensor(a.detach()), full_tensor(b.detach())), name
    else:
        publish_policy(round_.model, folder.parent / kind, folder / "policy", ranks=ranks)
    if ranks.first:
        (folder / "metrics.json").write_text(json.dumps([round_.state.metrics, summary]))


def scores(ranks: Any, folder: Path, kind: str, tokens: int) -> None:
    """Scores of rows with an empty answer among them, and of one row: most ranks have none."""
    from spinreg_core.logprobs.policy import load_for
    from spinreg_core.logprobs.scoring import score
    from tests.support.tiny_models import random_rows

    prompts, answers = random_rows(9, 7)
    answers[3] = []
    model = load_for(ranks, folder.parent / kind, "fp32")
    found = [
        score(model, prompts[:n], answers[:n], precision="fp32", tokens_per_pass=tokens, ranks=ranks) for n in (1, 9)
    ]
    (folder / f"scores-{ranks.rank}.json").write_text(json.dumps(found))


def several(ranks: Any, folder: Path, work: dict[str, dict[str, Any]]) -> None:
    """Functions of this file by the name of their folder: starting processes takes longer than what they do."""
    import torch.distributed as dist

    for name, arguments in work.items():
        (folder / name).mkdir(exist_ok=True)
        globals()[arguments.pop("do")](ranks, folder / name, **arguments)
        if ranks.size > 1:
            dist.barrier()


if __name__ == "__main__":
    import torch.distributed

    from spinreg_core.config import ResourcesConfig
    from spinreg_core.runtime.distributed import init_ranks

    given = json.loads(sys.argv[3])
    resources = ResourcesConfig(device="cpu", shard_over=given.pop("shard_over", "auto"), collective_timeout_seconds=60,
                                compile=given.pop("compile", "auto"))  # fmt: skip
    globals()[sys.argv[1]](init_ranks(resources), Path(sys.argv[2]), **given)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
