"""Limits on the size of users' input, checked before a file is opened or while it is unpacked.

Decides: the limits and their messages. Each limit is far above real input, and far below the memory of a machine.
Leaves out: the number of rows or weights, which are streamed or mapped, so that they cost disk space only.
"""

from __future__ import annotations

from pathlib import Path

from spinreg_core.errors import BadInput

# Text packs to a tenth of its size, repeated rows to a hundredth. The maximum of gzip is 1032, of bzip2 and xz more.
LARGEST_EXPANSION = 200
EXPANSION_FREE_BYTES = 64 * 2**20  # any file, however small, may unpack to this size
LONGEST_LINE = 64 * 2**20  # characters; a line is one conversation, and is held in memory
LARGEST_ARRAY = 2 * 2**30  # characters of one JSON array, which takes about eight times that in memory
LARGEST_FOOTER = 64 * 2**20  # bytes of a Parquet file's footer; thousands of row groups take 1 MiB
LARGEST_MODEL_FILE = 256 * 2**20  # bytes of a model's configuration, tokenizer or index; real: 35 MB
LARGEST_QUESTIONS = 256 * 2**20  # bytes of a file of questions, votes or prompts; real: 13 MB
LARGEST_TASK_FILE = 4 * 2**20  # bytes of a YAML file of lm-eval; real: 100 kB
MOST_LAYERS = 10_000  # transformers makes lists as long when it reads a configuration; real: 130


def require_plain(field: str, path: Path) -> None:
    """Raise BadInput for a pipe, socket or device: opening a pipe would block forever."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise BadInput(field, f"names {path}, which is a pipe, a socket or a device", "a file or a folder")


def require_size(field: str, file: object, size: int, most: int, expected: str) -> None:
    """Raise BadInput for a file, or a part of one, of more bytes than `most`."""
    if size > most:
        raise BadInput(field, f"{file} of {size} bytes", f"{expected} of at most {most} bytes")


def require_small_file(field: str, path: Path, most: int = LARGEST_QUESTIONS) -> None:
    """Raise BadInput for a pipe, socket or device, and for a file of more than `most` bytes.

    A missing file passes: its reader reports it in more detail.
    """
    require_plain(field, path)
    if path.is_file():
        require_size(field, path, path.stat().st_size, most, "a file")


def require_expansion(path: Path, unpacked: int) -> None:
    """Raise BadInput for a data file that unpacks to far more than its size: a decompression bomb."""
    if unpacked > max(EXPANSION_FREE_BYTES, LARGEST_EXPANSION * path.stat().st_size):
        found = f"names {path}, which unpacks to more than {LARGEST_EXPANSION} times its size"
        raise BadInput("dataset", found, "use other data, or unpack the file yourself if you trust it")
