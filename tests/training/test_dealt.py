"""A plan in several processes: dealt by cost, each run with the bits of one process, whichever dies; one sentence for bad input."""

import itertools
import json
import os
import random
import resource
import signal
import time
from dataclasses import replace

import pytest
import torch
from several_processes import flags, forked, said, torchrun, worker
from test_plan import plan_of
from test_shards import close
from test_train_kinds import sites  # noqa: F401 (a fixture)
from test_training import cache, contents  # noqa: F401 (a fixture)

from sae.training.deal import Load, deal
from sae.training.plan import train_plan
from sae.training.sweep import Sweep

RUNS = [
    {"name": "relu", "kind": "relu", "l1": [1.0, 4.0], "resample_every": 15, "reads": ["resid_post.0"]},
    {"name": "again", "kind": "relu", "l1": [2.0], "resample_every": 15, "reads": ["resid_post.0"], "seed": 5},
    {"name": "wide", "kind": "batchtopk", "k": [4], "d_sae": 56, "seed": 3, "reads": ["mlp_in.1"], "writes": ["mlp_out.1"], "lr": 0.01},
    {"name": "top", "kind": "topk", "k": [5], "reads": ["resid_post.0"]},
]


@pytest.fixture
def whole(sites, tmp_path):  # noqa: F811
    """What one process makes."""
    return train_plan(plan_of(sites, tmp_path, RUNS, "whole"))


def assert_same(whole, out):
    for folder in whole:
        assert contents(folder) == contents(out / folder.relative_to(whole[0].parents[1] if whole[0].name == "l1_1" else whole[0].parent))


def test_the_busiest_process_is_near_the_best_there_is():
    """Largest first is at most 4/3 of the best (Graham 1969), which is found here by trying all."""
    chance = random.Random(0)
    for _ in range(30):
        costs = [float(chance.randint(1, 50)) for _ in range(chance.randint(1, 7))]
        world = chance.randint(1, 3)
        ranks = deal([Load(cost, ("a",)) for cost in costs], world)

        def busiest(ranks, costs=costs, world=world):
            return max(sum(cost for cost, rank in zip(costs, ranks) if rank == one) for one in range(world))

        best = min(busiest(ranks) for ranks in itertools.product(range(world), repeat=len(costs)))
        assert busiest(ranks) <= 4 / 3 * best + 1e-9


def test_runs_of_equal_cost_are_together_with_their_site():
    loads = [Load(1.0, (site,)) for site in "abababab"]
    assert deal(loads, 2) == [0, 1] * 4
    assert deal(loads[:1], 3) == [0]


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_gives_the_same_runs(sites, whole, tmp_path, processes):  # noqa: F811
    config = plan_of(sites, tmp_path, RUNS, "several")
    assert forked(lambda: train_plan(config), processes, tmp_path / "log") == [0] * processes, said(tmp_path / "log")
    assert_same(whole, config.out)
    table = json.loads((config.out / "status.json").read_text())
    assert [(row["run"], row["state"], row["step"]) for row in table] == [
        (name, "done", 60) for name in ("relu/l1_1", "relu/l1_4", "again", "wide", "top")
    ]
    assert len({row["rank"] for row in table}) == min(processes, 4)
    assert all(row["loss"] > 0 and row["l0"] > 0 and row["rows_per_second"] > 0 for row in table)
    first, *others = said(tmp_path / "log")
    assert "relu/l1_4" in first
    assert all(line.startswith("process ") for text in others for line in text.splitlines())
    assert forked(lambda: train_plan(config), processes, tmp_path / "again") == [0] * processes
    assert "already complete" in said(tmp_path / "again")[0]


def dies(rank, at, config):
    """Trains until a process kills itself at its n-th step of any run."""
    if os.environ["RANK"] == str(rank):
        step, left = Sweep.step, iter(range(at))

        def or_die(self, *arguments):
            if next(left, None) is None:
                os.kill(os.getpid(), 9)
            return step(self, *arguments)

        Sweep.step = or_die
    train_plan(config)


@pytest.mark.parametrize(("rank", "at", "then"), [(0, 45, 2), (1, 45, 3), (1, 25, 1)])
def test_a_killed_process_costs_what_followed_its_last_checkpoint(sites, whole, tmp_path, rank, at, then):  # noqa: F811
    config = plan_of(sites, tmp_path, RUNS, "cut")
    codes = forked(lambda: dies(rank, at, config), 2, tmp_path / "log", kill=(9, 0))
    assert codes[rank] == -9
    assert "to continue" in said(tmp_path / "log")[1 - rank] or codes[1] == 0
    assert forked(lambda: train_plan(config), then, tmp_path / "then") == [0] * then, said(tmp_path / "then")
    assert_same(whole, config.out)
    assert not list(config.out.rglob("checkpoint.safetensors"))


def test_without_a_launcher_the_others_notice_a_killed_process_and_keep_their_steps(sites, whole, tmp_path):  # noqa: F811
    """Long before the silence of five minutes, after which this test would have failed."""
    config, step = plan_of(sites, tmp_path, RUNS, "cut", checkpoint_every=1000), Sweep.step

    def slow(self, *arguments):
        time.sleep(0.2)
        return step(self, *arguments)

    def work():
        Sweep.step = slow if os.environ["RANK"] == "0" else step
        dies(1, 25, config)

    assert forked(work, 2, tmp_path / "log") == [2, -9], said(tmp_path / "log")
    assert "process 1 of this run has died; run the same command again to continue" in said(tmp_path / "log")[0]
    assert "harvest" not in said(tmp_path / "log")[0]
    assert forked(lambda: train_plan(config), 2, tmp_path / "then") == [0, 0]
    assert "resuming after step" in said(tmp_path / "then")[0]
    assert_same(whole, config.out)


@pytest.mark.parametrize("shard", ["features", "rows"])
def test_all_processes_can_share_every_run(sites, whole, tmp_path, shard):  # noqa: F811
    """One process' runs to rounding; after a kill the bits of a plan that was left alone."""
    config, cut = (plan_of(sites, tmp_path, RUNS, name, shard=shard) for name in ("shared", "cut"))
    assert forked(lambda: train_plan(config), 2, tmp_path / "log") == [0, 0], said(tmp_path / "log")
    assert forked(lambda: dies(1, 105, cut), 2, tmp_path / "killed") == [2, -9]  # in step 36 of three sweeps
    assert len(list(cut.out.glob("*/checkpoint.safetensors"))) == len(RUNS)
    assert forked(lambda: train_plan(cut), 2, tmp_path / "on") == [0, 0], said(tmp_path / "on")
    assert "resuming after step 20" in said(tmp_path / "on")[0]
    for folder in whole:
        name = folder.relative_to(tmp_path / "whole")
        assert contents(config.out / name) == contents(cut.out / name)
        close(config.out / name, folder)
    assert not list(cut.out.rglob("checkpoint.safetensors"))
    assert {(row["rank"], row["state"]) for row in json.loads((cut.out / "status.json").read_text())} == {(None, "done")}
    assert [bool(text) for text in said(tmp_path / "log")] == [True, False]


def test_bad_input_of_one_process_is_one_sentence(sites, tmp_path):  # noqa: F811
    config = plan_of(sites, tmp_path, RUNS, "out")
    (tmp_path / "other").mkdir()
    other = plan_of(sites, tmp_path / "other", [{**RUNS[0], "l1": [1.0, 5.0]}, *RUNS[1:]])
    for changes, sentence in (
        (dict(plan=other.plan), "expected the same run relu in every process"),
        (dict(plan=tmp_path / "nowhere.json"), "nowhere.json"),
        (dict(batch_size=64), "expected the same batch size in every process"),
        (dict(cache=tmp_path / "nowhere"), "nowhere"),
        (dict(shard="rows"), "expected the same shard in every process"),
    ):

        def work(changes=changes):
            train_plan(replace(config, **changes) if os.environ["RANK"] == "1" else config)

        assert forked(work, 2, tmp_path / "log") == [2, 2]
        assert [text.count("error: ") for text in said(tmp_path / "log")] == [0, 1]
        assert sentence in said(tmp_path / "log")[1]


def test_processes_on_other_machines_are_named_and_refused_where_they_share_a_run(sites, tmp_path):  # noqa: F811
    def mixed(config):
        if os.environ["RANK"] == "1":
            torch.backends.cpu.get_cpu_capability = lambda: "AVX1"
        train_plan(config)

    dealt, shared = (plan_of(sites, tmp_path, RUNS[3:], name, shard=shard) for name, shard in (("dealt", None), ("shared", "features")))
    assert forked(lambda: mixed(dealt), 3, tmp_path / "log") == [0, 0, 0], said(tmp_path / "log")
    first, *others = said(tmp_path / "log")
    here = torch.backends.cpu.get_cpu_capability()
    assert (
        f"processes run on different machines (0, 2: processor {here}, threads 1; 1: processor AVX1, threads 1): the last digits" in first
    )
    assert "differ" not in "".join(others)
    assert forked(lambda: mixed(shared), 2, tmp_path / "log") == [2, 2]
    assert "expected the same processor in every process, but process 1 has AVX1" in said(tmp_path / "log")[1]


def test_a_full_disk_of_one_process_is_one_sentence_and_costs_nothing(sites, whole, tmp_path):  # noqa: F811
    config = plan_of(sites, tmp_path, RUNS, "full")

    def work():
        if os.environ["RANK"] == "1":
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        train_plan(config)

    assert forked(work, 2, tmp_path / "log") == [2, 2]
    assert "".join(said(tmp_path / "log")).count("error: ") == 1
    train_plan(config)
    assert_same(whole, config.out)


def test_torchrun_restarts_a_plan_whose_process_was_killed(sites, tmp_path):  # noqa: F811
    long = dict(steps=400, checkpoint_every=50)
    whole = train_plan(plan_of(sites, tmp_path, RUNS, "whole", **long))
    config = plan_of(sites, tmp_path, RUNS, "restarted", **long)
    run = torchrun("train-plan", *flags(config), processes=2, launcher=("--max-restarts=2",))
    while run.poll() is None and not list(config.out.glob("*/checkpoint.safetensors")):
        time.sleep(0.01)
    os.kill(worker(run, 1), signal.SIGKILL)
    out, err = run.communicate(timeout=280)
    assert run.returncode == 0, err
    assert "resuming after step" in out
    assert_same(whole, config.out)
