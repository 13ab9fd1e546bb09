"""Pairs under a tokenizer, their metric against softmax and means in float64, and the gate that says whether a task is there."""

import math

import numpy as np
import pytest
import torch

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.circuits.tasks.generators import Pair
from steering.circuits.tasks.presence import last_logits, presence, presence_of, require_present
from steering.circuits.tasks.prompts import encode_pair, make_prompts, one_token_words, own_prompts


@pytest.fixture(scope="module")
def demo_lm():
    return LanguageModel.load("checkpoints/demo-lm", device="cpu")


def pair(clean, corrupt, right=("x",), wrong=("y",)):
    sides = (side if isinstance(side, tuple) else (side,) for side in (clean, corrupt))
    return Pair(*sides, right, wrong)


def test_each_pair_has_one_length_and_the_others_are_counted(byte_lm):
    rows = [pair("ab", "cd", ("x",), ("y",)), pair("ab", "cde"), pair("ab", "cd", ("xy",), ("xz",)), pair("ab", "cd", ("x",), ("y",))]
    prompts = own_prompts(byte_lm, [*rows, pair("a" * 600, "b" * 600)])
    assert prompts.dropped == {
        "of different lengths in tokens": 1,
        "with right and wrong answers of the same first token": 1,
        "a second time": 1,
        "longer than the model's context": 1,
    }
    assert prompts.summary().startswith("1 pair of 3 tokens; left out: 1 of different lengths in tokens")
    with pytest.raises(InputError, match=r"found none \(1 of different lengths"):
        own_prompts(byte_lm, [rows[1]])


def test_prompts_end_in_the_last_column_and_logits_are_those_of_each_alone(byte_lm):
    prompts = own_prompts(byte_lm, [pair("ab", "cd"), pair("abcdef", "ghijkl")])
    assert prompts.clean_mask_np.tolist() == [[0, 0, 0, 0, 1, 1, 1], [1] * 7]
    assert byte_lm.tokenizer.decode(prompts.corrupt_np[1, 1:]) == "ghijkl"
    alone = [byte_lm.logits(torch.tensor([byte_lm.token_ids(text)]))[0, -1] for text in ("ab", "abcdef")]
    torch.testing.assert_close(last_logits(byte_lm, prompts.clean_np, prompts.clean_mask_np), torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_metric_is_the_formula(byte_lm):
    rows = [pair("ab", "cd", ("x", "y"), ("z",)), pair("ef", "gh", ("p",), ("q", "r", "s"))]
    v = byte_lm.model.config.vocab_size
    logits_nv = torch.randn(2, v, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ids = [[[byte_lm.token_ids(text)[-1] for text in side] for side in (row.right, row.wrong)] for row in rows]
    of_logits = own_prompts(byte_lm, rows)
    of_shares = own_prompts(byte_lm, rows, "probability_difference")
    for prompts, f, norm in (
        (of_logits, lambda row: row, True),
        (of_shares, lambda row: [math.exp(x) / sum(map(math.exp, row)) for x in row], False),
    ):
        expected = []
        for row, (right, wrong) in zip(logits_nv.tolist(), ids):
            value = f(row)
            totals = [sum(value[token] for token in side) / (len(side) if norm else 1) for side in (right, wrong)]
            expected.append(totals[0] - totals[1])
        found_n = prompts.measure(logits_nv)
        assert found_n.tolist() == pytest.approx(expected, rel=1e-12)
        assert torch.autograd.grad(found_n.sum(), logits_nv)[0].abs().sum() > 0
        again = prompts.subset([1, 0])
        assert again.measure(logits_nv.flip(0)).tolist() == pytest.approx(expected[::-1], rel=1e-12)
        assert again.pairs == (rows[1], rows[0])


def test_answers_that_begin_alike_are_left_out_and_the_rest_counts(byte_lm):
    encoded = encode_pair(byte_lm, pair("ab", "cd", ("31", "45"), ("30", "29")))
    digits = {digit: byte_lm.token_ids(digit)[-1] for digit in "2345"}
    assert (encoded.right, encoded.wrong) == ([digits["4"]], [digits["2"]])


def test_pieces_of_different_lengths_are_aligned_by_their_ends(byte_lm):
    encoded = encode_pair(byte_lm, pair(("a", "bcd", "e"), ("a", "xy", "e")))
    assert encoded.aligned == [0, 1, 2, 2, 3, 4]  # <s> a b c d e over <s> a x y e
    encoded = encode_pair(byte_lm, pair(("a", "bc", "e"), ("a", "xyz", "e")))
    assert encoded.aligned == [0, 1, 3, 4, 5]
    prompts = own_prompts(byte_lm, [pair(("a", "bcd", "e"), ("a", "xy", "e")), pair("abcdefg", "hijklmn")])
    assert not prompts.aligned
    assert prompts.aligned_np[0].tolist() == [0, 1, 3, 4, 5, 5, 6, 7]
    assert prompts.corrupt_np.gather(1, prompts.aligned_np)[0, -5:].tolist() == [byte_lm.token_ids(c)[-1] for c in "axxye"]
    assert prompts.subset([1]).aligned


def test_halves_are_every_pair_once(demo_lm):
    prompts = make_prompts(demo_lm, "ioi", 9)
    first, second = prompts.halves(3)
    assert (len(first), len(second)) == (4, 5)
    assert sorted([*first.pairs, *second.pairs]) == sorted(prompts.pairs)
    assert prompts.halves(3)[0].pairs == first.pairs != prompts.halves(4)[0].pairs
    with pytest.raises(InputError, match="at least one pair"):
        prompts.subset([0]).halves()


def test_equal_seeds_give_equal_prompts(demo_lm):
    first, second, other = (make_prompts(demo_lm, "pronoun", 12, seed) for seed in (1, 1, 2))
    assert first.pairs == second.pairs != other.pairs
    assert torch.equal(first.clean_np, second.clean_np)
    assert len(set(first.pairs)) == 12


def test_bad_requests(byte_lm):
    with pytest.raises(InputError, match="at least one pair, got 0"):
        make_prompts(byte_lm, "ioi", 0)
    with pytest.raises(InputError, match="too few words of one token"):
        make_prompts(byte_lm, "induction", 3)
    with pytest.raises(InputError, match="expected a tokenizer"):
        one_token_words(LanguageModel(byte_lm.model, None, "bare"))


def test_one_token_words_of_the_demo_model(demo_lm):
    words = one_token_words(demo_lm)
    assert len(words) > 500
    assert all(len(demo_lm.token_ids("one" + word + " two")) == len(demo_lm.token_ids("one two")) + 1 for word in words[::50])


def test_presence_of_known_numbers():
    clean_n, corrupt_n = np.array([1.0] * 9 + [-1.0]), np.array([-1.0] * 9 + [1.0])
    found = presence_of(clean_n, corrupt_n)
    assert (found.n, found.accuracy["value"], found.clean["value"], found.effect["value"]) == (10, 0.9, 0.8, 1.6)
    assert 0.55 < found.accuracy["low"] < 0.6 < 0.97 < found.accuracy["high"] < 1  # Wilson by hand: 0.596 to 0.982
    assert found.there
    assert "90 % of 10 right (60 % to 98 %), clean minus corrupt 1.60" in found.sentence()
    absent = presence_of(np.array([1.0, -1.0] * 10), np.array([1.0, -1.0] * 10))
    assert not absent.there
    with pytest.raises(InputError, match=r"'m' to do the task ioi.*50 % of 20 right \(30 % to 70 %\), clean minus corrupt 0.00"):
        require_present(absent, "ioi", "m")
    right_but_unmoved = presence_of(np.ones(20), np.ones(20))
    assert not right_but_unmoved.there


def test_the_demo_model_agrees_with_its_subject_and_gives_no_object(demo_lm):
    found = presence(demo_lm, make_prompts(demo_lm, "agreement", 32))
    assert found.there
    assert found.accuracy["value"] > 0.9
    assert not presence(demo_lm, make_prompts(demo_lm, "ioi", 32)).there


def test_stories260k_knows_pronouns(shared):
    lm = LanguageModel.load(str(shared / "models" / "stories260k"), device="cpu")
    assert presence(lm, make_prompts(lm, "pronoun", 32)).there
