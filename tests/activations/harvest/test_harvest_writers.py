"""Several processes that harvest one cache: the same bytes whatever their number, whichever dies, and one sentence when one fails."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from live_world import make_world
from safetensors.torch import load_file, save_file
from several_processes import flags, forked, said, torchrun, worker
from test_harvest import change, different, in_child
from torch.distributed import HashStore

from sae.activations.cache import ActivationCache
from sae.activations.files.ledger import Ledger
from sae.activations.harvest.command import HarvestConfig, device_of, harvest
from sae.disk.writing import only_writer
from sae.errors import InputError
from sae.processes import Processes


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict:
    return make_world(tmp_path_factory.mktemp("world"), 120)


def settings(world: dict, out: Path) -> HarvestConfig:
    """About 40 pools of two shards at most."""
    return HarvestConfig(out=out, **world | {"pool_tokens": 100, "shard_tokens": 60})


@pytest.fixture
def config(world, tmp_path) -> HarvestConfig:
    return settings(world, tmp_path / "cache")


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    """What one process makes."""
    return harvest(settings(world, tmp_path_factory.mktemp("whole") / "cache"))


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_gives_the_same_bytes(config, whole, tmp_path, processes):
    assert forked(partial(harvest, config), processes, tmp_path / "log") == [0] * processes
    assert different(config.out, whole) == []
    first, *others = said(tmp_path / "log")
    assert "training and" in first
    assert first.count("harvest: ") == 1
    tokens = json.loads((config.out / "manifest.json").read_text())["counts"]["tokens"]
    assert f"harvest: {tokens:,} of {tokens:,} tokens" in first
    assert set(others) == {""}
    assert forked(partial(harvest, config), processes, tmp_path / "again") == [0] * processes
    assert "already complete" in said(tmp_path / "again")[0]


def test_processes_without_a_pool_do_nothing(config, tmp_path):
    few = change(config, tokens=300)
    assert forked(partial(harvest, few), 3, tmp_path / "log") == [0, 0, 0]
    assert different(few.out, harvest(change(few, out=tmp_path / "one"))) == []


@pytest.mark.parametrize(("kill", "then"), [((0, 5), 2), ((0, 30), 1), ((1, 0), 3), ((1, 7), 1), ((1, 12), 2), ((1, 20), 3)])
def test_one_killed_process_costs_nothing_but_its_pool(config, whole, tmp_path, kill, then):
    if forked(partial(harvest, config), 2, tmp_path / "log", kill) != [
        0,
        0,
    ]:  # the process to be killed may start too late to write much
        assert "same command again" in said(tmp_path / "log")[1 - kill[0]]
        with pytest.raises(InputError, match="not finished"):
            ActivationCache.open(config.out)
    finished = [shard["name"] for rank in range(2) for entry in Ledger(config.out, rank).of("pool") for shard in entry["shards"]]
    written = {path: path.stat().st_mtime_ns for path in config.out.glob("resid*/*.safetensors") if path.stem in finished}
    assert forked(partial(harvest, config), then, tmp_path / "then") == [0] * then
    assert all(path.stat().st_mtime_ns == at for path, at in written.items())  # whoever wrote them, they are not made again
    assert different(config.out, whole) == []


def test_torchrun_makes_the_same_bytes_and_speaks_with_one_voice(config, whole):
    run = torchrun("cache", *flags(config), processes=2)
    out, err = run.communicate(timeout=200)
    assert run.returncode == 0, err
    assert different(config.out, whole) == []
    assert out.count("training and") == 1
    assert err.count("harvest: ") == 1


def test_torchrun_stops_when_a_process_is_killed_and_one_process_finishes(config, tmp_path):
    larger = change(config, pool_tokens=60, shard_tokens=20)
    run = torchrun("cache", *flags(larger), processes=2)
    while run.poll() is None and len(list(larger.out.glob("resid*/*.safetensors"))) < 10:
        time.sleep(0.005)
    os.kill(worker(run, 1), signal.SIGKILL)
    run.communicate(timeout=100)
    assert run.returncode != 0
    assert not (larger.out / "manifest.json").exists()
    harvest(larger)
    assert different(larger.out, harvest(change(larger, out=tmp_path / "whole"))) == []


def test_a_failure_is_told_once_and_stops_all(config, world, tmp_path):
    source = tmp_path / "lm"
    source.mkdir()
    for path in Path(world["model"]).iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    weights = load_file(source / "model.safetensors")
    weights["transformer.wte.weight"][49] = float("nan")
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    ids = load_file(world["text"][0])
    ids["ids"] = ids["ids"].clamp(max=48)
    ids["ids"][-5] = 49
    save_file(ids, tmp_path / "text.safetensors")
    ill = change(config, model=str(source), text=(str(tmp_path / "text.safetensors"),))
    assert forked(partial(harvest, ill), 3, tmp_path / "log") == [2, 2, 2]
    assert "".join(said(tmp_path / "log")).count("error: ") == 1
    assert "NaN or infinity" in "".join(said(tmp_path / "log"))
    for changes in ({"sites": ("resid_post.9",)}, {"text": ("nowhere.txt",)}, {"tokens": 1}):
        assert forked(partial(harvest, change(ill, **changes)), 2, tmp_path / "options") == [2, 2]
        assert [text.count("error: ") for text in said(tmp_path / "options")] == [1, 0]


def test_a_process_with_another_model_is_refused(config, tmp_path):
    assert os.WIFSIGNALED(in_child(config, kill_at_sync=8))
    torch.manual_seed(5)
    other = make_world(tmp_path, 1)["model"]
    assert forked(partial(harvest, change(config, model=other)), 2, tmp_path / "log") == [2, 2]
    assert "model name =" in "".join(said(tmp_path / "log")) or "settings model =" in "".join(said(tmp_path / "log"))


def test_only_one_run_at_a_time_however_many_processes_it_has(config):
    with only_writer(config.out, shared=True), only_writer(config.out, shared=True), pytest.raises(InputError, match="another run"):
        harvest(config)
    with only_writer(config.out) as share:
        with pytest.raises(InputError, match="another run"), only_writer(config.out, shared=True):
            pass
        share()
        with only_writer(config.out, shared=True), pytest.raises(InputError, match="another run"), only_writer(config.out):
            pass
    harvest(config)


def test_dry_run_and_verify_speak_once(config, whole, tmp_path):
    assert forked(partial(harvest, change(config, dry_run=True)), 2, tmp_path / "dry") == [0, 0]
    assert [text.count("would write") for text in said(tmp_path / "dry")] == [1, 0]
    assert forked(partial(harvest, HarvestConfig(out=whole, verify=True)), 2, tmp_path / "verify") == [0, 0]
    assert [text.count("as it was written") for text in said(tmp_path / "verify")] == [1, 0]


def test_the_leader_counts_what_the_others_did(tmp_path):
    """Also of one that ends before the leader waits."""
    store = HashStore()
    leader, other = (Processes(store, rank, 2, rank, 2) for rank in (0, 1))
    assert next(other.deal("ab")) == "a"
    assert next(leader.deal("ab")) == "b"
    other.count(30)
    assert leader.count(12) == 12, "it looks once a second"
    assert list(other.wait_for_all()) == []
    assert list(leader.wait_for_all()) == [42]


def test_a_crowded_gpu_is_refused(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    alone, first, second, third = (Processes(None, rank, world, rank, world) for rank, world in ((0, 1), (0, 2), (1, 2), (2, 3)))
    auto = change(config, device="auto")
    assert [device_of(auto, writer) for writer in (alone, first, second)] == ["auto", "cuda:0", "cuda:1"]
    assert device_of(config, third) == "cpu"
    with pytest.raises(InputError, match="2 GPUs"):
        device_of(auto, third)
    with pytest.raises(InputError, match="device-map"):
        device_of(change(auto, device_map="auto"), second)
