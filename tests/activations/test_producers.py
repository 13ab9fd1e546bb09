"""Live training in several processes: the bits of one, whichever dies; producers wait; one sentence for processes that differ."""

import os
import time
from functools import partial

import pytest
from live_world import make_world
from several_processes import flags, forked, said, torchrun
from test_live import live

from sae.activations.live import LiveSource
from sae.activations.producers import FedSource
from sae.training.live import train_live
from sae.training.sweep import Sweep


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict:
    return make_world(tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """What one process makes."""
    (folder,) = train_live(live(world, tmp_path_factory.mktemp("whole") / "sae"))
    return trained(folder)


def trained(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_producers_gives_the_same_bits(world, whole, tmp_path, processes):
    work = partial(train_live, live(world, tmp_path / "sae"))
    assert forked(work, processes, tmp_path / "log") == [0] * processes, said(tmp_path / "log")
    assert trained(tmp_path / "sae") == whole
    assert forked(work, processes, tmp_path / "again") == [0] * processes
    assert "already complete" in said(tmp_path / "again")[0]


def dies(rank, at, config):
    """Live training in which a process kills itself: a producer at its n-th pool, the one that trains at its n-th step."""
    if os.environ["RANK"] == str(rank):
        left = iter(range(at))
        of, name = (LiveSource, "make") if rank else (Sweep, "step")
        function = getattr(of, name)

        def or_die(*arguments):
            if next(left, None) is None:
                os.kill(os.getpid(), 9)
            return function(*arguments)

        setattr(of, name, or_die)
    train_live(config)


@pytest.mark.parametrize(("rank", "at", "then"), [(0, 50, 2), (1, 6, 3), (2, 1, 1)])
def test_a_killed_process_costs_what_followed_the_last_checkpoint(world, whole, tmp_path, rank, at, then):
    config = live(world, tmp_path / "sae")
    codes = forked(partial(dies, rank, at, config), 3, tmp_path / "log", kill=(9, 0))
    assert codes[rank] == -9
    assert all(code for code in codes)
    told = "".join(said(tmp_path / "log"))
    assert "continue" in told
    assert forked(partial(train_live, config), then, tmp_path / "then") == [0] * then
    assert trained(tmp_path / "sae") == whole


def test_producers_wait_for_the_one_that_trains(world, tmp_path):
    """However slow it is, no more pools are made than it has taken and one for each producer."""
    make, pool = LiveSource.make, FedSource.pool

    def noted(self, number):
        found = make(self, number)
        (tmp_path / f"made.{os.getpid()}.{time.monotonic()}").touch()
        return found

    def slow(self, *arguments):
        found = pool(self, *arguments)
        time.sleep(0.02)
        assert len(list(tmp_path.glob("made.*"))) <= self._requests <= self._requests - len(self._asked) + 2
        return found

    def work():
        LiveSource.make, FedSource.pool = noted, slow
        train_live(live(world, tmp_path / "sae"))

    assert forked(work, 3, tmp_path / "log") == [0, 0, 0], said(tmp_path / "log")


def test_processes_that_differ_are_one_sentence(world, tmp_path):
    (tmp_path / "other").mkdir()
    others = make_world(tmp_path / "other", 50)
    for change, rank, sentence in (
        ({"seed": 4}, 1, "expected the same --live.seed in every process, but process 1 has 4 and process 0 0;"),
        ({"model": others["model"]}, 2, "expected the same --live.model in every process"),
        ({"text": (str(tmp_path / "nowhere.txt"),)}, 1, "nowhere.txt"),
    ):

        def work(change=change, rank=rank):
            train_live(live(world | (change if os.environ["RANK"] == str(rank) else {}), tmp_path / "sae"))

        assert forked(work, 3, tmp_path / "log") == [2, 2, 2]
        assert [text.count("error: ") for text in said(tmp_path / "log")] == [int(number == rank) for number in range(3)]
        assert sentence in said(tmp_path / "log")[rank]


def test_torchrun_trains_live(world, whole, tmp_path):
    config = live(world, tmp_path / "sae")
    assert flags(config.live)
    run = torchrun("train-live", "relu", *command_line(config), processes=2)
    _, err = run.communicate(timeout=250)
    assert run.returncode == 0, err
    assert trained(tmp_path / "sae") == whole


def command_line(config):
    given = ["--l1", "0.2", "--resample-every", "15", "--out", str(config.out)]
    for name in ("d_sae", "steps", "batch_size", "lr", "log_every", "checkpoint_every", "device"):
        given += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    live = flags(config.live)
    return given + [f"--live.{word[2:]}" if word.startswith("--") else word for word in live]
