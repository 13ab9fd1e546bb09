"""How well predicted activations agree with a feature's own on held-out documents.

n scanned tokens · d held-out documents · r bootstrap draws
"""

from typing import Any, NamedTuple

import numpy as np

from sae.features.explanations.lookups import FiringRows, Prediction, ScannedText
from sae.statistics import percentile_interval, ratio, resamples

DRAWS = 200
"""Bootstrap draws of the held-out documents for an interval."""


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
    """F1 of predicting firing; undefined where the feature never fires."""
    return np.where(s.firing > 0, ratio(2 * s.hits, s.predicted + s.firing), np.nan)


def correlation(s: Sums) -> np.ndarray:
    """Pearson correlation of prediction and activation over all tokens; undefined where one of them is constant."""
    n, varies_p, varies_a = s.tokens, s.tokens * s.pp - s.p * s.p, s.tokens * s.aa - s.a * s.a
    varies_p, varies_a = np.where(varies_p > 1e-12 * n * s.pp, varies_p, 0), np.where(varies_a > 1e-12 * n * s.aa, varies_a, 0)
    return ratio(n * s.pa - s.p * s.a, np.sqrt(varies_p * varies_a))


def trivial(corpus: ScannedText, learn: FiringRows, held: FiringRows) -> dict[str, Any]:
    """Scores of predictions without an explanation: firing on every token, and at random as often as in the learning documents (expected
    values)."""
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
