"""Several processes evaluate one dictionary: the file of one, whichever dies; what was finished is not done again."""

import json
import os
import resource
import sys
from dataclasses import replace
from functools import partial

import pytest
from several_processes import flags, forked, leaving_work_to, said, torchrun
from test_evaluate import home, identity  # noqa: F401 (a fixture)

from sae.evaluation import EvaluationConfig, evaluate

evaluation = sys.modules["sae.evaluation.evaluate"]


@pytest.fixture
def config(home, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(evaluation, "READ_ROWS", 20)  # eighteen blocks
    identity(home).save(tmp_path / "sae")
    return EvaluationConfig(str(tmp_path / "sae"), home / "cache", device="cpu", batch=2, out=tmp_path / "one.json")


@pytest.fixture
def whole(config):
    evaluate(config)
    return config.out.read_bytes()


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_gives_the_same_bytes(config, whole, tmp_path, processes):
    several = replace(config, out=tmp_path / "several.json")
    assert forked(partial(evaluate, several), processes, tmp_path / "log") == [0] * processes
    assert several.out.read_bytes() == whole
    first, *others = said(tmp_path / "log")
    assert "loss recovered, against zero" in first
    rows = json.loads(whole)["reconstruction"]["rows"]
    for what in ("norms", "reconstruction"):
        assert f"{what}: {rows:,} of {rows:,} tokens" in first
    assert set(others) == {""}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("kill", "then"), [((0, 9), 2), ((1, 4), 1), ((1, 12), 2)])
def test_a_killed_process_costs_nothing_but_its_piece(config, whole, tmp_path, kill, then):
    several = replace(config, out=tmp_path / "several.json")
    work = leaving_work_to(kill[0], partial(evaluate, several))
    assert forked(work, 2, tmp_path / "log", kill)[kill[0]] == -9
    assert not several.out.exists()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".several.json.pieces/*.safetensors")}
    assert forked(partial(watched, several, finished), then, tmp_path / "then") == [0] * then
    assert several.out.read_bytes() == whole


def watched(config, finished):
    """Evaluates; fails if what was finished is computed again."""
    import sae.pieces as shared

    write = shared.write_tensors

    def noted(path, *rest):
        assert path not in finished
        write(path, *rest)

    shared.write_tensors = noted
    evaluate(config)


def test_a_full_disk_of_one_process_is_one_sentence(config, tmp_path):
    def work():
        if os.environ["RANK"] == "1":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
        evaluate(config)

    assert forked(leaving_work_to(1, work), 2, tmp_path / "log") == [2, 2]
    assert "".join(said(tmp_path / "log")).count("error: ") == 1
    assert not config.out.exists()


def test_torchrun_evaluates_with_one_voice(home, config, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.undo()
    evaluate(config)
    run = torchrun("evaluate", *flags(replace(config, out=tmp_path / "several.json")), processes=2)
    out, err = run.communicate(timeout=200)
    assert run.returncode == 0, err
    assert (tmp_path / "several.json").read_bytes() == config.out.read_bytes()
    assert out.count("explained variance") == 1
