"""A concept's texts in parts that share none, with documents of its label, and a score that counts the concept in text."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from typing import Literal, NamedTuple

import numpy as np

from sae.activations.text.documents import TextConfig, documents
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.statistics import auroc
from steering.concept import Concept
from steering.directions.contrast import TINY
from steering.strength.measure import word_rate

SHARES = (0.4, 0.3)
"""shares of the texts for fitting directions and for training the classifier; the rest is held out"""
LABEL_TEXTS = 240
"""documents of a label, and as many of the others"""
LENGTH = 240
"""characters of a document that are read"""
NAMED = 20
"""labels that a sentence names"""
SHORTEST = 20
"""minimum number of characters of a document"""


class LabelledTexts(NamedTuple):
    """The beginnings of documents, one text each."""

    texts: list[str]
    labels: list[str | None]


class Texts(NamedTuple):
    """Six sets of texts; no text, no pair of a concept's file and no document is in two of the parts."""

    fit_positive: list[str]
    fit_negative: list[str]
    classifier_positive: list[str]
    classifier_negative: list[str]
    held_positive: list[str]
    held_negative: list[str]


@dataclass(frozen=True)
class TextScore:
    """How much of a concept is in a text."""

    kind: Literal["words", "classifier"]
    describe: str
    held_out_auroc: float | None
    """of the held-out texts; None if there are none"""
    score: Callable[[Sequence[str]], np.ndarray]
    """one number for each text, float64 [n]"""


def read_labelled_texts(config: TextConfig, lm: LanguageModel) -> LabelledTexts:
    """The first `LENGTH` characters, whole words, of each document that has `SHORTEST`; token ids are read by the model's tokenizer."""
    texts: list[str] = []
    labels: list[str | None] = []
    for content, label in documents(config):
        if not isinstance(content, str):
            content = lm.tokenizer.decode(content[:LENGTH].tolist(), skip_special_tokens=True)
        text = _beginning(content)
        if len(text) >= SHORTEST:
            texts.append(text)
            labels.append(label)
    return LabelledTexts(texts, labels)


def concept_texts(concept: Concept, corpus: LabelledTexts | None, seed: int) -> Texts:
    """The concept's own texts, and `LABEL_TEXTS` documents of its label against as many of the other labels, each in one of the parts.

    Own texts that are as many on both sides are divided in pairs, so that what a pair is about is not in two parts. The other labels
    have equal shares as far as their documents go. Warns when a set has under `TINY` texts or both sides are unequal; all sets are
    empty for a concept without texts and label. Raises `InputError` if the label is the only source and the corpus does not have it.
    """
    rng = np.random.default_rng(seed)
    parts: list[list[str]] = [[] for _ in Texts._fields]
    own = (list(concept.positive), list(concept.negative))
    orders = [rng.permutation(len(side)) for side in own]
    if len(own[0]) == len(own[1]):
        orders[1] = orders[0]
    sources = [[[side[i] for i in order] for side, order in zip(own, orders)]]
    if concept.label is not None:
        sources.append(_label_texts(concept, corpus, rng, set(chain(*own))))
    for source in sources:
        for side, texts in enumerate(source):
            ends = [*np.round(np.cumsum((0, *SHARES)) * len(texts)).astype(int).tolist(), len(texts)]
            for part in range(3):
                parts[2 * part + side] += texts[ends[part] : ends[part + 1]]
    _warn_if_few(concept, parts)
    return Texts(*parts)


def target_score(concept: Concept, texts: Texts, seed: int) -> TextScore:
    """Counts the concept's words if it has a list, else a classifier of its texts. Raises `InputError` if it has neither."""
    if concept.words:
        return word_score(concept, texts)
    if not (texts.classifier_positive and texts.classifier_negative):
        raise InputError(f"expected words or contrast texts to score {concept.name!r} by, found neither; add them to its file")
    return classifier_score(texts, seed)


def second_score(concept: Concept, texts: Texts, seed: int) -> TextScore | None:
    """The classifier of a concept whose target is its words, as a check beyond the list; None if there is no second score."""
    return classifier_score(texts, seed) if concept.words and texts.classifier_positive and texts.classifier_negative else None


def word_score(concept: Concept, texts: Texts) -> TextScore:
    """Listed words per 1,000 words of each text, 0 for a text without words."""

    def score(scored: Sequence[str]) -> np.ndarray:
        return np.array([1000 * word_rate([text], concept.words).rate for text in scored])

    describe = f"words per 1,000 that are among the {len(concept.words)} listed for {concept.name}"
    return TextScore("words", describe, _auroc(score, texts), score)


def classifier_score(texts: Texts, seed: int) -> TextScore:
    """Mean probability by logistic regression on tf-idf of words (1–2) and of characters within words (1–4), both sides weighted equally.

    It learns from the classifier's part alone, which no direction was fitted on.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    union = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True, min_df=2),
    )
    model = make_pipeline(union, LogisticRegression(C=10, max_iter=1000, class_weight="balanced", random_state=seed))
    positive, negative = texts.classifier_positive, texts.classifier_negative
    model.fit(positive + negative, [1] * len(positive) + [0] * len(negative))

    def score(scored: Sequence[str]) -> np.ndarray:
        return model.predict_proba(list(scored))[:, 1] if len(scored) else np.zeros(0)

    describe = f"probability by a bag-of-words classifier that learned from {len(positive)} positive and {len(negative)} negative texts"
    return TextScore("classifier", describe, _auroc(score, texts), score)


def _beginning(text: str) -> str:
    text = text.strip()
    if len(text) <= LENGTH:
        return text
    return text[: LENGTH + 1].rsplit(maxsplit=1)[0] if any(map(str.isspace, text[: LENGTH + 1])) else text[:LENGTH]


def _label_texts(concept: Concept, corpus: LabelledTexts | None, rng: np.random.Generator, taken: set[str]) -> list[list[str]]:
    """As many texts of the label as of the others, none of them twice; the others in turns, so that any stretch has all of them."""
    by_label: dict[str, list[str]] = {}
    for i in rng.permutation(len(corpus.texts)) if corpus else ():
        text, label = corpus.texts[i], corpus.labels[i]  # type: ignore[union-attr]
        if label is not None and text not in taken:
            taken.add(text)
            by_label.setdefault(label, []).append(text)
    positive = by_label.pop(concept.label or "", [])
    n = min(LABEL_TEXTS, len(positive), sum(map(len, by_label.values())))
    turns = zip_longest(*(by_label[label] for label in sorted(by_label)))
    negative = list(islice((text for turn in turns for text in turn if text is not None), n))
    if n == 0:
        named = ", ".join(sorted(by_label)[:NAMED]) + f" and {len(by_label) - NAMED:,} more" * (len(by_label) > NAMED)
        found = "no corpus was given" if corpus is None else f"the corpus has the labels {named or 'none'}"
        said = f"expected documents labelled {concept.label!r} and others for the concept {concept.name!r}, but {found}"
        if not concept.positive:
            raise InputError(f"{said}; name a corpus with labels that has it")
        warnings.warn(f"{said}: its own {len(concept.positive)} and {len(concept.negative)} texts are used alone", stacklevel=3)
    return [positive[:n], negative]


def _warn_if_few(concept: Concept, parts: list[list[str]]) -> None:
    sizes = [len(part) for part in parts]
    if not any(sizes):
        return
    unequal = any(a != b for a, b in zip(sizes[::2], sizes[1::2]))
    if min(sizes) < TINY or unequal:
        counts = ", ".join(
            f"{what} {a} and {b}" for what, a, b in zip(("to fit", "for the classifier", "held out"), sizes[::2], sizes[1::2])
        )
        said = "unequally many" if unequal else "few"
        warnings.warn(f"{said} texts of {concept.name}, positive and negative: {counts}; intervals will be wide", stacklevel=3)


def _auroc(score: Callable[[Sequence[str]], np.ndarray], texts: Texts) -> float | None:
    positive, negative = texts.held_positive, texts.held_negative
    if not positive or not negative:
        return None
    score_t = score(positive + negative)
    return float(auroc(score_t[: len(positive)], score_t[len(positive) :]))
