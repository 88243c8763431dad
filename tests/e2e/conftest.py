"""Fixtures for whole runs: a real Prefect server for the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.servers import PrefectServer, prefect_server


@pytest.fixture(scope="session", name="prefect_server")
def _prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A Prefect server with its own database; `servers.prefect_worker(server)` starts workers on it."""
    with prefect_server(tmp_path_factory.mktemp("prefect")) as server:
        yield server
