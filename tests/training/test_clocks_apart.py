"""Processes whose clocks are an hour apart: the same bits, since no decision depends on another machine's clock."""

import os
import time

import pytest
from several_processes import forked, said
from test_live_shards import live  # noqa: F401 (a fixture)
from test_plan import RUNS, plan_of
from test_train_kinds import config_of, sites, small  # noqa: F401 (a fixture)
from test_training import cache, contents  # noqa: F401 (a fixture)

from sae.training import train
from sae.training.live import train_live
from sae.training.plan import train_plan


def an_hour_apart(work):
    """The last process' clocks are an hour ahead."""

    def ahead(read):
        return lambda: read() + 3600

    def shifted():
        if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            time.time, time.monotonic, time.perf_counter = map(ahead, (time.time, time.monotonic, time.perf_counter))
        work()

    return shifted


@pytest.mark.parametrize("job", ["train", "train-plan", "train-live"])
def test_clocks_do_not_decide(job, sites, cache, live, tmp_path):  # noqa: F811
    def made(name):
        """The folders of a job's dictionaries, and the job."""
        if job == "train":
            config = config_of(small("relu"), cache, tmp_path / name, steps=20, checkpoint_every=5, shard="features")
            return config.folders(), lambda: train(config)
        if job == "train-live":
            config = live("relu", name, steps=20, checkpoint_every=5)
            return config.folders(), lambda: train_live(config)
        plan = plan_of(sites, tmp_path, RUNS, name, steps=20, checkpoint_every=5)
        return [folder for run in plan.runs() for folder in run.folders()], lambda: train_plan(plan)

    folders, work = made("one_clock")
    assert forked(work, 2, tmp_path / "log") == [0, 0], said(tmp_path / "log")
    apart, work = made("apart")
    assert forked(an_hour_apart(work), 2, tmp_path / "log") == [0, 0], said(tmp_path / "log")
    assert len(folders) == len(apart) > 1
    for one, other in zip(folders, apart):
        assert contents(one) == contents(other)
