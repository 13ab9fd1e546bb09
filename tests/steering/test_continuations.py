"""What is measured of an arm, against the model used by hand.

s texts · p prompts or positions
"""

import copy
import math

import numpy as np
import pytest
import torch

from sae.model.language_model import LanguageModel
from sae.model.sampling import Sampling
from sae.pieces import pieces
from sae.processes import Processes
from steering.compare.arms import NONE, PROMPTING, Arm
from steering.compare.concepts import TextScore
from steering.compare.continuations import (
    CALIBRATION_SENTENCES,
    OFF_TOPIC_SENTENCES,
    ComparisonSetup,
    continuations,
    detection_auroc,
    level,
    measure_arms,
    off_topic,
)
from steering.directions.actadd import actadd
from steering.directions.random import random_direction
from steering.intervention import steered
from steering.strength.calibration import TOKENS, Calibration, Divergence
from steering.vector import SteeringVector

SITE = "resid_post.1"
PROMPTS = ("one", "two and more", "three", "four is")
SAMPLING = Sampling(max_new_tokens=6, seed=3)


def letters(texts) -> np.ndarray:
    return np.array([float(len(text)) for text in texts])


def setup_of(lm: LanguageModel, **changes) -> ComparisonSetup:
    settings = dict(prompts=PROMPTS, samples=2, sampling=SAMPLING, budgets=(0.1, 0.5), target=TextScore("words", "length", None, letters))
    return ComparisonSetup(lm, **(settings | dict(second=None, held=(["aaa", "abab"], ["zzz", "zyzy"])) | changes))


@pytest.fixture(scope="module")
def random_arm(byte_lm) -> Arm:
    return Arm("random", "control", random_direction(32, SITE, 1))


def test_continuations_are_one_batch_steered_everywhere(byte_lm, random_arm):
    found = continuations(setup_of(byte_lm), random_arm, 4.0, 2)
    ids_sp, mask_sp = byte_lm.encode([prompt for prompt in PROMPTS for _ in range(2)])
    with steered(byte_lm, [(random_arm.vector, 4.0)]):
        whole_sp = byte_lm.generate(ids_sp, mask_sp, **vars(SAMPLING))
    expected = [byte_lm.tokenizer.decode(row, skip_special_tokens=True) for row in whole_sp[:, ids_sp.shape[1] :]]
    assert len(found.texts) == 8
    for text, whole in zip(found.texts, expected):
        assert whole.startswith(text)
    assert found.texts != continuations(setup_of(byte_lm), Arm(NONE, "baseline"), 0.0, 2).texts


def test_a_prompt_that_brings_its_own_beginning_of_text_is_the_same_prompt(byte_lm):
    bos = byte_lm.tokenizer.bos_token
    for arm in (Arm(NONE, "baseline"), Arm(PROMPTING, "baseline", prefix="a word ")):
        plain, own = (continuations(setup_of(byte_lm, prompts=p), arm, 0.0, 1) for p in (PROMPTS, [bos + text for text in PROMPTS]))
        assert own.tokens == plain.tokens
        assert own.nats_p.tolist() == plain.nats_p.tolist()


def test_fluency_is_that_of_the_unsteered_model_after_the_plain_prompt(byte_lm):
    for arm in (Arm(NONE, "baseline"), Arm(PROMPTING, "baseline", prefix="a word ")):
        found = continuations(setup_of(byte_lm), arm, 0.0, 1)
        for prompt, row, nats in zip(PROMPTS, found.tokens, found.nats_p):
            ids_sp = byte_lm.encode([prompt])[0]
            both_sp = torch.cat([ids_sp, torch.tensor([row])], dim=1)
            log_p = byte_lm.logits(both_sp).double().log_softmax(-1)[0, ids_sp.shape[1] - 1 : -1]
            assert nats == pytest.approx(-log_p[range(len(row)), row].mean().item(), rel=1e-4)


def test_directions_per_position_are_added_to_the_prompt_alone(byte_lm):
    arm = Arm("ActAdd", "method", actadd(byte_lm, "aa", "zz", "resid_pre.2").unit())
    found = continuations(setup_of(byte_lm), arm, 30.0, 1)
    for prompt, row in zip(PROMPTS, found.tokens):
        ids_sp = byte_lm.encode([prompt])[0]
        both_sp = torch.cat([ids_sp, torch.tensor([row])], dim=1)
        with steered(byte_lm, [(arm.vector, 30.0)], positions="all", prompt_length=ids_sp.shape[1]):
            log_p = byte_lm.logits(both_sp).log_softmax(-1)[0, ids_sp.shape[1] - 1 : -1]
        assert torch.isfinite(log_p[range(len(row)), row]).all()
    assert found.texts != continuations(setup_of(byte_lm), Arm(NONE, "baseline"), 0.0, 1).texts


def test_logits_that_are_not_numbers_are_a_failure_not_text(byte_lm):
    broken = copy.deepcopy(byte_lm.model)
    broken.transformer.ln_f.weight.data.fill_(math.nan)
    setup = setup_of(LanguageModel(broken, byte_lm.tokenizer, "broken"))
    said = continuations(setup, Arm(NONE, "baseline"), 0.0, 1)
    assert isinstance(said, str)
    assert "not finite" in said
    entry = level(setup, Calibration(0.1, 1.0, 0.1, 0.1, None, True, True), said, Divergence(math.nan, 1.0), np.zeros(4))
    assert entry["failure"] == said
    assert entry["texts"] == []
    assert entry["score"] is None


def test_halves_and_gains_of_a_level(byte_lm):
    setup = setup_of(byte_lm, second=TextScore("classifier", "length again", None, letters))
    found = continuations(setup, Arm(NONE, "baseline"), 0.0, 2)
    calibration = Calibration(0.1, 1.0, 0.1, 0.1, None, True, True)
    entry = level(setup, calibration, found, Divergence(0.2, 0.1), np.array([1.0, 2.0, 3.0, 4.0]))
    length_p = letters(found.texts).reshape(4, 2).mean(1)
    assert entry["choose"] == {"target": length_p[[0, 2]].mean(), "gain": (length_p - [1, 2, 3, 4])[[0, 2]].mean()}
    assert entry["score"]["target"]["value"] == pytest.approx(length_p[[1, 3]].mean())
    assert entry["score"]["gain"]["value"] == pytest.approx((length_p - [1, 2, 3, 4])[[1, 3]].mean())
    assert entry["score"]["second_target"] == entry["score"]["target"]
    assert entry["nats_per_token"]["value"] == pytest.approx(found.nats_p[[1, 3]].mean())
    assert [(t["prompt"], t["half"]) for t in entry["texts"]] == [
        (prompt, half) for prompt, half in zip(PROMPTS, ("choose", "score") * 2) for _ in range(2)
    ]


def test_a_prompt_put_before_changes_neutral_text_as_by_hand(byte_lm):
    setup = setup_of(byte_lm)
    found = off_topic(setup, Arm(PROMPTING, "baseline", prefix="aaa "), 0.0)
    total, count = 0.0, 0
    for text in OFF_TOPIC_SENTENCES:
        text = byte_lm.tokenizer.decode(byte_lm.encode([text])[0][0, 1:TOKENS])
        plain = byte_lm.logits(byte_lm.encode([text])[0])[0].double().log_softmax(-1)
        behind = byte_lm.logits(byte_lm.encode(["aaa" + text])[0])[0, 3:].double().log_softmax(-1)
        total += (plain.exp() * (plain - behind)).sum().item()
        count += len(plain)
    assert found.kl == pytest.approx(total / count, rel=1e-4)
    assert off_topic(setup, Arm(NONE, "baseline"), 0.0) == (0, 0)


def test_neutral_text_is_calibrated_on_and_reported_on_apart():
    assert not set(CALIBRATION_SENTENCES) & set(OFF_TOPIC_SENTENCES)
    assert len(CALIBRATION_SENTENCES) == len(OFF_TOPIC_SENTENCES) >= 24


def test_detection_is_the_projection_of_held_out_texts(byte_lm):
    means = {text: byte_lm.record(byte_lm.encode([text])[0], [SITE])[SITE][0, 1:].mean(0) for text in ("aaa", "abab", "zzz", "zyzy")}
    towards = means["aaa"] + means["abab"] - means["zzz"] - means["zyzy"]
    for sign in (1, -1):
        vector = SteeringVector.at(SITE, sign * towards)
        pos, neg = ([(means[text] @ vector.direction_d).item() for text in side] for side in (("aaa", "abab"), ("zzz", "zyzy")))
        expected = np.mean([p > n for p in pos for n in neg])
        assert detection_auroc(setup_of(byte_lm), vector)["value"] == expected
    assert detection_auroc(setup_of(byte_lm), actadd(byte_lm, "aa", "zz", "resid_pre.2")) is None
    assert detection_auroc(setup_of(byte_lm, held=([], [])), vector) is None


def test_all_arms_are_measured_with_one_seed_and_broken_last(byte_lm, random_arm, tmp_path):
    same = random_arm._replace(method="the same again")
    gone = Arm("gone", "method", left_out="no reason")
    with pieces(Processes.from_environment(), tmp_path / "out", {}) as made:
        entries, broken = measure_arms(setup_of(byte_lm), [Arm(NONE, "baseline"), random_arm, gone, same], made)
    none, random, left_out, again = entries
    assert none["levels"][0]["score"]["gain"] == {"value": 0, "low": 0, "high": 0}
    assert none["levels"][0]["budget"] is None
    assert [entry["budget"] for entry in random["levels"]] == [0.1, 0.5]
    assert random["levels"] == again["levels"]
    assert random["best"]["budget"] in (0.1, 0.5)
    assert (left_out["levels"], left_out["best"], left_out["left_out"]) == ([], None, "no reason")
    assert [sample["method"] for sample in broken] == ["random", "the same again"]
    assert broken[0]["budget"] == 2.5
    assert broken[0]["coefficient"] > random["levels"][1]["coefficient"]
    assert len(broken[0]["texts"]) == 3
    for entry in random["levels"]:
        assert entry["kl"] == pytest.approx(entry["budget"], rel=0.031)
        assert entry["off_topic_kl"] == pytest.approx(entry["budget"], rel=0.5)
