"""Contributions to the FVU equal leaving each feature out and measuring again, in float64."""

import numpy as np
import pytest
import torch

from sae.dictionaries.dictionary import Dictionary
from sae.entries import Entries
from sae.features.index.contribution import ErrorSums, carried, contributions, exact_sums, whole_number


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    W_enc_fd, W_dec_fd = torch.randn(2, 24, 10, generator=generator)
    dictionary = Dictionary.autoencoder(W_enc_fd, -torch.rand(24, generator=generator), W_dec_fd / 9, torch.randn(10, generator=generator))
    x_bd = torch.randn(300, 10, generator=generator) + 5  # a large mean must not count as variance
    return dictionary.requires_grad_(False), x_bd


def entries(acts_bf):
    row, feature = acts_bf.nonzero(as_tuple=True)
    return Entries(row.int(), feature.int(), acts_bf[row, feature])


def test_contributions_equal_leaving_each_feature_out(problem):
    dictionary, x_bd = problem
    sums = ErrorSums(dictionary)
    for part in x_bd.split(70):
        sums.add(part, entries(dictionary.encode(part)))
    found, fvu = contributions(sums.sums, len(x_bd))

    wide, x = dictionary.double(), x_bd.double()
    acts = wide.encode(x)
    centred = (x - x.mean(0)).square().sum()
    error = (x - wide.decode(acts)).square().sum()
    assert fvu == pytest.approx((error / centred).item(), rel=1e-5)
    for j in range(24):
        without = acts.clone()
        without[:, j] = 0
        rise = ((x - wide.decode(without)).square().sum() - error) / centred
        assert found[j] == pytest.approx(rise.item(), rel=1e-4, abs=1e-6)


def test_sums_are_the_same_in_any_order_and_any_parts():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(5000) * 10.0 ** rng.integers(-6, 6, 5000)
    group = rng.integers(0, 7, 5000)
    whole = exact_sums(values, group, 7)
    for _ in range(5):
        order = rng.permutation(5000)
        parts = [exact_sums(values[part], group[part], 7) for part in np.array_split(order, 9)]
        np.testing.assert_array_equal(carried(np.sum(parts, axis=0)), whole)
    for g in range(7):
        assert whole_number(whole[:, g]) / 2.0**36 == pytest.approx(values[group == g].sum(), rel=1e-9, abs=1e-6)


def test_activations_that_do_not_vary_have_no_fvu(problem):
    dictionary, _ = problem
    sums = ErrorSums(dictionary)
    x_bd = torch.ones(8, 10)
    sums.add(x_bd, entries(dictionary.encode(x_bd)))
    found, fvu = contributions(sums.sums, 8)
    assert np.isnan(found).all()
    assert np.isnan(fvu)
