"""What is shown of a feature equals plain loops over all tokens, on random codes, documents and sequences."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.features.index import examples
from sae.features.index.examples import AFTER, BEFORE, BUCKET_SAMPLES, BUCKETS, NONE, PER_DOCUMENT, TOKENS, TOP, Text


@st.composite
def corpora(draw):
    """(dense [n, f] of float16 values, ids, sequence_starts, sequence_document); many values are equal, so that ties matter."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = rng.integers(1, draw(st.sampled_from([3, 40, 130])), draw(st.integers(1, 12)))
    n, f = int(lengths.sum()), draw(st.integers(1, 5))
    values = rng.integers(0, 12, (n, f)) * 10.0 ** rng.integers(-9, 4, f)
    values[rng.random((n, f)) > draw(st.floats(0, 1))] = 0
    documents = np.cumsum(rng.random(len(lengths)) < draw(st.floats(0, 1)))
    return values.astype(np.float16), rng.integers(0, 7, n), np.r_[0, np.cumsum(lengths)], documents


def columns_of(dense, fires):
    """The block of csc.py for a dense matrix; `fires` says where there is an entry, be its value rounded to 0."""
    feature, position = np.nonzero(fires.T)
    offsets = np.r_[0, np.cumsum(fires.sum(0))]
    return {"offsets": offsets, "positions": position.astype(np.uint32), "values": dense[position, feature]}


def greedy(column, fires, sequence, document):
    covered, used, chosen = set(), {}, []
    for p in sorted(np.flatnonzero(fires), key=lambda p: (-column[p], p)):
        window = {q for q in range(p - BEFORE, p + AFTER + 1) if 0 <= q < len(column) and sequence[q] == sequence[p]}
        if len(chosen) < TOP and not covered & window and used.get(document[p], 0) < PER_DOCUMENT:
            covered |= window
            used[document[p]] = used.get(document[p], 0) + 1
            chosen.append(int(p))
    return chosen


def scalar_hash(position, feature):
    x = (position << 24) ^ feature
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & (2**64 - 1)
    return x >> 32


@settings(max_examples=60, deadline=None)
@given(corpora(), st.integers(0, 1000))
def test_examples_equal_brute_force(corpus, begin):
    dense, ids, starts, documents = corpus
    fires = dense > 0
    block = columns_of(dense, fires)
    text = Text.of(ids, starts, documents)
    sequence = np.searchsorted(starts, np.arange(len(ids)), "right") - 1
    document = documents[sequence]
    shown = examples.examples(begin, block, text)
    reached = examples.reach(block, text)
    for j in range(dense.shape[1]):
        column = dense[:, j].astype(np.float64)
        places = np.flatnonzero(fires[:, j])
        top = shown["top_entries"][j]
        assert places[top[top != NONE]].tolist() == greedy(column, fires[:, j], sequence, document)
        assert reached["sequences"][j] == len(set(sequence[places]))
        assert reached["documents"][j] == len(set(document[places]))

        mass = np.bincount(ids, column, 7).astype(np.float32)
        order = [t for t in sorted(range(7), key=lambda t: (-mass[t], t)) if mass[t] > 0]
        assert shown["token_ids"][j].tolist() == (order + [-1] * TOKENS)[:TOKENS]
        np.testing.assert_allclose(shown["token_shares"][j][: len(order)], mass[order] / max(column.sum(), 1e-30), rtol=1e-6)

        edges = 2.0 ** (np.arange(161) / 4 - 24)
        np.testing.assert_array_equal(shown["histogram"][j], np.histogram(column[places], edges)[0])
        octaves = {p: math.floor(math.log2(column[p])) for p in places}
        for k in range(BUCKETS):
            octave = max(octaves.values(), default=0) - k
            inside = [p for p in places if (octaves[p] == octave if k < BUCKETS - 1 else octaves[p] <= octave)]
            inside.sort(key=lambda p: (scalar_hash(int(p), begin + j), p))
            entries = shown["bucket_entries"][j, k]
            assert places[entries[entries != NONE]].tolist() == inside[:BUCKET_SAMPLES]


def test_values_that_float16_rounds_to_zero_still_fire():
    fires = np.ones((100, 1), bool)
    shown = examples.examples(
        0, columns_of(np.zeros((100, 1), np.float16), fires), Text.of(np.zeros(100, int), np.array([0, 100]), np.zeros(1))
    )
    assert shown["top_entries"][0, :3].tolist() == [0, 41, NONE]
    assert shown["histogram"].sum() == 0
    assert shown["token_ids"][0, 0] == 0


def test_samples_of_an_octave_are_fair():
    """Of 200 features that fire on the same 1,000 tokens, every tenth of the tokens gives a tenth of the samples."""
    fires = np.ones((1000, 200), bool)
    block = columns_of(np.ones((1000, 200), np.float16), fires)
    shown = examples.examples(0, block, Text.of(np.zeros(1000, int), np.array([0, 1000]), np.zeros(1)))
    drawn = shown["bucket_entries"][:, 0].flatten()
    assert (shown["bucket_entries"][:, 1:] == NONE).all()
    np.testing.assert_allclose(np.histogram(drawn, 10, (0, 1000))[0] / 1000, 0.1, atol=0.04)  # standard error 0.0095


def test_a_dense_feature_of_which_nearly_all_candidates_are_passed_over():
    """400,000 activations, the strongest half in one document."""
    rng = np.random.default_rng(0)
    values = rng.random((400_000, 1)).astype(np.float16)
    values[:200_000] += np.float16(1)
    starts = np.arange(0, 400_001, 100)
    documents = np.maximum(np.arange(4000) - 1999, 0)  # the first half is one document, then each sequence its own
    shown = examples.examples(0, columns_of(values, values > 0), Text.of(np.zeros(400_000, int), starts, documents))
    top = np.flatnonzero(values[:, 0] > 0)[shown["top_entries"][0]]
    assert (top < 200_000).sum() == PER_DOCUMENT
    assert len(set(top)) == TOP
    assert (np.diff(values[top, 0].astype(np.float64)) <= 0).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 6))
def test_smallest_equals_sorting(seed, groups, k):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 60))
    group, score = rng.integers(0, groups, n), rng.integers(0, 5, n).astype(np.uint32) * np.uint32(2**29)
    found = examples.smallest(group, groups, score, k)
    for g in range(groups):
        expected = sorted(np.flatnonzero(group == g), key=lambda i: (score[i], i))[:k]
        assert found[g].tolist() == expected + [-1] * (k - len(expected))


def test_features_by_token_stand_strongest_first():
    ids = np.array([[3, 0, -1], [3, -1, -1], [-1, -1, -1], [0, 3, 1]], np.int32)
    shares = np.array([[0.5, 0.2, 0], [0.9, 0, 0], [0, 0, 0], [0.2, 0.5, 0.1]], np.float32)
    found = examples.by_top_token(ids, shares)
    lists = [
        list(zip(found["features"][a:b].tolist(), found["shares"][a:b].round(3).tolist()))
        for a, b in zip(found["offsets"][:-1], found["offsets"][1:])
    ]
    assert [[(j, round(s, 3)) for j, s in one] for one in lists] == [[(0, 0.2), (3, 0.2)], [(3, 0.1)], [], [(1, 0.9), (0, 0.5), (3, 0.5)]]
