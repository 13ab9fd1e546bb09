"""A block cache of the test's own, no waiting between tries, and a server of S3's protocol on this machine."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from remote_world import FLAKY, Flaky, S3Server

from sae.disk import blocks, server


@pytest.fixture(autouse=True)
def block_cache(tmp_path, monkeypatch) -> Iterator[Callable[[float | None], Path]]:
    """Call it to begin as a new process would, with so many bytes for blocks; returns the folder."""

    def begin(limit: float | None = None) -> Path:
        monkeypatch.setenv("SAE_BLOCK_CACHE_GB", "1" if limit is None else repr(limit / 1e9))
        blocks.blocks.cache_clear()
        return tmp_path / "local"

    monkeypatch.setenv("SAE_BLOCK_CACHE", str(tmp_path / "local"))
    monkeypatch.setattr(server, "WAITS", (0, 0, 0))
    monkeypatch.setattr(blocks, "KEPT_FREE", 0)
    begin()
    yield begin
    blocks.blocks.cache_clear()


@pytest.fixture
def flaky() -> Iterator[Flaky]:
    FLAKY.clear()
    yield FLAKY
    FLAKY.clear()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    running = S3Server()
    yield running
    running.stop()


@pytest.fixture
def s3(s3_server, monkeypatch) -> S3Server:
    """An empty bucket, and credentials for it in the environment."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    s3_server.empty()
    return s3_server
