"""The comparison of curves: what is run next, which learning rate is kept, and a difference at equal L0."""

import math
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))
QUALITY = runpy.run_path(str(FOLDER / "quality.py"))
sys.path.remove(str(FOLDER))
REPORT = sys.modules["quality_report"]
Run = QUALITY["Run"]


def point(tool: str, l0: float, fvu: float, sparsity: float = 2.0, lr: float | None = 1e-3, seed: int = 0, kind: str = "relu") -> dict:
    return dict(
        tool=tool, kind=kind, l0=l0, fvu=fvu, sparsity=sparsity, lr=lr, seed=seed, dead=8, loss_recovered=1 - fvu, median_density=0.01
    )


def test_difference_is_read_at_equal_l0():
    ours = [point("ours", 10, 0.4, 2), point("ours", 100, 0.1, 1)]
    theirs = [point("saelens", 10, 0.5, 2), point("saelens", 1000, 0.1, 1)]  # falls by 0.2 for each factor of ten
    found = REPORT.differences(ours + theirs, "relu", "saelens")
    assert found == {10: pytest.approx(-0.1), 100: pytest.approx(0.1 - 0.3)}
    recovered = REPORT.differences(ours + theirs, "relu", "saelens", "loss_recovered")
    assert recovered == {10: pytest.approx(0.1), 100: pytest.approx(0.2)}
    said = REPORT.report(ours + theirs, 64)
    assert "| relu | SAELens StandardTrainingSAE | -0.1000 at 10, -0.2000 at 100 |" in said


def test_no_difference_without_a_common_range():
    points = [point("ours", 10, 0.4), point("saelens", 20, 0.3, 2), point("saelens", 30, 0.2, 1)]
    assert REPORT.differences(points, "relu", "saelens") == {}
    assert math.isnan(REPORT.at([], 10))


def test_kinds_are_not_mixed():
    points = [point("ours", 10, 0.4), point("ours", 10, 0.1, kind="topk"), point("saelens", 10, 0.5)]
    assert REPORT.differences(points, "relu", "saelens") == {10: pytest.approx(-0.1)}


def test_seeds_are_averaged_and_their_spread_is_shown():
    points = [point("ours", 10, 0.40, seed=0), point("ours", 14, 0.30, seed=1), point("saelens", 12, 0.5)]
    (mean,) = REPORT.curve(points, "ours", "relu")
    assert (mean["l0"], mean["fvu"], mean["seeds"]) == (12, pytest.approx(0.35), 2)
    assert (mean["l0_spread"], mean["fvu_spread"]) == (2, pytest.approx(0.05))
    assert "| relu | ours | 2 | 0.001 | 2 | 12.0 ± 2.0 | 0.3500 ± 0.0500 |" in REPORT.report(points, 64)


def test_a_curve_takes_the_rate_that_all_seeds_had():
    points = [point("ours", 10, 0.40, lr=1e-3, seed=seed) for seed in (0, 1)] + [point("ours", 10, 0.39, lr=3e-3, seed=0)]
    assert [p["lr"] for p in REPORT.curve(points, "ours", "relu")] == [1e-3]


def test_a_dictionary_that_never_fires_is_the_worst():
    assert REPORT.score(point("ours", 0, 1.0)) == math.inf
    assert REPORT.curve([point("ours", 0, 1.0)], "ours", "relu") == []


def test_learning_rates_come_first_then_curves_then_seeds():
    config = QUALITY["QualityConfig"](cache=Path("x"), kinds=("relu", "abstopk"), lr=(1e-3, 3e-3), seeds=(5, 6))
    first = QUALITY["waves"](config, [])
    assert Run("ours", "relu", 2.0, 1e-3, 5) in first
    assert Run("saelens", "abstopk", 16, None, 5) in first
    assert not any(run.lr is None for run in first if run.tool == "ours")
    assert not any(run.tool == "dictionary_learning" and run.kind == "abstopk" for run in first)
    assert {run.sparsity for run in first} == {2.0, 16}
    assert {run.seed for run in first} == {5}
    done = [point(run.tool, 10, 0.2 if run.lr == 3e-3 else 0.3, run.sparsity, run.lr, 5, run.kind) for run in first]
    second = QUALITY["waves"](config, done)
    assert {(run.lr, run.seed) for run in second} == {(3e-3, 5)}
    assert {run.sparsity for run in second} == {1.0, 4.0, 8, 32}
    done += [point(run.tool, 10, 0.2, run.sparsity, run.lr, 5, run.kind) for run in second]
    third = QUALITY["waves"](config, done)
    assert {(run.lr, run.seed) for run in third} == {(3e-3, 6)}
    assert {run.sparsity for run in third} == {1.0, 2.0, 4.0, 8, 16, 32}
    done += [point(run.tool, 10, 0.2, run.sparsity, run.lr, 6, run.kind) for run in third]
    assert QUALITY["waves"](config, done) == []
