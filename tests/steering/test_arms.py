"""The arms that are made from one concept's texts, on a tiny model that reads bytes.

t texts · d width · f features
"""

from typing import get_args

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.gates import AbsTopK
from steering.compare.arms import MAKERS, NONE, PROMPTING, RANDOM, SHUFFLED, ArmInputs, Method, build_arms
from steering.compare.concepts import LabelledTexts, Texts
from steering.concept import Concept
from steering.directions.targeted import Effects, targeted_direction
from steering.directions.texts import activations_of_texts

SITE = "resid_post.1"
POSITIVE = [f"aaaa number {i} of the apples again" for i in range(20)]
NEGATIVE = [f"zzzz zone {i} of the puzzle buzzing" for i in range(20)]
TEXTS = Texts(POSITIVE, NEGATIVE, [], [], ["aaaa and an apple"], ["zzzz in a puzzle"])
PROMPTS = ("one", "two and", "three", "four")
CONCEPT = Concept("a", prompt="aaaa", prompt_pairs=(("aa", "zz"),), positive=tuple(POSITIVE), negative=tuple(NEGATIVE))


@pytest.fixture(scope="module")
def dictionary(byte_lm) -> Dictionary:
    """Feature 0 reads along the difference of means, above the negative texts; the others are random."""
    means = [torch.stack([x.mean(0) for x in activations_of_texts(byte_lm, texts, SITE)]).mean(0) for texts in (POSITIVE, NEGATIVE)]
    generator = torch.Generator().manual_seed(0)
    W_enc_fd, W_dec_fd = (torch.randn(16, 32, generator=generator) for _ in range(2))
    W_enc_fd[0] = means[0] - means[1]
    b_enc_f = torch.zeros(16)
    b_enc_f[0] = -W_enc_fd[0] @ means[1]
    return Dictionary.autoencoder(W_enc_fd, b_enc_f, W_dec_fd, torch.zeros(32), {"site": SITE})


def material(lm, **changes) -> ArmInputs:
    settings = dict(site=SITE, concept=CONCEPT, texts=TEXTS, prompts=PROMPTS, max_new_tokens=8) | changes
    return ArmInputs(lm, **settings)


@pytest.fixture(scope="module")
def arms(byte_lm, dictionary):
    return {arm.method: arm for arm in build_arms(material(byte_lm, dictionary=dictionary))}


def test_every_arm_is_there_as_a_unit_vector(arms):
    assert list(arms) == [NONE, PROMPTING, *MAKERS]
    assert arms["SAE-TS"].left_out == "no fitted effects were given"
    assert arms["SAE feature named"].left_out == "no feature was named"
    for method in set(MAKERS) - {"SAE-TS", "SAE feature named"}:
        assert arms[method].left_out is None
        assert arms[method].vector.norm == pytest.approx(1, abs=1e-5)
    assert [arms[method].kind for method in (NONE, PROMPTING, RANDOM, SHUFFLED, "DiffMean")] == ["baseline"] * 2 + ["control"] * 2 + [
        "method"
    ]
    assert arms[PROMPTING].prefix == "aaaa "


def test_chosen_methods_come_with_all_baselines_and_controls(byte_lm):
    made = build_arms(material(byte_lm), ["diffmean", "iti"])
    assert [arm.method for arm in made] == [NONE, PROMPTING, RANDOM, SHUFFLED, "DiffMean", "ITI"]
    for method in get_args(Method):  # each name chooses one
        assert len(build_arms(material(byte_lm), [method])) == 5


def test_diffmean_counts_every_text_once(byte_lm, arms):
    means = []
    for texts in (POSITIVE, NEGATIVE):
        acts = [byte_lm.record(byte_lm.encode([text])[0], [SITE])[SITE][0, 1:].double() for text in texts]
        means.append(torch.stack([x.mean(0) for x in acts]).mean(0))
    expected_d = torch.nn.functional.normalize(means[0] - means[1], dim=0)
    torch.testing.assert_close(arms["DiffMean"].vector.direction_d.double(), expected_d, rtol=0, atol=1e-5)


def test_the_feature_of_highest_auroc_on_the_texts_to_fit(byte_lm, dictionary, arms):
    m = material(byte_lm, dictionary=dictionary)
    auroc_f, highest_f, _ = m.features
    scores = np.array(
        [
            dictionary.encode(x).mean(0).detach().numpy()
            for texts in (POSITIVE, NEGATIVE)
            for x in activations_of_texts(byte_lm, texts, SITE)
        ]
    )
    for f in (0, 3, 7):
        assert auroc_f[f] == pytest.approx(roc_auc_score([1] * 20 + [0] * 20, scores[:, f]))
    best = int(np.argmax(auroc_f))
    assert arms["SAE feature by AUROC"].note.startswith(f"feature {best}:")
    row_d = dictionary.W_dec_fo[best]
    torch.testing.assert_close(arms["SAE feature by AUROC"].vector.direction_d, row_d / row_d.norm())
    assert arms["SAE feature by AUROC"].strongest == pytest.approx((highest_f[best] * row_d.norm()).item(), rel=1e-5)
    assert "output score" in arms["SAE feature by output score"].note


@pytest.mark.parametrize("feature", [3, 15])
def test_a_named_feature_is_its_decoder_row(byte_lm, dictionary, feature):
    named = {arm.method: arm for arm in build_arms(material(byte_lm, dictionary=dictionary, feature=feature))}["SAE feature named"]
    row_d = dictionary.W_dec_fo[feature]
    torch.testing.assert_close(named.vector.direction_d, row_d / row_d.norm())


def test_a_named_feature_that_is_strongest_below_zero_points_there(byte_lm, dictionary):
    signed = Dictionary(
        dictionary.W_enc_fd, dictionary.b_enc_f, dictionary.W_dec_fo, dictionary.b_dec_o, metadata={"site": SITE}, gate=AbsTopK(9)
    )
    texts = [x for texts in (POSITIVE, NEGATIVE) for x in activations_of_texts(byte_lm, texts, SITE)]
    acts_nf = signed.encode(torch.cat(texts)).detach()
    low_f, high_f = acts_nf.min(0).values, acts_nf.max(0).values
    for feature in (int((high_f + low_f).argmin()), int((high_f + low_f).argmax())):
        named = {arm.method: arm for arm in build_arms(material(byte_lm, dictionary=signed, feature=feature))}["SAE feature named"]
        strongest = max(low_f[feature].item(), high_f[feature].item(), key=abs)
        row_d = strongest * signed.W_dec_fo[feature]
        torch.testing.assert_close(named.vector.direction_d, row_d / row_d.norm())
        assert named.strongest == pytest.approx(row_d.norm().item(), rel=1e-5)


def test_the_targeted_direction_is_aimed_at_the_feature_by_output_score(byte_lm, dictionary, arms):
    generator = torch.Generator().manual_seed(1)
    effects = Effects(torch.randn(32, 16, generator=generator), torch.randn(16, generator=generator), SITE, {})
    found = {arm.method: arm for arm in build_arms(material(byte_lm, dictionary=dictionary, effects=effects))}["SAE-TS"]
    feature = int(arms["SAE feature by output score"].note.split()[1].strip(":"))
    torch.testing.assert_close(found.vector.direction_d, targeted_direction(effects, feature).direction_d)
    elsewhere = {
        arm.method: arm for arm in build_arms(material(byte_lm, dictionary=dictionary, effects=effects._replace(site="resid_pre.0")))
    }
    assert "got them at resid_pre.0 and 16" in elsewhere["SAE-TS"].left_out


def test_the_principal_direction_points_to_the_concept(byte_lm, arms):
    unit_d = arms["principal direction"].vector.direction_d
    pos, neg = ([(x.mean(0) @ unit_d).item() for x in activations_of_texts(byte_lm, texts, SITE)] for texts in (POSITIVE, NEGATIVE))
    found = roc_auc_score([1] * 20 + [0] * 20, pos + neg)
    assert found > 0.5
    assert f"AUROC {found:.2f}" in arms["principal direction"].note


def test_activation_addition_is_added_before_the_next_block(arms):
    ((site, rows_pd),) = arms["ActAdd"].vector.directions.items()
    assert site == "resid_pre.2"
    assert rows_pd.shape == (3, 32)
    assert not rows_pd[0].any()


def test_what_a_concept_lacks_is_left_out_with_the_reason(byte_lm):
    words_only = Concept("b", words=("apple",))
    found = {arm.method: arm for arm in build_arms(material(byte_lm, concept=words_only, texts=Texts([], [], [], [], [], [])))}
    assert {name for name, arm in found.items() if arm.left_out is None} == {NONE, RANDOM}
    for method in (SHUFFLED, "DiffMean", "PCA of differences", "principal direction", "ITI", "SAE feature by AUROC"):
        assert "contrast texts" in found[method].left_out or "no dictionary" in found[method].left_out
    assert "no pair of prompts" in found["ActAdd"].left_out
    assert "no prompt to put before" in found[PROMPTING].left_out
    without = {arm.method: arm for arm in build_arms(material(byte_lm))}
    assert without["SAE feature by AUROC"].left_out == "no dictionary was given"
    last = {arm.method: arm for arm in build_arms(material(byte_lm, site="resid_post.2"))}
    assert "resid_post.2" in last["ActAdd"].left_out


def test_prompts_too_long_for_their_place_are_left_out(byte_lm):
    long = Concept(
        "c", prompt="long " * 100, prompt_pairs=(("a much longer prompt", "b"),), positive=tuple(POSITIVE), negative=tuple(NEGATIVE)
    )
    found = {arm.method: arm for arm in build_arms(material(byte_lm, concept=long))}
    assert "leaves no room" in found[PROMPTING].left_out
    assert "more than the longest prompt" in found["ActAdd"].left_out


@pytest.mark.filterwarnings("ignore:.*examples, ")  # of the other arms
def test_few_texts_are_warned_about_with_an_interval_and_noted(byte_lm):
    few = TEXTS._replace(fit_positive=POSITIVE[:5], fit_negative=NEGATIVE[:9])
    with pytest.warns(UserWarning, match=r"DiffMean: few examples, 5 positive and 9 negative.*95 %"):
        found = {arm.method: arm for arm in build_arms(material(byte_lm, texts=few))}
    assert "few examples, 5 positive and 9 negative" in found["DiffMean"].note


def test_the_plain_batch_has_no_text_that_is_tested_on(byte_lm):
    corpus = LabelledTexts([*TEXTS.held_positive, *TEXTS.held_negative, *(f"plain text number {i}" for i in range(40))], [None] * 42)
    found = next(arm for arm in build_arms(material(byte_lm, corpus=corpus)) if arm.method == "principal direction")
    assert "of 40 texts" in found.note
