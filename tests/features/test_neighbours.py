"""Neighbours equal dense products."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sae.features.index.neighbours as module
from sae.features.index.neighbours import by_token, coactive, cosine_neighbours


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 30), st.floats(0, 1), st.integers(1, 300), st.integers(1, 50))
def test_coactivation_equals_the_dense_product(seed, n, f, density, pairs, block_entries):
    rng = np.random.default_rng(seed)
    fires = rng.random((n, f)) < density
    position = np.nonzero(fires.T)[1]
    offsets, position = np.r_[0, np.cumsum(fires.sum(0))], position.astype(np.uint32)
    features_n = np.zeros(len(position), np.uint32)
    starts = by_token(offsets, position, n, features_n, block_entries)
    token, expected = np.nonzero(fires)
    np.testing.assert_array_equal(starts, np.searchsorted(token, np.arange(n + 1)))
    np.testing.assert_array_equal(features_n, expected)

    ids, counts = np.full((f, 5), -1, np.int32), np.zeros((f, 5), np.uint32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PAIRS", pairs)  # rounds of every size, counted and sorted
        coactive(offsets, position, starts, features_n, ids, counts)
    together = fires.T.astype(int) @ fires.astype(int)
    np.fill_diagonal(together, 0)
    for j in range(f):
        order = [k for k in sorted(range(f), key=lambda k: (-together[j, k], k)) if together[j, k]][:5]
        assert ids[j].tolist() == order + [-1] * (5 - len(order))
        assert counts[j].tolist() == together[j, order].tolist() + [0] * (5 - len(order))


@pytest.mark.parametrize("block", [1, 7 * 4 * 30, 1 << 26])
def test_cosine_neighbours_equal_the_float64_product(monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    W_dec_fd = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)) * torch.rand(30, 1)
    W_dec_fd[4] = 0  # a row without direction is nobody's neighbour above the others
    ids, cosines = np.full((30, 20), -1, np.int32), np.zeros((30, 20), np.float32)
    cosine_neighbours(W_dec_fd, ids, cosines)
    unit = torch.nn.functional.normalize(W_dec_fd.double(), dim=-1).numpy()
    expected = unit @ unit.T
    np.fill_diagonal(expected, -2)
    for j in range(30):
        np.testing.assert_allclose(cosines[j], np.sort(expected[j])[::-1][:20], atol=1e-6)
        np.testing.assert_allclose(expected[j, ids[j]], cosines[j], atol=1e-6)


def test_one_or_two_features_have_few_neighbours():
    for f in (1, 2):
        ids, cosines = np.full((f, 20), -1, np.int32), np.zeros((f, 20), np.float32)
        cosine_neighbours(torch.eye(f), ids, cosines)
        assert (ids >= 0).sum(1).tolist() == [f - 1] * f
