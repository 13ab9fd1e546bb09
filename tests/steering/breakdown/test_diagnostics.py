"""Diagnostics of a steered pass against closed forms, loops written here and other libraries' formulas.

n tokens · d width · s sequences · h heads · q positions · k columns · v vocabulary
"""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis as scipy_mahalanobis
from scipy.special import rel_entr, softmax
from scipy.stats import entropy
from sklearn.covariance import LedoitWolf

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from steering.breakdown.diagnostics import (
    attention_kl,
    attention_masses,
    dictionary_change,
    effective_rank,
    fit_neutral,
    isotropic_null,
    kl_slopes,
    lens_sharpness,
    logit_change,
    mahalanobis,
    norm_gain,
    rho,
    stream_change,
    token_share,
    write_change,
)
from steering.strength.calibration import typical_norm


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_massive_rows_do_not_count_in_the_norm_and_rho_is_the_ratio_of_lengths():
    h_nd = normal(5, 4)
    h_nd = h_nd / h_nd.norm(dim=-1, keepdim=True) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])[:, None]
    with_massive_nd = torch.cat([h_nd, 1e4 * h_nd[:2]])
    assert typical_norm(h_nd) == pytest.approx(3)
    assert typical_norm(with_massive_nd) == pytest.approx(3)
    assert rho(2.0, torch.tensor([3.0, 4.0]), 5.0) == pytest.approx(2)
    with pytest.raises(InputError, match="a steering vector that is not zero"):
        rho(1.0, torch.zeros(2), 1.0)
    for rows_nd in (h_nd[:0], torch.zeros(3, 4)):
        with pytest.raises(InputError, match="besides beginning-of-text that are not zero"):
            typical_norm(rows_nd)


@pytest.mark.parametrize("size", [0.0, 0.5, 1.0, 2.0, 4.0, 8.0])
def test_isotropic_tokens_give_the_null_models_numbers(size):
    """Tokens drawn here, not by the null; the ranks of 512 tokens of width 768 are known from an independent computation."""
    n, d = 512, 768
    h_nd, v_d = normal(n, d, seed=1), normal(d, seed=2)
    added_d = size * math.sqrt(d) * v_d / v_d.norm()
    null = isotropic_null(size, n, d)
    change = stream_change(h_nd, h_nd + added_d, v_d)
    x_nd = torch.nn.functional.layer_norm(h_nd + added_d, (d,))
    assert null.cos_v == pytest.approx(size / math.sqrt(1 + size**2), abs=1e-12)
    assert null.token_share == pytest.approx(1 / (1 + size**2), abs=1e-12)
    assert change.cos_v == pytest.approx(null.cos_v, abs=0.01)
    assert change.norm_ratio == pytest.approx(math.sqrt(1 + size**2), rel=0.01)
    assert token_share(x_nd) == pytest.approx(null.token_share, rel=0.05, abs=0.005)
    rank = {0.0: 367, 0.5: 185, 1.0: 38, 2.0: 5.4, 4.0: 1.8, 8.0: 1.2}[size]
    assert effective_rank(x_nd) == pytest.approx(rank, rel=0.03)
    assert null.effective_rank == pytest.approx(rank, rel=0.03)
    if size:
        assert change.cos_change == pytest.approx(1)


def test_stream_change_is_the_mean_of_each_token():
    h_nd, steered_nd, v_d = normal(40, 6), normal(40, 6, seed=1), normal(6, seed=2)

    def cosine(a, b):
        return float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))

    h, steered, v = h_nd.numpy(), steered_nd.numpy(), v_d.numpy()
    found = stream_change(h_nd, steered_nd, v_d)
    ratios = [np.sqrt(s @ s) / np.sqrt(x @ x) for x, s in zip(h, steered)]
    assert found.norm_ratio == pytest.approx(np.mean(ratios))
    assert found.norm_ratio_p95 == pytest.approx(np.quantile(ratios, 0.95))
    assert found.cos_v == pytest.approx(np.mean([cosine(s, v) for s in steered]))
    assert found.cos_unsteered == pytest.approx(np.mean([cosine(s, x) for x, s in zip(h, steered)]))
    assert found.cos_change == pytest.approx(np.mean([cosine(s - x, v) for x, s in zip(h, steered)]))
    assert math.isnan(stream_change(h_nd, h_nd, v_d).cos_change)


def test_norm_gain_and_writes_by_hand():
    assert norm_gain(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 2.0])) == pytest.approx(0.75)
    h_nd, w_nd, added_d = normal(7, 5), normal(7, 5, seed=1), normal(5, seed=2)
    undone = write_change(w_nd, w_nd - 0.25 * added_d, h_nd, h_nd + added_d, added_d)
    assert undone.taken_back == pytest.approx(0.25)
    assert undone.share == pytest.approx(np.mean([float(w.norm() / h.norm()) for w, h in zip(w_nd, h_nd)]))
    steered = zip(w_nd - 0.25 * added_d, h_nd + added_d)
    assert undone.steered_share == pytest.approx(np.mean([float(w.norm() / h.norm()) for w, h in steered]))
    assert write_change(w_nd, 3 * w_nd, h_nd, 3 * h_nd, added_d).steered_share == pytest.approx(undone.share)
    assert math.isnan(write_change(w_nd, w_nd, h_nd, h_nd, torch.zeros(5)).taken_back)


def test_attention_masses_and_kl_are_those_of_each_row():
    """Two sequences, the second with two columns of padding; the pass has the last four of six columns."""
    s, h, q, k = 2, 3, 4, 6
    real_sk = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]).bool()
    steered_sk = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0]]).bool()
    patterns = []
    for seed in (0, 1):
        score = normal(s, h, q, k, seed=seed)
        score = score.masked_fill(~torch.ones(q, k).tril(k - q).bool(), -torch.inf).masked_fill(~real_sk[:, None, None], -torch.inf)
        patterns.append(score.softmax(-1))
    masses, kl_h = attention_masses(patterns[0], real_sk, steered_sk), attention_kl(*patterns, real_sk)
    for head in range(h):
        rows = [(i, row) for i in range(s) for row in range(q) if real_sk[i, k - q + row]]
        one, other = ([p[i, head, row].numpy() for i, row in rows] for p in patterns)
        first = [0, 2]
        assert float(masses.entropy_h[head]) == pytest.approx(np.mean([entropy(p) for p in one]))
        assert float(masses.first_h[head]) == pytest.approx(np.mean([p[first[i]] for (i, _), p in zip(rows, one)]))
        assert float(masses.self_h[head]) == pytest.approx(np.mean([p[k - q + row] for (_, row), p in zip(rows, one)]))
        by_hand = [p[steered_sk[i].numpy()].sum() for (i, _), p in zip(rows, one)]
        assert float(masses.steered_h[head]) == pytest.approx(np.mean(by_hand))
        assert float(kl_h[head]) == pytest.approx(np.mean([rel_entr(p, p2).sum() for p, p2 in zip(one, other)]))


def test_attention_that_collapsed_in_float32_has_a_finite_kl():
    real_sk = torch.ones(1, 2, dtype=torch.bool)
    uniform, collapsed = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]), torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    assert 0 < float(attention_kl(uniform, collapsed, real_sk)) < 100
    assert float(attention_kl(uniform, uniform, real_sk)) == 0


def test_logit_change_against_scipy():
    logits_nv, steered_nv, lens_v = normal(9, 30), 3 * normal(9, 30, seed=1), normal(30, seed=2)
    p, q = softmax(logits_nv.numpy(), axis=1), softmax(steered_nv.numpy(), axis=1)
    found = logit_change(logits_nv, steered_nv, lens_v, tokens=4)
    assert found.entropy == pytest.approx(np.mean([entropy(row) for row in p]))
    assert found.steered_entropy == pytest.approx(np.mean([entropy(row) for row in q]))
    assert found.kl == pytest.approx(rel_entr(p, q).sum(1).mean())
    assert found.reverse_kl == pytest.approx(rel_entr(q, p).sum(1).mean())
    assert found.top1_flips == pytest.approx((p.argmax(1) != q.argmax(1)).mean())
    lens = set(np.argsort(-lens_v.numpy())[:4])
    tops = [set(np.argsort(-row)[:4]) for row in q]
    assert found.lens_overlap == pytest.approx(np.mean([len(lens & top) / len(lens | top) for top in tops]))
    assert logit_change(logits_nv, 50 * lens_v.expand(9, -1), lens_v).lens_overlap == 1
    assert logit_change(logits_nv, logits_nv, lens_v).kl == 0
    steered_nv[3, 2] = torch.nan
    assert all(map(math.isnan, logit_change(logits_nv, steered_nv, lens_v)))


def test_lens_sharpness_is_in_standard_deviations():
    assert lens_sharpness(torch.tensor([1.0, -1.0, 1.0, -1.0]), tokens=2) == pytest.approx(1)
    flat_v = normal(5000)
    peaked_v = flat_v.clone()
    peaked_v[:10] += 20
    assert lens_sharpness(peaked_v) > 3 * lens_sharpness(flat_v) > 6


def test_slopes_are_exact_for_powers():
    c = np.array([0.1, 0.3, 1.0, 5.0])
    np.testing.assert_allclose(kl_slopes(c, 0.7 * c**2), [2, 2, 2])
    np.testing.assert_allclose(kl_slopes(c, [0.01, 0.09, 1, math.inf]), [2, math.log(1 / 0.09) / math.log(1 / 0.3), math.nan])
    with pytest.raises(InputError, match="rising coefficients above 0"):
        kl_slopes([1.0, 0.5], [1.0, 2.0])


def test_mahalanobis_distance_is_scipys_with_the_shrunk_covariance():
    h_nd = normal(400, 6) @ normal(6, 6, seed=1)
    neutral, far_nd = fit_neutral(h_nd), 10 * normal(5, 6, seed=3)
    fitted = LedoitWolf().fit(h_nd.numpy())
    by_hand = [scipy_mahalanobis(row, fitted.location_, np.linalg.inv(fitted.covariance_)) for row in far_nd.numpy()]
    np.testing.assert_allclose(mahalanobis(far_nd, neutral).numpy(), by_hand, rtol=1e-8)
    inside = mahalanobis(h_nd, neutral)
    assert float((inside < neutral.p99).double().mean()) == pytest.approx(0.99, abs=0.005)
    round_nd = normal(4000, 6)
    assert float(mahalanobis(round_nd, fit_neutral(round_nd)).square().mean()) == pytest.approx(6, rel=0.05)


def test_a_dictionary_that_writes_its_features_apart():
    """Orthonormal features, so all numbers can be counted: 1 active before, the steered one after, and an error outside of the span."""
    eye = torch.eye(6)
    dictionary = Dictionary.autoencoder(eye[:4], torch.zeros(4), eye[:4], torch.zeros(6))
    h_nd = torch.stack([2 * eye[i] for i in (0, 1, 0, 1)])
    steered_nd = h_nd + 3 * eye[2] + torch.stack([sign * eye[5] for sign in (1, -1, -1, 1)])
    found = dictionary_change(dictionary, h_nd, steered_nd, feature=2)
    assert (found.l0, found.steered_l0) == (1, 2)
    assert found.turnover == pytest.approx(1 - 1 / 2)
    assert found.activation_rise == pytest.approx(3)
    assert found.fvu == pytest.approx(0, abs=1e-6)
    # mean-centred, each token has 2 of variance in the first two directions and 1 of the error's
    assert found.steered_fvu == pytest.approx(1 / 3, rel=1e-5)
    assert math.isnan(dictionary_change(dictionary, h_nd, steered_nd).activation_rise)
    assert dictionary_change(dictionary, h_nd, h_nd, 2).turnover == 0
    with pytest.raises(InputError, match="feature"):
        dictionary_change(dictionary, h_nd, steered_nd, 9)
