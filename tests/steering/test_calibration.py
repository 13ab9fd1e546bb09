"""Coefficients for KL budgets: closed-form curves, and the bundled model against a dense grid.

s sequences · p positions · d width · v vocabulary
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.directions.actadd import actadd
from steering.intervention import steered
from steering.strength.calibration import calibrate, coefficient_for_kl, divergence, encode_cut, kl_per_token, log_probs
from steering.vector import SteeringVector

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo-lm"
TEXTS = ["The door was open and the light was on.", "It rained for most of the week.", "They met in the afternoon to talk about the house."]


@pytest.fixture(scope="module")
def demo_lm() -> LanguageModel:
    return LanguageModel.load(str(DEMO), device="cpu")


def random_vector(lm: LanguageModel, site: str, seed: int = 0) -> SteeringVector:
    return SteeringVector.at(site, torch.randn(lm.width(site), generator=torch.Generator().manual_seed(seed))).unit()


@given(
    scale=st.floats(1e-6, 1e6), exponent=st.floats(0.7, 4.5), budget=st.floats(0.01, 3.0), start=st.floats(1e-3, 1e3), bend=st.floats(0, 2)
)
def test_power_laws_are_inverted(scale, exponent, budget, start, bend):
    """kl = (c / scale)^a, bent by a factor that changes the slope on the way."""

    def kl_at(c):
        x = c / scale
        return x**exponent * (1 + bend * x / (1 + x))

    found = coefficient_for_kl(kl_at, budget, start=start)
    assert found.reached
    assert found.monotone
    assert kl_at(found.coefficient) == pytest.approx(budget, rel=0.031)


def test_a_quadratic_takes_two_evaluations():
    found = coefficient_for_kl(lambda c: 0.02 * c**2, 0.3)
    assert found.coefficient == pytest.approx(math.sqrt(0.3 / 0.02))
    assert len(found.tried) == 2


@given(ceiling=st.floats(0.01, 5.0), budget=st.floats(0.01, 5.0))
def test_a_curve_that_saturates_is_reached_below_its_ceiling_and_reported_above(ceiling, budget):
    def kl_at(c):
        return -ceiling * math.expm1(-(c**2))

    found = coefficient_for_kl(kl_at, budget, most=1000.0)
    assert len(found.tried) <= 20
    if ceiling > 1.04 * budget:
        assert found.reached
        assert found.kl == pytest.approx(budget, rel=0.031)
    elif ceiling < 0.96 * budget:
        assert not found.reached
        assert found.kl == pytest.approx(ceiling, rel=1e-3)


def test_a_plateau_before_the_curve_rises_is_crossed():
    found = coefficient_for_kl(lambda c: max(0.0, c - 50.0) ** 2, 0.3)
    assert found.reached
    assert found.coefficient == pytest.approx(50 + math.sqrt(0.3), abs=0.02)


def test_a_jump_over_the_budget_is_reported_from_below():
    found = coefficient_for_kl(lambda c: 0.1 if c < 7 else 2.0, 0.3)
    assert not found.reached
    assert found.kl == 0.1
    assert found.coefficient < 7
    assert max(c for c, kl in found.tried if kl == 0.1) == pytest.approx(7, rel=1e-3)
    assert len(found.tried) < 30


def test_what_is_not_a_number_is_too_large():
    found = coefficient_for_kl(lambda c: 1e-4 * c**2 if c < 60 else math.nan, 0.3, start=500.0)
    assert found.reached
    assert found.coefficient == pytest.approx(math.sqrt(0.3 / 1e-4), rel=0.02)
    never = coefficient_for_kl(lambda c: math.nan, 0.3)
    assert (never.reached, never.kl) == (False, math.inf)
    overflowing = coefficient_for_kl(lambda c: 1e-5 * c**2 if c < 60 else math.nan, 0.3)
    assert not overflowing.reached
    assert 50 < overflowing.coefficient < 60


def test_a_curve_that_falls_again_is_said_to_be_not_monotone():
    found = coefficient_for_kl(lambda c: 0.25 * c**2 * math.exp(-c), 1.0, most=1e3)
    assert not found.reached
    assert not found.monotone
    assert found.kl == max(kl for _, kl in found.tried)
    assert coefficient_for_kl(lambda c: c**2, 1.0, start=0.01).monotone


@pytest.mark.parametrize(("budget", "start"), [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (0.3, 0.0), (0.3, math.inf)])
def test_unusable_budgets_and_starts(budget, start):
    with pytest.raises(InputError, match="budget above 0"):
        coefficient_for_kl(lambda c: c, budget, start=start)


def test_divergence_is_the_formula_in_float64():
    generator = torch.Generator().manual_seed(0)
    p_nv, q_nv = (torch.randn(7, 11, generator=generator) for _ in range(2))
    found = divergence(p_nv.log_softmax(-1), q_nv.log_softmax(-1))
    p, q = (np.exp(x.double().numpy()) / np.exp(x.double().numpy()).sum(-1, keepdims=True) for x in (p_nv, q_nv))
    assert found.kl == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-5)
    assert found.top1_flips == pytest.approx((p.argmax(-1) != q.argmax(-1)).mean())


def test_kl_of_a_padded_batch_is_that_of_its_texts_one_by_one(byte_lm):
    vector = random_vector(byte_lm, "resid_post.1")
    ids_sp, mask_sp = encode_cut(byte_lm, TEXTS, 30)
    assert ids_sp.shape[1] == 30
    together = kl_per_token(byte_lm, ids_sp, mask_sp, [(vector, 3.0)])
    total, count = 0.0, 0
    for text in TEXTS:
        one_sp = byte_lm.encode([text])[0][:, :30]
        plain = byte_lm.logits(one_sp).double().log_softmax(-1)
        with steered(byte_lm, [(vector, 3.0)]):
            changed = byte_lm.logits(one_sp).double().log_softmax(-1)
        total += (plain.exp() * (plain - changed)).sum().item()
        count += one_sp.numel()
    assert together == pytest.approx(total / count, rel=1e-4)
    assert kl_per_token(byte_lm, ids_sp, mask_sp, [(vector, 0.0)]) == 0


def test_texts_longer_than_the_context_are_cut_and_none_are_refused(byte_lm):
    assert encode_cut(byte_lm, ["word " * 1000], 10_000)[0].shape[1] == byte_lm.context
    with pytest.raises(InputError, match="expected texts to read"):
        encode_cut(byte_lm, [])


def test_the_demo_model_agrees_with_a_dense_grid(demo_lm):
    site, budgets = "resid_post.2", (0.1, 0.3, 1.0)
    vector = random_vector(demo_lm, site)
    found = calibrate(demo_lm, vector, budgets, TEXTS)
    ids_sp, mask_sp = demo_lm.encode(TEXTS)
    grid = np.geomspace(found[0].coefficient / 3, found[-1].coefficient * 3, 60)
    kls = np.array([kl_per_token(demo_lm, ids_sp, mask_sp, [(vector, float(c))]) for c in grid])
    for calibration in found:
        assert calibration.reached
        assert calibration.monotone
        assert calibration.kl == pytest.approx(calibration.budget, rel=0.031)
        first = np.argmax(kls >= calibration.budget)
        assert grid[first - 1] * 0.98 <= calibration.coefficient <= grid[first] * 1.02


def test_units_of_a_calibration(demo_lm):
    site = "resid_post.2"
    vector = random_vector(demo_lm, site)
    (found,) = calibrate(demo_lm, vector, [0.3], TEXTS)
    h_nd = torch.cat([demo_lm.record(demo_lm.encode([text])[0], [site])[site][0, 1:] for text in TEXTS]).double()
    assert found.rho == pytest.approx(found.coefficient / h_nd.norm(dim=1).median().item(), rel=1e-4)
    assert found.max_activations == pytest.approx(found.coefficient / (h_nd @ vector.direction_d.double()).max().item(), rel=1e-4)
    (doubled,) = calibrate(demo_lm, 2 * vector, [0.3], TEXTS, strongest=5.0)
    assert doubled.coefficient == pytest.approx(found.coefficient / 2, rel=1e-3)
    assert doubled.rho == pytest.approx(found.rho, rel=1e-3)
    assert doubled.max_activations == pytest.approx(found.coefficient / 5, rel=1e-3)


def test_activation_addition_at_the_front_saturates(demo_lm):
    vector = actadd(demo_lm, "Anger", "Calm", "resid_pre.3").unit()
    (far,) = calibrate(demo_lm, vector, [6.0], ["It was the first day of the week. " * 6])
    assert not far.reached
    assert 0 < far.kl < 6
    assert far.max_activations is None


def test_a_zero_vector_and_another_width_are_refused(demo_lm):
    with pytest.raises(InputError, match="not zero"):
        calibrate(demo_lm, SteeringVector.at("resid_post.2", torch.zeros(256)), [0.3], TEXTS)
    with pytest.raises(InputError, match="width 256"):
        calibrate(demo_lm, SteeringVector.at("resid_post.2", torch.ones(32)), [0.3], TEXTS)


def test_a_model_whose_predictions_are_not_numbers_is_never_calibrated(byte_lm):
    import copy

    broken = copy.deepcopy(byte_lm.model)
    broken.transformer.ln_f.weight.data.fill_(math.nan)
    lm = LanguageModel(broken, byte_lm.tokenizer, "broken")
    (found,) = calibrate(lm, random_vector(lm, "resid_post.1"), [0.3], TEXTS)
    assert not found.reached
    assert found.kl == math.inf


def test_log_probs_are_in_batches_what_they_are_at_once(byte_lm):
    texts = [f"number {i} of many" for i in range(19)]
    ids_sp, mask_sp = encode_cut(byte_lm, texts)
    whole = byte_lm.logits(ids_sp, mask_sp)[mask_sp.bool()].log_softmax(-1)
    torch.testing.assert_close(log_probs(byte_lm, ids_sp, mask_sp), whole, rtol=1e-5, atol=1e-5)
