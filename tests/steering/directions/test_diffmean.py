"""Differences of means against loops over tokens, and what is said of contrast sets that are too small."""

import re
import warnings

import numpy as np
import pytest
import torch

from sae.errors import InputError
from steering.directions.contrast import cosine_interval
from steering.directions.diffmean import diffmean, diffmean_of_texts
from steering.directions.texts import activations_of_texts

POSITIVE = ["I love you", "so happy", "what joy", "good"] * 5
NEGATIVE = ["I hate you all", "so sad", "what pain", "bad one"] * 5


def normal(n: int, d: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_planted_direction_is_found_and_coefficient_one_moves_mean_onto_mean():
    planted_d = 3 * torch.nn.functional.normalize(normal(1, seed=1)[0], dim=0)
    pos_nd, neg_nd = normal(4000, seed=2) + planted_d, normal(4000, seed=3)
    made = diffmean(pos_nd, neg_nd, "resid_post.1", {"model": "m"})
    torch.testing.assert_close(made.direction_d, planted_d, rtol=0, atol=0.1)
    by_hand_d = np.array([sum(col) / len(col) for col in pos_nd.double().numpy().T]) - neg_nd.double().numpy().mean(0)
    np.testing.assert_allclose(made.direction_d, by_hand_d, atol=1e-5)
    assert made.site == "resid_post.1"
    assert made.provenance | {"data": ""} == {"method": "diffmean", "positive": 4000, "negative": 4000, "data": "", "model": "m"}
    assert made.provenance["data"] != diffmean(pos_nd + 1, neg_nd, "resid_post.1").provenance["data"]


@pytest.mark.parametrize("tokens", ["all", "last"])
def test_texts_one_by_one_token_by_token(byte_lm, tokens):
    made = diffmean_of_texts(byte_lm, POSITIVE, NEGATIVE, "resid_post.1", tokens=tokens)
    means = []
    for texts in (POSITIVE, NEGATIVE):
        seen = []
        for text in texts:
            ids = [0, *byte_lm.tokenizer(text)["input_ids"]]
            value_pd = byte_lm.record(torch.tensor([ids]), ["resid_post.1"])["resid_post.1"][0].double()
            seen += [value_pd[-1]] if tokens == "last" else [value_pd[p] for p in range(1, len(ids))]
        means.append(sum(seen) / len(seen))
    torch.testing.assert_close(made.direction_d.double(), means[0] - means[1], rtol=1e-4, atol=1e-5)
    assert made.provenance["model"] == "tiny bytes"
    assert made.provenance["tokens"] == tokens


def test_first_tokens_can_be_dropped_and_too_short_texts_are_refused(byte_lm):
    whole, dropped = (activations_of_texts(byte_lm, ["four", "longer"], "resid_pre.2", first_dropped=n) for n in (0, 3))
    assert [len(x) for x in whole] == [4, 6]
    for x_nd, y_nd in zip(whole, dropped):
        torch.testing.assert_close(x_nd[3:], y_nd)
    with pytest.raises(InputError, match="over 4 tokens, got one of 4"):
        activations_of_texts(byte_lm, ["longer", "four"], "resid_pre.2", first_dropped=4)
    with pytest.raises(InputError, match="over 0 tokens, got one of 0"):
        diffmean_of_texts(byte_lm, ["a", ""], ["b", "c"], "resid_pre.2")


def test_interval_covers_what_the_bootstrap_of_means_says():
    # Positive rows N(m, I) in d dimensions, against a fixed zero: the cosine of m + e with m + e' is near 1 / sqrt(1 + (d - 1)/(n m²)).
    n, d, length = 400, 50, 0.25
    pos_nd = normal(n, d, seed=5) + length * torch.nn.functional.normalize(torch.ones(d), dim=0)

    def mean_of(pos_n, _):
        return pos_n @ pos_nd / n

    low, high = cosine_interval(mean_of, n, n)
    # Given the sample, a drawn mean is the sample's mean plus noise of covariance I/n.
    sample_length = float(pos_nd.mean(0).norm())
    assert low < 1 / (1 + d / n / sample_length**2) ** 0.5 < high
    assert 0.5 < low < high < 1


@pytest.mark.parametrize(
    ("n_pos", "n_neg", "said"),
    [(5, 5, "few examples, 5 positive and 5 negative"), (30, 24, "unequally many examples, 30 positive and 24 negative")],
)
def test_small_and_unequal_sets_warn_with_an_interval(n_pos, n_neg, said):
    with pytest.warns(UserWarning, match=said) as caught:
        diffmean(normal(n_pos, seed=1), normal(n_neg, seed=2), "resid_post.0")
    assert len(caught) == 1
    low, high = map(float, re.search(r"cosine of (-?\d\.\d\d) to (-?\d\.\d\d)", str(caught[0].message)).groups())
    assert -1 <= low < high <= 1
    assert caught[0].filename == __file__


def test_one_example_cannot_tell_and_enough_are_silent(byte_lm):
    with pytest.warns(UserWarning, match="it is unknown how certain"):
        diffmean(normal(1), normal(30), "resid_post.0")
    with pytest.warns(UserWarning, match="few examples, 3 positive and 3 negative"):  # texts count, not their tokens
        diffmean_of_texts(byte_lm, ["a" * 30, "b" * 30, "c" * 30], ["d" * 30, "e" * 30, "f" * 30], "resid_pre.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffmean(normal(16), normal(16, seed=1), "resid_post.0")


def test_unusable_sets(byte_lm):
    for pos_nd, neg_nd, sentence in [
        (torch.zeros(0, 3), normal(4, 3), "positive activations .* at least one row"),
        (normal(4, 3), torch.zeros(0, 3), "negative activations .* at least one row"),
        (normal(4, 3), normal(4, 5), "one width, got 3 and 5"),
        (normal(4, 3) / 0, normal(4, 3), "finite"),
    ]:
        with pytest.raises(InputError, match=sentence):
            diffmean(pos_nd, neg_nd, "resid_post.0")
    with pytest.raises(InputError, match="got 2 and 0"):
        diffmean_of_texts(byte_lm, ["a", "b"], [], "resid_post.0")
    with pytest.raises(InputError, match=r"all.*last"):
        diffmean_of_texts(byte_lm, ["a"], ["b"], "resid_post.0", tokens="first")
