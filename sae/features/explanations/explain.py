"""Explanations of features, and how well each predicts the feature's activations on documents that it was not learned from.

n scanned tokens · d held-out documents · r bootstrap draws

Token look-up, bigram look-up and patterns (lookups.py) need neither model nor network. A model behind an OpenAI-compatible endpoint can
write explanations too (judge.py); nothing is sent without `--endpoint`. All stand in `explanations.jsonl` in the index's folder.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae.disk.arrays import EXPLANATIONS
from sae.disk.places import require_file
from sae.disk.writing import only_writer
from sae.errors import InputError
from sae.features.explanations.explanation import METHODS, Explanation, write_explanations
from sae.features.explanations.lookups import (
    Explained,
    FiringRows,
    Prediction,
    ScannedText,
    bigram_lookup,
    pattern_lookup,
    read_scanned_text,
    rules_text,
    token_lookup,
)
from sae.features.index.reader import FeatureIndex
from sae.progress import progress
from sae.statistics import percentile_interval, ratio, resamples

LOOKUPS: dict[str, Callable[[ScannedText, FiringRows], Explained]] = dict(
    zip(METHODS, (token_lookup, bigram_lookup, pattern_lookup), strict=True)
)
DRAWS = 200
"""Bootstrap draws of the held-out documents behind an interval."""


@dataclass(kw_only=True)
class ExplainConfig:
    index: Path
    """Folder that `sae index` wrote; explanations.jsonl is written into it."""
    features: tuple[int, ...] = ()
    """Features to explain. Default: all."""
    sample: int | None = None
    """Explain this many features, drawn at random from those that fire."""
    held_out: float = 0.3
    """Share of the documents kept for testing; nothing is learned from them."""
    seed: int = 0
    """Decides which documents are held out, and whatever else is drawn."""
    endpoint: str | None = None
    """Let a model write explanations: base URL of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1."""
    judge_model: str | None = None
    """Model to ask there."""
    key_variable: str | None = None
    """Environment variable that holds the endpoint's key. Default: no key is sent."""


def explain(config: ExplainConfig) -> Path:
    """Explains features and writes explanations.jsonl; lines of other features and methods in it are kept. Gives its path.

    Raises `InputError` for a feature that does not exist, or flags that do not go together.
    """
    if config.features and config.sample is not None:
        raise InputError("expected --features or --sample, but got both")
    if config.endpoint is None and (config.judge_model is not None or config.key_variable is not None):
        raise InputError("--judge-model and --key-variable belong to --endpoint, which was not given; add it or leave them out")
    index = FeatureIndex.open(config.index, verify=True)
    require_file(config.index / EXPLANATIONS)
    features = choose(index, config)
    corpus = read_scanned_text(index, config.held_out, config.seed)
    with only_writer(config.index):
        if config.endpoint is None:
            new = explain_by_lookup(index, corpus, features, config.seed)
            print(lookup_summary(new))
        else:
            from sae.features.explanations.judge import explain_by_model

            new = explain_by_model(index, corpus, features, config)
        path = write_explanations(config.index, new)
    print(f"{len(new):,} explanations written to {path}")
    return path


def choose(index: FeatureIndex, config: ExplainConfig) -> list[int]:
    for j in config.features:
        index.feature(j)
    if config.features:
        return sorted(set(config.features))
    if config.sample is None:
        return list(range(index.d_sae))
    alive = np.flatnonzero(index.columns["count"])
    if not 1 <= config.sample <= len(alive):
        raise InputError(f"expected --sample between 1 and {len(alive)}, the features that fire, but got {config.sample}")
    return sorted(np.random.default_rng(config.seed).permutation(alive)[: config.sample].tolist())


def explain_by_lookup(index: FeatureIndex, corpus: ScannedText, features: Sequence[int], seed: int) -> list[Explanation]:
    """Token, bigram and pattern of every feature, scored on the held-out documents beside trivial baselines.

    The "shuffled" baseline is the explanation of the feature before it in one random round of all that fire: the same for any choice of
    `features`.
    """
    alive = np.random.default_rng(seed).permutation(np.flatnonzero(index.columns["count"]))
    before = dict(zip(alive.tolist(), np.roll(alive, 1).tolist()))
    scorer = PredictionScorer(corpus, seed)
    last: tuple[int, dict[str, Explained]] = (-1, {})

    def lookups(j: int) -> dict[str, Explained]:
        learn, _ = corpus.firing(index, j)
        return {method: lookup(corpus, learn) for method, lookup in LOOKUPS.items()}

    found = []
    place = {j: i for i, j in enumerate(alive.tolist())}
    with progress("explain", len(features), "features") as bar:
        for j in sorted(features, key=lambda j: place.get(j, len(place))):  # neighbours in the round: each is looked up once
            learn, held = corpus.firing(index, j)
            mine = lookups(j)
            other = before.get(j, j)
            theirs = {} if other == j else last[1] if last[0] == other else lookups(other)
            baselines = trivial(corpus, learn, held)
            token: dict[str, Any] = {}
            for method, (rules, prediction) in mine.items():
                scores = scorer.score(held, prediction)
                beside = baselines | ({"token": token} if token else {})
                if theirs:
                    beside["shuffled"] = point(scorer.score(held, theirs[method].prediction, intervals=False))
                token = token or point(scores)
                text = rules_text(rules, index.vocabulary) if len(learn.rows) else "never fires in the documents learned from"
                found.append(Explanation(j, method, text, scores, beside))
            last = (j, mine)
            bar.advance(1)
    return found


class Sums(NamedTuple):
    """Over tokens, of a feature's activations a and predicted ones p; each a number, or one for every draw of the documents."""

    tokens: np.ndarray
    hits: np.ndarray
    """predicted to fire, and firing"""
    predicted: np.ndarray
    """to fire"""
    firing: np.ndarray
    p: np.ndarray
    pp: np.ndarray
    pa: np.ndarray
    a: np.ndarray
    aa: np.ndarray


class PredictionScorer:
    """Scores predictions over all scanned tokens of the held-out documents, firing or not; only the non-zero ones are touched."""

    def __init__(self, corpus: ScannedText, seed: int, draws: int = DRAWS):
        held = np.flatnonzero(corpus.held_n)
        documents, inverse = np.unique(corpus.document_n[held], return_inverse=True)
        self.document_n = np.full(len(corpus.held_n), -1, np.int32)
        self.document_n[held] = inverse
        self.rows_d = np.bincount(inverse)
        self.truth_n = np.zeros(len(corpus.held_n))  # of one feature at a time; all 0 in between
        n = len(documents)
        self.draws_rd = resamples(n, draws, np.random.default_rng(seed)).astype(np.float64)

    def score(self, held: FiringRows, prediction: Prediction, *, intervals: bool = True) -> dict[str, Any]:
        """precision, recall and F1 of firing, Pearson correlation of the activations, with bootstrap intervals (95 %) over documents.

        None where a score is not defined: F1 and recall of a feature that never fires there, a correlation with a constant.
        """
        if (self.document_n[prediction.rows] < 0).any() or (self.document_n[held.rows] < 0).any():
            raise AssertionError("a prediction is scored on a document that was learned from")
        self.truth_n[held.rows] = held.values
        truth, p = self.truth_n[prediction.rows], prediction.values
        self.truth_n[held.rows] = -1  # a mark of firing: an activation may have been rounded to 0
        hit = prediction.fires & (self.truth_n[prediction.rows] < 0)
        self.truth_n[held.rows] = 0
        n, of_prediction, of_truth = len(self.rows_d), self.document_n[prediction.rows], self.document_n[held.rows]
        parts = [(of_prediction, hit), (of_prediction, prediction.fires), (of_truth, np.ones(len(held.rows)))]
        parts += [(of_prediction, p), (of_prediction, p * p), (of_prediction, p * truth)]
        parts += [(of_truth, held.values), (of_truth, held.values**2)]
        sums_dk = np.stack([self.rows_d, *(np.bincount(at, weight, n) for at, weight in parts)], axis=1)
        total = Sums(*sums_dk.sum(0))
        scores: dict[str, Any] = {
            "f1": rounded(f1(total)),
            "precision": rounded(ratio(total.hits, total.predicted)),
            "recall": rounded(ratio(total.hits, total.firing)),
            "correlation": rounded(correlation(total)),
        }
        if intervals:
            drawn = Sums(*(self.draws_rd @ sums_dk).T)
            for name, values in (("f1", f1(drawn)), ("correlation", correlation(drawn))):
                low, high = percentile_interval(values)
                known = scores[name] is not None and np.isfinite(low)
                scores[f"{name}_interval"] = [rounded(low), rounded(high)] if known else None
            scores |= {"firing_tokens": int(total.firing), "tokens": int(total.tokens), "documents": n}
        return scores


def f1(s: Sums) -> np.ndarray:
    """Of predicting to fire; undefined where the feature never fires."""
    return np.where(s.firing > 0, ratio(2 * s.hits, s.predicted + s.firing), np.nan)


def correlation(s: Sums) -> np.ndarray:
    """Pearson correlation of prediction and activation over all tokens; undefined where one of them is constant."""
    n, varies_p, varies_a = s.tokens, s.tokens * s.pp - s.p * s.p, s.tokens * s.aa - s.a * s.a
    varies_p, varies_a = np.where(varies_p > 1e-12 * n * s.pp, varies_p, 0), np.where(varies_a > 1e-12 * n * s.aa, varies_a, 0)
    return ratio(n * s.pa - s.p * s.a, np.sqrt(varies_p * varies_a))


def trivial(corpus: ScannedText, learn: FiringRows, held: FiringRows) -> dict[str, Any]:
    """What no explanation is needed for: firing on every token, and at random as often as in the learning documents (expected values)."""
    n = int(corpus.held_n.sum())
    density, rate = len(held.rows) / n, len(learn.rows) / max(len(corpus.held_n) - n, 1)
    alive = density > 0
    always = {
        "f1": rounded(2 * density / (1 + density)) if alive else None,
        "precision": rounded(density),
        "recall": 1.0 if alive else None,
    }
    random = {"f1": rounded(2 * density * rate / (density + rate)) if alive else None, "precision": rounded(density)}
    return {"always": always, "random": random | {"recall": rounded(rate) if alive else None}}


def point(scores: dict[str, Any]) -> dict[str, Any]:
    return {name: scores[name] for name in ("f1", "precision", "recall", "correlation")}


def rounded(value: Any) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None


def lookup_summary(explanations: Sequence[Explanation]) -> str:
    """A table: quartiles over the features that fire in the held-out documents, of each method and of what it is compared with."""
    rows: dict[str, list[tuple[Any, Any]]] = {}
    for e in explanations:
        if e.scores["f1"] is None:
            continue
        rows.setdefault(e.method, []).append((e.scores["f1"], e.scores["correlation"]))
        for name in ("always", "random", "shuffled"):
            if name in e.baselines:
                key = f"{name} ({e.method})" if name == "shuffled" else name
                rows.setdefault(key, []).append((e.baselines[name]["f1"], e.baselines[name].get("correlation")))
    lines = [f"{'':<20}{'features':>9}   {'F1: 25 %':>9}{'median':>8}{'75 %':>8}   {'r: 25 %':>9}{'median':>8}{'75 %':>8}"]
    for name, pairs in rows.items():
        cells = []
        for column in zip(*pairs):
            known = [value for value in column if value is not None]
            quartiles = np.percentile(known, [25, 50, 75]) if known else [np.nan] * 3
            cells.append("{:>9.3f}{:>8.3f}{:>8.3f}".format(*quartiles) if known else f"{'—':>9}{'—':>8}{'—':>8}")
        count = len(pairs) if "(" in name or name in LOOKUPS else len(pairs) // len(LOOKUPS)
        lines.append(f"{name:<20}{count:>9,}   {'   '.join(cells)}")
    return "\n".join(lines)
