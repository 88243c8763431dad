"""How large what users hand over may be: looked at before it is opened, or while it is unpacked.

Decides: the limits, each far above what is real and below what ends a machine, and the one message of each. Leaves out:
who asks (`data/readers.py`, `models/source.py`, `models/gguf.py`), and how many rows or weights there may be: those are
read as a stream or mapped, and cost a disk that the user has filled himself.
"""

from __future__ import annotations

from pathlib import Path

from spinreg_core.errors import BadInput

# Text packs to a tenth of its size, rows that repeat to a hundredth; gzip's most is 1032, that of bzip2 and xz more.
LARGEST_EXPANSION = 200
EXPANSION_FREE_BYTES = 64 * 2**20  # what any file may unpack to, however small it is
LONGEST_LINE = 64 * 2**20  # characters; a line is in memory as a whole, and is one conversation
LARGEST_ARRAY = 2 * 2**30  # characters of one JSON array, which takes some eight times that in memory; JSONL does not
LARGEST_FOOTER = 64 * 2**20  # bytes of what a Parquet file says of itself; thousands of row groups take one of them
LARGEST_MODEL_FILE = 256 * 2**20  # bytes of a configuration, tokenizer or index beside the weights; real: 35 MB
LARGEST_QUESTIONS = 256 * 2**20  # bytes of a file of questions, votes or prompts, read as a whole; real: 13 MB
LARGEST_TASK_FILE = 4 * 2**20  # bytes of a YAML file of lm-eval; real: 100 kB
MOST_LAYERS = 10_000  # transformers makes lists as long when it reads a configuration; real: 130


def require_plain(field: str, path: Path) -> None:
    """Raise BadInput for what is there and neither a file nor a folder: a pipe would be waited for without end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise BadInput(field, f"{path}, which is a pipe, a socket or a device", "a file or a folder")


def require_size(field: str, file: object, size: int, most: int, expected: str) -> None:
    """Raise BadInput for a file, or a part of one, of more bytes than `most`."""
    if size > most:
        raise BadInput(field, f"{file} of {size} bytes", f"{expected} of at most {most}")


def require_small_file(field: str, path: Path, most: int = LARGEST_QUESTIONS) -> None:
    """Raise BadInput for a pipe, socket or device, and for a file of more than `most` bytes; not for one that is not
    there, of which whoever reads it says more."""
    require_plain(field, path)
    if path.is_file():
        require_size(field, path, path.stat().st_size, most, "a file")


def require_expansion(path: Path, unpacked: int) -> None:
    """Raise BadInput for a data file that unpacks to so much more than it is that it was made for that."""
    if unpacked > max(EXPANSION_FREE_BYTES, LARGEST_EXPANSION * path.stat().st_size):
        raise BadInput("dataset", f"{path}, which unpacks to more than {LARGEST_EXPANSION} times its size",
                       "data; unpack it yourself if it is")  # fmt: skip
