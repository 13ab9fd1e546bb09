"""Repetition and the verdict, against other formulas and by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.statistics import mean_estimate
from steering.compare.arms import NONE, PROMPTING, RANDOM, SHUFFLED
from steering.compare.scores import choose_best, comparison_verdict, per_prompt
from steering.strength.measure import distinct_2, first_repeated_step, longest_repeat

rows = st.lists(st.integers(0, 3), max_size=20)


@given(rows)
def test_longest_repeat_is_that_of_all_runs(row):
    runs = [(i, j) for i in range(len(row)) for j in range(i + 1, len(row) + 1)]
    twice = [j - i for i, j in runs if any(row[k : k + j - i] == row[i:j] for k in range(len(row) - (j - i) + 1) if k != i)]
    assert longest_repeat(row) == max(twice, default=0)


@given(rows, st.integers(1, 4))
def test_first_repeated_step_is_the_first_of_all_runs(row, length):
    runs = [row[end - length : end] for end in range(length, len(row) + 1)]
    repeated = [length - 1 + i for i, run in enumerate(runs) if run in runs[:i]]
    assert first_repeated_step(row, length) == (min(repeated) if repeated else None)


def test_repetition_by_hand():
    assert first_repeated_step([7, 8, 9, 1, 7, 8, 9]) == 6
    assert first_repeated_step([5, 5, 5, 5]) == 3
    assert longest_repeat([5] * 9) == 8
    assert longest_repeat([1, 2, 3, 1, 2, 4]) == 2
    assert distinct_2([[1, 2, 1, 2], [1, 2]]) == pytest.approx(2 / 4)
    assert distinct_2([[1], []]) is None


def level(budget: float, choose: list[float], score: list[float], none: list[float]) -> dict:
    """What `continuations.level` gives, of one text a prompt."""
    gain_p = np.array(score) - np.array(none)
    texts = [
        {"prompt": f"{half} {i}", "half": half, "target": v}
        for half, vs in (("choose", choose), ("score", score))
        for i, v in enumerate(vs)
    ]
    return {
        "budget": budget,
        "failure": None,
        "off_topic_kl": 0.4,
        "choose": {"target": float(np.mean(choose)), "gain": float(np.mean(choose))},
        "score": {"target": mean_estimate(np.array(score)), "gain": mean_estimate(gain_p)},
        "texts": texts,
    }


def arm(method: str, kind: str, *levels: dict) -> dict:
    return {"method": method, "kind": kind, "levels": list(levels), "best": choose_best(levels)}


def test_the_budget_is_chosen_on_one_half_and_scored_on_the_other():
    weak, strong = level(0.1, [1, 1], [9, 9], [0, 0]), level(1.0, [2, 2], [3, 3], [0, 0])
    failed = level(3.0, [99, 99], [99, 99], [0, 0]) | {"failure": "no text", "choose": None, "score": None}
    assert choose_best([weak, strong, failed]) == {"budget": 1.0, "gain": {"value": 3.0, "low": 3.0, "high": 3.0}}
    assert choose_best([weak, level(1.0, [1, 1], [0, 0], [0, 0])])["budget"] == 0.1  # the weakest of equal ones
    assert choose_best([failed]) is None
    assert choose_best([]) is None


def test_targets_are_averaged_by_prompt_in_their_order():
    texts = [
        {"prompt": p, "half": h, "target": t}
        for p, h, t in (("b", "score", 1.0), ("b", "score", 3.0), ("c", "choose", 9.0), ("a", "score", 5.0))
    ]
    np.testing.assert_array_equal(per_prompt({"texts": texts}, "score"), [2.0, 5.0])


def test_the_verdict_by_rule():
    rng = np.random.default_rng(0)
    none = [0.0] * 30

    def noisy(mean: float) -> list[float]:
        return list(rng.normal(mean, 1.0, 30))

    arms = [
        arm(NONE, "baseline", level(0, none, none, none) | {"budget": None}),
        arm(PROMPTING, "baseline", level(0, noisy(2), noisy(2), none) | {"budget": None}),
        arm(RANDOM, "control", level(0.3, noisy(1), noisy(1), none)),
        arm(SHUFFLED, "control", level(0.3, noisy(0), noisy(0), none)),
        arm("strong", "method", level(0.1, noisy(1), noisy(1), none), level(0.3, noisy(8), noisy(8), none)),
        arm("fair", "method", level(0.3, noisy(4), noisy(4), none)),
        arm("as good as random", "method", level(0.3, noisy(1), noisy(1), none)),
        arm("nothing", "method", level(0.3, noisy(0), [*(noisy(0)[:15]), *([-0.2] * 15)], none)),
        arm("away", "method", level(0.3, noisy(-5), noisy(-5), none)),
        {"method": "missing", "kind": "method", "levels": [], "best": None},
    ]
    said = comparison_verdict(arms, "cats", 0.6)
    by_method = {
        name: next((s for s in said if s.startswith(name)), None) for name in ("strong", "fair", "as good", "nothing", "away", "missing")
    }
    assert by_method["strong"].startswith("strong steers towards cats: +")
    assert "at 0.3 nat, more than random direction and shuffled labels" in by_method["strong"]
    assert by_method["fair"].startswith("fair steers towards cats")
    assert "no evidence" in by_method["as good"]
    assert f"not more than {RANDOM}" in by_method["as good"]
    assert "the interval includes 0" in by_method["nothing"]
    assert "below 0" in by_method["away"]
    assert by_method["missing"] is None
    assert any(s.startswith("strong gained most and is ahead of fair") for s in said)
    assert any(s.startswith("Plain prompting") for s in said)
    assert said[-1].startswith("The target score itself is weak: AUROC 0.60")


def test_two_equal_methods_cannot_be_told_apart_and_none_is_said():
    rng = np.random.default_rng(1)
    none = [0.0] * 30
    one, other = (arm(name, "method", level(0.3, [5.0] * 30, list(rng.normal(5, 3, 30)), none)) for name in ("one", "other"))
    said = comparison_verdict([one, other], "cats", 0.9)
    assert any("is not clearly ahead of" in s for s in said)
    assert "but there was no control" in said[0]
    idle = arm("idle", "method", level(0.3, none, list(rng.normal(0, 3, 30)), none))
    assert "No direction steers towards the concept at these budgets." in comparison_verdict([idle], "cats", 0.9)
