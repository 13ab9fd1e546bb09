"""A feature index read back: every feature's activations, statistics and contexts, from memory-mapped files.

f features · n tokens of the corpus · w tokens of a window
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sae.errors import InputError
from sae.features.storage import open_arrays
from sae.features.text import Vocabulary
from sae.files import read_json

if TYPE_CHECKING:
    from sae.features.search import FiresOn, Promotes

FORMAT_VERSION = 1
UTF8_MARGIN = 3  # tokens to the left of a window that may hold the first bytes of a character which ends inside it
OCTAVE = 4  # histogram bins per doubling


class Feature(NamedTuple):
    """One feature's record: every token on which it fires."""

    id: int
    positions: np.ndarray
    """tokens on which it fires, uint32, ascending"""
    values: np.ndarray
    """activations there, float16, in the units of the dictionary"""
    columns: dict[str, Any]
    """its statistics: count, density, sum, max, mean, top_position, decoder_norm, lens tokens and values"""


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


class FeatureIndex:
    """The folder that `build_index` writes. `columns` maps a statistic to one value (or row) per feature."""

    def __init__(self, folder: Path, info: dict[str, Any], columns: dict, records: dict, tokens: dict):
        self.folder, self.info, self.columns, self.tokens = folder, info, columns, tokens
        self.offsets, self.positions, self.values = records["offsets"], records["positions"], records["values"]
        ends = np.cumsum(tokens["piece_lengths"], dtype=np.int64)
        blob = tokens["piece_bytes"].tobytes()
        pieces = [blob[end - length : end] for end, length in zip(ends.tolist(), tokens["piece_lengths"].tolist())]
        self.vocabulary = Vocabulary(pieces, np.asarray(tokens["piece_special"]))

    @classmethod
    def open(cls, folder: str | Path) -> "FeatureIndex":
        """Raises `InputError` if the folder is no whole feature index."""
        folder = Path(folder)
        info = read_json(folder / "index.json", "a feature index (built by build_feature_index.py)")
        if info.get("format_version") != FORMAT_VERSION:
            raise InputError(
                f"{folder} is a feature index of format {info.get('format_version')}, expected {FORMAT_VERSION}; build the index again"
            )
        columns, records, tokens = (open_arrays(folder / f"{name}.safetensors") for name in ("columns", "records", "tokens"))
        return cls(folder, info, columns, records, tokens)

    @property
    def d_sae(self) -> int:
        return len(self.offsets) - 1

    def feature(self, j: int) -> Feature:
        """Raises `InputError` if `j` is not a feature."""
        if not 0 <= j < self.d_sae:
            raise InputError(f"feature {j} does not exist: the dictionary of {self.folder} has features 0 to {self.d_sae - 1}")
        low, high = self.offsets[j : j + 2]
        return Feature(int(j), self.positions[low:high], self.values[low:high], {k: v[j] for k, v in self.columns.items()})

    def context(self, feature: Feature, position: int, before: int, after: int) -> Context:
        """The window of at most `before` + 1 + `after` tokens around `position`, inside its sequence."""
        sequence, start, end = self._window(position, before, after)
        ids = np.asarray(self.tokens["ids"][start:end])
        values = np.zeros(end - start, np.float32)
        low, high = np.searchsorted(feature.positions, [start, end])
        values[feature.positions[low:high].astype(np.int64) - start] = feature.values[low:high]
        margin = min(UTF8_MARGIN, start - int(self.tokens["sequence_starts"][sequence]))
        texts = self.vocabulary.texts(self.tokens["ids"][start - margin : end].tolist())[margin:]
        document = int(self.tokens["sequence_document"][sequence])
        label = int(self.tokens["document_label"][document])
        return Context(
            int(position),
            int(position) - start,
            ids,
            values,
            np.asarray(self.tokens["scanned"][start:end]),
            texts,
            document,
            self.info["label_names"][label] if label >= 0 else None,
        )

    def top_contexts(self, j: int, n: int = 20, per_document: int = 2, before: int = 24, after: int = 16) -> list[Context]:
        """The `n` highest activations whose windows share no token, at most `per_document` from one document.

        Taken greedily from the highest down; of equal activations the earlier token comes first.
        """
        feature = self.feature(j)
        taken: list[tuple[int, int]] = []
        documents: dict[int, int] = {}
        contexts: list[Context] = []
        for i in np.argsort(-feature.values.astype(np.float32), kind="stable"):
            if len(contexts) == n:
                break
            position = int(feature.positions[i])
            sequence, start, end = self._window(position, before, after)
            document = int(self.tokens["sequence_document"][sequence])
            if documents.get(document, 0) >= per_document or any(start < e and s < end for s, e in taken):
                continue
            taken.append((start, end))
            documents[document] = documents.get(document, 0) + 1
            contexts.append(self.context(feature, position, before, after))
        return contexts

    def random_contexts(self, j: int, n: int = 20, seed: int = 0, before: int = 24, after: int = 16) -> list[Context]:
        """`n` (or all) of the tokens on which the feature fires, drawn uniformly without replacement: what it usually does."""
        feature = self.feature(j)
        rng = np.random.default_rng((seed, j))
        drawn = rng.choice(len(feature.positions), min(n, len(feature.positions)), replace=False)
        return [self.context(feature, feature.positions[i], before, after) for i in drawn]

    def histogram(self, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Edges [bins + 1] at 2^(k/4) and the number of activations in each bin [bins]; empty for a feature that never fires."""
        values = self.feature(j).values.astype(np.float64)
        values = values[values > 0]  # float16 rounds activations under 3e-8 to 0
        if not len(values):
            return np.zeros(0), np.zeros(0, np.int64)
        low, high = np.floor(np.log2([values.min(), values.max()]) * OCTAVE)
        edges = 2.0 ** (np.arange(low, high + 2) / OCTAVE)
        return edges, np.histogram(values, edges)[0]

    def top_tokens(self, j: int, n: int = 5) -> list[tuple[int, float]]:
        """The tokens on which most of the feature's activation falls: (id, share of the sum of its activations)."""
        feature = self.feature(j)
        ids, inverse = np.unique(self.tokens["ids"][feature.positions], return_inverse=True)
        mass = np.bincount(inverse, feature.values.astype(np.float64), len(ids))
        order = np.argsort(-mass, kind="stable")[:n]
        return [(int(ids[i]), float(mass[i] / max(mass.sum(), 1e-30))) for i in order]

    def lens_tokens(self, j: int, n: int = 10, *, bottom: bool = False) -> list[tuple[int, float]]:
        """The tokens whose logits the decoder row raises most (or, with `bottom`, lowers most): (id, value); [] without a lens."""
        columns = self.feature(j).columns
        side = "bottom" if bottom else "top"
        if f"{side}_token_ids" not in columns:
            return []
        return list(zip(columns[f"{side}_token_ids"][:n].tolist(), columns[f"{side}_token_values"][:n].tolist()))

    def search(self, query: str | Sequence[str], n: int = 20) -> "list[FiresOn]":
        """Features that fire on a word: see `sae.features.search.search`."""
        from sae.features.search import search

        return search(self, query, n)

    def promotes(self, query: str | Sequence[str], n: int = 20) -> "list[Promotes]":
        """Features that make a word more likely: see `sae.features.search.promotes`."""
        from sae.features.search import promotes

        return promotes(self, query, n)

    def _window(self, position: int, before: int, after: int) -> tuple[int, int, int]:
        """Sequence of `position`, and the window's first token and the one after its last."""
        starts = self.tokens["sequence_starts"]
        sequence = int(np.searchsorted(starts, position, "right")) - 1
        start, end = max(int(starts[sequence]), int(position) - before), min(int(starts[sequence + 1]), int(position) + after + 1)
        return sequence, start, end
