"""A folder that this process may read and not write, whoever it is: root may do anything otherwise."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def as_nobody(fill: Callable[[Path], object] = lambda folder: None) -> Iterator[Path]:
    """`fill`: writes to the folder before the rights are gone."""
    folder = Path(tempfile.mkdtemp())
    fill(folder)
    user = os.getresuid()
    folder.chmod(0o555)
    if user[0] == 0:
        os.setresuid(65534, 65534, 0)
    try:
        yield folder
    finally:
        os.setresuid(*user)
        folder.chmod(0o700)
        for place, folders, _ in os.walk(folder):
            for name in folders:
                os.chmod(os.path.join(place, name), 0o700)
        shutil.rmtree(folder)
