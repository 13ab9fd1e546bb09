"""Which features fire on a word, and which make it more likely.

f features · n tokens of the corpus · v vocabulary
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae.disk.arrays import front_to_back
from sae.errors import InputError
from sae.features.index.words import Occurrences, folded, occurrences, words_of

if TYPE_CHECKING:
    from sae.features.index.reader import FeatureIndex

BLOCK = 1 << 21  # activations looked at together: some 15 MB


class FiresOn(NamedTuple):
    """How well a feature marks the occurrences of a word."""

    feature: int
    score: float
    """harmonic mean of precision and recall (F1)"""
    precision: float
    """share of the feature's activation, summed over tokens, that falls on pieces of the word"""
    recall: float
    """share of the word's occurrences on which the feature fires at any piece"""
    last_piece: float
    """share of the activation on the word that falls on its last piece; 1 for words of one token"""
    occurrences: int
    """occurrences of the word in the scanned tokens, the same for every feature"""
    lens_rank: int | None
    """place of the word's first token among the tokens the feature promotes, from 1; None beyond the stored ones"""


class Promotes(NamedTuple):
    """How strongly a feature raises the logit of a word's first token."""

    feature: int
    value: float
    """of the logit lens (see index.json), for one unit of activation of the sign of the strongest one"""
    lens_rank: int
    token: int


def search(index: "FeatureIndex", query: str | Sequence[str], n: int = 20) -> list[FiresOn]:
    """The `n` features that fire best on a word, by F1; several words ("one|two" or a list) are taken as one set.

    Raises `InputError` when the word does not occur in the scanned tokens.
    """
    words = words_of(query)
    found = _scanned_occurrences(index, words)
    piece_of = np.full(len(index.tokens["ids"]), -1, np.int32)  # which occurrence a token belongs to
    pieces, starts = _pieces(found)
    piece_of[pieces] = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(pieces)))

    mass_f, last_f, hits_f = (np.zeros(index.d_sae) for _ in range(3))
    previous = (-1, -1)  # feature and occurrence of the last hit of the block before
    with front_to_back(index.positions):
        for low in range(0, len(index.positions), BLOCK):
            positions = index.positions[low : low + BLOCK]
            hit = np.flatnonzero(piece_of[positions] >= 0)
            if not len(hit):
                continue
            token = positions[hit]
            value = index.values[low : low + BLOCK][hit].astype(np.float64)
            feature = np.searchsorted(index.offsets, hit + low, "right") - 1
            occurrence = piece_of[token]
            mass_f += np.bincount(feature, value, index.d_sae)
            last_f += np.bincount(feature, value * (token == found.last[occurrence]), index.d_sae)
            new = (np.diff(feature, prepend=previous[0]) != 0) | (np.diff(occurrence, prepend=previous[1]) != 0)
            hits_f += np.bincount(feature[new], minlength=index.d_sae)
            previous = (int(feature[-1]), int(occurrence[-1]))

    precision = mass_f / np.maximum(index.columns["sum"], 1e-30)
    recall = hits_f / len(found.first)
    score = 2 * precision * recall / np.maximum(precision + recall, 1e-30)
    best = np.argsort(-score, kind="stable")[:n]
    best = best[score[best] > 0]
    ranks = _lens_ranks(index, best, np.unique(index.tokens["ids"][found.first]))
    return [
        FiresOn(
            j,
            float(score[j]),
            float(precision[j]),
            float(recall[j]),
            float(last_f[j] / max(mass_f[j], 1e-30)),
            len(found.first),
            rank or None,
        )
        for j, rank in zip(best.tolist(), ranks.tolist())
    ]


def promotes(index: "FeatureIndex", query: str | Sequence[str], n: int = 20) -> list[Promotes]:
    """The `n` features whose logit lens has a token of the word highest, by place and then by value.

    Tokens of a word are those of the vocabulary that spell it, in any case, with or without a space before; for a word of several
    tokens, the first pieces with which it occurs in the scanned text. Raises `InputError` when there is neither.
    """
    if not index.has_lens:
        raise InputError(
            f"{index.folder} has no logit lens ({index.info['logit_lens']}); search for features that fire on the word instead"
        )
    words = words_of(query)
    wanted = {folded(word) for word in words}
    texts = [folded(piece.decode("utf-8", "replace").strip()) for piece in index.vocabulary.pieces]
    tokens = [i for i, text in enumerate(texts) if text in wanted]
    in_pieces = [word for word in words if folded(word) not in texts]
    if in_pieces:
        try:
            tokens += index.tokens["ids"][_scanned_occurrences(index, in_pieces).first].tolist()
        except InputError:
            if not tokens:
                raise
    ids_fk, values_fk = index.lens(np.arange(index.d_sae))
    feature, place = np.nonzero(np.isin(ids_fk, tokens))
    first = np.r_[True, feature[1:] != feature[:-1]] if len(feature) else np.zeros(0, bool)
    feature, place = feature[first], place[first]
    value = values_fk[feature, place]
    best = np.lexsort((-value, place))[:n]
    ids = ids_fk[feature, place]
    return [Promotes(int(feature[i]), float(value[i]), int(place[i]) + 1, int(ids[i])) for i in best]


def _scanned_occurrences(index: "FeatureIndex", words: list[str]) -> Occurrences:
    """Occurrences of which at least one token was scanned; a feature cannot be seen to fire on the others."""
    tokens = index.tokens
    found = occurrences(words, tokens["ids"], tokens["sequence_starts"][:-1], index.vocabulary)
    pieces, starts = _pieces(found)
    kept = np.logical_or.reduceat(tokens["scanned"][pieces], starts) if len(starts) else np.zeros(0, bool)
    if not kept.any():
        raise InputError(
            f"{' or '.join(repr(w) for w in words)} does not occur as a whole word in the {index.info['tokens_scanned']:,} tokens "
            f"of {index.folder}; check the spelling, try another form of the word, or index more tokens"
        )
    return Occurrences(found.first[kept], found.last[kept])


def _pieces(found: Occurrences) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all occurrences one after another, and where each occurrence begins among them."""
    lengths = found.last - found.first + 1
    starts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(found.first - starts, lengths), starts


def _lens_ranks(index: "FeatureIndex", features: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Place of the first of the tokens in each feature's lens, from 1; 0 beyond the stored ones."""
    if not index.has_lens:
        return np.zeros(len(features), np.int64)
    among = np.isin(index.lens(features)[0], tokens)
    return np.where(among.any(1), among.argmax(1) + 1, 0)
