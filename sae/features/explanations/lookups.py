"""What fires a feature, learned from its stored activations: a token, a token after another, or a pattern of tokens with wildcards.

n scanned tokens ("rows"), in the order of the corpus · g groups: rows with the same tokens at a shape's offsets · k rows of a prediction

A *shape* is a set of offsets back from the row: (0,) is the token itself, (0, 2) the token and the one two before it (" a * c"), (1,)
any token that follows a given one. Every row belongs to one group of every shape, so that a token, a bigram and a pattern are all groups.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sae.errors import InputError
from sae.features.index.reader import FeatureIndex
from sae.model.vocabulary import Vocabulary

TOKEN, BIGRAM = (0,), (0, 1)
LEVELS: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((0,), (1,), (2,)),
    ((0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 6), (0, 7), (0, 8), (1, 2)),
    ((0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)),
)
"""Shapes of patterns, shortest first; 4 bytes of memory per scanned token for each."""
KEEP = 0.5
"""A pattern must keep this share of an example's activation at its other occurrences, and fire on this share of all of them."""
MIN_FIRINGS = 3
"""Occurrences in the learning documents on which a pattern must have fired."""
LISTED = 6
"""Rules of one kind written out in an explanation's text."""


class FiringRows(NamedTuple):
    """A feature's non-zero activations in one part of the documents."""

    rows: np.ndarray
    values: np.ndarray
    """float64"""


class Prediction(NamedTuple):
    """Activations that an explanation predicts for held-out rows; every other held-out row is predicted 0."""

    rows: np.ndarray
    """[k], each once"""
    values: np.ndarray
    """predicted activation, float64 [k]"""
    fires: np.ndarray
    """bool [k]: predicted to fire"""


class Rule(NamedTuple):
    """Tokens on which a feature fires, according to an explanation."""

    tokens: tuple[int | None, ...]
    """oldest first, the firing token last; None for any token, -1 for before the text begins"""
    share: float
    """of the feature's activation in the learning documents"""


class Patterns(NamedTuple):
    """The chosen patterns of one shape."""

    shape: tuple[int, ...]
    groups: np.ndarray
    value: np.ndarray
    """the activation that each pattern predicts"""
    explains: np.ndarray
    """the activation of the learning documents that each pattern covers first"""


class Explained(NamedTuple):
    rules: list[Rule]
    """strongest first"""
    prediction: Prediction


@dataclass
class Shape:
    """The groups of one shape."""

    group_n: np.ndarray
    """group of every row, int32 [n]"""
    learn_g: np.ndarray
    """rows of each group in the learning documents, firing or not, int64 [g]"""
    held: np.ndarray
    """held-out rows, group after group"""
    held_starts: np.ndarray
    """offsets into `held`, [g + 1]"""

    def held_rows(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Held-out rows of `groups`, one group after another, and how many each has."""
        counts = self.held_starts[groups + 1] - self.held_starts[groups]
        return self.held[spans(self.held_starts[groups], counts)], counts


@dataclass
class ScannedText:
    """The scanned tokens of an index, their documents divided into learning and held-out ones."""

    positions: np.ndarray
    """token in the corpus of every row, int64 [n]"""
    row_of: np.ndarray
    """row of every token of the corpus, int32; -1 if it was not scanned"""
    document_n: np.ndarray
    """document of every row, [n]"""
    held_n: np.ndarray
    """bool [n]: rows of held-out documents"""
    context: list[np.ndarray]
    """tokens at offset 0, 1, ... before every row, int64 [n] each; -1 before its sequence begins"""
    shapes: dict[tuple[int, ...], Shape]

    def firing(self, index: FeatureIndex, j: int) -> tuple[FiringRows, FiringRows]:
        """The feature's activations in the learning documents, and in the held-out ones."""
        feature = index.feature(j)
        rows, values = self.row_of[feature.positions], feature.values.astype(np.float64)
        held = self.held_n[rows]
        return FiringRows(rows[~held], values[~held]), FiringRows(rows[held], values[held])


def divide(documents: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The held-out ones of `documents`: a random `share` of them, at least one, never all. Raises `InputError` for fewer than two."""
    documents = np.unique(documents)
    if not 0 < share < 1:
        raise InputError(f"expected --held-out between 0 and 1, but got {share}")
    if len(documents) < 2:
        raise InputError(f"expected at least 2 documents, some to learn from and some to test on, but the index has {len(documents)}")
    n = min(max(round(share * len(documents)), 1), len(documents) - 1)
    return np.sort(np.random.default_rng(seed).permutation(documents)[:n])


def read_scanned_text(index: FeatureIndex, share: float, seed: int) -> ScannedText:
    """Divides the index's documents and groups its scanned tokens by the tokens before them; raises `InputError` as `divide`."""
    tokens = index.tokens
    ids, starts = np.asarray(tokens["ids"], np.int64), np.asarray(tokens["sequence_starts"])
    positions = np.flatnonzero(tokens["scanned"])
    sequence = np.searchsorted(starts, positions, "right") - 1
    document_n = np.asarray(tokens["sequence_document"], np.int64)[sequence]
    held_n = np.isin(document_n, divide(document_n, share, seed))
    row_of = np.full(len(ids), -1, np.int32 if len(ids) < 1 << 31 else np.int64)
    row_of[positions] = np.arange(len(positions))
    longest = max(offset for level in LEVELS for shape in level for offset in shape)
    context = [np.where(positions - d >= starts[sequence], ids[np.maximum(positions - d, 0)], -1) for d in range(longest + 1)]
    shapes = {shape: group_rows(shape, context, held_n) for level in LEVELS for shape in level}
    return ScannedText(positions, row_of, document_n, held_n, context, shapes)


def group_rows(shape: tuple[int, ...], context: list[np.ndarray], held_n: np.ndarray) -> Shape:
    """Groups are numbered in the order of their tokens, that of the first offset first."""
    width = max(int(column.max(initial=0)) for column in context) + 2  # tokens from -1
    group_n = np.zeros(len(held_n), np.int64)
    for offset in shape:
        group_n = np.unique(group_n * width + context[offset] + 1, return_inverse=True)[1]
    n_groups = int(group_n.max(initial=-1)) + 1
    held = np.flatnonzero(held_n)
    order = np.argsort(group_n[held], kind="stable")
    held_starts = np.r_[0, np.cumsum(np.bincount(group_n[held], minlength=n_groups))]
    return Shape(group_n.astype(np.int32), np.bincount(group_n[~held_n], minlength=n_groups), held[order], held_starts)


def spans(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (counts[0] of them), then those from starts[1], and so on."""
    return np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)


def token_lookup(corpus: ScannedText, learn: FiringRows) -> Explained:
    """Predicts E[activation | token], as if every token had been seen once more without the feature (a token seen once proves little).

    Firing is predicted for tokens whose firing rate reaches the cut with the best F1 on the learning documents, each of their rows
    judged by the rate of the others.
    """
    shape = corpus.shapes[TOKEN]
    groups, inverse = np.unique(shape.group_n[learn.rows], return_inverse=True)
    mass, hits, seen = np.bincount(inverse, learn.values), np.bincount(inverse), shape.learn_g[groups]
    rate = hits / (seen + 1)
    cut = best_cut(np.r_[(hits - 1) / seen, hits / seen], np.r_[hits, 0 * hits], np.r_[hits, seen - hits])
    rows, counts = shape.held_rows(groups)
    prediction = Prediction(rows, np.repeat(mass / (seen + 1), counts), np.repeat(rate >= cut, counts))
    return Explained(_rules(corpus, TOKEN, groups, mass, rate >= cut, learn), prediction)


def bigram_lookup(corpus: ScannedText, learn: FiringRows) -> Explained:
    """Predicts E[activation | token before, token], as if every bigram had been seen once more with what `token_lookup` predicts.

    A bigram never seen thus falls back to its token. The cut is chosen as in `token_lookup`.
    """
    token, bigram = corpus.shapes[TOKEN], corpus.shapes[BIGRAM]
    groups, inverse = np.unique(token.group_n[learn.rows], return_inverse=True)
    mass, hits, seen = np.bincount(inverse, learn.values), np.bincount(inverse), token.learn_g[groups]
    group_of = bigram.group_n[learn.rows]
    mass_g = np.bincount(group_of, learn.values, len(bigram.learn_g))
    hits_g = np.bincount(group_of, minlength=len(bigram.learn_g))

    token_of_g = np.zeros(len(bigram.learn_g), np.int32)
    token_of_g[bigram.group_n] = token.group_n  # ascending, as groups are numbered by their token first
    first, last = np.searchsorted(token_of_g, groups), np.searchsorted(token_of_g, groups, "right")
    of, back = spans(first, last - first), np.repeat(np.arange(len(groups)), last - first)
    of, back = of[bigram.learn_g[of] > 0], back[bigram.learn_g[of] > 0]
    fired, occurred = hits_g[of], bigram.learn_g[of]
    if_fired, if_silent = (fired - 1 + ((hits - 1) / seen)[back]) / occurred, (fired + (hits / seen)[back]) / occurred
    cut = best_cut(np.r_[if_fired, if_silent], np.r_[fired, 0 * fired], np.r_[fired, occurred - fired])

    rows, counts = token.held_rows(groups)
    at, more = bigram.group_n[rows], bigram.learn_g[bigram.group_n[rows]] + 1
    values = (mass_g[at] + np.repeat(mass / (seen + 1), counts)) / more
    rates = (hits_g[at] + np.repeat(hits / (seen + 1), counts)) / more
    rate = (fired + (hits / (seen + 1))[back]) / (occurred + 1)
    return Explained(_rules(corpus, BIGRAM, of, mass_g[of], rate >= cut, learn), Prediction(rows, values, rates >= cut))


def best_cut(rate: np.ndarray, positives: np.ndarray, total: np.ndarray) -> float:
    """The firing rate above which firing is predicted, for the best F1; groups of `total` rows have `positives` firing ones. 0.5 if none
    helps."""
    order = np.argsort(-rate, kind="stable")
    rate = rate[order]
    f1 = 2 * np.cumsum(positives[order]) / np.maximum(np.cumsum(total[order]) + positives.sum(), 1)
    f1[:-1][rate[1:] == rate[:-1]] = 0  # groups of one rate stand or fall together
    best = int(f1.argmax()) if len(f1) else 0
    return float(rate[best]) if len(f1) and f1[best] > 0 else 0.5


def pattern_lookup(corpus: ScannedText, learn: FiringRows) -> Explained:
    """The shortest patterns that keep half of the activation, in the manner of N2G (Foote et al. 2023), learned from the corpus itself.

    For every token on which the feature fired: the shape with the fewest tokens whose group, at its *other* occurrences, keeps `KEEP` of
    the activation on average (rows where the feature is silent count as 0), fires on `KEEP` of them and has fired `MIN_FIRINGS` times.
    Among such shapes of a level, the one that keeps most. N2G edits the text and asks the model; here the corpus holds the edits.
    Predicted is the mean activation of the strongest pattern that matches; firing is predicted wherever one does.
    """
    rest = np.arange(len(learn.rows))
    found: list[Patterns] = []
    for level in LEVELS:
        best, chosen, groups_of = np.zeros(len(rest)), np.full(len(rest), -1), []
        for i, shape in enumerate(level):
            groups, inverse = np.unique(corpus.shapes[shape].group_n[learn.rows], return_inverse=True)
            mass, hits, seen = np.bincount(inverse, learn.values), np.bincount(inverse), corpus.shapes[shape].learn_g[groups]
            groups_of.append((groups, inverse[rest], mass / (seen + 1)))
            others = ((mass[inverse] - learn.values) / seen[inverse])[rest]  # one more silent occurrence, as in the look-ups
            others[((hits < MIN_FIRINGS) | (hits < KEEP * (seen + 1)))[inverse[rest]]] = 0
            better = (others > best) & (others >= KEEP * learn.values[rest])
            best[better], chosen[better] = others[better], i
        for i, shape in enumerate(level):
            groups, inverse, value = groups_of[i]
            explains = np.bincount(inverse[chosen == i], learn.values[rest[chosen == i]], len(groups))
            kept = np.unique(inverse[chosen == i])
            found.append(Patterns(shape, groups[kept], value[kept], explains[kept]))
        rest = rest[chosen < 0]
    rules = [rule for p in found for rule in _rules(corpus, p.shape, p.groups, p.explains, p.explains > 0, learn)]
    matches = [corpus.shapes[p.shape].held_rows(p.groups) for p in found]
    rows = np.concatenate([rows for rows, _ in matches])
    values = np.concatenate([np.repeat(p.value, counts) for p, (_, counts) in zip(found, matches)])
    order = np.lexsort((-values, rows))
    order = order[np.diff(rows[order], prepend=-1) > 0]
    return Explained(sorted(rules, key=lambda rule: -rule.share), Prediction(rows[order], values[order], np.ones(len(order), bool)))


def _rules(corpus: ScannedText, shape: tuple, groups: np.ndarray, mass: np.ndarray, kept: np.ndarray, learn: FiringRows) -> list[Rule]:
    """The kept groups that fired, strongest first."""
    kept = kept & (mass > 0)
    order = np.argsort(-mass[kept], kind="stable")
    groups, share = groups[kept][order], mass[kept][order] / max(learn.values.sum(), 1e-30)
    group_of = corpus.shapes[shape].group_n[learn.rows]
    uniq, example = np.unique(group_of, return_index=True)
    rows = learn.rows[example[np.searchsorted(uniq, groups)]]
    tokens = [[int(t) for t in corpus.context[d][rows]] if d in shape else [None] * len(rows) for d in range(max(shape), -1, -1)]
    return [Rule(spelled, float(s)) for spelled, s in zip(zip(*tokens), share)]


def rules_text(rules: list[Rule], vocabulary: Vocabulary) -> str:
    """One line of plain text: `fires on " fuck", " shit" (93 % of activation); after " the" (2 %)`. Not HTML: escape it there."""
    kinds = {
        "on": [rule for rule in rules if len(rule.tokens) == 1],
        "on the end of": [rule for rule in rules if len(rule.tokens) > 1 and rule.tokens[-1] is not None],
        "after": [rule for rule in rules if rule.tokens[-1] is None],
    }
    parts: list[str] = []
    for words, some in sorted(kinds.items(), key=lambda kind: -sum(rule.share for rule in kind[1])):
        if some:
            listed = ", ".join(_spell(rule.tokens, vocabulary) for rule in some[:LISTED])
            more = f" and {len(some) - LISTED:,} more" if len(some) > LISTED else ""
            unit = " of activation" if not parts else ""
            share = sum(rule.share for rule in some)
            percent = f"{100 * share:.0f} %" if share >= 0.005 else "under 1 %"
            parts.append(f"{words} {listed}{more} ({percent}{unit})")
    return "fires " + "; ".join(parts) if parts else "no rule found"


def _spell(tokens: tuple[int | None, ...], vocabulary: Vocabulary) -> str:
    """Quoted text of the tokens: `*` for any token, other marks escaped with a backslash, nothing that could steer a terminal or page."""
    tokens = tokens[:-1] if tokens[-1] is None else tokens
    text, run = "", b""
    for token in [*tokens, None]:
        if token is not None and token >= 0:
            run += vocabulary.pieces[token]
            continue
        text += "".join(_visible(c) for c in run.decode("utf-8", "backslashreplace"))
        text, run = text + ("⟨start⟩" if token == -1 else " *"), b""
    return f'"{text[:-2]}"'


def _visible(character: str) -> str:
    if character in '*"':
        return "\\" + character
    return character if character.isprintable() else character.encode("unicode_escape").decode()
