"""Dictionaries that train together from a plan: each as if alone, one checkpoint, one sentence for plans that make no sense."""

import json

import pytest
from test_train_kinds import config_of, sites  # noqa: F401 (a fixture)
from test_training import cache, contents  # noqa: F401 (a fixture)

from sae.errors import InputError
from sae.kinds import BatchTopK, ReLU
from sae.training import train
from sae.training.plan import PlanConfig, train_plan
from sae.training.sweep import Sweep

RUNS = [
    {"name": "relu", "kind": "relu", "l1": [1.0, 4.0], "resample_every": 15, "reads": ["resid_post.0"]},
    {"name": "wide", "kind": "batchtopk", "k": [4], "d_sae": 56, "seed": 3, "reads": ["mlp_in.1"], "writes": ["mlp_out.1"], "lr": 0.01},
    {"name": "second", "kind": "batchtopk", "k": [4], "d_sae": 56, "seed": 4, "reads": ["mlp_in.1"], "writes": ["mlp_out.1"], "lr": 0.01},
]


def plan_of(sites, tmp_path, runs, name="out", **changes):  # noqa: F811
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(runs))
    shared = dict(d_sae=40, steps=60, batch_size=128, lr=3e-3, log_every=10, checkpoint_every=20, dead_steps=5, device="cpu")
    return PlanConfig(cache=sites, plan=path, out=tmp_path / name, **(shared | changes))


def test_each_run_is_as_if_it_had_trained_alone(sites, tmp_path):  # noqa: F811
    found = train_plan(plan_of(sites, tmp_path, RUNS))
    relu = ReLU(l1=(1.0, 4.0), resample_every=15)
    alone = train(config_of(relu, sites, tmp_path / "relu", reads=("resid_post.0",)))
    assert [folder.relative_to(tmp_path).as_posix() for folder in found] == ["out/relu/l1_1", "out/relu/l1_4", "out/wide", "out/second"]
    for one, other in zip(found, alone):
        assert contents(one) == contents(other)
    changes = dict(d_sae=56, reads=("mlp_in.1",), writes=("mlp_out.1",), lr=0.01)
    (wide,) = train(config_of(BatchTopK(k=(4,)), sites, tmp_path / "wide", **changes))
    assert contents(found[2])[0] != contents(wide)[0]  # another seed of the start; the batches are those of the command's own


ALIKE = [
    {"kind": "abstopk", "resample_every": 15, "dead_steps": 1, "reads": ["mlp_in.1"], "writes": ["mlp_out.1"], "skip": True, **own}
    for own in ({"name": "one", "k": [1]}, {"name": "two", "k": [1], "seed": 7}, {"name": "zero", "k": [2], "b_dec": "zero"})
]


def test_runs_that_differ_in_seed_start_and_value_are_one_sweep(sites, tmp_path, monkeypatch):  # noqa: F811
    """And each has the bits that it has alone."""
    sizes, step = [], Sweep.step

    def noted(self, x_bd, number, y_bo=None):
        sizes.append(len(self.values))
        return step(self, x_bd, number, y_bo)

    monkeypatch.setattr(Sweep, "step", noted)
    other = {**ALIKE[0], "name": "other", "lr": 0.01}
    found = train_plan(plan_of(sites, tmp_path, [*ALIKE, other]))
    assert sizes[:4] == [3, 1, 3, 1]
    for run, folder in zip(ALIKE, found):
        (alone,) = train_plan(plan_of(sites, tmp_path, [run], f"alone_{run['name']}"))
        assert contents(alone) == contents(folder)
    weights = [contents(folder)[0] for folder in found]
    assert weights[0] != weights[1]
    assert sum(line["resampled"] for line in contents(found[1])[1]) > 0  # from its own seed


def test_one_checkpoint_resumes_them_all(sites, tmp_path, monkeypatch):  # noqa: F811
    whole = train_plan(plan_of(sites, tmp_path, RUNS, "whole"))
    step, calls = Sweep.step, []

    def interrupted(self, x_bd, number, y_bo=None):
        calls.append(number)
        if len(calls) == 90:  # between the two runs of a step
            raise RuntimeError("power cut")
        return step(self, x_bd, number, y_bo)

    monkeypatch.setattr(Sweep, "step", interrupted)
    with pytest.raises(RuntimeError):
        train_plan(plan_of(sites, tmp_path, RUNS, "cut"))
    monkeypatch.undo()
    for one, other in zip(whole, train_plan(plan_of(sites, tmp_path, RUNS, "cut"))):
        assert contents(one) == contents(other)
    with pytest.raises(InputError, match="other settings"):
        train_plan(plan_of(sites, tmp_path, RUNS[:1], "cut"))


BAD = [
    ([], "an empty list"),
    ([RUNS[0], RUNS[0]], "two runs of .* have the name 'relu'"),
    ([{"kind": "relu"}], "expected a name"),
    ([{"name": "../a", "kind": "relu"}], "expected a name"),
    ([{"name": "a", "kind": "rely"}], "expected a kind among"),
    ([{"name": "a", "kind": "relu", "k": [3]}], "got 'k'"),
    ([{"name": "a", "kind": "topk", "k": [3.5]}], "k of run 1"),
    ([{"name": "a", "kind": "topk", "k": [41]}], "run 1 of .*: --k must be"),
    ([{"name": "a", "kind": "topk", "reads": ["mlp_in.7"]}], "mlp_in.7"),
    ([{"name": "a", "kind": "topk", "steps": 3}], "got 'steps'"),
]


@pytest.mark.parametrize(("runs", "sentence"), BAD)
def test_plans_that_cannot_be_meant_are_refused(sites, tmp_path, runs, sentence):  # noqa: F811
    with pytest.raises(InputError, match=sentence):
        train_plan(plan_of(sites, tmp_path, runs))
    assert not (tmp_path / "out" / "a").exists()
