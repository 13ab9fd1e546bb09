"""A cache behind a URL: the rows of the same cache on disk, bit for bit, whatever the connection does; or one sentence."""

import sys
import threading
from threading import Event

import fsspec
import numpy as np
import pytest
import torch
from handmade_cache import SITE, write_cache
from remote_world import upload

from sae.activations.cache import ActivationCache
from sae.activations.cached import BLOCKS_PER_BUFFER, CachedSource
from sae.activations.describe import sample_rows
from sae.activations.joined import JoinedCache
from sae.disk.remote import RemotePath
from sae.errors import InputError

OTHER = "mlp_out.0"
SHARDS = [70, 90, 40, 85]
BUFFER = 2 * 4 * (3 + 5) * BLOCKS_PER_BUFFER  # blocks of two rows of both sites


@pytest.fixture
def local(tmp_path):
    return write_cache(tmp_path / "cache", SHARDS, held_out=(2,), more_sites={OTHER: 5})


@pytest.fixture(params=["flaky", "s3"])
def url(request, local, monkeypatch):
    monkeypatch.setattr("sae.disk.remote.BLOCK_BYTES", {"flaky": 500, "s3": 1000}[request.param])  # so that small files have several
    name = {"flaky": "flaky://place/cache", "s3": "s3://activations/some/cache"}[request.param]
    request.getfixturevalue(request.param)
    upload(local, name)
    return name


@pytest.fixture
def on_flaky(local, flaky, monkeypatch):
    monkeypatch.setattr("sae.disk.remote.BLOCK_BYTES", 500)
    upload(local, "flaky://place/cache")
    return "flaky://place/cache"


def batches(folder, **options):
    caches = [ActivationCache.open(folder, site) for site in (SITE, OTHER)]
    return CachedSource(*caches).batches(32, seed=3, buffer_bytes=BUFFER, **options)


def drawn(reader, count):
    return torch.cat([torch.cat(list(next(reader).values()), dim=1) for _ in range(count)])


def rows_of(folder, count=20, **options):
    return drawn(batches(folder, **options), count)


def test_batches_are_those_from_disk(local, url):
    expected = rows_of(local)  # more than two epochs of 245 rows
    assert torch.equal(rows_of(url), expected)
    resumed = batches(url)
    resumed.seek(7)
    assert torch.equal(drawn(resumed, 13), expected[7 * 32 :])
    for rank in range(2):
        assert torch.equal(rows_of(url, rank=rank, world=2), rows_of(local, rank=rank, world=2))


def test_everything_else_is_that_from_disk(local, url):
    here, there = ActivationCache.open(local, SITE), ActivationCache.open(url, SITE, verify=True)
    assert str(there.folder) == url
    assert there.verify() == []
    for split in ("train", "held_out"):
        for one, other in zip(here.shards(split), there.shards(split), strict=True):
            assert all(map(torch.equal, here.read(one), there.read(other)))
            assert np.array_equal(here.positions(one), there.positions(other))
    assert np.array_equal(here.tokens.ids, there.tokens.ids)
    assert all(map(torch.equal, sample_rows(here, 99), sample_rows(there, 99)))
    joined = [JoinedCache([cache, cache.at(OTHER)]) for cache in (here, there)]
    assert torch.equal(*(cache.read(cache.shards("train")[1])[0] for cache in joined))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_number_formats_are_read(tmp_path, flaky, dtype):
    local = write_cache(tmp_path / "cache", [30, 30], d_in=7, dtype=dtype)
    here, there = ActivationCache.open(local), ActivationCache.open(str(upload(local, "flaky://c")))
    assert torch.equal(*(cache.read(cache.shards("train")[0])[0] for cache in (here, there)))
    assert torch.equal(*(next(CachedSource(cache).batches(16))[SITE] for cache in (here, there)))


def test_a_second_epoch_and_a_second_run_read_the_local_disk(local, on_flaky, flaky, block_cache):
    reader = batches(on_flaky)
    expected = rows_of(local, 8 * 3)
    first = drawn(reader, 8)  # an epoch is 7.7 batches
    flaky.faults["read"].extend([OSError("unplugged")] * 10_000)
    assert torch.equal(torch.cat([first, drawn(reader, 16)]), expected)
    flaky.faults["read"].clear()
    block_cache()
    assert flaky.calls["read"] > 0
    flaky.calls.clear()
    assert torch.equal(rows_of(on_flaky, 24), expected)
    assert flaky.calls["read"] == 0


@pytest.mark.parametrize("limit", [0, 3000])
def test_blocks_that_have_no_room_are_read_again(local, on_flaky, flaky, block_cache, capsys, limit):
    folder = block_cache(limit)
    assert torch.equal(rows_of(on_flaky), rows_of(local))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size <= limit
    assert (size > 2000) == bool(limit)  # it keeps what it has
    assert capsys.readouterr().err.count("takes no more blocks") == bool(limit)  # nothing of this is news to whoever wrote 0


def test_neighbouring_blocks_are_one_request(on_flaky, flaky):
    cache = ActivationCache.open(on_flaky, SITE)
    shard = cache.shards("train")[1]
    cache.read_block(shard, 0, torch.empty(1, 3))
    flaky.calls.clear()
    cache.read_block(shard, 25, torch.empty(60, 3))  # 720 bytes
    assert flaky.calls["read"] == 1


def test_shards_read_one_after_the_other_are_read_ahead(on_flaky, flaky):
    cache = ActivationCache.open(on_flaky, SITE)
    shards = cache.shards("train")
    cache.read(shards[0])
    assert not cache._in_order._coming
    cache.read(shards[1])
    (coming,) = cache._in_order._coming.values()
    coming.result()
    flaky.faults["read"].extend([OSError("unplugged")] * 99)
    assert torch.equal(cache.read(shards[2])[1], torch.arange(200, 285))


# what can go wrong


@pytest.mark.parametrize("fault", ["short", OSError("unplugged"), TimeoutError("no answer"), ConnectionResetError(104, "reset by peer")])
def test_a_connection_that_comes_back_changes_nothing(local, on_flaky, flaky, capsys, fault):
    reader = batches(on_flaky)
    flaky.faults["read"].extend([None, fault, fault, None, None, fault] + [None] * 10 + [fault])
    assert torch.equal(drawn(reader, 20), rows_of(local))
    said = capsys.readouterr().err
    assert "the connection to flaky://place/cache/" in said
    assert "trying again in 0 s, 1 of 3 times" in said


@pytest.mark.parametrize("fault", ["short", OSError("unplugged")])
def test_a_connection_that_stays_away_is_said(on_flaky, flaky, fault):
    reader = batches(on_flaky)
    drawn(reader, 1)
    flaky.faults["read"].extend([fault] * 10_000)
    with pytest.raises(InputError, match=r"^the connection to flaky://\S+ is lost \(.*\), and 3 further tries have not helped; give"):
        drawn(reader, 10)
    flaky.faults["read"].clear()
    assert len(drawn(reader, 10))  # when it is back


def test_each_try_waits_longer(on_flaky, flaky, monkeypatch):
    waited, main = [], threading.current_thread()  # threads of an earlier test may still be reading ahead
    monkeypatch.setattr("sae.disk.server.WAITS", (1, 2, 4, 8, 16))
    monkeypatch.setattr("sae.disk.server.time.sleep", lambda wait: waited.append(wait) if threading.current_thread() is main else None)
    flaky.faults["info"].extend([OSError("unplugged")] * 9999)
    with pytest.raises(InputError, match="5 further tries"):
        RemotePath(on_flaky).exists()
    assert waited == [1, 2, 4, 8, 16]


def test_an_error_of_the_program_is_not_taken_for_one_of_the_network(on_flaky, flaky):
    flaky.faults["info"].append(KeyError("a mistake"))
    with pytest.raises(KeyError):
        RemotePath(on_flaky).exists()


def test_a_file_that_is_replaced_while_it_is_read_is_refused(local, url):
    cache = ActivationCache.open(url, SITE)
    shard = cache.shards("train")[0]
    out = torch.empty(5, 3)
    cache.read_block(shard, 0, out)
    fs, path = fsspec.core.url_to_fs(str(shard.path))
    data = bytearray(fs.cat_file(path))
    data[-9:] = b"123456789"
    other = type(fs)(skip_instance_cache=True)  # as another process would
    other.pipe_file(path, bytes(data))
    with pytest.raises(
        InputError, match="as it was when it was opened, but it is another one now; read a cache that no process is writing"
    ):
        cache.read_block(shard, 65, out)
    other.rm_file(path)
    with pytest.raises(InputError, match="but it is gone"):
        cache.read_block(shard, 65, out)


def test_blocks_of_an_earlier_version_are_not_taken(local, url):
    ActivationCache.open(url, SITE, verify=True)
    fs, path = fsspec.core.url_to_fs(f"{url}/{SITE}/00000.safetensors")
    data = bytearray(fs.cat_file(path))
    data[-4:] = np.float32(7).tobytes()
    fs.pipe_file(path, bytes(data))
    cache = ActivationCache.open(url, SITE)
    assert cache.read(cache.shards("train")[0])[0][-1, -1] == 7
    with pytest.raises(InputError, match="its checksum is wrong"):
        ActivationCache.open(url, SITE, verify=True)


def test_a_cut_off_file_is_refused(url):
    fs, path = fsspec.core.url_to_fs(f"{url}/{SITE}/00001.safetensors")
    fs.pipe_file(path, fs.cat_file(path)[:-10])
    with pytest.raises(InputError, match=r"expected a whole file at \S+/00001.safetensors, but it has \d+ bytes instead of \d+"):
        ActivationCache.open(url, SITE)
    fs.rm_file(path)
    with pytest.raises(InputError, match="but it is missing"):
        ActivationCache.open(url, SITE)


def test_places_that_are_not_there(s3):
    for url in ("s3://activations/none", "s3://nowhere/cache"):
        with pytest.raises(InputError, match=f"expected an activation cache's manifest at {url}/manifest.json, which does not exist"):
            ActivationCache.open(url)
    s3.fs.pipe_file("activations/begun/harvest.json", b"{}")
    with pytest.raises(InputError, match="the harvest into s3://activations/begun has not finished"):
        ActivationCache.open("s3://activations/begun")


def test_protocols_and_packages_that_are_not_there():
    with pytest.raises(InputError, match="expected a URL that fsspec knows, got none://cache"):
        ActivationCache.open("none://cache")
    with pytest.raises(InputError, match=r"gs://bucket/cache needs a package that is not here .*; pip install '.\[remote\]'"):
        ActivationCache.open("gs://bucket/cache")


def test_s3_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(InputError, match=r"s3://b/c needs a package .*s3fs.*; pip install '.\[remote\]' has what s3:// and hf://"):
        ActivationCache.open("s3://b/c")


def test_credentials_that_are_missing_or_wrong(s3, flaky, local, monkeypatch):
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(InputError, match=r"access to s3://activations/c is refused \(Unable to locate credentials\); set the credentials"):
        ActivationCache.open("s3://activations/c")
    S3FileSystem.clear_instance_cache()
    upload(local, "flaky://c")
    flaky.faults["list"].append(PermissionError(13, "Forbidden"))
    with pytest.raises(InputError, match=r"access to flaky://c is refused \(Forbidden\)"):
        ActivationCache.open("flaky://c")


def test_a_server_that_stops_is_said(local, monkeypatch):
    from remote_world import S3Server
    from s3fs import S3FileSystem

    server = S3Server()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("sae.disk.remote.BLOCK_BYTES", 500)
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    S3FileSystem.clear_instance_cache()
    server.empty()
    upload(local, "s3://activations/c")
    reader = batches("s3://activations/c")
    drawn(reader, 1)
    server.stop()
    with pytest.raises(InputError, match=r"the connection to s3://activations/c/\S+ is lost \(.*\), and 3 further tries have not helped"):
        drawn(reader, 8)
    S3FileSystem.clear_instance_cache()


def test_the_next_buffer_is_read_while_one_is_dealt_out(local, on_flaky, flaky, block_cache):
    """The server stops answering as soon as the first buffer is there: what is in it is drawn all the same."""
    block_cache(0)
    reader = batches(on_flaky)
    next(reader)
    answers = Event()
    flaky.faults["read"].extend([answers.wait] * 10_000)
    try:
        drawn(reader, 2)  # a buffer has some 120 rows
    finally:
        answers.set()
    assert torch.equal(drawn(reader, 10), rows_of(local, 13)[3 * 32 :])
