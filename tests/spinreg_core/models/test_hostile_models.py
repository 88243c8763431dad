"""Model folders that bring code, pickles, links, or files that were made to fill memory."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.config import TrainingConfig
from spinreg_core.errors import BadInput
from spinreg_core.input_limits import LARGEST_MODEL_FILE
from spinreg_core.models import source as model_source
from spinreg_core.models.chat_template import Renderer, load_tokenizer
from spinreg_core.models.loading import load_policy
from spinreg_core.models.source import link_policy, resolve_model, tokenizer_folder
from spinreg_core.runtime.distributed import Ranks
from spinreg_core.store.cache import cache_folder
from spinreg_core.store.s3 import RemoteFile
from spinreg_core.training.checkpoint_files import load_checkpoint, start_checkpoint
from spinreg_core.training.optimizer import make_optimizer
from tests.support.files import change_json
from tests.support.tiny_models import tiny_model, write_policy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the toy model to spoil."""
    return Path(shutil.copytree(resolve_model("random:tiny", cache_folder()), tmp_path / "model"))


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.write_text, (self.mark, "went off")


def test_bomb_when_unpickled_goes_off(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_pickled_weights_are_neither_opened_nor_stored(folder: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    assert resolve_model(str(folder), cache_folder()) == folder
    load_policy(folder, "fp32", "cpu")
    Renderer.from_folder(folder)
    link_policy(folder, tmp_path / "policy")
    assert not (tmp_path / "mark").exists()
    assert not [path for path in (tmp_path / "policy").iterdir() if path.suffix in (".bin", ".pt", ".pth")]


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_resolve_model_with_code_raises_and_never_runs_it(folder: Path, tmp_path: Path, where: str) -> None:
    mark = f"import pathlib; pathlib.Path({str(tmp_path / 'mark')!r}).write_text('ran')\n"
    (folder / "modeling_own.py").write_text(mark + "class Own: pass\n")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    change_json(
        folder / where, model_type="own", auto_map=dict.fromkeys(names, "modeling_own.Own"), tokenizer_class="Own"
    )
    with pytest.raises(BadInput, match="has code of its own"):
        resolve_model(str(folder), cache_folder())
    # And by what loads, wherever a folder came from.
    if where == "config.json":
        with pytest.raises(BadInput):
            load_policy(folder, "fp32", "cpu")
    else:
        with pytest.raises(BadInput):
            load_tokenizer(folder)
    assert not (tmp_path / "mark").exists()


def test_resolve_model_with_an_adapter_raises(folder: Path) -> None:
    """transformers would add it to the weights that were checked, or load the base that it names instead."""
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    with pytest.raises(BadInput, match="an adapter next to the model"):
        resolve_model(str(folder), cache_folder())


def test_resolve_model_with_an_index_of_other_files_raises(folder: Path) -> None:
    for shards in ({"a": "../model.safetensors"}, {"a": "/etc/passwd"}, {"a": 7}, ["a"]):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
        with pytest.raises(BadInput, match="has no weight_map of files next to it"):
            resolve_model(str(folder), cache_folder())


@pytest.mark.parametrize("name", ["notes.json", "vocab.txt", "extra.safetensors"])
def test_resolve_model_with_a_link_out_of_it_raises(folder: Path, tmp_path: Path, name: str) -> None:
    """It would put a file of this machine into the store, with the model."""
    (tmp_path / "credentials").write_text("planted")
    (folder / name).symlink_to(tmp_path / "credentials")
    for use in (resolve_model, tokenizer_folder):
        with pytest.raises(BadInput, match=rf"{name}, a link to {tmp_path}/credentials; expected files inside"):
            use(str(folder), cache_folder())
    (folder / name).unlink()
    (folder / "alike.json").symlink_to("config.json")
    assert resolve_model(str(folder), cache_folder()) == folder


def test_resolve_model_of_a_hub_snapshot_follows_its_links(folder: Path, tmp_path: Path) -> None:
    blobs = Path(shutil.copytree(folder, tmp_path / "models--a--b" / "blobs"))
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert resolve_model(str(snapshot), cache_folder()) == snapshot


def test_resolve_model_with_a_large_config_raises_unopened(folder: Path) -> None:
    """The file is sparse and no JSON, which reading it would report."""
    os.truncate(folder / "config.json", LARGEST_MODEL_FILE + 1)
    message = rf"config\.json of {LARGEST_MODEL_FILE + 1} bytes; .* of at most {LARGEST_MODEL_FILE}"
    for use in (resolve_model, tokenizer_folder):
        with pytest.raises(BadInput, match=message):
            use(str(folder), cache_folder())


def test_resolve_model_with_large_weights_accepts_their_size(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", LARGEST_MODEL_FILE + 1)
    assert resolve_model(str(folder), cache_folder()) == folder


def test_resolve_model_on_s3_checks_sizes_before_fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = {"config.json": RemoteFile(2**40, "x"), "model.safetensors": RemoteFile(2**50, "y")}
    monkeypatch.setattr(model_source, "list_s3", lambda url, field: listed)
    with pytest.raises(BadInput, match=rf"s3://bucket/model/config\.json of {2**40} bytes"):
        resolve_model("s3://bucket/model", tmp_path)


@pytest.mark.parametrize("text", ["[" * 200_000, "{", "[]", "7"])
def test_resolve_model_with_an_invalid_config_raises(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(BadInput, match=r"config\.json (cannot be read|holds a)"):
        resolve_model(str(folder), cache_folder())


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.popen('true') }}",
    "{% for i in range(10**9) %}x{% endfor %}",
])  # fmt: skip
def test_renderer_runs_chat_templates_in_a_sandbox(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(BadInput, match="chat template"):
        Renderer.from_folder(folder)


_unpickled: list[str] = []
_listening = False


def _hook(event: str, arguments: Any) -> None:
    if _listening and event == "pickle.find_class":
        _unpickled.append(str(arguments))


def test_loading_a_policy_or_checkpoint_unpickles_nothing(tmp_path: Path) -> None:
    """Python itself reports every class that an unpickler asks for."""
    global _listening
    sys.addaudithook(_hook)  # there to the end of the process
    import torch

    ranks, model = Ranks(torch.device("cpu")), tiny_model()
    optimizer = make_optimizer(model, TrainingConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    start_checkpoint(tmp_path / "step", model, optimizer, '{"done": 1}', ranks).result()
    write_policy(tmp_path / "policy")
    _listening = True
    try:
        other = tiny_model(seed=1)
        load_checkpoint(tmp_path / "step", other, make_optimizer(other, TrainingConfig()), ranks)
        load_policy(tmp_path / "policy", "fp32", "cpu")
        assert _unpickled == []
        torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
        torch.load(tmp_path / "a.pt", weights_only=False)
        assert _unpickled  # it would have been seen
    finally:
        _listening = False
