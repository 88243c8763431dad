"""A store in a folder that behaves as one on another machine: its files are fetched into the cache."""

from __future__ import annotations

from pathlib import Path

from spinreg_core.store.folder import FolderStore


class RemoteStore(FolderStore):
    """Notes the object of every file that is fetched, in the order of the fetches."""

    def local_path(self, key: str) -> Path | None:
        return None

    def download(self, key: str, path: Path) -> None:
        with open(self.root / "fetched", "a") as file:
            file.write(f"{key.split('/')[1]}\n")
        super().download(key, path)

    def fetched(self) -> list[str]:
        return (self.root / "fetched").read_text().split()
