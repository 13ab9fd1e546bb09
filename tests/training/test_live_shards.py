"""Live training that several processes share while others run the model: the bits of those that run it themselves; killed, resumed."""

import os
import signal
import time
from dataclasses import replace

import pytest
from safetensors import safe_open
from several_processes import fork, forked, said
from test_shards import close, dying
from test_train_kinds import small
from test_training import cache, contents  # noqa: F401 (a fixture)

from sae.activations.harvest.pools import Recorder
from sae.activations.harvest.settings import RecordingConfig
from sae.activations.live import LiveSource
from sae.processes import Processes
from sae.training.cost import size
from sae.training.live import LiveTrainingConfig, train_from, train_live
from sae.training.shard import Split, meshed
from sae.training.sweep import Sweep

SPLITS = ("features=2,rows=1", "features=1,rows=2")


@pytest.fixture
def live(cache, tmp_path):  # noqa: F811
    recording = RecordingConfig(
        text=(str(cache.parent / "text.jsonl"),),
        model=str(cache.parent / "lm"),
        sites=("resid_post.0",),
        context=32,
        tokens=4000,
        pool_tokens=600,
        held_out=0.2,
        device="cpu",
    )
    shared = dict(d_sae=40, steps=40, batch_size=128, lr=3e-3, log_every=10, checkpoint_every=10, dead_steps=5, device="cpu")
    return lambda name, out, **changes: LiveTrainingConfig(kind=small(name), live=recording, out=tmp_path / out, **(shared | changes))


def themselves(config):
    """Each process that trains runs the model too."""

    def work():
        processes = Processes.from_environment()
        with processes.together(), meshed(Split.of(config.shard, 2), "cpu", processes) as mesh:
            train_from(LiveSource(config.live), config, {}, mesh)

    return work


@pytest.mark.parametrize(("name", "split"), [("batchtopk", SPLITS[0]), ("relu", SPLITS[1])])  # the first measures at its end
def test_those_that_train_learn_what_they_learn_without_the_others(name, split, live, tmp_path):
    whole = live(name, "alone")
    train_live(whole)
    own = live(name, "own", shard=split)
    assert forked(themselves(own), 2, tmp_path / "log") == [0, 0], said(tmp_path / "log")
    for processes in (3, 4):
        config = live(name, f"of_{processes}", shard=split)
        assert forked(lambda config=config: train_live(config), processes, tmp_path / "log") == [0] * processes, said(tmp_path / "log")
        for alone, one, other in zip(whole.folders(), own.folders(), config.folders(), strict=True):
            assert contents(one) == contents(other)
            close(one, alone)
    assert [bool(text) for text in said(tmp_path / "log")] == [True, False, True, False]


def dying_producer(config, rank, at):
    make, left = LiveSource.make, iter(range(at))

    def or_die(self, number):
        if os.environ["RANK"] == str(rank) and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(self, number)

    def work():
        LiveSource.make = or_die
        train_live(config)

    return work


@pytest.mark.parametrize(("dead", "processes", "shard"), [(0, 3, SPLITS[0]), (1, 2, None), (2, 4, SPLITS[0])])
def test_a_killed_process_ends_all_and_any_number_goes_on(dead, processes, shard, live, tmp_path):
    config = live("topk", "whole", shard=SPLITS[0])
    assert forked(lambda: train_live(config), 3, tmp_path / "log") == [0, 0, 0], said(tmp_path / "log")
    cut = replace(config, out=tmp_path / "cut")
    work = dying_producer(cut, dead, 4) if dead > 1 else dying(cut, dead, 27, train_live)
    codes = forked(work, 4, tmp_path / "killed", kill=(9, 0))  # silence is noticed soon
    assert codes[dead] == -9
    assert [code for rank, code in enumerate(codes) if rank != dead] == [2, 2, 2]
    sentences = "".join(said(tmp_path / "killed")).count("error: ")
    assert sentences == 1 or dead == 0  # with it the store of these processes is gone, by which they would agree
    assert (cut.out / "checkpoint.safetensors").exists()
    on = replace(cut, shard=shard)
    assert forked(lambda: train_live(on), processes, tmp_path / "on") == [0] * processes, said(tmp_path / "on")
    assert "resuming after step" in said(tmp_path / "on")[0]
    for one, other in zip(config.folders(), on.folders(), strict=True):
        close(one, other)
        assert shard is None or contents(one) == contents(other)


def asking_to_be_stopped(config, folder, where, number):
    """Live training that leaves a note of every step, and one when it is to be stopped: in a step, or while a pool is made."""
    step, make = Sweep.step, LiveSource.make

    def noted(self, x_bd, at, y_bo=None):
        (folder / f"step.{at + 1}").touch()
        if where == "step" and at == number:
            (folder / "now").touch()
            time.sleep(0.3)
        return step(self, x_bd, at, y_bo)

    def noted_pool(self, at):
        if where == "pool" and len(list(folder.glob("step.*"))) > number:
            time.sleep(0.5)  # until those that train wait for it
            (folder / "now").touch()
            time.sleep(30)
        return make(self, at)

    def work():
        Sweep.step, LiveSource.make = noted, noted_pool
        train_live(config)

    return work


@pytest.mark.parametrize(("where", "order", "shard"), [("step", 1, SPLITS[0]), ("pool", -1, SPLITS[0]), ("pool", 1, None)])
def test_a_signal_to_all_loses_no_step(where, order, shard, live, tmp_path):
    config = live("topk", "whole", shard=shard, checkpoint_every=1000)
    train_live(config) if shard is None else forked(lambda: train_live(config), 3, tmp_path / "log")
    cut, notes = replace(config, out=tmp_path / "cut"), tmp_path / "notes"
    notes.mkdir()
    children = fork(asking_to_be_stopped(cut, notes, where, 12), 4, tmp_path / "cut")
    while not (notes / "now").exists():
        time.sleep(0.01)
    for child in children[::order]:
        os.kill(child, signal.SIGTERM)
    assert all(os.waitpid(child, 0)[1] for child in children)
    done = max(int(path.suffix[1:]) for path in notes.glob("step.*"))
    with safe_open(cut.out / "checkpoint.safetensors", "pt") as file:
        assert int(file.metadata()["step"]) == done
    assert f"stopped after step {done}" in said(tmp_path / "cut")[0]
    assert forked(lambda: train_live(cut), 3, tmp_path / "on") == [0, 0, 0], said(tmp_path / "on")
    for one, other in zip(config.folders(), cut.folders(), strict=True):
        assert contents(one) == contents(other)


def test_too_few_processes_are_one_sentence(live, tmp_path):
    bad = {
        SPLITS[0]: "expected processes beside the 2 that train, to run the model, got 2 in all with --shard features=2,rows=1",
        "features": "expected processes beside the 2 that train",
        "columns": "expected --shard features, rows, or both",
        "features=3,rows=2": "expected processes beside the 6 that train",
    }
    for shard, sentence in bad.items():
        assert forked(lambda shard=shard: train_live(live("relu", "d", shard=shard)), 2, tmp_path / "log") == [2, 2]
        spoken = "".join(said(tmp_path / "log"))
        assert spoken.count("error: ") == 1, spoken
        assert sentence in spoken
    assert forked(lambda: train_live(live("relu", "d", shard=SPLITS[0], d_sae=41)), 3, tmp_path / "log") == [2, 2, 2]
    assert "expected --d-sae that divides by 2 processes, got 41" in "".join(said(tmp_path / "log"))
    assert forked(lambda: train_live(live("relu", "d", shard=SPLITS[0])), 1, tmp_path / "log") == [2]


def test_a_dry_run_says_what_both_sides_take_and_which_is_slower(live, tmp_path, monkeypatch, capsys):
    config, tokens = live("topk", "d", dry_run=True), LiveSource(live("topk", "d").live).recorder.tokens
    source = LiveSource(config.live)
    assert source.recorder.tokens_per_second(source.pools[0]) > 0
    monkeypatch.setattr(Recorder, "tokens_per_second", lambda self, pool: 1000.0)
    made = source.production()
    pool = max(source.pools, key=lambda pool: pool.rows)
    of_pool = sum(int(tokens.sequence_starts[s + 1] - tokens.sequence_starts[s]) for s in pool.sequences)
    assert made.rows_per_second == pytest.approx(1000 * len(source.make(source.pools.index(pool))[0]["resid_post.0"]) / of_pool)
    assert made.pool_bytes == made.memory["a pool of rows"] == pool.rows * 16 * 2
    assert made.memory["tokens"] == 4 * len(tokens.ids)

    train_live(config)
    out = capsys.readouterr().out
    assert f"a pool has {pool.rows} rows ({size(made.pool_bytes)}), enough for {pool.rows / 128:.3g} steps" in out
    assert f"model {size(made.memory['model'])}, tokens" in out
    assert "one process that does both in turn: about " in out
    train_live(replace(config, shard=SPLITS[0]))  # can be planned by one
    out = capsys.readouterr().out
    assert "each of 2 processes (2 by features, 1 by rows): " in out
    assert f"two pools of rows {size(2 * made.pool_bytes)}" in out
    assert " of them would keep up with training" in out
    assert forked(lambda: train_live(replace(config, shard=SPLITS[0])), 4, tmp_path / "log") == [0] * 4, said(tmp_path / "log")
    first, *others = said(tmp_path / "log")
    assert "for what is sent, at" in first
    assert "with 2 of them the model is slower than training; " in first
    assert "rows/s" not in "".join(others)
    assert not (tmp_path / "d").exists()
