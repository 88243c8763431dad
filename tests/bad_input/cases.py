"""Cases of bad input, and their outcomes.

Decides: who may notice something, and the placeholders for what differs by machine.
Leaves out: the cases (`*_cases.py`), the page (`write_page.py`).
"""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.config.resolve import validate
from spinreg_core.errors import BadInput, SpinregError
from spinreg_core.models.source import resolve_model
from spinreg_core.runs.job import Job
from spinreg_core.stages import prepare
from spinreg_core.store.cache import cache_folder
from tests.support.servers import S3Server

# Who notices it. The first two come before anything is sampled, scored or trained.
NOTICED = {
    "start": "the command or the flow, before any stage",
    "prepare": "the stage prepare",
    "use": "the stage or command that reads it",
}
ROWS = [{"prompt": f"What is {i}?", "answer": f"It is {i}."} for i in range(12)]


@dataclass
class Place:
    """The place of a case: its own folder, patches for its duration, and a real S3 server on request."""

    folder: Path
    patch: pytest.MonkeyPatch
    server: Callable[[], S3Server]

    def write(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def rows(self, rows: list[Any], name: str = "rows.jsonl") -> str:
        return self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    def model(self) -> Path:
        """A copy of the toy model, to be broken."""
        return Path(shutil.copytree(resolve_model("random:tiny", cache_folder()), self.folder / "model"))

    def prepare(self, dataset: str | None = None, **fields: Any) -> object:
        """The stage `prepare`, in this process."""
        data = {"heldout_rows": 2} | fields.pop("data", {})
        given = {"model": "random:tiny", "dataset": dataset or self.rows(ROWS), "store": str(self.folder / "store")}
        config = validate(given | fields | {"data": data})
        (self.folder / "work").mkdir()
        prepare.run(Job("prepare", "", {}, config.store, "e1-test", 0, {}, config, self.folder / "work"))
        return json.loads((self.folder / "work/result.json").read_text())


@dataclass(frozen=True)
class Case:
    what: str
    noticed: str
    error: type[SpinregError]
    feed: Callable[[Place], object]


Feed = Callable[[Place], object]


def table(cases: list[Case], noticed: str) -> Callable[..., Callable[[Feed], Feed]]:
    """A decorator that puts a function into a table of cases."""

    def case(what: str, error: type[SpinregError] = BadInput, noticed: str = noticed) -> Callable[[Feed], Feed]:
        def add(feed: Feed) -> Feed:
            cases.append(Case(what, noticed, error, feed))
            return feed

        return add

    return case


def message(error: SpinregError, place: Place) -> str:
    """Its text with placeholders for what another machine or another time has otherwise."""
    text = str(error).replace(str(place.folder), "FOLDER").replace(socket.gethostname(), "HOST")
    text = text.replace(str(Path.cwd()), "HERE")
    text = re.sub(r"(127\.0\.0\.1|localhost):\d+", "HOST:PORT", text)
    text = re.sub(r"\bpid \d+", "pid PID", text)
    text = re.sub(r"\b(base|data|generate|train|mix-opponent|evaluate)-[0-9a-f]{32}\b", r"\1-FINGERPRINT", text)
    text = re.sub(r"\b[0-9a-f]{64}\b", "SHA256", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:]+(\+00:00|Z)|\b\d{8}T\d{6}Z", "TIME", text)
    return re.sub(r"expected \d{3,} bytes", "expected SIZE bytes", text)
