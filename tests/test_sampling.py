"""Tokens drawn without sorting, against the set and the probabilities that sorting in float64 gives."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from sae.model import sampling
from sae.model.sampling import sample


def nucleus(logits_v: torch.Tensor, temperature: float, top_p: float) -> np.ndarray:
    """Probabilities by the definition: likeliest first, equals by id, up to and with the token that reaches `top_p`."""
    probs_v = (logits_v.double() / temperature).softmax(-1).numpy()
    order_v = np.argsort(-probs_v, kind="stable")
    ahead_v = np.concatenate([[0.0], np.cumsum(probs_v[order_v])[:-1]])
    kept_v = np.zeros_like(probs_v)
    kept_v[order_v[ahead_v < top_p]] = probs_v[order_v[ahead_v < top_p]]
    return kept_v / kept_v.sum()


def drawn(logits_v: torch.Tensor, times: int, temperature: float, top_p: float, seed: int = 0) -> np.ndarray:
    """How often each token was drawn."""
    tokens_s = sample(logits_v.expand(times, -1), temperature, top_p, torch.Generator().manual_seed(seed))
    return torch.bincount(tokens_s, minlength=len(logits_v)).numpy()


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.6, 0.3, 0.01])
@pytest.mark.parametrize("vocabulary", [5, 256, 700])
def test_frequencies_are_the_probabilities(vocabulary, top_p):
    torch.manual_seed(vocabulary)
    logits_v = torch.randn(vocabulary) * 2
    expected_v, counts_v = nucleus(logits_v, 0.8, top_p), drawn(logits_v, 20_000, 0.8, top_p)
    assert counts_v[expected_v == 0].sum() == 0
    common = expected_v * 20_000 >= 5
    observed, wanted = [*counts_v[common], counts_v[~common].sum()], [*expected_v[common], expected_v[~common].sum()]
    if common.sum() > 1:
        cells = [(o, w * 20_000) for o, w in zip(observed, wanted) if w > 0]
        assert chisquare([o for o, _ in cells], [w for _, w in cells]).pvalue > 1e-4


@settings(max_examples=40, deadline=None)
@given(
    levels=st.lists(st.integers(0, 5), min_size=2, max_size=40),  # few levels, so many equals
    top_p=st.sampled_from([0.05, 0.2, 0.5, 0.77, 0.9, 0.99]),
    seed=st.integers(0, 1000),
)
def test_the_set_is_the_smallest_and_of_equals_the_first(levels, top_p, seed):
    logits_v = torch.tensor(levels, dtype=torch.float32) * 0.7
    expected_v = nucleus(logits_v, 1.0, top_p)
    probs_v = logits_v.double().softmax(-1).numpy()
    sums = np.cumsum(np.sort(probs_v)[::-1])
    if np.abs(sums - top_p).min() < 1e-5:  # rounding decides whether one more belongs to it
        return
    counts_v = drawn(logits_v, 2000, 1.0, top_p, seed)
    assert counts_v[expected_v == 0].sum() == 0
    assert (counts_v[expected_v * 2000 > 30] > 0).all()


def test_a_flat_distribution_keeps_the_first_ids_and_ends():
    counts_v = drawn(torch.zeros(1000), 20_000, 1.0, 0.0995)  # 100 tokens: the 99 first hold 0.099
    assert (counts_v[:100] > 0).all()
    assert counts_v[100:].sum() == 0
    assert drawn(torch.zeros(1000), 50, 1.0, 1e-6)[0] == 50


def test_each_share_of_the_unit_interval_goes_to_its_token(monkeypatch):
    """The inverse of the running sum, also where a float32 random number is coarser than a token's share."""
    torch.manual_seed(0)
    weights_v = torch.cat([torch.tensor([1.0]), torch.rand(3000) * 1e-9])[torch.randperm(3001)]
    sums_v = np.cumsum(weights_v.double().numpy())
    middles_s = torch.from_numpy((sums_v - weights_v.double().numpy() / 2) / sums_v[-1])
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: middles_s[:, None])
    found_s = sampling._draw(weights_v.expand(3001, -1), torch.Generator())
    assert (found_s - torch.arange(3001)).abs().max() <= 1  # a block's sum is rounded to float32
    small_s = torch.from_numpy((np.arange(5000) + 0.5) / 5000)
    weights_v = torch.randn(600).relu()
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: small_s[:, None])
    found_s = sampling._draw(weights_v.expand(5000, -1), torch.Generator())
    sums_v = np.cumsum(weights_v.double().numpy())
    wrong = found_s.numpy() != np.searchsorted(sums_v, small_s.numpy() * sums_v[-1], side="right")
    assert wrong.sum() <= 3  # within rounding of a border
    assert (weights_v[found_s] > 0).all()


def test_equal_seeds_give_equal_tokens_and_rows_differ():
    torch.manual_seed(1)
    logits_sv = torch.randn(1, 400).expand(64, -1)
    first, second, other = (sample(logits_sv, 1.0, 0.9, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert len(first.unique()) > 10


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 0.0])
def test_a_temperature_near_0_takes_the_likeliest(temperature):
    logits_sv = torch.randn(20, 500) * 50
    for top_p in (1.0, 0.5):
        assert torch.equal(sample(logits_sv, temperature, top_p, torch.Generator()), logits_sv.argmax(-1))


def test_a_row_that_ended_in_nonsense_does_not_hold_up_the_others():
    logits_sv = torch.randn(3, 300)
    logits_sv[1] = torch.nan
    tokens_s = sample(logits_sv, 1.0, 0.5, torch.Generator().manual_seed(0))
    assert tokens_s.min() >= 0
    assert tokens_s.max() < 300
