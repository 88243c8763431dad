"""A policy of a run as an ordinary model folder, with a card that says where it comes from.

Decides: what is in the folder, how weights are cut into files, what the card says (`model_card.md.jinja`), and that the
folder is there whole or not at all. Leaves out: the policy itself, which is what was committed, bit for bit.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spinreg_core.errors import BadInput
from spinreg_core.evaluation.formatting import counts, format_estimate, label
from spinreg_core.evaluation.intervals import Estimate
from spinreg_core.reports.run_report import report_data
from spinreg_core.reports.templating import template
from spinreg_core.runs.fetch import fetch_folder
from spinreg_core.runs.head import require_head, stage_object
from spinreg_core.runs.objects import require_manifest
from spinreg_core.runs.plans import policy_object
from spinreg_core.store.base import Store

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def export(
    store: Store, run: str, target: Path | None, *, round_number: int | None = None, shard_size: str | None = None
) -> Path:
    """Write iterate `round_number` (default: the last trained; 0 is the base) of a run to the folder `target` (default:
    RUN-round-N in the current one).

    The files are the committed policy's, verified: weights in safetensors, config and generation config, tokenizer,
    chat template; and README.md, the model card. shard_size: largest size of a weights file, `5GB` or `500MB`; unset:
    the files as they were committed. Returns `target`.

    Raises BadInput for a run or round there is not, a target that holds something, a size that is none; Damaged.
    """
    head = require_head(store, run)
    trained = [entry["round"] for entry in head["rounds"] if "train" in entry["stages"]]
    number = max(trained, default=0) if round_number is None else round_number
    if head.get("base") is None:
        raise BadInput("--round", f"run {run!r}, which has not prepared its base yet", "a run with a model")
    if number and number not in trained:
        known = ", ".join(map(str, sorted(trained))) or "none"
        raise BadInput("--round", number, f"0 or a round that was trained ({known}) of run {run!r}")
    most = None if shard_size is None else parse_size(shard_size)
    target = (Path(f"{run}-round-{number}") if target is None else target).absolute()
    if target == Path.cwd():
        raise BadInput("--to", f"{target}, the current folder", "another one, which appears when it is whole")
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
        raise BadInput(field, f"{target}, which holds something", "a folder that is empty, or not there yet")


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write to, which becomes `target` where nothing is raised, and is gone otherwise."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent)
    except OSError as error:
        raise BadInput("--to", f"{target} ({error.strerror})", "a place where a folder can be made") from None
    with place as scratch:
        folder = Path(scratch) / target.name
        folder.mkdir()
        yield folder
        if target.exists():
            target.rmdir()
        folder.rename(target)


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500 MB`, `2GiB`. Raises BadInput."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * _UNITS.get(found[2].upper(), 0)) if found else 0
    if size < 10**6:
        raise BadInput("--shard-size", repr(text), "a size of at least 1MB, such as 5GB or 500MB")
    return size


def reshard(source: Path, folder: Path, most: int) -> None:
    """Copy the weights of a model folder into files of at most `most` bytes (one tensor at least), a file at a time."""
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors import safe_open
    from safetensors.torch import save_file

    where: dict[str, Path] = {}
    sizes: dict[str, int] = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)  # of a mapped file: not read yet
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
        (folder / file_name).chmod(0o644)  # safetensors leaves it to its owner alone
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def model_card(store: Store, run: str, number: int) -> str:
    """README.md of an exported iterate: a Hugging Face model card, its metrics with 95 % intervals."""
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
    weights = [entry for entry in made["files"] if entry["name"].endswith(".safetensors")]
    measured = {entry["round"]: entry for entry in data["rounds"] if entry["metrics"]}
    shown = [measured[n] for n in dict.fromkeys((0, number)) if n in measured]
    names = [name for name in data["definitions"] if any(name in entry["metrics"] for entry in shown)]
    lineage = [("base", head["base"]), ("data", head["data"])]
    for n in range(1, number + 1):
        lineage += [(f"round {n}, {stage}", str(stage_object(head, n, stage)))
                    for stage in ("generate", "mix-opponent", "train")]  # fmt: skip
    return template("model_card.md.jinja").render(
        about=about.to_yaml(), run=run, number=number, config=config, data=data, weights=weights, shown=shown,
        rows=[_row(name, [entry["metrics"].get(name) for entry in shown]) for name in names],
        versions=made["versions"],
        lineage=lineage, estimate=format_estimate, text=_plain, how=how_measured,
    )  # fmt: skip


def _row(name: str, estimates: list[Estimate | None]) -> tuple[str, list[str]]:
    return label(name, counts(estimates)).replace("*", r"\*"), [format_estimate(one) for one in estimates]


def how_measured(part: dict[str, Any]) -> str:
    """What of a benchmark's settings its figures cannot be read without: examples, limit, judge and prompts."""
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
    """A value of the configuration as text that Markdown leaves alone."""
    return f"`{str(text).replace('`', chr(39))}`"


def check_push(target: str) -> None:
    """Raise BadInput for what `push` cannot take, before anything is written."""
    if _HUB_ID.fullmatch(target):
        return
    place = Path(target.removeprefix("file://"))
    if "://" in str(place) or not place.is_absolute():
        raise BadInput("--push", repr(target), "the hub's name/model, or an absolute path of a folder")
    _require_free("--push", place)


def push(folder: Path, target: str) -> str:
    """Put an exported folder where others find it: a folder (`/srv/models/x`, `file:///srv/models/x`) that is empty or
    not there, or a repository of the Hugging Face hub (`name/model`; made if it is not there, private; the token comes
    from HF_TOKEN or `hf auth login`). Weights that an earlier push left there are removed: a loader would prefer one
    whole file to new ones in pieces. Returns its address. Raises BadInput."""
    check_push(target)
    if not _HUB_ID.fullmatch(target):
        place = Path(target.removeprefix("file://"))
        with _appearing(place) as copy:
            shutil.copytree(folder, copy, dirs_exist_ok=True)
        return str(place)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or httpx2's, by version

    try:
        hub = HfApi()
        hub.create_repo(target, private=True, exist_ok=True)
        found = hub.upload_folder(
            repo_id=target, folder_path=folder, commit_message="Exported by spinreg",
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )  # fmt: skip
    except (HTTPError, OSError, ValueError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise BadInput("--push", f"{target}, which the hub does not take: {said}",
                       f"a repository you may write to (HF_TOKEN); `hf upload {target} {folder}` sends what is exported"
                       ) from None  # fmt: skip
    return str(found)
