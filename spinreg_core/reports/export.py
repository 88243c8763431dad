"""A policy of a run as an ordinary model folder with a model card.

Decides: the content of the folder, the sizes of weight files and the text of the card; the folder appears whole or not
at all. Leaves out: the policy itself, which is the committed one, bit for bit.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spinreg_core.errors import BadInput
from spinreg_core.evaluation.formatting import counts, format_estimate, label
from spinreg_core.evaluation.intervals import Estimate
from spinreg_core.evaluation.schema import StoredBenchmark
from spinreg_core.formatting import first_line
from spinreg_core.reports.run_report import report_data
from spinreg_core.reports.templating import template
from spinreg_core.runs.fetch import fetch_folder
from spinreg_core.runs.head import require_head
from spinreg_core.runs.objects import require_manifest
from spinreg_core.runs.plans import policy_object
from spinreg_core.store.base import Store

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def export(
    store: Store, run: str, target: Path | None, *, round_number: int | None = None, shard_size: str | None = None
) -> Path:
    """Write the policy of a run to a folder and return that folder.

    The folder holds the verified files of the committed policy (weights in safetensors, config and generation config,
    tokenizer, chat template) and README.md, the model card.

    target: the folder, which must be empty or missing; default `RUN-round-N` in the current folder.
    round_number: the iterate; default the last trained, 0 is the base.
    shard_size: largest size of a weights file, such as `5GB`, `500MB` or `2GiB`; default the files as committed.

    Raises:
        BadInput: no such run or round, a target that is not empty, or a size that cannot be read.
        Removed: `spinreg gc` removed the policy.
        Damaged: a committed file is missing or altered.
    """
    head = require_head(store, run)
    trained = [entry.round for entry in head.rounds if "train" in entry.stages]
    number = max(trained, default=0) if round_number is None else round_number
    if head.base is None:
        raise BadInput(f"run {run!r}", "has no prepared base yet", "run its first round, then export it")
    if number and number not in trained:
        known = ", ".join(map(str, sorted(trained))) or "none"
        raise BadInput("--round", f"{number}, which is not trained in run {run!r}", f"0 or a trained round ({known})")
    most = None if shard_size is None else parse_size(shard_size)
    target = (Path(f"{run}-round-{number}") if target is None else target).absolute()
    if target == Path.cwd():
        raise BadInput("--to", f"is the current folder ({target})", "name another folder, which export creates")
    _require_free("--to", target)
    source = fetch_folder(store, policy_object(head, number), "policy")
    with _appearing(target) as folder:
        for path in sorted(source.iterdir()):
            if most is None or not _WEIGHTS.fullmatch(path.name):
                shutil.copyfile(path, folder / path.name)
        if most is not None:
            reshard(source, folder, most)
        (folder / "README.md").write_text(model_card(store, run, number), encoding="utf-8")
    return target


def _require_free(field: str, target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput(field, f"is not empty ({target})", "name an empty folder or a new one")


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Yield a scratch folder next to `target`. It becomes `target` at the end, or is deleted on an error."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent)
    except OSError as error:
        raise BadInput("--to", f"{target} ({error.strerror})", "a place where a folder can be created") from None
    with place as scratch:
        folder = Path(scratch) / target.name
        folder.mkdir()
        yield folder
        if target.exists():
            target.rmdir()
        folder.rename(target)


def parse_size(text: str) -> int:
    """Return the bytes of `5GB`, `500 MB` or `2GiB`. Raises BadInput."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * _UNITS.get(found[2].upper(), 0)) if found else 0
    if size < 10**6:
        raise BadInput("--shard-size", repr(text), "a size of at least 1MB, such as 5GB or 500MB")
    return size


def reshard(source: Path, folder: Path, most: int) -> None:
    """Copy the weights of a model folder into files of at most `most` bytes, each with at least one tensor.

    Only one file's tensors are in memory at a time.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors import safe_open
    from safetensors.torch import save_file

    where: dict[str, Path] = {}
    sizes: dict[str, int] = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                # The file is memory-mapped, so this reads no weights yet.
                tensor = file.get_tensor(name)
                where[name], sizes[name] = path, tensor.nbytes
    split = split_state_dict_into_shards_factory(
        sizes,  # type: ignore[arg-type]
        get_storage_size=lambda size: int(size),  # type: ignore[call-overload]
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=most,
    )
    for file_name, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            with safe_open(where[name], "pt") as file:
                tensors[name] = file.get_tensor(name)
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        # safetensors creates files that only their owner can read.
        (folder / file_name).chmod(0o644)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def model_card(store: Store, run: str, number: int) -> str:
    """Return README.md of an exported iterate: a Hugging Face model card, its metrics with 95 % intervals."""
    from huggingface_hub import ModelCardData

    head, data = require_head(store, run), report_data(store, run)
    config = data["config"]
    about = ModelCardData(
        base_model=config["model"] if _HUB_ID.fullmatch(config["model"]) else None,
        datasets=[config["dataset"]] if _HUB_ID.fullmatch(config["dataset"]) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["spinreg", "self-play", "spin", "alignment"],
    )
    made = require_manifest(store, policy_object(head, number))
    weights = [file for file in made.files if file.name.endswith(".safetensors")]
    measured = {entry["round"]: entry for entry in data["rounds"] if entry["metrics"]}
    shown = [measured[n] for n in dict.fromkeys((0, number)) if n in measured]
    names = [name for name in data["definitions"] if any(name in (entry["metrics"] or {}) for entry in shown)]
    lineage = [("base", head.base), ("data", head.data)]
    lineage += [(f"round {n}, {stage}", str(head.stage(n, stage)))
                for n in range(1, number + 1) for stage in ("generate", "mix-opponent", "train")]  # fmt: skip
    return template("model_card.md.jinja").render(
        about=about.to_yaml(), run=run, number=number, config=config, data=data, weights=weights, shown=shown,
        rows=[_row(name, [(entry["metrics"] or {}).get(name) for entry in shown]) for name in names],
        versions=made.versions,
        lineage=lineage, estimate=format_estimate, text=_plain, how=how_measured,
    )  # fmt: skip


def _row(name: str, estimates: list[Estimate | None]) -> tuple[str, list[str]]:
    return label(name, counts(estimates)).replace("*", r"\*"), [format_estimate(one) for one in estimates]


def how_measured(part: StoredBenchmark) -> str:
    """Return the settings that readers of a benchmark's figures need: examples, limit, judge and prompts."""
    settings, told = part["settings"], []
    if settings.get("fewshot") is not None:
        told.append(f"{settings['fewshot']} examples")
    if (limit := settings.get("limit")) is not None:
        told.append(f"the first {limit} {'prompts' if part['kind'] == 'win-rate' else 'questions'}")
    if settings.get("questions_as") == "chat":
        told.append("as a chat")
    if (judge := settings.get("judge")) is not None:
        told.append(
            f"judge {_plain(judge['model'])} at {_plain(judge['endpoint'])}, temperature {judge['temperature']}"
        )
        told.append(f"prompts {_plain(part['fingerprints']['prompts'][:12])}")
    if part["kind"] == "win-rate":
        told.append({"base": "against the base", "previous": "against the previous iterate",
                     "human": "against the human answers"}.get(part["name"], part["name"]))  # fmt: skip
    return "; ".join(told).replace("|", r"\|")


def _plain(text: object) -> str:
    """Return a value of the configuration as text that Markdown does not interpret."""
    return f"`{str(text).replace('`', chr(39))}`"


def check_push(target: str) -> None:
    """Raise BadInput for a target that `push` cannot use, before anything is written."""
    if _HUB_ID.fullmatch(target):
        return
    place = Path(target.removeprefix("file://"))
    # An address of another kind is a relative path here.
    if not place.is_absolute():
        raise BadInput("--push", repr(target), "a repository of the hub (name/model) or an absolute path of a folder")
    _require_free("--push", place)


def push(folder: Path, target: str) -> str:
    """Copy an exported folder to another folder or to the Hugging Face hub, and return its address.

    target: an absolute path or file:// address of an empty or missing folder, or `name/model` on the hub. A repository
        that does not exist is created as a private one, with the token from HF_TOKEN or `hf auth login`.

    Raises BadInput for a target that cannot be used or that the hub refuses.
    """
    check_push(target)
    if not _HUB_ID.fullmatch(target):
        place = Path(target.removeprefix("file://"))
        with _appearing(place) as copy:
            shutil.copytree(folder, copy, dirs_exist_ok=True)
        return str(place)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or httpx2's, by version

    # Weights of an earlier push are deleted, because a loader would prefer one whole file to new ones in pieces.
    try:
        hub = HfApi()
        hub.create_repo(target, private=True, exist_ok=True)
        found = hub.upload_folder(
            repo_id=target, folder_path=folder, commit_message="Exported by spinreg",
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )  # fmt: skip
    except (HTTPError, OSError, ValueError) as error:
        raise BadInput(
            "--push", f"{target}, which the hub refuses ({first_line(error)})",
            f"a repository that HF_TOKEN may write to; `hf upload {target} {folder}` uploads the exported folder",
        ) from None  # fmt: skip
    return str(found)
