"""Search finds planted features, and its scores are those of a brute-force count."""

import numpy as np
import pytest
import torch
from feature_world import VOCABULARY, save_dictionary

import sae.features.index.search as search_module
from sae.errors import InputError
from sae.features.index.build import IndexConfig, build_index
from sae.features.index.reader import FeatureIndex
from sae.features.index.words import occurrences


def piece_mask(index, words):
    """Tokens of the words, and the occurrence each belongs to."""
    found = occurrences(words, index.tokens["ids"], index.tokens["sequence_starts"][:-1], index.vocabulary)
    return [range(first, last + 1) for first, last in zip(found.first.tolist(), found.last.tolist())]


@pytest.mark.parametrize("block", [7, 1 << 24])
@pytest.mark.parametrize("query", ["zebrafly", "привет|мир", "done"])
def test_scores_equal_brute_force(world, dense, monkeypatch, query, block):
    monkeypatch.setattr(search_module, "BLOCK", block)
    index = world.index
    spans = piece_mask(index, query.split("|"))
    pieces = np.concatenate([list(span) for span in spans])
    hits = {hit.feature: hit for hit in index.search(query, n=40)}
    for j in range(40):
        mass, total = dense[pieces, j].sum(dtype=np.float64), dense[:, j].sum(dtype=np.float64)
        if mass == 0:
            assert j not in hits
            continue
        precision = mass / total
        recall = np.mean([dense[list(span), j].any() for span in spans])
        assert hits[j].precision == pytest.approx(precision, rel=1e-9)
        assert hits[j].recall == pytest.approx(recall, rel=1e-9)
        assert hits[j].score == pytest.approx(2 * precision * recall / (precision + recall), rel=1e-9)
        assert hits[j].last_piece == pytest.approx(dense[[span[-1] for span in spans], j].sum() / mass, rel=1e-6)
        assert hits[j].occurrences == len(spans)
    scores = [hit.score for hit in hits.values()]
    assert scores == sorted(scores, reverse=True)


@pytest.fixture(scope="module")
def planted(world, tmp_path_factory) -> FeatureIndex:
    """Feature 11 fires on the last piece of "zebrafly" (the letters y), feature 5 on every token, the others on random ones."""
    folder = tmp_path_factory.mktemp("planted")
    tokens = world.index.tokens
    found = occurrences(["zebrafly"], tokens["ids"], tokens["sequence_starts"][:-1], world.index.vocabulary)
    last = np.unique(tokens["ids"][found.last])
    rng = np.random.default_rng(1)
    W_enc_fd = torch.from_numpy((rng.random((16, VOCABULARY)) < 0.03).astype(np.float32))
    W_enc_fd[5], W_enc_fd[11] = 1.0, 0.0
    W_enc_fd[:, last] = 0.0
    W_enc_fd[5, last] = W_enc_fd[11, last] = 3.0
    save_dictionary(folder / "dictionary", W_enc_fd, torch.zeros(16), world.cache)
    build_index(IndexConfig(cache=world.cache, dictionary=folder / "dictionary", out=folder / "index", device="cpu"))
    return FeatureIndex.open(folder / "index")


@pytest.mark.parametrize("query", ["zebrafly", "ZebraFly", ["zebrafly", "nothinglikeit"]])
def test_a_planted_feature_is_found_first(planted, query):
    best = planted.search(query)[0]
    assert best.feature == 11
    assert best.recall == 1.0
    assert best.last_piece == 1.0


def test_promotes_finds_features_by_their_lens(world):
    index = world.index
    token = int(index.columns["top_token_ids"][9, 0])
    word = index.vocabulary.spelling(token).strip()
    hits = index.promotes(word, 40)
    expected = {}
    texts = [piece.decode("utf-8", "replace").strip().casefold() for piece in index.vocabulary.pieces]
    for j in range(40):
        places = [k for k, t in enumerate(index.columns["top_token_ids"][j]) if texts[t] == word.casefold()]
        if places:
            expected[j] = places[0] + 1
    assert {hit.feature: hit.lens_rank for hit in hits} == expected
    assert [hit.lens_rank for hit in hits] == sorted(expected.values())
    assert 9 in [hit.feature for hit in hits if hit.lens_rank == 1]


def test_promotes_of_several_words_is_their_union(world):
    index = world.index
    token = int(index.columns["top_token_ids"][9, 0])
    word = index.vocabulary.spelling(token).strip()
    alone = [{hit.feature for hit in index.promotes(query, 40)} for query in (word, "zebrafly")]  # the second is of several tokens
    assert {hit.feature for hit in index.promotes(f"{word}|zebrafly", 40)} == alone[0] | alone[1]
    assert {hit.feature for hit in index.promotes(f"{word}|quokka", 40)} == alone[0]


@pytest.mark.parametrize("method", ["search", "promotes"])
def test_a_word_that_never_occurs_is_said_so(world, method):
    with pytest.raises(InputError, match="'quokka' does not occur as a whole word"):
        getattr(world.index, method)("quokka")
