"""Intervals against closed forms and other packages, AUROC against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from sae.statistics import (
    auroc,
    auroc_estimate,
    data_and_resamples,
    estimate,
    mean_estimate,
    percentile_interval,
    ratio_interval,
    wilson_interval,
)

numbers = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)


def test_percentile_interval_leaves_out_what_is_not_finite():
    assert percentile_interval(np.arange(1001.0)) == (25.0, 975.0)
    assert percentile_interval(np.array([np.nan, *np.arange(1001.0), np.inf])) == (25.0, 975.0)
    assert np.isnan(percentile_interval(np.array([np.nan]))).all()


def test_estimate_of_a_mean_against_its_standard_error():
    rng = np.random.default_rng(0)
    x_n = rng.normal(3, 2, 400)
    weight_rn = data_and_resamples(400, rng)
    found = estimate(weight_rn @ x_n / weight_rn.sum(1))
    assert found["value"] == pytest.approx(x_n.mean())
    assert (found["high"] - found["low"]) / 2 == pytest.approx(1.96 * x_n.std() / 20, rel=0.08)
    assert estimate(np.array([np.nan, np.nan])) == {"value": None, "low": None, "high": None}


def test_mean_estimate_has_the_width_of_the_normal_one_and_none_for_a_constant():
    value_n = np.random.default_rng(3).normal(2.0, 5.0, 400)
    found = mean_estimate(value_n)
    assert found["value"] == pytest.approx(value_n.mean())
    half = 1.96 * value_n.std() / 20
    assert found["high"] - found["value"] == pytest.approx(half, rel=0.1)
    assert found["value"] - found["low"] == pytest.approx(half, rel=0.1)
    assert mean_estimate(np.full(7, 1.5)) == {"value": 1.5, "low": 1.5, "high": 1.5}


def test_ratio_interval_is_that_of_a_proportion():
    """Texts of one word each: the rate is a mean of n coin flips, whose normal interval is known."""
    flips = np.random.default_rng(0).random(400) < 0.3
    low, high = ratio_interval(flips, np.ones(400), seed=1)
    p = flips.mean()
    half = 1.96 * (p * (1 - p) / 400) ** 0.5
    assert low == pytest.approx(p - half, abs=0.01)
    assert high == pytest.approx(p + half, abs=0.01)
    assert ratio_interval(np.zeros(50), np.full(50, 10), seed=0) == (0.0, 0.0)
    assert ratio_interval(np.zeros(0), np.zeros(0), seed=0) == (0.0, 0.0)


@pytest.mark.parametrize(("count", "n"), [(0, 50), (3, 50), (50, 50), (12345, 495576)])
def test_wilson_interval_is_that_of_scipy(count, n):
    expected = binomtest(count, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(count, n) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert wilson_interval(0, 0) == (0.0, 1.0)


@given(numbers, numbers)
def test_auroc_is_that_of_scikit_learn_ties_included(pos, neg):
    expected = roc_auc_score([1] * len(pos) + [0] * len(neg), pos + neg)
    found = auroc_estimate(np.array(pos), np.array(neg))
    assert found["value"] == pytest.approx(expected)
    assert 0 <= found["low"] <= found["high"] <= 1 + 1e-12
    both = auroc(np.array([pos, pos[::-1]]).T, np.array([neg, neg]).T)
    np.testing.assert_allclose(both, expected)
    assert np.isnan(auroc(np.zeros((0, 2)), np.array([neg, neg]).T)).all()


def test_auroc_interval_has_the_width_of_hanley_and_mcneil():
    """For two normal samples one standard deviation apart, the standard error of Hanley and McNeil (1982)."""
    rng = np.random.default_rng(0)
    pos_n, neg_n = rng.normal(1, 1, 120), rng.normal(0, 1, 80)
    found = auroc_estimate(pos_n, neg_n)
    a = found["value"]
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = np.sqrt((a * (1 - a) + 119 * (q1 - a * a) + 79 * (q2 - a * a)) / (120 * 80))
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.2)
