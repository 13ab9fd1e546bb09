"""Which features to list and in which order: search, filters and sorting over the index's columns, fast at a million features.

f features · v vocabulary
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlencode

import numpy as np

from sae.errors import InputError
from sae.features.index.reader import FeatureIndex
from sae.features.index.words import folded
from sae.features.notes import Notes

SORTS = ("feature", "density", "max", "mean", "fvu_contribution", "skewness", "kurtosis", "top_token", "label", "match")
PAGE = 50
REMEMBERED = 16  # lists, and searches, kept in memory: four and twelve bytes a feature


@dataclass(frozen=True, kw_only=True)
class Query:
    """A list of features, as the URL of a page describes it."""

    q: str = ""
    """what to search for"""
    how: str = "text"
    """"text": in labels, explanations and top tokens; "fires": features that fire on the word; "promotes": those that make it likelier"""
    sort: str = ""
    """One of SORTS. Default: "match" after a search, "max" otherwise."""
    up: bool = False
    """smallest first"""
    density_min: float | None = None
    """as a share of all tokens"""
    density_max: float | None = None
    max_min: float | None = None
    max_max: float | None = None
    fvu_min: float | None = None
    fvu_max: float | None = None
    token: str = ""
    """part of the top token's text"""
    label: str = ""
    """part of the label; case does not matter"""
    list: str = ""
    """name of a list"""
    starred: bool = False
    labelled: bool = False
    dead: bool = False
    """also features that never fire"""

    @classmethod
    def read(cls, params: Mapping[str, str]) -> "Query":
        """From the query string of a URL; unknown parameters are ignored. Raises `InputError` for an invalid value."""
        given: dict[str, Any] = {}
        for field in fields(cls):
            text = params.get(field.name, "")
            if not text:
                continue
            if field.type is bool:
                given[field.name] = text == "1"
            elif field.type is str:
                given[field.name] = text[:200]
            else:
                given[field.name] = finite(field.name, text)
        for name, allowed in (("sort", SORTS), ("how", ("text", "fires", "promotes"))):
            if name in given and given[name] not in allowed:
                raise InputError(f"expected {name} to be one of {', '.join(allowed)}, got {given[name]!r}")
        return cls(**given)

    def params(self, **changes: Any) -> str:
        """The query-string parameters that differ from their defaults."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        texts = {
            k: "1" if v is True else f"{v:.15g}" if isinstance(v, float) else str(v)
            for k, v in (values | changes).items()
            if v or type(v) is float
        }
        return urlencode(texts)

    @property
    def in_index(self) -> bool:
        """Whether a word is searched for in the index rather than in labels and explanations."""
        return bool(self.q) and self.how != "text"

    @property
    def order(self) -> str:
        return self.sort or ("match" if self.q else "list" if self.list else "max")


class _Remembered:
    """The most recent results. Thread-safe."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def keep(self, key: Any, value: Any) -> Any:
        with self._lock:
            self._kept[key] = value
            while len(self._kept) > REMEMBERED:
                self._kept.popitem(last=False)
        return value


class Tables:
    """Makes lists of features, searches one word at a time, and caches the most recent of both. Thread-safe."""

    def __init__(self, index: FeatureIndex, notes: Notes):
        self.index, self.notes = index, notes
        self._lists, self._searches = _Remembered(), _Remembered()
        self._searching = threading.Lock()
        pieces = [index.vocabulary.spelling(token) for token in range(len(index.vocabulary.pieces))]
        self._folded = [folded(piece) for piece in pieces]
        self._rank_v = np.argsort(np.argsort(np.array([piece.strip() for piece in self._folded], dtype=object), kind="stable"))

    def features(self, query: Query) -> np.ndarray:
        """Numbers of the listed features in their order, int32.

        Raises `InputError` for a word that does not occur, or a list that does not exist.
        """
        key = (query, self.notes.version)
        if (known := self._lists.get(key)) is not None:
            return known
        chosen = self._started(query)
        chosen = chosen[self._kept(query, chosen)]
        if query.order not in ("match", "list"):
            chosen = self._sorted(query, chosen)
        elif query.up:
            chosen = chosen[::-1]
        return self._lists.keep(key, chosen.astype(np.int32))

    def match(self, query: Query, j: int) -> float | None:
        """How well a listed feature fits the searched word: F1 of its firing on it, or its contribution to the word's logit; else None."""
        score_f = None if not query.in_index else self._found(query)[1]
        return None if score_f is None else float(score_f[j])

    def remembers(self, query: Query) -> bool:
        """Whether the result is cached, so that no search through the index is needed."""
        return not query.in_index or self._searches.get((query.q, query.how)) is not None

    def _started(self, query: Query) -> np.ndarray:
        """The result of a list or a search, best first; all features without either."""
        chosen = np.arange(self.index.d_sae)
        if query.list:
            chosen = np.array(self._members(query.list), np.int64)
        if query.q:
            hits = self._found(query)[0] if query.in_index else np.array(self.notes.search(query.q, self.index.d_sae), np.int64)
            chosen = hits[np.isin(hits, chosen)] if query.list else hits
        elif query.sort == "match":
            raise InputError("sorting by match needs something to search for")
        return chosen

    def _members(self, name: str) -> list[int]:
        """Features of the list with that name; if there is none, of one whose name differs in case, accents or apostrophes alone."""
        lists = self.notes.lists()
        alike = [other for other in lists if folded(other) == folded(name)]
        if name not in lists and not alike:
            raise InputError(f"there is no list {name!r}; the lists are {', '.join(map(repr, lists)) or 'none yet'}")
        return lists[name if name in lists else alike[0]]

    def _found(self, query: Query) -> tuple[np.ndarray, np.ndarray]:
        """The features that a word finds in the index, best first, and every feature's score."""
        key = query.q, query.how
        if (known := self._searches.get(key)) is not None:
            return known
        with self._searching:
            if (known := self._searches.get(key)) is not None:  # found while this one waited
                return known
            if query.how == "fires":
                found = [(hit.feature, hit.score) for hit in self.index.search(query.q, self.index.d_sae)]
            else:
                found = [(hit.feature, hit.value) for hit in self.index.promotes(query.q, self.index.d_sae)]
            hits, score_f = np.array([j for j, _ in found], np.int64), np.zeros(self.index.d_sae, np.float32)
            score_f[hits] = [score for _, score in found]
            return self._searches.keep(key, (hits, score_f))

    def _kept(self, query: Query, chosen: np.ndarray) -> np.ndarray:
        """Which of the features pass the filters, bool."""
        columns = self.index.columns
        kept = np.ones(len(chosen), bool)
        if not (query.dead or query.list or query.q):
            kept &= columns["count"][chosen] > 0
        for column, low, high in (
            ("density", query.density_min, query.density_max),
            ("max", query.max_min, query.max_max),
            ("fvu_contribution", query.fvu_min, query.fvu_max),
        ):
            if low is not None:  # in the column's precision, so that 0.1 keeps what is stored for 0.1
                kept &= columns[column][chosen] >= np.float32(low)
            if high is not None:
                kept &= columns[column][chosen] <= np.float32(high)
        if query.token:
            part = folded(query.token)
            matching_v = np.array([part in piece for piece in self._folded])
            top = columns["top_token"][chosen]
            kept &= (top >= 0) & matching_v[np.maximum(top, 0)]
        if query.starred or query.labelled or query.label:
            part = folded(query.label)
            known = [
                j
                for j, note in self.notes.all().items()
                if part in folded(note.label) and (note.starred or not query.starred) and (note.label or not query.labelled)
            ]
            kept &= np.isin(chosen, known)
        return kept

    def _sorted(self, query: Query, chosen: np.ndarray) -> np.ndarray:
        if query.order == "feature":
            key = chosen if query.up else -chosen
            return chosen[np.argsort(key, kind="stable")]
        if query.order == "label":
            labels = {j: folded(note.label) for j, note in self.notes.all().items() if note.label}
            named = sorted((j for j in chosen.tolist() if j in labels), key=lambda j: labels[j], reverse=not query.up)
            return np.r_[np.array(named, np.int64), chosen[~np.isin(chosen, named)]]  # those without one last
        column = np.asarray(self.index.columns[query.order])[chosen]
        if query.order == "top_token":
            key = np.where(column >= 0, self._rank_v[np.maximum(column, 0)], len(self._rank_v))
            return chosen[np.argsort(key if query.up else -key, kind="stable")]
        key = column.astype(np.float32)
        key = np.where(np.isnan(key), np.inf, key if query.up else -key)  # a moment that a feature does not have comes last
        return chosen[np.argsort(key, kind="stable")]


def finite(name: str, text: str) -> float:
    """A number from a URL parameter. Raises `InputError` that names the parameter."""
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"expected a number as {name}, got {text[:40]!r}") from None
    if not math.isfinite(value):
        raise InputError(f"expected a finite number as {name}, got {text[:40]!r}")
    return value
