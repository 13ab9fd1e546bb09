"""The arms against what their names say, on tiny models.

s sequences · p positions · d width
"""

import pytest
import torch
import transformers as hf
from test_language_model import COMMON, GROUPED, randomised

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.breakdown.arms import FRONT, Arm, _key_readers, applied, make_arms, off_the_keys
from steering.circuits.model_graph.frozen import PARTS, internals
from steering.directions.pca import principal_directions_of_texts
from steering.directions.random import random_direction
from steering.strength.neutral import SENTENCES
from steering.vector import SteeringVector

SITE, C = "resid_post.1", 1.5
FROZEN = [f"{parts} frozen" for parts in ("norms", "patterns", "values", "norms, patterns", "patterns, values", "norms, patterns, values")]


def direction(lm: LanguageModel, site: str = SITE) -> SteeringVector:
    return SteeringVector.at(site, 3 * torch.randn(lm.width(site), generator=torch.Generator().manual_seed(2)))


@pytest.fixture(scope="module")
def arms(byte_lm) -> dict[str, Arm]:
    made, left_out = make_arms(byte_lm, direction(byte_lm))
    assert left_out == {}
    return {arm.name: arm for arm in made}


def seen_in(lm: LanguageModel, arm: Arm, c: float, sites: list[str]) -> tuple[dict, dict, torch.Tensor]:
    """Values at sites without and with the arm, and which positions are tokens; the second row is padded on the left."""
    ids_sp, mask_sp = lm.encode(["a text of some length", "a short one"])
    with internals(lm) as unsteered:
        before = lm.record(ids_sp, sites, mask_sp)
        lm.logits(ids_sp, mask_sp)
    with lm.attention_edited(lambda layer, pattern, value: (pattern, value)), applied(lm, arm, c, unsteered, ids_sp.shape[1]):
        return before, lm.record(ids_sp, sites, mask_sp), mask_sp.bool()


def test_there_is_an_arm_for_every_question(arms):
    others = ["added", "rotated", "lengthened", "opposite", "all layers", "random", "front", "last"]
    assert list(arms) == [*others, "random in the top span", "off the keys", *FROZEN]


def test_every_arm_is_as_long_as_the_vector(byte_lm, arms):
    for name, arm in arms.items():
        lengths = [d.norm().item() for d in arm.vector.directions.values()]
        assert sum(lengths) == pytest.approx(direction(byte_lm).norm, rel=1e-5), name
    assert list(arms["all layers"].vector.directions) == ["resid_post.0", "resid_post.1", "resid_post.2"]


def test_the_random_arm_is_no_random_direction_that_is_studied(byte_lm):
    made, _ = make_arms(byte_lm, random_direction(32, SITE, 0), seed=0)
    cosines = {arm.name: float(arm.vector.direction_d @ made[0].vector.direction_d) for arm in made if arm.name.startswith("random")}
    assert len(cosines) == 2
    assert all(abs(cosine) < 0.9 for cosine in cosines.values())


def test_coefficient_zero_keeps_every_bit_in_every_arm(byte_lm, arms):
    ids_sp, mask_sp = byte_lm.encode(["a text of some length", "a short one"])
    for name, arm in arms.items():
        with internals(byte_lm) as unsteered:
            plain = byte_lm.logits(ids_sp, mask_sp)
            with applied(byte_lm, arm, 0.0, unsteered, ids_sp.shape[1]):
                assert torch.equal(byte_lm.logits(ids_sp, mask_sp), plain), name


@pytest.mark.parametrize("name", ["added", "rotated", "lengthened", "opposite"])
def test_angle_and_length_at_the_site(byte_lm, arms, name):
    before, after, real_sp = seen_in(byte_lm, arms[name], C, [SITE])
    h, found, v = before[SITE][real_sp].double(), after[SITE][real_sp].double(), C * direction(byte_lm).direction_d.double()
    moved, cosine = h + v, torch.nn.functional.cosine_similarity
    by_hand = {
        "added": moved,
        "rotated": moved / moved.norm(dim=-1, keepdim=True) * h.norm(dim=-1, keepdim=True),
        "lengthened": h / h.norm(dim=-1, keepdim=True) * moved.norm(dim=-1, keepdim=True),
        "opposite": h - v,
    }[name]
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-4)
    if name == "rotated":
        torch.testing.assert_close(cosine(found, v[None]), cosine(moved, v[None]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["front", "last"])
def test_where_an_arm_steers(byte_lm, arms, name):
    before, after, real_sp = seen_in(byte_lm, arms[name], C, [SITE])
    changed_sp = (before[SITE] != after[SITE]).any(-1)
    number_sp = real_sp.cumsum(1) - 1
    last_sp = torch.zeros_like(real_sp)
    last_sp[:, -1] = True
    expected_sp = last_sp if name == "last" else real_sp & (number_sp >= 1) & (number_sp <= FRONT)
    assert torch.equal(changed_sp & real_sp, expected_sp)


def test_frozen_arms_write_what_was_written(byte_lm, arms):
    before, after, real_sp = seen_in(byte_lm, arms["norms, patterns, values frozen"], C, ["attn_out.2", "mlp_out.2"])
    torch.testing.assert_close(after["attn_out.2"][real_sp], before["attn_out.2"][real_sp], rtol=1e-5, atol=1e-5)
    assert arms["norms, patterns, values frozen"].frozen == PARTS
    assert not torch.allclose(after["mlp_out.2"][real_sp], before["mlp_out.2"][real_sp], atol=0.1)


def test_random_in_the_top_span_lies_in_it(byte_lm, arms):
    span = torch.stack([v.unit().direction_d for v in principal_directions_of_texts(byte_lm, SENTENCES, SITE, 10)]).double()
    v_d = arms["random in the top span"].vector.direction_d.double()
    torch.testing.assert_close(span.T @ (span @ v_d), v_d, rtol=1e-4, atol=1e-4)


def test_off_the_keys_moves_the_keys_little():
    """Two groups of keys 16 wide together, in a stream of 32: what they read can be left."""
    lm = randomised(hf.LlamaConfig(**GROUPED), 3)
    vector, real = direction(lm), torch.randint(2, 40, (3, 12), generator=torch.Generator().manual_seed(1))
    lm.tokenizer = _Letters()
    off = off_the_keys(lm, vector)
    moved = {}
    plain = lm.record(real, ["k.2"])["k.2"]
    for name, one in (("added", vector), ("off", off)):
        with lm.edited({SITE: lambda value, one=one: value + 0.01 * one.direction_d}):
            moved[name] = (lm.record(real, ["k.2"])["k.2"] - plain).norm().item()
    assert moved["off"] < 0.5 * moved["added"]
    assert off.norm == pytest.approx(vector.norm, rel=1e-5)
    # what is read is what the gain and the weights of the keys read, by far the most of it
    read_dk = _key_readers(lm, SITE, "k.2", 1 - 1e-9)
    block = lm.model.model.layers[2]
    weights_kd = (block.self_attn.k_proj.weight * block.input_layernorm.weight).double()
    lost = weights_kd - (weights_kd @ read_dk) @ read_dk.T
    assert lost.norm() < 1e-3 * weights_kd.norm()


class _Letters:
    """A tokenizer for a model of 50 tokens."""

    bos_token_id, pad_token_id = 0, None

    def __call__(self, text: str, **_) -> dict:
        return {"input_ids": [2 + ord(letter) % 40 for letter in text]}


def test_what_the_model_cannot_do_is_left_out_and_said(byte_lm):
    made, left_out = make_arms(byte_lm, direction(byte_lm, "resid_post.2"))
    assert left_out == {"off the keys": "expected a direction that an attention reads, but none comes after resid_post.2"}
    assert len(made) == 15
    lm = randomised(hf.GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, **COMMON), 1)
    lm.tokenizer = _Letters()
    _, left_out = make_arms(lm, direction(lm, "resid_post.0"))
    assert set(left_out) >= {"patterns frozen", "values frozen"}
    assert "has its own attention code" in left_out["patterns frozen"]
    assert "norms frozen" not in left_out


def test_directions_of_positions_have_the_arms_that_make_sense(byte_lm):
    v_pd = 3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    v_pd[0] = 0
    made, left_out = make_arms(byte_lm, SteeringVector.at(SITE, v_pd))
    arms = {arm.name: arm for arm in made}
    reason = "expected one direction for every position, got one for each of the first 4"
    assert left_out == dict.fromkeys(("lengthened", "front", "last"), reason)
    assert list(arms) == [
        *("added", "rotated", "opposite", "all layers", "random", "random in the top span", "off the keys"),
        *FROZEN,
    ]
    span = torch.stack([v.unit().direction_d for v in principal_directions_of_texts(byte_lm, SENTENCES, SITE, 10)])
    for name in ("random", "random in the top span"):
        (rows_pd,) = arms[name].vector.directions.values()
        torch.testing.assert_close(rows_pd.norm(dim=1), v_pd.norm(dim=1))
        assert (torch.nn.functional.cosine_similarity(rows_pd[1:], v_pd[1:]).abs() < 0.9).all()
        assert abs(torch.nn.functional.cosine_similarity(rows_pd[1], rows_pd[2], dim=0)) < 0.9
    torch.testing.assert_close(rows_pd @ span.T @ span, rows_pd, rtol=1e-3, atol=1e-3)
    (off_pd,) = arms["off the keys"].vector.directions.values()
    read_dk = _key_readers(byte_lm, SITE, "k.2", 0.9).float()
    assert off_pd.norm().item() == pytest.approx(v_pd.norm().item(), rel=1e-5)
    assert (off_pd @ read_dk).norm() < 1e-3 * v_pd.norm()
    for name in ("added", "rotated", "norms, patterns, values frozen"):
        before, after, real_sp = seen_in(byte_lm, arms[name], C, [SITE])
        for h_pd, found_pd, real_p in zip(before[SITE], after[SITE], real_sp):
            by_hand = h_pd[real_p].clone()
            by_hand[:4] += C * v_pd
            if name == "rotated":
                by_hand *= h_pd[real_p].norm(dim=-1, keepdim=True) / by_hand.norm(dim=-1, keepdim=True)
            torch.testing.assert_close(found_pd[real_p], by_hand, rtol=1e-4, atol=1e-4)


def test_what_is_no_direction_of_the_stream_is_refused(byte_lm):
    zero = SteeringVector.at(SITE, torch.zeros(32))
    for vector, message in (
        (zero, "expected a steering vector that is not zero"),
        (direction(byte_lm, "mlp_act.1"), "expected a direction of the residual stream"),
        (SteeringVector.at(SITE, torch.ones(3, 5)), "expected a direction of width 32 for resid_post.1 of 'tiny bytes', got 5"),
        (SteeringVector.at(SITE, torch.ones(5)), "expected a direction of width 32 for resid_post.1"),
        (SteeringVector.at("resid_post.9", torch.ones(32)), "expected a site of the model"),
    ):
        with pytest.raises(InputError, match=message):
            make_arms(byte_lm, vector)
