"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from servers import S3Server, s3_server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("SPINREG_CHAOS") != "long":
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes long; with SPINREG_CHAOS=long"))


@pytest.fixture(scope="session", name="s3_server")
def _s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 store (SeaweedFS) for the whole session; its credentials and endpoint are in the environment."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        before = {name: os.environ.get(name) for name in server.env}
        os.environ.update(server.env)
        try:
            yield server
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
