"""The job of one stage: the order that a stage's process gets, as a JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput
from spinreg_core.store.base import stays_inside


@dataclass(frozen=True)
class Job:
    """The order to make one object. `object_id` is the fingerprint of `key`; `inputs` maps names to object ids."""

    stage: str
    object_id: str
    key: dict[str, Any]
    store: str
    writer: str
    round: int
    inputs: dict[str, Any]
    config: RunConfig
    workdir: Path
    extra: dict[str, Any] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self) | {"config": self.config.model_dump(mode="json"), "workdir": str(self.workdir)}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Job:
        """Return the job of such fields, which may come from a shared store.

        Raises BadInput for names that lead out of a folder.
        """
        for name in ("stage", "object_id", "writer"):
            if fields[name] and ("/" in fields[name] or not stays_inside(fields[name])):
                raise BadInput(f"job, {name}", repr(fields[name]), "a plain name")
        config, workdir = RunConfig.model_validate(fields["config"]), Path(fields["workdir"])
        return cls(**fields | {"config": config, "workdir": workdir})

    @property
    def module(self) -> str:
        """The module that runs the stage: `python -m MODULE JOB.json`."""
        return f"spinreg_core.stages.{self.stage.replace('-', '_')}"

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.fields(), indent=1, sort_keys=True))

    @classmethod
    def load(cls, path: Path) -> Job:
        return cls.from_fields(json.loads(path.read_text()))
