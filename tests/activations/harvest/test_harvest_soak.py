"""Killed with SIGKILL at random moments, again and again, a harvest ends with the bytes of one that was left alone."""

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from live_world import make_world
from several_processes import flags, fork, forked, torchrun, worker
from test_harvest import different

from sae.activations.harvest import parts
from sae.activations.harvest.command import HarvestConfig, harvest

SOAK = pytest.mark.soak
SEED = 7


@pytest.fixture(autouse=True)
def kept_at_every_batch(monkeypatch):
    monkeypatch.setattr(parts, "EVERY", 0.0)
    monkeypatch.setattr(parts, "SHARE", 0)


def settings(world: dict, out: Path, kills: int) -> HarvestConfig:
    """More pools than the kills leave time for."""
    return HarvestConfig(out=out, **world | {"pool_tokens": 60, "shard_tokens": 40, "tokens": 1200 * (kills + 3)})


def wait_for_moment(config: HarvestConfig, moments: random.Random, ended: Callable[[], bool]) -> None:
    """Until some new files are there, none at times, and a random while longer, but never until the harvest is nearly done."""
    wanted = files(config) + moments.randint(0, 8)
    while files(config) < wanted and not ended():
        time.sleep(0.001)
    until = time.monotonic() + (moments.uniform(0, 0.03) if moments.random() < 0.8 else moments.uniform(0, 0.5))
    while time.monotonic() < until and files(config) < wanted + 8 and not ended():
        time.sleep(0.001)


def files(config: HarvestConfig) -> int:
    return len([path for path in config.out.glob("*/*.safetensors") if path.parent.name != parts.FOLDER])


def one_life_forked(config: HarvestConfig, processes: int, moments: random.Random, log: Path) -> bool:
    """Starts the harvest and kills its processes one after another; returns whether it was killed before its end."""
    children = fork(partial(harvest, config), processes, log) if processes > 1 else [fork_alone(config)]
    wait_for_moment(config, moments, lambda: os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None)
    for child in moments.sample(children, processes):
        os.kill(child, signal.SIGKILL)
        time.sleep(moments.choice([0, 0.002, 0.02]))
    statuses = [os.waitpid(child, 0)[1] for child in children]
    return any(map(os.WIFSIGNALED, statuses))


def fork_alone(config: HarvestConfig) -> int:
    if (child := os.fork()) == 0:
        try:
            harvest(config)
        finally:
            os._exit(0)
    return child


def one_life_of_torchrun(config: HarvestConfig, moments: random.Random) -> bool:
    """Like `one_life_forked`, killing a rank, whose end torchrun must notice, or all at once, as a power cut does."""
    run = torchrun("cache", *flags(config), processes=2)
    wait_for_moment(config, moments, lambda: run.poll() is not None)
    victims = [rank for rank in range(2) if moments.random() < 0.6]
    pids = []
    for rank in victims:
        try:
            pids.append(worker(run, rank))
        except (StopIteration, FileNotFoundError):  # not started yet, or at its end
            continue
    if len(pids) != 1:
        pids = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
        run.kill()
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    run.communicate(timeout=120)
    while any(alive(pid) for pid in pids):  # those that lost their launcher
        time.sleep(0.01)
    return run.returncode != 0


def alive(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("how", "kills"),
    [
        ("one process", 3),
        ("two processes", 3),
        pytest.param("one process", 50, marks=SOAK),
        pytest.param("two processes", 50, marks=SOAK),
        pytest.param("torchrun", 50, marks=SOAK),
    ],
)
def test_killed_again_and_again_it_ends_with_the_same_bytes(how, kills, tmp_path):
    moments = random.Random(SEED)
    world = make_world(tmp_path, 50 * (kills + 3))
    config = settings(world, tmp_path / "cache", kills)
    for life in range(kills):
        if how == "torchrun":
            killed = one_life_of_torchrun(config, moments)
        else:
            killed = one_life_forked(config, 1 if how == "one process" else 2, moments, tmp_path / "log")
        assert killed, f"it ended by itself in life {life}"
    if how == "torchrun":
        last = torchrun("cache", *flags(config), processes=2)
        _, err = last.communicate(timeout=300)
        assert last.returncode == 0, err
    else:
        assert forked(partial(harvest, config), 2 if how == "two processes" else 1, tmp_path / "log") == [0] * (
            2 if how == "two processes" else 1
        )
    assert different(config.out, harvest(settings(world, tmp_path / "whole", kills))) == []
