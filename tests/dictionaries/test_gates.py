"""Every gate against its definition written out in plain Python."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae.dictionaries.gates import AbsTopK, BareTopK, Gate, GroupMax, Threshold, TopK, gated
from sae.errors import InputError

# integers, so that ties are wanted only where the definition allows any of them
rows = st.lists(st.integers(-50, 50), min_size=1, max_size=12, unique_by=abs)


def threshold(z, theta):
    return [value if value > theta[j] and value > 0 else 0 for j, value in enumerate(z)]


def top(z, k):
    kept = sorted(range(len(z)), key=lambda j: -z[j])[:k]
    return [max(value, 0) if j in kept else 0 for j, value in enumerate(z)]


def top_by_size(z, k):
    kept = sorted(range(len(z)), key=lambda j: -abs(z[j]))[:k]
    return [value if j in kept else 0 for j, value in enumerate(z)]


def bare_top(z, k):
    kept = sorted(range(len(z)), key=lambda j: -z[j])[:k]
    return [value if j in kept else 0 for j, value in enumerate(z)]


def group_max(z, k):
    groups = [z[i : i + len(z) // k] for i in range(0, len(z), len(z) // k)]
    return [max(value, 0) if value == max(group) else 0 for group in groups for value in group]


def through(gate: Gate, z: list) -> list:
    return gate(torch.tensor([z], dtype=torch.float64))[0].tolist()


@given(rows, st.integers(0, 2**31))
def test_threshold(z, seed):
    theta = np.random.default_rng(seed).integers(-10, 30, len(z)).tolist()
    assert through(Threshold(torch.tensor(theta, dtype=torch.float64)), z) == threshold(z, theta)
    assert through(Threshold(), z) == threshold(z, [0] * len(z))


@given(rows, st.integers(1, 15))
def test_top_k(z, k):
    assert through(TopK(k), z) == top(z, k)
    assert through(AbsTopK(k), z) == top_by_size(z, k)
    assert through(BareTopK(k), z) == bare_top(z, k)


@given(st.lists(st.integers(-50, 50), min_size=12, max_size=12, unique=True), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_group_max(z, k):
    assert through(GroupMax(k), z) == group_max(z, k)


def test_a_gated_dictionary_is_a_threshold():
    W_enc_fd, r_f, b_mag_f, b_gate_f = (torch.randn(shape, dtype=torch.float64) for shape in ((12, 5), (12,), (12,), (12,)))
    x_bd = torch.randn(50, 5, dtype=torch.float64)
    z_bf = x_bd @ W_enc_fd.T
    expected = (z_bf + b_gate_f > 0) * (r_f.exp() * z_bf + b_mag_f).relu()
    W_fd, gate = gated(W_enc_fd, r_f, b_mag_f, b_gate_f)
    torch.testing.assert_close(gate(x_bd @ W_fd.T + b_mag_f), expected, rtol=1e-12, atol=1e-12)


@given(rows, st.integers(0, 2**31))
def test_a_threshold_commutes_with_positive_factors(z, seed):
    rng = np.random.default_rng(seed)
    theta_f, factor_f = (torch.tensor(rng.integers(1, 20, len(z)), dtype=torch.float64) for _ in range(2))
    gate = Threshold(theta_f)
    expected = (factor_f * gate(torch.tensor([z], dtype=torch.float64)))[0].tolist()
    assert through(gate.scaled(factor_f), (factor_f * torch.tensor(z)).tolist()) == expected
    assert TopK(3).scaled(factor_f) is None


def test_nan_is_not_hidden():
    for gate in (Threshold(), Threshold(torch.ones(2)), TopK(2), AbsTopK(2), BareTopK(2), GroupMax(1)):
        assert gate(torch.tensor([[float("nan"), 2.0]])).isnan().any()


def test_k_below_one_is_refused():
    with pytest.raises(InputError, match="k of at least 1"):
        TopK(0)
