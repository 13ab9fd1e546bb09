"""Working ranges against a whole sweep's crossings, and against KL by scipy."""

import math

import numpy as np
import pytest
import torch
import transformers as hf
from scipy.special import rel_entr
from test_language_model import COMMON, randomised

from sae.errors import InputError
from sae.model.sampling import Sampling
from steering.breakdown.arms import make_arms
from steering.breakdown.findings import KL_SIGN, SIGNS, crossings
from steering.breakdown.sweep import make_setup, sweep
from steering.breakdown.working_range import RHOS, RangeFinder, working_range
from steering.directions.actadd import actadd
from steering.directions.random import random_direction
from steering.intervention import steered
from steering.strength.neutral import MEASURED, OTHERS
from steering.vector import SteeringVector

SITE = "resid_post.1"
OF_TEXT = ("distinct-2 of the text over the unsteered one", "nats per token of the text above the unsteered one")


@pytest.fixture(scope="module")
def finder(byte_lm) -> RangeFinder:
    return RangeFinder(byte_lm, SITE)


@pytest.mark.parametrize("vector", [random_direction(32, SITE, 5, 3.0), SteeringVector.at(SITE, torch.linspace(-1, 2, 32))])
def test_it_is_the_first_crossing_of_a_sweep(byte_lm, finder, vector):
    found = finder.of(vector)
    rhos = [rho for rho in RHOS if rho <= found.tried * found.rho_of_1 * 1.0001]
    made = make_arms(byte_lm, vector).arms
    arms = [arm for arm in made if arm.name in ("added", "norms, patterns, values frozen")]
    setup = make_setup(byte_lm, vector, MEASURED, OTHERS, arms)
    whole = sweep(setup, arms, rhos, ["A"], Sampling(max_new_tokens=2))
    crossed = {name: rho for name, rho in crossings(whole).items() if rho is not None and name not in OF_TEXT}
    unusual = crossed.pop("share of tokens beyond 99 % of neutral ones")
    assert len(crossed) > 2
    assert found.rho_of_1 == pytest.approx(whole["rho_of_1"])
    assert found.sign == next(iter(crossed))
    assert found.coefficient == pytest.approx(min(crossed.values()) / whole["rho_of_1"])
    assert found.unusual == pytest.approx(unusual / whole["rho_of_1"])
    assert found.beyond == next(sign.beyond for sign in SIGNS if sign.name == found.sign)
    assert {sign.name for sign in SIGNS if sign.of_text} == set(OF_TEXT)


def test_where_only_the_predictions_break_the_range_ends_at_scipys_kl_of_one_nat(byte_lm, finder, monkeypatch):
    monkeypatch.setattr("steering.breakdown.working_range.BREAKING", [sign for sign in SIGNS if sign.name == KL_SIGN])
    vector = random_direction(32, SITE, 5, 3.0)
    found = finder.of(vector)

    def kl(c: float) -> float:
        kls = []
        for text in MEASURED:
            ids_sp, _ = byte_lm.encode([text])
            p = byte_lm.logits(ids_sp[:, :64])[0].double().softmax(-1).numpy()
            with steered(byte_lm, [(vector, c)]):
                kls.append(rel_entr(p, byte_lm.logits(ids_sp[:, :64])[0].double().softmax(-1).numpy()).sum(1).mean())
        return float(np.mean(kls))

    above = next(i for i, rho in enumerate(RHOS) if kl(rho / found.rho_of_1) >= 1)
    low, high = (RHOS[i] / found.rho_of_1 for i in (above - 1, above))
    share = (1 - kl(low)) / (kl(high) - kl(low))
    assert found.coefficient == pytest.approx(low * (high / low) ** share, rel=1e-3)
    assert found.tried == pytest.approx(high)


def test_it_scales_with_the_vector_and_one_finder_serves_many(byte_lm, finder):
    vector = random_direction(32, SITE, 5, 3.0)
    once, again = finder.of(vector), finder.of(0.1 * vector)
    assert again.coefficient == pytest.approx(10 * once.coefficient, rel=1e-4)
    assert again.sign == once.sign
    assert working_range(byte_lm, vector) == once


def test_passes_leave_the_model_free_between_them(byte_lm, finder):
    """Others may use it: no edit is left standing."""
    ids_sp, _ = byte_lm.encode(["a text"])
    plain, seen = byte_lm.logits(ids_sp), 0
    passes = finder.passes(random_direction(32, SITE, 5))
    for _ in passes:
        seen += 1
        assert torch.equal(byte_lm.logits(ids_sp), plain)
    assert 1 < seen <= len(RHOS)


def test_directions_of_positions_that_never_break_the_predictions(byte_lm):
    found = working_range(byte_lm, actadd(byte_lm, "ab", "ba", "resid_pre.2"))
    assert found.tried * found.rho_of_1 == pytest.approx(RHOS[-1])
    assert found.sign in (None, "norm of the stream over the unsteered one, at any layer", "cosine of the stream and v, at any layer")


def test_what_float32_cannot_hold_ends_the_search(byte_lm, finder):
    found = finder.of(random_direction(32, SITE, 5), rhos=(0.1, 1e30, 2e30))
    assert found.coefficient == found.tried == pytest.approx(1e30 / found.rho_of_1)
    assert (found.sign, found.unusual) == (KL_SIGN, None)


def test_a_model_whose_attention_is_not_seen_has_a_range(byte_lm):
    lm = randomised(hf.GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, **COMMON), 1)
    lm.tokenizer = _Letters()
    found = working_range(lm, random_direction(32, "resid_post.0", 1))
    assert found.coefficient is not None
    assert math.isfinite(found.coefficient)


class _Letters:
    """A tokenizer for a model of 50 tokens."""

    bos_token_id, pad_token_id = 0, None

    def __call__(self, text: str, **_) -> dict:
        return {"input_ids": [2 + ord(letter) % 40 for letter in text[:40]]}


def test_what_has_no_range_is_one_sentence(byte_lm, finder):
    for vector, message in (
        (SteeringVector.at(SITE, torch.zeros(32)), "expected a steering vector that is not zero"),
        (random_direction(32, "resid_post.0", 1), "expected a vector at resid_post.1, got one at resid_post.0"),
    ):
        with pytest.raises(InputError, match=message):
            finder.of(vector)
    with pytest.raises(InputError, match="expected a direction of the residual stream"):
        RangeFinder(byte_lm, "mlp_out.1")
    with pytest.raises(InputError, match="expected a steering vector at one site"):
        working_range(byte_lm, SteeringVector({SITE: torch.ones(32), "resid_post.0": torch.ones(32)}))
