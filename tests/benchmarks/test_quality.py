"""The comparison of curves: which learning rate is kept, what a frontier is, and a difference at equal L0."""

import math
import runpy
from pathlib import Path

import pytest

QUALITY = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "quality.py"))


def point(tool: str, l0: float, fvu: float, l1: float = 1.0, lr: float = 1e-3, objective: float = 1.0) -> dict:
    return dict(tool=tool, l0=l0, fvu=fvu, l1=l1, lr=lr, objective=objective, dead=0, seconds=1.0)


def test_difference_is_read_at_equal_l0_from_the_peers_best_points():
    ours = [point("ours", 10, 0.4), point("ours", 100, 0.1)]
    # between 10 and 1000 the peer falls by 0.2 for each factor of ten; the point at 50 is beaten and must not count
    theirs = [point("saelens", 10, 0.5), point("saelens", 50, 0.9), point("saelens", 1000, 0.1)]
    found = QUALITY["differences"](ours + theirs, "saelens")
    assert found == {10: pytest.approx(-0.1), 100: pytest.approx(0.1 - 0.3)}
    assert "nowhere worse" in QUALITY["report"](ours + theirs)
    worse = QUALITY["report"]([*ours, point("saelens", 10, 0.3), point("saelens", 100, 0.05)])
    assert "worse by up to 0.1000" in worse


def test_no_difference_without_a_common_range():
    points = [point("ours", 10, 0.4), point("saelens", 20, 0.3), point("saelens", 30, 0.2)]
    assert QUALITY["differences"](points, "saelens") == {}
    assert math.isnan(QUALITY["fvu_at"]([], 10))


def test_each_tools_best_learning_rate_is_that_of_the_lowest_objective():
    points = [point("saelens", 10, 0.4, lr=1e-4, objective=3), point("saelens", 12, 0.5, lr=1e-3, objective=2), point("ours", 9, 0.4)]
    assert [(p["tool"], p["lr"]) for p in QUALITY["best_by_l1"](points)] == [("ours", 1e-3), ("saelens", 1e-3)]
