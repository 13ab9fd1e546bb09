"""Killed at any change to a file, a training run ends as one that was left alone: the same files, the same weights, the same log."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from kills import changes, killed, limited
from kills import contents as every_file
from test_training import cache, config_for  # noqa: F401 (a fixture)

from sae.training import train
from sae.training.metrics import keep_until
from sae.training.sweep import Sweep

ROOT = Path(__file__).parents[2]


def without_clock(folder):
    """Files by name; the log without its rates."""
    files = every_file(folder)
    for name in files:
        if name.endswith("metrics.jsonl"):
            lines = [json.loads(line) for line in files[name].splitlines()]
            files[name] = [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]
    return files


@pytest.fixture
def runs(cache, tmp_path):  # noqa: F811
    """How to run into a folder, what an uninterrupted run leaves, and at how many changes to files it can be killed."""

    def run(**more):
        train(config_for(cache, tmp_path / "d", l1=(1.0, 15.0), steps=30, checkpoint_every=10, **more))

    last = changes(run, tmp_path)
    whole = without_clock(tmp_path / "d")
    shutil.rmtree(tmp_path / "d")
    return run, whole, last


def check(runs, folder, moments):
    run, whole, _ = runs
    for moment in moments:
        assert killed(run, moment, folder.parent)
    run()
    assert without_clock(folder) == whole, moments
    run()  # says that it is complete
    assert without_clock(folder) == whole
    shutil.rmtree(folder)


def test_a_kill_now_and_then(runs, tmp_path, capsys):
    last = runs[2]
    for moments in ([last // 3], [last // 2, 7], [last - 2], [last - 1], [last]):
        check(runs, tmp_path / "d", moments)
    assert capsys.readouterr().out.count("already complete") >= 5


@pytest.mark.soak
def test_a_kill_at_every_change(runs, tmp_path):
    for moment in range(1, runs[2] + 1):
        check(runs, tmp_path / "d", [moment])
    chance = random.Random(0)
    for _ in range(40):
        check(runs, tmp_path / "d", [chance.randint(2, runs[2] // 2), chance.randint(1, 12), chance.randint(1, 9)])


def test_a_log_is_never_rewritten_in_place(tmp_path):
    """Killed at each change of the rewriting, the log is as it was or as it shall be."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in range(10, 60, 10)]
    whole, kept = "".join(lines) + '{"step": 6', "".join(lines[:3])
    path.write_text(whole)
    for moment in range(1, 20):
        if not killed(lambda: keep_until(path, 30), moment, tmp_path):
            break
        assert path.read_text() in (whole, kept)
    assert moment > 3
    keep_until(path, 30)
    assert path.read_text() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_limit_of_the_files_size_costs_no_more_than_the_steps_since_the_checkpoint(runs, tmp_path):
    """At the log, at the checkpoint, at the weights; never at all."""
    run, whole, _ = runs
    codes = []
    for limit in (0, 300, 2000, 5000, 1 << 20):
        codes.append(limited(run, limit))
        assert not [path for path in every_file(tmp_path) if path.endswith((".tmp", ".box"))]
        run()
        assert without_clock(tmp_path / "d") == whole
        shutil.rmtree(tmp_path / "d")
    assert codes == [2, 2, 2, 2, 0]


def test_a_run_whose_output_is_closed_is_the_same_run(cache, tmp_path):  # noqa: F811
    train(config_for(cache, tmp_path / "whole"))
    flags = "relu --d-sae 40 --l1 1 --steps 60 --batch-size 128 --lr 3e-3 --log-every 10 --resample-every 15 --dead-steps 5 --device cpu"
    command = f"'{sys.executable}' scripts/train_sae.py {flags} --cache '{cache}' --out '{tmp_path}/d' >&-"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
    assert without_clock(tmp_path / "d") == without_clock(tmp_path / "whole")


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_leaves_a_checkpoint_unless_nohup_ignores_it(cache, tmp_path, monkeypatch, ignored):  # noqa: F811
    step, steps = Sweep.step, []

    def hung_up(self, *args):
        steps.append(1)
        if len(steps) == 33:
            os.kill(os.getpid(), signal.SIGHUP)
        return step(self, *args)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with monkeypatch.context() as patch, nullcontext() if ignored else pytest.raises(KeyboardInterrupt):
            patch.setattr(Sweep, "step", hung_up)
            train(config_for(cache, tmp_path / "d"))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(steps) == (60 if ignored else 33)
    assert (tmp_path / "d" / "checkpoint.safetensors").exists() != ignored
