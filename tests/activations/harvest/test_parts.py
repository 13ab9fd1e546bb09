"""A pool that was interrupted continues where it was kept, and the cache has the bytes of one that was left alone."""

from functools import partial
from pathlib import Path

import pytest
from kills import changes, killed
from live_world import make_world
from several_processes import forked
from test_harvest import change, different

from sae.activations.harvest import parts
from sae.activations.harvest.command import HarvestConfig, harvest
from sae.activations.harvest.models import Models
from sae.disk.remote import RemotePath
from sae.errors import InputError


@pytest.fixture(autouse=True)
def kept_at_every_batch(monkeypatch):
    monkeypatch.setattr(parts, "EVERY", 0.0)
    monkeypatch.setattr(parts, "SHARE", 0)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict:
    return make_world(tmp_path_factory.mktemp("world"), 60) | {"sites": ("resid_post.0", "mlp_out.1"), "pool_tokens": 10**6}


@pytest.fixture
def config(world, tmp_path) -> HarvestConfig:
    """One pool for each split."""
    return HarvestConfig(out=tmp_path / "cache", **world)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    return harvest(HarvestConfig(out=tmp_path_factory.mktemp("whole") / "cache", **world))


class Stopped(Exception):
    pass


@pytest.fixture
def passes(monkeypatch):
    """Counts forward passes, and raises `Stopped` instead of the one with the number `passes["last"]`."""
    record, count = Models.record, {"done": 0, "last": -1}

    def counted(self, ids_sp, sites):
        if count["done"] == count["last"]:
            raise Stopped
        count["done"] += 1
        return record(self, ids_sp, sites)

    monkeypatch.setattr(Models, "record", counted)
    return count


def kept(config: HarvestConfig) -> list[Path]:
    return sorted((config.out / parts.FOLDER).glob("*.safetensors"))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_an_interrupted_pool_goes_on_with_its_next_batch(config, passes, tmp_path, dtype):
    config = change(config, dtype=dtype)
    whole = harvest(change(config, out=tmp_path / "whole"))
    batches = passes["done"]
    assert batches > 15
    passes["done"] = 0
    for last in (1, batches // 2, batches - 3, batches - 1):
        passes["last"] = last
        with pytest.raises(Stopped):
            harvest(config)
    assert kept(config)
    passes["last"] = -1
    harvest(config)
    assert passes["done"] == batches
    assert different(config.out, whole) == []
    assert not (config.out / parts.FOLDER).exists()


def test_killed_at_any_change_to_a_file_it_ends_with_the_same_bytes(config, whole, tmp_path):
    many = changes(partial(harvest, change(config, out=tmp_path / "counted")), tmp_path)
    assert many > 200
    for number in range(7, many, 31):
        cut = change(config, out=tmp_path / str(number))
        assert killed(partial(harvest, cut), number, tmp_path)
        harvest(cut)
        assert different(cut.out, whole) == [], number


def test_what_is_damaged_or_missing_is_recorded_again(config, whole, passes):
    passes["last"] = 12
    with pytest.raises(Stopped):
        harvest(config)
    found = kept(config)
    assert len(found) == 12
    found[3].unlink()
    data = bytearray(found[2].read_bytes())
    data[-5] ^= 1
    found[2].write_bytes(data)
    passes |= {"done": 0, "last": 1}
    with pytest.raises(Stopped):
        harvest(config)
    assert [path.name for path in kept(config)] == [path.name for path in found[:3]]  # two that were good, one made again
    passes["last"] = -1
    harvest(config)
    assert different(config.out, whole) == []


def test_other_settings_are_refused_and_another_number_of_processes_goes_on(config, whole, passes, tmp_path):
    passes["last"] = 12
    with pytest.raises(Stopped):
        harvest(config)
    with pytest.raises(InputError, match="settings batch_tokens = 100, but now it is 50"):
        harvest(change(config, batch_tokens=50))
    passes["last"] = -1
    assert forked(partial(harvest, config), 2, tmp_path / "log") == [0, 0]
    assert different(config.out, whole) == []


def test_a_harvest_to_a_url_goes_on_too(config, whole, passes, tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_BLOCK_CACHE", str(tmp_path / "blocks"))
    remote = change(config, out=RemotePath(f"file://{tmp_path}/remote"))
    passes["last"] = 12
    with pytest.raises(Stopped):
        harvest(remote)
    assert kept(change(config, out=tmp_path / "remote"))
    passes |= {"done": 0, "last": -1}
    harvest(remote)
    assert passes["done"] < 12
    assert different(tmp_path / "remote", whole) == []


def test_keeping_takes_at_most_a_twentieth(monkeypatch, tmp_path):
    monkeypatch.undo()
    now = [100.0]
    monkeypatch.setattr(parts.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(parts, "write_tensors", lambda path, arrays: now.__setitem__(0, now[0] + 3))
    made = parts.Parts(tmp_path)
    pool = parts.Pool("train", 0, None, 1, [])
    now[0] += 9.9
    assert not made.due()
    now[0] += 0.1
    assert made.due()
    made.write(pool, 0, 5, {})
    now[0] += 59
    assert not made.due()
    now[0] += 1
    assert made.due()
