"""Look-ups and patterns: rules that are known are found, held-out documents teach nothing, and all equals brute force."""

from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import RULES, by_rules, index_of, texts

from sae.errors import InputError
from sae.features.explanations.lookups import (
    KEEP,
    LEVELS,
    MIN_FIRINGS,
    Rule,
    bigram_lookup,
    divide,
    pattern_lookup,
    read_scanned_text,
    rules_text,
    token_lookup,
)
from sae.model.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def index():
    return by_rules(texts())


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("token_c", 'fires on "c" (100 % of activation)'),
        ("a_star_c", 'fires on the end of "a *c" (100 % of activation)'),
        ("first", 'fires after "<s>" (100 % of activation)'),
        ("after_a", 'fires after "a" (100 % of activation)'),
        ("never", "no rule found"),
    ],
)
def test_known_rules_are_found_and_predict_every_held_out_token(index, rule, text):
    corpus = read_scanned_text(index, 0.3, 0)
    learn, held = corpus.firing(index, [r.__name__ for r in RULES].index(rule))
    rules, prediction = pattern_lookup(corpus, learn)
    assert rules_text(rules, index.vocabulary) == text
    assert sorted(prediction.rows) == sorted(held.rows)
    assert prediction.fires.all()


def test_first_position_of_sequences_without_a_beginning_token():
    sequences = [s[1:] for s in texts()]
    index = index_of(sequences, [np.array([float(i == 0) for s in sequences for i in range(len(s))])])
    corpus = read_scanned_text(index, 0.3, 0)
    learn, held = corpus.firing(index, 0)
    rules, prediction = pattern_lookup(corpus, learn)
    assert rules_text(rules, index.vocabulary) == 'fires after "⟨start⟩" (100 % of activation)'
    assert sorted(prediction.rows) == sorted(held.rows)


@pytest.mark.parametrize("lookup", [token_lookup, bigram_lookup, pattern_lookup])
def test_nothing_is_learned_from_held_out_documents(index, lookup):
    corpus = read_scanned_text(index, 0.3, 0)
    assert not set(corpus.document_n[corpus.held_n]) & set(corpus.document_n[~corpus.held_n])
    held_tokens = np.zeros(len(index.tokens["ids"]), bool)
    held_tokens[corpus.positions[corpus.held_n]] = True
    sequences = texts()
    true = np.array([rule(s, i) for rule in RULES for s in sequences for i in range(len(s))]).reshape(len(RULES), -1)
    noise = np.random.default_rng(1).uniform(1, 9, true.shape) * (np.random.default_rng(2).random(true.shape) < 0.3)
    other = index_of(sequences, list(np.where(held_tokens, noise, true)))
    other_corpus = read_scanned_text(other, 0.3, 0)
    for j in range(len(RULES)):
        rules, prediction = lookup(corpus, corpus.firing(index, j)[0])
        rules_too, prediction_too = lookup(other_corpus, other_corpus.firing(other, j)[0])
        assert rules == rules_too
        for a, b in zip(prediction, prediction_too):
            np.testing.assert_array_equal(a, b)


def test_documents_of_several_sequences_are_not_parted():
    sequences = texts(40)
    index = index_of(sequences, [np.ones(sum(map(len, sequences)))], documents=[i // 4 for i in range(40)])
    corpus = read_scanned_text(index, 0.5, 3)
    assert len(set(corpus.document_n[corpus.held_n])) == 5
    assert not set(corpus.document_n[corpus.held_n]) & set(corpus.document_n[~corpus.held_n])


def test_division_of_too_few_documents_or_a_share_outside_is_refused():
    with pytest.raises(InputError, match="at least 2 documents"):
        divide(np.zeros(5, int), 0.3, 0)
    with pytest.raises(InputError, match="between 0 and 1"):
        divide(np.arange(5), 1.0, 0)
    assert len(divide(np.arange(2), 0.01, 0)) == len(divide(np.arange(2), 0.99, 0)) == 1


@st.composite
def worlds(draw):
    """Few letters and short texts, so that contexts repeat; activations by chance, more likely on some tokens."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    letters, n = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    sequences = [[0] * int(rng.integers(0, 2)) + rng.integers(1, letters + 1, rng.integers(1, 25)).tolist() for _ in range(n)]
    ids = np.concatenate([np.array(s) for s in sequences])
    chance = np.where(ids == 1, draw(st.sampled_from([0.2, 0.7, 1.0])), draw(st.sampled_from([0.0, 0.1])))
    return index_of(sequences, [(rng.random(len(ids)) < chance) * rng.integers(1, 5, len(ids)).astype(float)])


def rows_by_hand(index, corpus):
    """(context tokens of offsets 0 to 8, activation, held out) of every scanned token, by plain loops."""
    starts, ids = index.tokens["sequence_starts"].tolist(), index.tokens["ids"].tolist()
    acts = dict(zip(index.positions.tolist(), index.values.tolist()))
    held = set(corpus.document_n[corpus.held_n].tolist())
    rows = []
    for s, (start, end) in enumerate(pairwise(starts)):
        for p in range(start, end):
            if ids[p] != 0:
                context = [ids[p - d] if p - d >= start else -1 for d in range(9)]
                rows.append((context, acts.get(p, 0.0), int(index.tokens["sequence_document"][s]) in held))
    return rows


def table(rows, shape):
    """Per key of a shape: sum, firings and occurrences in the documents learned from."""
    cells: dict[tuple, list[float]] = defaultdict(lambda: [0.0, 0, 0])
    for context, a, held in rows:
        if not held:
            cell = cells[tuple(context[d] for d in shape)]
            cell[0] += a
            cell[1] += a > 0
            cell[2] += 1
    return cells


@settings(max_examples=60, deadline=None)
@given(worlds())
def test_lookups_equal_brute_force(index):
    corpus = read_scanned_text(index, 0.4, 0)
    learn, _ = corpus.firing(index, 0)
    rows = rows_by_hand(index, corpus)
    unigrams, bigrams = table(rows, (0,)), table(rows, (0, 1))
    token, bigram = token_lookup(corpus, learn).prediction, bigram_lookup(corpus, learn).prediction
    by_token, by_bigram = np.zeros(len(rows)), np.zeros(len(rows))
    by_token[token.rows], by_bigram[bigram.rows] = token.values, bigram.values
    for i, (context, _, held) in enumerate(rows):
        total, _, seen = unigrams[(context[0],)]
        back = total / (seen + 1)
        total, _, seen = bigrams[tuple(context[:2])]
        assert by_token[i] == pytest.approx(back if held else 0)
        assert by_bigram[i] == pytest.approx((total + back) / (seen + 1) if held else 0)


@settings(max_examples=60, deadline=None)
@given(worlds())
def test_patterns_equal_brute_force(index):
    corpus = read_scanned_text(index, 0.4, 0)
    learn, _ = corpus.firing(index, 0)
    rows = rows_by_hand(index, corpus)
    tables = {shape: table(rows, shape) for level in LEVELS for shape in level}
    patterns: dict[tuple, float] = {}
    for context, a, held in rows:
        if held or a == 0:
            continue
        for level in LEVELS:
            best, chosen = 0.0, None
            for shape in level:
                key = tuple(context[d] for d in shape)
                total, fired, seen = tables[shape][key]
                others = (total - a) / seen
                if others > best and others >= KEEP * a and fired >= MIN_FIRINGS and fired >= KEEP * (seen + 1):
                    best, chosen = others, (shape, key, total / (seen + 1))
            if chosen:
                patterns[chosen[:2]] = chosen[2]
                break
    prediction = pattern_lookup(corpus, learn).prediction
    mine = dict(zip(prediction.rows.tolist(), prediction.values.tolist()))
    for i, (context, _, held) in enumerate(rows):
        matching = [v for (shape, key), v in patterns.items() if held and tuple(context[d] for d in shape) == key]
        assert mine.get(i, 0) == pytest.approx(max(matching, default=0))
        assert (i in mine) == bool(matching)


def test_text_is_plain_and_holds_nothing_that_steers():
    vocabulary = Vocabulary([b"<script>", "\u202e".encode(), b"\n", b'"', b"*", b"\xf0\x9f", b"\xa6\x93", b" of"], np.zeros(8, bool))
    rules = [Rule((t,), 0.1) for t in range(5)] + [Rule((5, 6), 0.2), Rule((7, None, 7), 0.1), Rule((7, None, None), 0.001)]
    text = rules_text(rules, vocabulary)
    assert text == (
        'fires on "<script>", "\\u202e", "\\n", "\\"", "\\*" (50 % of activation); on the end of "🦓", " of * of" (30 %); '
        'after " of *" (under 1 %)'
    )
    assert text.isprintable()
    assert rules_text([Rule((7,), 0.1)] * 8, vocabulary).endswith('" of" and 2 more (80 % of activation)')
