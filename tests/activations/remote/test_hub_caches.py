"""A cache in a repository of the hub: read in one commit from beginning to end."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from handmade_cache import SITE, write_cache
from hub_world import REPO, Hub

from sae.activations.cache import ActivationCache
from sae.activations.cached import CachedSource
from sae.errors import InputError

URL = f"hf://datasets/{REPO}/cache"


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    from huggingface_hub import HfFileSystem, constants

    running = Hub()
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": running.url})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("sae.disk.remote.BLOCK_BYTES", 500)
    HfFileSystem.clear_instance_cache()
    yield running
    HfFileSystem.clear_instance_cache()
    running.stop()


@pytest.fixture
def local(tmp_path) -> Path:
    return write_cache(tmp_path / "cache", [40, 60, 30])


def test_rows_are_those_from_disk_although_a_newer_commit_comes(hub, local, tmp_path, block_cache):
    block_cache(0)  # so that every block is asked for
    old = hub.commit(local)
    cache = ActivationCache.open(URL)
    reader = CachedSource(cache).batches(16, buffer_bytes=2 * 12 * 64)
    expected = CachedSource(ActivationCache.open(local)).batches(16, buffer_bytes=2 * 12 * 64)
    assert torch.equal(next(reader)[SITE], next(expected)[SITE])
    new = hub.commit(write_cache(tmp_path / "newer", [70, 20, 40]))
    hub.requests.clear()
    for _ in range(20):
        assert torch.equal(next(reader)[SITE], next(expected)[SITE])
    assert hub.requests
    assert all(old in request for request in hub.requests)
    assert not [request for request in hub.requests if "/api/" in request]  # the hub allows few of those a minute
    assert [shard.rows for shard in ActivationCache.open(URL).shards("train")] == [70, 20, 40]
    assert new in hub.requests[-1]
    assert [shard.rows for shard in ActivationCache.open(f"hf://datasets/{REPO}@{old}/cache").shards("train")] == [40, 60, 30]


def test_a_repository_that_refuses_is_said_at_once(hub, local, capsys):
    hub.commit(local)
    hub.refuses = True
    with pytest.raises(InputError, match=f"access to {URL} is refused .*; set the credentials of an account that may use it"):
        ActivationCache.open(URL)
    assert "trying again" not in capsys.readouterr().err


@pytest.mark.parametrize("url", [f"hf://datasets/{REPO}/none", "hf://datasets/me/other/cache"])
def test_what_is_not_there_is_said(hub, local, url):
    hub.commit(local)
    with pytest.raises(InputError, match=f"expected an activation cache's manifest at {url}/manifest.json, which does not exist"):
        ActivationCache.open(url)
