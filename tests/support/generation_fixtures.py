"""A store with a data object and the tiny policies of three iterates, for tests of the generate stage."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spinreg_core.config import RunConfig
from spinreg_core.models.chat_template import Renderer
from spinreg_core.runs import fetch, objects
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import Manifest
from spinreg_core.store.open import open_store

END, PROMPTS, HELDOUT = 1, 23, 5
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# For the script of an engine's process: tells of every policy that is loaded, in a file below {root!r}.
LOADS = """
import os
from pathlib import Path
from spinreg_core.models import loading
load = loading.load_policy
def noted(folder, *more):
    with open(Path({root!r}, "loads"), "a") as file:
        print(os.getpid(), folder.parts[folder.parts.index("objects") + 1], file=file)
    return load(folder, *more)
loading.load_policy = noted
"""


def write_policy(folder: Path, seed: int) -> None:
    """A random Llama over bytes, with a chat template; it ends a turn about every thirtieth token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(special + letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>", additional_special_tokens=special[2:]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=96, initializer_range=0.3, bos_token_id=None, eos_token_id=END, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[END] = 0.0  # a logit in the middle of the others': neither rare nor certain
        model.lm_head.weight *= 0.5
    model.save_pretrained(folder)


def rows(renderer: Renderer, count: int, kind: str) -> pa.Table:
    prompts = [[{"role": "user", "content": f"{kind} {i} " + "x" * (i % 7)}] for i in range(count)]
    return pa.table(
        {
            "prompt_id": [f"{kind}-{i:04d}" for i in range(count)],
            "prompt_ids": pa.array([renderer.prompt_ids(p) for p in prompts], pa.list_(pa.int32())),
            "answer": ["yes"] * count,
        }
    )


class House:
    """A local store with a data object and the policies of iterates 0, 1 and 2."""

    def __init__(self, root: Path) -> None:
        self.root, self.store = root, open_store(str(root / "store"))
        for n in range(3):
            write_policy(root / f"iterate-{n}" / "policy", seed=n)
            self._publish(f"policy-{n}", root / f"iterate-{n}")
        self.renderer = Renderer.from_folder(root / "iterate-0" / "policy")
        (root / "data").mkdir()
        for kind, count in (("train", PROMPTS), ("heldout", HELDOUT)):
            pq.write_table(rows(self.renderer, count, kind), root / "data" / f"{kind}.parquet")
        self._publish("data", root / "data")

    def _publish(self, name: str, folder: Path) -> None:
        job = Job("base", name, {}, self.store.url, "w", 0, {}, RunConfig(), self.root)
        objects.publish(self.store, job, folder, metrics={})

    def job(self, name: str, *, iterates: list[int], round_number: int = 3, engine: str = "hf", kind: str = "train",
            writer: str = "e1-a", geometric: dict[str, float] | None = None, resources: dict[str, Any] | None = None,
            **generation: Any) -> Job:  # fmt: skip
        """`iterates`, newest first, share the prompts equally."""
        config = RunConfig.model_validate(
            {
                "store": self.store.url,
                "seed": 7,
                "data": {"prompts_per_round": 13, "max_prompt_tokens": 64, "max_length": 96},
                "resources": {"device": "cpu", "kv_cache_tokens": 150} | (resources or {}),
                "generation": {"dtype": "float32", "max_new_tokens": 12, "shard_size": 4} | generation,
            }
        )
        extra: dict[str, Any] = {"rows": kind}
        if kind == "train":
            extra["weights"] = [1 / len(iterates)] * len(iterates)
        policies = {str(n): f"policy-{n}" for n in iterates}
        if geometric:
            extra["geometric"] = geometric
            policies["0"] = "policy-0"
        return Job(
            stage="generate", object_id=f"generate-{name}", key={"sampler": {"engine": engine}}, store=self.store.url,
            writer=writer, round=round_number, inputs={"data": "data", "policies": policies}, config=config,
            workdir=self._workdir(), extra=extra,
        )  # fmt: skip

    def loads(self) -> dict[int, list[str]]:
        """The policies that processes with `LOADS` in their script have loaded, in their order, by process id."""
        found = defaultdict(list)
        for line in (self.root / "loads").read_text().splitlines():
            pid, name = line.split()
            found[int(pid)].append(name)
        return found

    def _workdir(self) -> Path:
        folder = self.root / f"work-{len(list(self.root.glob('work-*')))}"
        folder.mkdir()
        return folder

    def answers(self, manifest: Manifest) -> pa.Table:
        names = sorted(file.name for file in manifest.files)
        paths = [fetch.fetch_file(self.store, manifest.object_id, name) for name in names]
        return pa.concat_tables([pq.read_table(path) for path in paths])


def by_answer(table: pa.Table) -> dict[tuple[str, int], dict[str, Any]]:
    rows = {(row["prompt_id"], row["answer"]): row for row in table.to_pylist()}
    assert len(rows) == len(table)
    return rows


def drawn(rows: dict[tuple[str, int], dict[str, Any]]) -> dict[tuple[str, int], tuple[Any, ...]]:
    return {key: (row["iterate"], row["geometric"], row["answer_ids"], row["seed"]) for key, row in rows.items()}
