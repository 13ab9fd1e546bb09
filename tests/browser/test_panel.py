"""What the steering panel streams, against the model's own generation and a vector added by hand."""

import pytest
import torch
from browser_world import FEATURE

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.model.sampling import Sampling
from steering.breakdown.working_range import WorkingRange, working_range
from steering.panel import make_ranges, range_words
from steering.vector import SteeringVector

SETTINGS = Sampling(max_new_tokens=16, temperature=0.9, top_p=0.95, seed=5)
PROMPT = "I think 🦓"


def streamed(demo, features, sampling=SETTINGS) -> tuple[dict[str, str], list[dict]]:
    """Text of each side, and all pieces."""
    pieces = list(demo.steering(PROMPT, features, sampling))
    texts = {side: "".join(piece.get("text", "") for piece in pieces if piece["side"] == side) for side in ("unsteered", "steered")}
    return texts, pieces


def generated(demo) -> torch.Tensor:
    """The new ids, [1, n]."""
    ids_sp, mask_sp = demo.lm.encode([PROMPT])
    return demo.lm.generate(ids_sp, mask_sp, **vars(SETTINGS))[:, ids_sp.shape[1] :]


def test_both_sides_are_what_the_model_generates(demo):
    texts, pieces = streamed(demo, [(FEATURE, 1.5), (12, -0.5)])
    assert texts["unsteered"] == demo.lm.tokenizer.decode(generated(demo)[0], skip_special_tokens=True)
    dictionary = Dictionary.load(demo.index.info["dictionary"])
    highest = demo.index.columns["max"]
    added_d = 1.5 * highest[FEATURE] * dictionary.W_dec_fo[FEATURE] - 0.5 * highest[12] * dictionary.W_dec_fo[12]
    with demo.lm.edited({demo.index.info["site"]: lambda value: value + added_d}):
        steered = generated(demo)[0]
    assert texts["steered"] == demo.lm.tokenizer.decode(steered, skip_special_tokens=True)
    assert texts["steered"] != texts["unsteered"]
    assert [piece["side"] for piece in pieces[:6]] == ["unsteered", "steered"] * 3  # neither waits for the other


def test_nats_per_token_are_those_of_the_unsteered_model(demo):
    _, pieces = streamed(demo, [(FEATURE, 1.5)])
    stated = {piece["side"]: piece["nats_per_token"] for piece in pieces if "nats_per_token" in piece}
    ids_sp, _ = demo.lm.encode([PROMPT])
    new = generated(demo)
    whole = torch.cat([ids_sp, new], dim=1)
    log_p = demo.lm.logits(whole)[0, ids_sp.shape[1] - 1 : -1].double().log_softmax(-1)
    expected = -log_p[torch.arange(new.shape[1]), new[0]].mean().item()
    assert stated["unsteered"] == pytest.approx(expected, rel=1e-4)
    assert stated["steered"] > stated["unsteered"]


def test_at_strength_zero_and_without_features_the_sides_are_equal(demo):
    for features in ([], [(FEATURE, 0.0)]):
        texts, pieces = streamed(demo, features)
        assert texts["steered"] == texts["unsteered"]
        nats = [piece["nats_per_token"] for piece in pieces if "nats_per_token" in piece]
        assert nats[0] == nats[1]


@pytest.mark.parametrize("strength", [1e19, 1e30, -1e37])
def test_a_strength_beyond_the_arithmetic_is_a_sentence(demo, strength):
    texts, pieces = streamed(demo, [(FEATURE, strength)])
    failures = [piece for piece in pieces if "failure" in piece]
    if failures:
        assert [piece["side"] for piece in failures] == ["steered"]
        assert "strength is more than" in failures[0]["failure"]
        assert texts["steered"] == ""
    assert failures or abs(strength) < 1e20
    assert texts["unsteered"]


def last_of(pieces):
    *waits, found = pieces
    assert set(waits) <= {None}
    return found, len(waits)


def test_the_range_of_a_feature_is_that_of_its_direction_both_ways(demo):
    """In multiples of the maximum activation; found once, then remembered."""
    ranges = make_ranges(demo.lm, demo.dictionary, demo.index)  # the server's may remember what a page of another test asked for
    found, passes = last_of(ranges(FEATURE))
    row_d, highest = demo.dictionary.rows([FEATURE])[0].float(), float(demo.index.feature(FEATURE).columns["max"])
    for side, sign in (("up", 1), ("down", -1)):
        alone = working_range(demo.lm, SteeringVector.at("resid_post.2", sign * row_d))
        assert found[side]["coefficient"] * highest == pytest.approx(alone.coefficient, rel=1e-3)
        assert found[side]["sign"] == alone.sign
    assert passes >= 8
    assert last_of(ranges(FEATURE)) == (found, 0)
    low, high = (f"{found[side]['coefficient']:.2g}" for side in ("down", "up"))
    assert found["sentence"] == f"works from about −{low} to {high}; beyond, the text usually breaks"
    assert f"above {high}, {found['up']['beyond']}" in found["details"]


def test_a_range_without_an_end_says_so():
    crossed = WorkingRange(1.5, "KL", "the predictions are broken", 0.5, 2.0, 0.1)
    never = WorkingRange(None, None, None, None, 80.0, 0.1)
    assert range_words(never, crossed) == {
        "sentence": "works from about −1.5 to 80 and further; beyond, the text usually breaks",
        "details": "below −1.5, the predictions are broken; below −0.5, most tokens are unlike those of plain text, which text survives",
    }
    assert range_words(never, never) == {"sentence": "works from about −80 and further to 80 and further", "details": ""}


def test_a_feature_that_has_no_range_says_why(demo):
    silent = int((demo.index.columns["max"][:] == 0).argmax())
    found, _ = last_of(demo.ranges(silent))
    assert found["why"].startswith(f"feature {silent} never fires")


def test_what_cannot_be_steered_is_refused_before_the_first_piece(demo):
    dead = int((demo.index.columns["count"] == 0).argmax())
    assert demo.index.columns["count"][dead] == 0  # 12,000 tokens leave some features silent
    for features, prompt in (([(dead, 1.0)], "I"), ([(4096, 1.0)], "I"), ([(FEATURE, 1.0)], "I think " * 200)):
        with pytest.raises(InputError):
            demo.steering(prompt, features, SETTINGS)
