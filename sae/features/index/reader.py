"""Reads a feature index: every feature's activations, statistics and contexts, from memory-mapped files.

f features · n tokens of the corpus · w tokens of a window

Only `feature`, `percentile` and readers of its arrays go through all of a feature's activations, so that a dense feature is shown as fast
as a rare one, and from a cold disk.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sae.dictionaries.source import sampled_crc32, weights_crc32
from sae.disk.arrays import fetch
from sae.errors import InputError
from sae.features.index.examples import AFTER, BEFORE, BUCKET_SAMPLES, BUCKETS, LOWEST, NONE, OCTAVE, TOP
from sae.features.index.lens import BINS
from sae.features.index.opening import FILES, open_index
from sae.model.vocabulary import Vocabulary

if TYPE_CHECKING:
    from sae.dictionaries.dictionary import Dictionary
    from sae.features.index.search import FiresOn, Promotes

UTF8_MARGIN = 3  # tokens to the left of a window that may hold the first bytes of a character which ends inside it


class Feature(NamedTuple):
    """One feature's record: every token on which it fires."""

    id: int
    positions: np.ndarray
    """tokens on which it fires, uint32, ascending"""
    values: np.ndarray
    """activations there, float16, in the units of the dictionary; without their signs (see `FeatureIndex.signed_values`)"""
    columns: dict[str, Any]
    """its value (or row) of every column of the index: see docs/features.md"""
    maximum: float
    """its strongest activation, with its sign; 0 if it never fires"""


class Context(NamedTuple):
    """A window of tokens around one on which a feature fires."""

    position: int
    """the firing token in the corpus"""
    centre: int
    """the firing token in the window"""
    ids: np.ndarray
    """tokens of the window, [w]; it never leaves the sequence"""
    values: np.ndarray
    """the feature's activation on each of them, float32 [w]; 0 where it does not fire"""
    scanned: np.ndarray
    """bool [w]: False for tokens the index never looked at, whose activation is unknown and written as 0"""
    texts: list[str]
    """text of each token; joined, the exact text (see `Vocabulary.texts`)"""
    document: int
    label: str | None
    """the document's label, for example its domain"""

    @property
    def value(self) -> float:
        return float(self.values[self.centre])


class Bucket(NamedTuple):
    """Activations of one feature from `low` up to `high`."""

    low: float
    high: float
    count: int  # type: ignore[assignment]  # a tuple has a method of that name
    contexts: list[Context]
    """a fair sample of them, at most 5"""


class Coactive(NamedTuple):
    """A feature that fires on the same tokens."""

    feature: int
    together: int
    """tokens on which both fire"""
    share: float
    """of the first feature's tokens"""


class FeatureIndex:
    """The folder that `build_index` writes. `columns` maps a statistic to one value (or row) per feature."""

    def __init__(self, folder: Path, info: dict[str, Any], columns: dict, records: dict, details: dict, token_features: dict, tokens: dict):
        small = ("sequence_starts", "sequence_document", "document_label")  # looked through for every context, so not left on the disk
        tokens = tokens | {name: np.array(tokens[name]) for name in small}
        self.folder, self.info, self.columns, self.tokens = folder, info, columns, tokens
        self.details, self._token_features = details, token_features
        self.offsets, self.positions, self.values = records["offsets"], records["positions"], records["values"]
        self.negative = records.get("negative")
        """of a dictionary whose activations may be negative, which of `values` were; None for others"""
        ends = np.cumsum(tokens["piece_lengths"], dtype=np.int64)
        blob = tokens["piece_bytes"].tobytes()
        pieces = [blob[end - length : end] for end, length in zip(ends.tolist(), tokens["piece_lengths"].tolist())]
        self.vocabulary = Vocabulary(pieces, np.asarray(tokens["piece_special"]))

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False) -> "FeatureIndex":
        """Compares checksums of files up to 32 MB, with `verify` those of all. Raises `InputError` if the folder is not a complete feature
        index."""
        info, arrays = open_index(Path(folder), verify)
        return cls(Path(folder), info, *(arrays[name] for name in FILES))

    def dictionary(self, source: str | Path | None = None, device: str = "cpu") -> "Dictionary":
        """The indexed dictionary, from its original place or the same one from elsewhere; raises `InputError` for any other."""
        from sae.dictionaries.dictionary import Dictionary

        source = source or self.info["dictionary"]
        dictionary = Dictionary.load(source, device)
        parts, sampled = dictionary.parts(), "dictionary_crc32_of" in self.info
        if (sampled_crc32(parts) if sampled else weights_crc32(source, [parts])) != self.info["dictionary_crc32"]:
            raise InputError(
                f"expected the dictionary that {self.folder} was built from, but the weights in {source} differ; index it again"
            )
        dictionary.require_site(self.info["site"])
        return dictionary

    def __repr__(self) -> str:
        return f"FeatureIndex({str(self.folder)!r}: {self.d_sae:,} features, {self.info.get('tokens_scanned', 0):,} tokens scanned)"

    @property
    def d_sae(self) -> int:
        return len(self.offsets) - 1

    @property
    def place(self) -> str:
        """The dictionary's site or sites as text; for a transcoder both ends: "mlp_in.2 to mlp_out.2"."""
        ends = [self.info["site"]] + ([self.info["site_out"]] if "site_out" in self.info else [])
        return " to ".join(end if isinstance(end, str) else " and ".join(end) for end in ends)

    def feature(self, j: int) -> Feature:
        """Raises `InputError` if `j` is not a feature."""
        low, high = self._bounds(j)
        columns = {k: v[j] for k, v in self.columns.items()}
        return Feature(int(j), self.positions[low:high], self.values[low:high], columns, float(columns["max"] * self.signs([j])[0]))

    def signs(self, features: Sequence[int] | np.ndarray) -> np.ndarray:
        """−1 for each of the features whose strongest activation is below 0, otherwise 1, int8 [n].

        The decoder row times this sign is the direction in which the feature is strongest.
        """
        features = np.asarray(features, np.int64)
        signs_n = np.ones(len(features), np.int8)
        if self.negative is not None:
            entries_n = self.details["top_entries"][features, 0]
            fires_n = entries_n != NONE
            with self._in_range():
                signs_n[fires_n] -= 2 * self.negative[self.offsets[features[fires_n]] + entries_n[fires_n]].astype(np.int8)
        return signs_n

    def signed_values(self, j: int) -> np.ndarray:
        """The feature's activations with their signs, float64, in the order of its positions."""
        low, high = self._bounds(j)
        values = self.values[low:high].astype(np.float64)
        return values if self.negative is None else np.where(self.negative[low:high], -values, values)

    def prefetch(self, j: int) -> None:
        """Asks the system for everything stored about a feature: on a cold disk one wait instead of one for each array."""
        self._bounds(j)
        for array in (*self.columns.values(), *self.details.values()):
            fetch(array, [j], 1)

    def context(self, feature: Feature, position: int, before: int, after: int) -> Context:
        """The window of at most `before` + 1 + `after` tokens around `position`, inside its sequence."""
        with self._in_range():
            return self._context(feature.id, int(np.searchsorted(feature.positions, position)), position, before, after)

    def top_contexts(self, j: int, n: int = 20, before: int = BEFORE, after: int = AFTER) -> list[Context]:
        """The `n` highest activations whose windows (24 tokens before, 16 after) share no token, at most 2 from one document.

        Taken greedily from the highest down; of equal activations the earlier token is first. The index holds 32 of them, and more
        are not returned. `before` and `after`: numbers of tokens shown around each.
        """
        return self._contexts(j, self._details("top_entries", j)[: min(n, TOP)], before, after)

    def random_contexts(self, j: int, n: int = 20, seed: int = 0, before: int = BEFORE, after: int = AFTER) -> list[Context]:
        """`n` (or all) of the tokens on which the feature fires, drawn uniformly without replacement: its typical behaviour."""
        low, high = self._bounds(j)
        drawn = np.random.default_rng((seed, j)).choice(high - low, min(n, high - low), replace=False)
        return self._contexts(j, drawn, before, after)

    def bucket_contexts(self, j: int, n: int = BUCKET_SAMPLES, before: int = BEFORE, after: int = AFTER) -> list[Bucket]:
        """The activations by octave (a factor of 2), the highest first, with at most `n` <= 5 of each, drawn by a hash of position and
        feature, so that they are a fair sample of the octave. The last of 12 octaves takes all that is below."""
        octaves = self._details("histogram", j).reshape(-1, OCTAVE).sum(1, dtype=np.int64)
        fired = np.flatnonzero(octaves)
        if not len(fired):
            return []
        low, high = self._bounds(j)
        entries = self._details("bucket_entries", j)[:, :n]
        contexts = iter(self._contexts(j, entries.flatten(), before, after))
        highest, buckets = int(fired[-1]), list[Bucket]()
        for k, found in enumerate((entries != NONE).sum(1)[: highest + 1].tolist()):
            octave, last = highest - k, k in (BUCKETS - 1, highest)
            count = high - low - sum(bucket.count for bucket in buckets) if last else int(octaves[octave])
            if count:
                bottom = 0.0 if last else 2.0 ** (octave + LOWEST)
                buckets.append(Bucket(bottom, 2.0 ** (octave + 1 + LOWEST), count, list(islice(contexts, found))))
        return buckets

    def histogram(self, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Edges [bins + 1] at 2^(k/4) and the number of activations in each bin [bins]; empty for a feature that never fires.

        Activations under 3e-8, which float16 rounds to 0, are in no bin.
        """
        counts = self._details("histogram", j)
        fired = np.flatnonzero(counts)
        if not len(fired):
            return np.zeros(0), np.zeros(0, np.int64)
        low, high = int(fired[0]), int(fired[-1]) + 1
        return 2.0 ** (np.arange(low, high + 1) / OCTAVE + LOWEST), counts[low:high].astype(np.int64)

    def percentile(self, j: int, value: float) -> float:
        """Share of the feature's activations that are at most `value`; NaN for a feature that never fires."""
        low, high = self._bounds(j)
        return float((self.values[low:high] <= np.float32(value)).mean()) if high > low else float("nan")

    def top_tokens(self, j: int, n: int = 5) -> list[tuple[int, float]]:
        """The tokens on which most of the feature's activation falls, at most 10: (id, share of the sum of its activations)."""
        pairs = zip(self._details("token_ids", j)[:n].tolist(), self._details("token_shares", j)[:n].tolist())
        return [(token, share) for token, share in pairs if token >= 0]

    def token_features(self, token: int, n: int = 20) -> list[tuple[int, float]]:
        """Features with the largest share of their activation on a token, among those that have it in their ten top tokens."""
        offsets = self._token_features["offsets"]
        if not 0 <= token < len(offsets) - 1:
            return []
        low, high = offsets[token : token + 2]
        stop = min(int(high), int(low) + n)
        return list(zip(self._token_features["features"][low:stop].tolist(), self._token_features["shares"][low:stop].tolist()))

    def cosine_neighbours(self, j: int, n: int = 10) -> list[tuple[int, float]]:
        """Features with the highest cosine of decoder rows, at most 20: (feature, cosine)."""
        pairs = zip(self._details("neighbour_ids", j)[:n].tolist(), self._details("neighbour_cosines", j)[:n].tolist())
        return [(other, cosine) for other, cosine in pairs if other >= 0]

    def coactive(self, j: int, n: int = 10) -> list[Coactive]:
        """Features that fire on most of the same tokens, at most 20, counted over all tokens scanned."""
        low, high = self._bounds(j)
        pairs = zip(self._details("coactive_ids", j)[:n].tolist(), self._details("coactive_counts", j)[:n].tolist())
        return [Coactive(other, together, together / (high - low)) for other, together in pairs if other >= 0]

    def lens_histogram(self, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Edges [51] and counts [50] of the logit lens' values over the vocabulary; empty without a lens."""
        counts = self._details("lens_counts", j)
        if "top_token_values" not in self.columns:
            return np.zeros(0), np.zeros(0, np.int64)
        low, high = self.columns["bottom_token_values"][j, 0], self.columns["top_token_values"][j, 0]
        edges, counts = np.linspace(low, high, BINS + 1), counts.astype(np.int64)
        return (-edges[::-1], counts[::-1]) if self.signs([j])[0] < 0 else (edges, counts)

    def lens_tokens(self, j: int, n: int = 10, *, bottom: bool = False) -> list[tuple[int, float]]:
        """The tokens whose logits the feature raises most (or, with `bottom`, lowers most) with the sign of its strongest activation:
        (id, value); [] without a lens."""
        self._bounds(j)
        if not self.has_lens:
            return []
        ids, values = self.lens([j], bottom=bottom)
        return list(zip(ids[0, :n].tolist(), values[0, :n].tolist()))

    @property
    def has_lens(self) -> bool:
        return "top_token_ids" in self.columns

    def lens(self, features: Sequence[int] | np.ndarray, *, bottom: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """`lens_tokens` of several features: ids and values, [n, 20] each (fewer of a smaller vocabulary). Only where there is a lens."""
        sides = ("bottom", "top") if bottom else ("top", "bottom")
        ids_nk, values_nk = (self.columns[f"{sides[0]}_token_{what}"][features] for what in ("ids", "values"))
        flipped_n = self.signs(features) < 0
        if flipped_n.any():
            others = np.asarray(features)[flipped_n]
            ids_nk[flipped_n] = self.columns[f"{sides[1]}_token_ids"][others]
            values_nk[flipped_n] = -self.columns[f"{sides[1]}_token_values"][others]
        return ids_nk, values_nk

    def search(self, query: str | Sequence[str], n: int = 20) -> "list[FiresOn]":
        """Features that fire on a word: see `sae.features.index.search.search`."""
        from sae.features.index.search import search

        return search(self, query, n)

    def promotes(self, query: str | Sequence[str], n: int = 20) -> "list[Promotes]":
        """Features that make a word more likely: see `sae.features.index.search.promotes`."""
        from sae.features.index.search import promotes

        return promotes(self, query, n)

    def _bounds(self, j: int) -> tuple[int, int]:
        """First entry of the feature and the one after its last; raises `InputError` if `j` is not a feature."""
        if not 0 <= j < self.d_sae:
            raise InputError(f"feature {j} does not exist: the dictionary of {self.folder} has features 0 to {self.d_sae - 1}")
        return int(self.offsets[j]), int(self.offsets[j + 1])

    def _details(self, name: str, j: int) -> np.ndarray:
        self._bounds(j)
        return self.details[name][j]

    def _contexts(self, j: int, entries: np.ndarray, before: int, after: int) -> list[Context]:
        """Contexts of some of the feature's entries, by number; the disk is read for all together."""
        low, _ = self._bounds(j)
        entries = low + entries[entries != NONE].astype(np.int64)
        for array in (self.positions, self.values) if self.negative is None else (self.positions, self.values, self.negative):
            fetch(array, (entries - before).tolist(), before + after + 1)
        with self._in_range():
            positions = self.positions[entries].tolist()
            for name in ("ids", "scanned"):
                fetch(self.tokens[name], [position - before for position in positions], before + after + 1)
            return [self._context(j, entry - low, position, before, after) for entry, position in zip(entries.tolist(), positions)]

    @contextmanager
    def _in_range(self) -> Iterator[None]:
        """Checks that numbers are in range: a file too large for its checksum to be compared at every opening may hold anything."""
        try:
            yield
        except IndexError as error:
            raise InputError(f"{self.folder} holds a number out of range ({error}), so it is damaged; --verify says where") from None

    def _context(self, j: int, entry: int, position: int, before: int, after: int) -> Context:
        """The window around `position`; `entry` is the feature's entry at it, or the first one after it."""
        low, high = self._bounds(j)
        sequence, start, end = self._window(position, before, after)
        values = np.zeros(end - start, np.float32)
        near = slice(max(low, low + entry - before), min(high, low + entry + after + 1))  # so many at most lie in the window
        places = self.positions[near].astype(np.int64) - start
        inside = (places >= 0) & (places < end - start)
        values[places[inside]] = self.values[near][inside]
        if self.negative is not None:
            values[places[inside][self.negative[near][inside]]] *= -1
        margin = min(UTF8_MARGIN, start - int(self.tokens["sequence_starts"][sequence]))
        ids = self.tokens["ids"][start - margin : end]
        document = int(self.tokens["sequence_document"][sequence])
        label = int(self.tokens["document_label"][document])
        return Context(
            int(position),
            int(position) - start,
            ids[margin:],
            values,
            self.tokens["scanned"][start:end],
            self.vocabulary.texts(ids.tolist())[margin:],
            document,
            self.info["label_names"][label] if label >= 0 else None,
        )

    def _window(self, position: int, before: int, after: int) -> tuple[int, int, int]:
        """Sequence of `position`, and the window's first token and the one after its last."""
        starts = self.tokens["sequence_starts"]
        sequence = int(np.searchsorted(starts, position, "right")) - 1
        start, end = max(int(starts[sequence]), int(position) - before), min(int(starts[sequence + 1]), int(position) + after + 1)
        return sequence, start, end
