"""What a run's folder may hold, which settings continue it, and settings that are refused before anything is written."""

import json
from dataclasses import replace

import pytest
from test_plan import RUNS, plan_of
from test_train_kinds import config_of, sites  # noqa: F401 (a fixture)
from test_training import cache, contents  # noqa: F401 (a fixture)

from sae.errors import InputError
from sae.kinds import ReLU, TopK
from sae.training import train
from sae.training.plan import train_plan
from sae.training.sweep import Sweep

ONE, TWO = ReLU(l1=(1.0,), resample_every=15), ReLU(l1=(1.0, 4.0), resample_every=15)


def stopped(config, monkeypatch, at=30):
    """Trains until a power cut."""
    step = Sweep.step

    def or_stop(self, x_bd, number, y_bo=None):
        if number == at:
            raise RuntimeError("power cut")
        return step(self, x_bd, number, y_bo)

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "step", or_stop)
        with pytest.raises(RuntimeError):
            train(config)


def test_a_folder_with_something_else_is_refused_and_left_alone(cache, tmp_path):  # noqa: F811
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.md").write_text("mine")
    for out in (cache, tmp_path / "notes"):
        before = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
        with pytest.raises(InputError, match=r"expected a new or empty folder, or one with a run, for --out, got .* with .*"):
            train(config_of(ONE, cache, out))
        assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == before


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_with_a_finished_run_of_other_values_is_refused(cache, tmp_path, restart):  # noqa: F811
    finished = train(config_of(TWO, cache, tmp_path / "out"))
    before = [(contents(folder), (folder / "training.json").read_bytes()) for folder in finished]
    for kind in (replace(TWO, l1=(16.0, 32.0)), replace(TWO, l1=(1.0, 16.0)), replace(TWO, l1=(1.0,)), TopK(k=(4, 8))):
        with pytest.raises(InputError, match=r"out holds another run in .*l1_4; use another --out, or remove that run"):
            train(config_of(kind, cache, tmp_path / "out", restart=restart))
    with pytest.raises(InputError, match=r"lr 0\.003 there, 0\.001 now"):
        train(config_of(TWO, cache, tmp_path / "out", lr=1e-3))
    assert [(contents(folder), (folder / "training.json").read_bytes()) for folder in finished] == before


def test_restart_replaces_an_unfinished_run_of_other_values_and_logs_may_be_there(cache, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "slurm-7.out").write_text("a launcher's")
    stopped(config_of(TWO, cache, tmp_path / "out"), monkeypatch)
    other = config_of(replace(TWO, l1=(2.0, 8.0)), cache, tmp_path / "out")
    with pytest.raises(InputError, match="or --restart to start over"):
        train(other)
    assert (tmp_path / "out" / "checkpoint.safetensors").exists()
    train(replace(other, restart=True))
    alone = train(replace(other, out=tmp_path / "alone"))
    assert [contents(folder) for folder in other.folders()] == [contents(folder) for folder in alone]
    stopped(config_of(TWO, cache, tmp_path / "early"), monkeypatch, at=3)  # before the first checkpoint
    train(config_of(replace(TWO, l1=(2.0, 8.0)), cache, tmp_path / "early"))


def test_a_run_continues_with_its_cache_under_another_name_and_other_log_lines(cache, tmp_path, monkeypatch):  # noqa: F811
    (whole,) = train(config_of(ONE, cache, tmp_path / "whole"))
    stopped(config_of(ONE, cache, tmp_path / "cut"), monkeypatch)
    (tmp_path / "link").symlink_to(cache)
    (cut,) = train(config_of(ONE, tmp_path / "link", tmp_path / "cut", log_every=20))
    assert contents(cut)[0] == contents(whole)[0]


def test_a_run_does_not_continue_on_a_cache_that_has_changed(cache, tmp_path, monkeypatch):  # noqa: F811
    import shutil

    shutil.copytree(cache, tmp_path / "cache")
    stopped(config_of(ONE, tmp_path / "cache", tmp_path / "cut"), monkeypatch)
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps(manifest | {"seed": 99}))
    with pytest.raises(InputError, match=r"cut holds a run with other settings \(cache_content \w+ there, \w+ now\)"):
        train(config_of(ONE, tmp_path / "cache", tmp_path / "cut"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(lr=float("inf")), "expected numbers that are finite for --lr, got inf"),
        (dict(kind=ReLU(l1=(1.0, float("nan")))), r"expected numbers that are finite for --l1, got \(1.0, nan\)"),
        (dict(betas=(1.0, 1.0)), "expected --betas of at least 0 and less than 1, got 1.0 1.0"),
        (dict(lr_warmup=0.6, lr_decay=0.6), "--lr-warmup and --lr-decay of together at most 1, got 0.6 and 0.6"),
        (dict(precision="bfloat16"), "expected precision float32 on cpu, got bfloat16"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_before_anything_is_written(cache, tmp_path, changes, sentence):  # noqa: F811
    with pytest.raises(InputError, match=sentence) as error:
        train(config_of(**(dict(kind=ONE, cache=cache, out=tmp_path / "out") | changes)))
    assert "harvest" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_divergence_advises_only_what_is_not_done_yet(cache, tmp_path):  # noqa: F811
    for clip, advice in ((1.0, "lower --lr; "), (0.0, "lower --lr or set --clip 1; ")):
        with pytest.raises(InputError, match=f"training diverged at step .*{advice}"):
            train(config_of(ONE, cache, tmp_path / "out", lr=1e6, clip=clip, restart=True))


def test_a_plans_difference_is_said_in_short(sites, tmp_path):  # noqa: F811
    train_plan(plan_of(sites, tmp_path, RUNS))
    other = [RUNS[0], {**RUNS[1], "k": [5]}, RUNS[2]]
    with pytest.raises(InputError, match=r"with other settings \(runs wide k \[4\] there, \[5\] now\); "):
        train_plan(plan_of(sites, tmp_path, other))
    with pytest.raises(InputError, match=r"with other settings \(runs third only now\); "):
        train_plan(plan_of(sites, tmp_path, [*RUNS, {**RUNS[2], "name": "third"}]))
    marks = sorted((tmp_path / "out").rglob("training.json"))
    with pytest.raises(InputError, match=r"relu holds another run in .*l1_4"):
        train_plan(plan_of(sites, tmp_path, [{**RUNS[0], "l1": [1.0, 9.0]}, *RUNS[1:]], restart=True))
    assert sorted((tmp_path / "out").rglob("training.json")) == marks


def test_errors_of_a_plan_name_the_run(sites, tmp_path):  # noqa: F811
    (narrow,) = train(config_of(ReLU(l1=(1.0,), resample_every=15), sites, tmp_path / "narrow", reads=("resid_post.0",), d_sae=24))
    with pytest.raises(InputError, match=r"run second: the dictionary in .* was made for"):
        train_plan(plan_of(sites, tmp_path, [*RUNS[:2], {**RUNS[2], "init": str(narrow)}]))
    for name in ("status.json", ".hidden"):
        with pytest.raises(InputError, match="expected a name that can be a folder's"):
            train_plan(plan_of(sites, tmp_path, [{**RUNS[0], "name": name}]))
    config = plan_of(sites, tmp_path, RUNS)
    config.plan.write_text('[{"name": "a", "kind": "topk", "k": [5], "reads": ["resid_post.0"], "k": [6]}]')
    with pytest.raises(InputError, match=r"expected each name once in a plan at .*plan.json, got 'k' twice in one object; remove one"):
        train_plan(config)


def test_an_init_with_a_skip_needs_the_flag_and_one_without_must_not_have_it(sites, tmp_path):  # noqa: F811
    ends = dict(reads=("mlp_in.1",), writes=("mlp_out.1",))
    (with_skip,), (without,) = (train(config_of(TopK(k=(4,)), sites, tmp_path / str(skip), skip=skip, **ends)) for skip in (True, False))
    for init, skip, sentence in ((with_skip, False, "has a skip; give --skip"), (without, True, "has no skip; leave --skip out")):
        with pytest.raises(InputError, match=sentence):
            train(config_of(TopK(k=(4,)), sites, tmp_path / "out", init=init, skip=skip, **ends))
