"""Concepts: what is read, what is refused, how texts are divided, and scores held against counts and against texts of known kind."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.activations.text.documents import TextConfig
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.compare.concepts import (
    LABEL_TEXTS,
    LENGTH,
    LabelledTexts,
    Texts,
    concept_texts,
    read_labelled_texts,
    second_score,
    target_score,
)
from steering.concept import Concept, load_concept, shipped_concepts
from steering.strength.measure import word_rate

NAMES = ["anger_calm", "bible", "code", "curse_words", "formality", "love_hate", "question_statement", "sentiment", "weddings", "wine"]
DEMO = Path(__file__).parents[2] / "checkpoints/demo-lm"


def own(n: int, name: str = "mine", **more) -> Concept:
    return Concept(name, positive=tuple(f"yes {i}" for i in range(n)), negative=tuple(f"no {i}" for i in range(n)), **more)


def corpus_of(**counts: int) -> LabelledTexts:
    pairs = [(f"document {i} of {label}, long enough to read", label) for label, n in counts.items() for i in range(n)]
    return LabelledTexts([text for text, _ in pairs], [label for _, label in pairs])


def quietly(*args) -> Texts:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return concept_texts(*args)


def test_ten_concepts_come_with_the_package():
    assert shipped_concepts() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_shipped_concept_can_be_used_by_every_method(name):
    concept = load_concept(name)
    assert concept.name == name
    assert len(concept.positive) == len(concept.negative) >= 48
    assert len(concept.prompt_pairs) >= 4
    assert concept.description and concept.prompt  # noqa: PT018
    assert concept.words == () or len(concept.words) >= 15
    assert max(map(len, concept.positive + concept.negative)) <= LENGTH
    lengths = [np.mean([len(text) for text in side]) for side in (concept.positive, concept.negative)]
    assert max(lengths) < 1.6 * min(lengths)  # length alone must not tell the sides apart
    if concept.words:  # the list must count what the positive texts are about
        rates = [word_rate(side, concept.words).rate for side in (concept.positive, concept.negative)]
        assert rates[0] > 4 * rates[1]


def test_curse_words_are_those_of_the_one_list():
    listed = (Path(__file__).parents[2] / "steering/words/curse_words.txt").read_text().split("\n")
    assert list(load_concept("curse_words").words) == [word for word in listed if word and not word.startswith("#")]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"name": "x"}, "empty concept"),
        ({"name": "x", "positive": ["a"]}, "one side is empty"),
        ({"name": "x", "positive": ["a"], "negative": ["a"]}, "got 'a' twice"),
        ({"name": "x", "positive": "a", "negative": ["b"]}, "list of texts"),
        ({"name": "x", "words": ["a", " "]}, "not empty"),
        ({"name": "x", "words": {"path": "a"}}, "list or"),
        ({"name": "x", "words": {"file": "none.txt"}}, "cannot be read"),
        ({"name": "x", "prompt_pairs": [["a"]]}, "two prompts"),
        ({"name": "x", "words": ["a"], "prompt": 3}, "text or null"),
        ({"name": "x", "words": ["a"], "wrods": ["b"]}, "got 'wrods'"),
        ({"words": ["a"]}, '"name"'),
        (["a"], '"name"'),
    ],
)
def test_unusable_file_is_refused(tmp_path, value, said):
    (tmp_path / "c.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=re.escape(said)):
        load_concept(str(tmp_path / "c.json"))


def test_names_that_are_none():
    with pytest.raises(InputError, match="anger_calm, bible"):
        load_concept("angry")
    with pytest.raises(InputError, match="empty concept"):
        load_concept("label:")
    with pytest.raises(InputError):
        load_concept("nowhere/c.json")


def test_missing_keys_are_empty_and_a_prompt_of_a_pair_may_be(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"name": "x", "prompt_pairs": [[" weddings", ""]], "prompt": None}))
    assert load_concept(str(tmp_path / "c.json")) == Concept("x", prompt_pairs=((" weddings", ""),))


def test_half_a_character_in_a_concepts_file_is_replaced_and_counted(tmp_path, capsys):
    value = {"name": "x", "positive": ["a \ud83d", "b 😀"], "negative": ["c", "d"], "words": ["\udc00e"]}
    (tmp_path / "c.json").write_text(json.dumps(value))
    concept = load_concept(str(tmp_path / "c.json"))
    assert (concept.positive, concept.words) == (("a \ufffd", "b 😀"), ("\ufffde",))
    assert f"halves of surrogate pairs in {tmp_path / 'c.json'}, which are no characters, are now U+FFFD (2)" in capsys.readouterr().err


def test_byte_order_marks_of_a_concept_and_its_words_are_no_text(tmp_path):
    (tmp_path / "w.txt").write_bytes("rain\nsnow".encode("utf-8-sig"))
    (tmp_path / "c.json").write_bytes(json.dumps({"name": "x", "words": {"file": "w.txt"}}).encode("utf-8-sig"))
    assert load_concept(str(tmp_path / "c.json")).words == ("rain", "snow")


def test_a_corpus_with_a_label_of_its_own_for_every_document_is_told_in_short():
    corpus = LabelledTexts([f"text {i} of a corpus" for i in range(500)], [f"label {i:03}" for i in range(500)])
    with pytest.raises(InputError, match=r"label 000, label 001.* label 019 and 480 more") as raised:
        concept_texts(Concept("x", label="none"), corpus, 0)
    assert "label 020" not in str(raised.value)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 400), st.integers(0, 400), st.integers(0, 3))
def test_texts_are_divided_without_overlap_and_none_is_lost(n_own, n_other_own, n_label, n_others, seed):
    concept = Concept("x", positive=tuple(f"yes {i}" for i in range(n_own)), negative=tuple(f"no {i}" for i in range(n_own)), label="a")
    corpus = corpus_of(a=n_label, b=n_others, c=n_other_own)
    texts = quietly(concept, corpus, seed)
    every = [text for part in texts for text in part]
    assert len(every) == len(set(every))
    n = min(LABEL_TEXTS, n_label, n_others + n_other_own)
    positive = {text for part in texts[::2] for text in part}
    assert len(positive) == n_own + n == len(every) / 2
    assert all(text.startswith("yes") or "of a," in text for text in positive)
    assert texts == quietly(concept, corpus, seed)


def test_pairs_stay_together_and_seeds_divide_differently():
    texts = quietly(own(50), None, 0)
    for positive, negative in zip(texts[::2], texts[1::2]):
        assert [text.split()[1] for text in positive] == [text.split()[1] for text in negative]
    assert [len(part) for part in texts] == [20, 20, 15, 15, 15, 15]
    assert texts != quietly(own(50), None, 1)


def test_other_labels_have_equal_shares_in_every_part():
    texts = quietly(Concept("label:a", label="a"), corpus_of(a=300, b=300, c=300, d=300), 0)
    for part in texts[1::2]:
        counts = [sum(f"of {label}," in text for text in part) for label in "bcd"]
        assert max(counts) - min(counts) <= 1
    assert sum(map(len, texts)) == 2 * LABEL_TEXTS


def test_a_document_that_comes_twice_is_used_once():
    corpus = corpus_of(a=40, b=40)
    doubled = LabelledTexts(corpus.texts * 2, corpus.labels * 2)
    every = [text for part in quietly(Concept("label:a", label="a"), doubled, 0) for text in part]
    assert len(every) == len(set(every)) == 80


def test_few_texts_warn_with_their_numbers_and_missing_ones_are_refused():
    with pytest.warns(UserWarning, match="to fit 4 and 4, for the classifier 3 and 3, held out 3 and 3"):
        concept_texts(own(10), None, 0)
    uneven = Concept("x", positive=tuple(f"p {i}" for i in range(100)), negative=tuple(f"n {i}" for i in range(60)))
    with pytest.warns(UserWarning, match="unequally many"):
        concept_texts(uneven, None, 0)
    with pytest.warns(UserWarning, match="60 and 60 texts are used alone"):
        concept_texts(own(60, label="a"), corpus_of(b=20), 0)
    with pytest.raises(InputError, match="no corpus was given"):
        concept_texts(Concept("label:a", label="a"), None, 0)
    with pytest.raises(InputError, match="has the labels b, c"):
        concept_texts(Concept("label:a", label="a"), corpus_of(b=20, c=20), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert concept_texts(Concept("x", words=("a",)), None, 0) == Texts([], [], [], [], [], [])
        concept_texts(own(54), None, 0)


def test_words_are_counted_per_thousand():
    scorer = target_score(Concept("x", words=("damn", "hell")), Texts([], [], [], [], [], []), 0)
    assert scorer.kind == "words"
    assert scorer.held_out_auroc is None
    np.testing.assert_allclose(scorer.score(["Damn it to hell", "damned", "", "no no no"]), [500, 0, 0, 0])
    texts = Texts([], [], [], [], ["damn", "damn it"], ["well", "damn it all"])
    # four pairs: 1000 and 500 against 0 and 333, all won
    assert target_score(Concept("x", words=("damn",)), texts, 0).held_out_auroc == 1.0


def test_classifier_learns_from_its_own_part_alone():
    def part(word: str, n: int) -> list[str]:
        return [f"the {word} number {i} was here" for i in range(n)]

    texts = Texts(part("wrong", 9), part("also", 9), part("cat", 30), part("dog", 30), ["a cat came", "two cat"], ["a dog came", "two dog"])
    scorer = target_score(own(2), texts, 0)
    assert scorer.kind == "classifier"
    assert scorer.held_out_auroc == 1.0
    assert "30 positive and 30 negative" in scorer.describe
    p = scorer.score(["cat", "dog", "wrong"])
    assert p[0] > 0.9 > 0.1 > p[1]
    other = target_score(own(2), texts._replace(fit_positive=["x"], fit_negative=["y"]), 0)
    np.testing.assert_array_equal(other.score(["cat", "dog", "wrong"]), p)
    assert scorer.score([]).shape == (0,)


def test_second_score_is_the_classifier_of_a_concept_with_words():
    texts = quietly(own(50), None, 0)
    assert second_score(own(50), texts, 0) is None
    second = second_score(own(50, words=("yes",)), texts, 0)
    assert second is not None
    assert second.kind == "classifier"
    assert second_score(Concept("x", words=("a",)), Texts([], [], [], [], [], []), 0) is None
    with pytest.raises(InputError, match="neither"):
        target_score(Concept("x", prompt_pairs=(("a", "b"),)), Texts([], [], [], [], [], []), 0)


def test_score_says_little_of_shuffled_labels_and_much_of_the_bundled_bible():
    lm = LanguageModel.load(str(DEMO), device="cpu")
    corpus = read_labelled_texts(TextConfig(text=(str(DEMO / "tokens.safetensors"),)), lm)
    assert len(corpus.texts) > 10_000
    assert max(map(len, corpus.texts)) <= LENGTH
    assert not any("<|" in text for text in corpus.texts)
    assert {"bible", "wine_reviews", "python_code"} <= set(corpus.labels)
    texts = concept_texts(load_concept("bible"), corpus, 0)
    second = second_score(load_concept("bible"), texts, 0)
    assert second is not None
    assert second.held_out_auroc > 0.9
    mixed = np.random.default_rng(0).permutation(texts.classifier_positive + texts.classifier_negative).tolist()
    half = len(mixed) // 2
    shuffled = second_score(load_concept("bible"), texts._replace(classifier_positive=mixed[:half], classifier_negative=mixed[half:]), 0)
    assert shuffled is not None
    assert 0.25 < shuffled.held_out_auroc < 0.75


def test_long_documents_are_cut_at_a_word_and_short_ones_left_out(tmp_path):
    documents = ["word " * 400, "too short", "x" * 1000, "  just long enough to be read  "]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": text, "kind": "k"}) for text in documents))
    lm = LanguageModel.load(str(DEMO), device="cpu")
    corpus = read_labelled_texts(TextConfig(text=(str(tmp_path / "c.jsonl"),), label_field="kind"), lm)
    assert corpus.labels == ["k", "k", "k"]
    assert corpus.texts == ["word " * 47 + "word", "x" * LENGTH, "just long enough to be read"]
