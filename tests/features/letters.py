"""An index in memory whose text is random letters and whose features fire by rules that are known."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from sae.features.index.reader import FeatureIndex

PIECES = [b"<s>", *(bytes([c]) for c in b"abcdef")]
A, C = 1, 3
Rule = Callable[[list[int], int], float]
"""Activation of a feature from a sequence's tokens and a place in it."""


def token_c(ids: list[int], i: int) -> float:
    return 2.0 if ids[i] == C else 0.0


def a_star_c(ids: list[int], i: int) -> float:
    return 3.0 if ids[i] == C and i >= 2 and ids[i - 2] == A else 0.0


def after_a(ids: list[int], i: int) -> float:
    return 1.5 if i and ids[i - 1] == A else 0.0


def first(ids: list[int], i: int) -> float:
    return 1.0 if i == 1 else 0.0


def never(_ids: list[int], _i: int) -> float:
    return 0.0


RULES: list[Rule] = [token_c, a_star_c, first, never, after_a]


def texts(documents: int = 60, length: int = 40, seed: int = 0) -> list[list[int]]:
    """Letters behind a beginning-of-text token."""
    rng = np.random.default_rng(seed)
    return [[0, *rng.integers(1, len(PIECES), length).tolist()] for _ in range(documents)]


def index_of(sequences: list[list[int]], activations: list[np.ndarray], documents: list[int] | None = None) -> FeatureIndex:
    """`activations` of every feature over all tokens end to end; beginning-of-text tokens (0) were not scanned."""
    ids = np.concatenate([np.array(s, np.int32) for s in sequences])
    scanned = ids != 0
    positions = [np.flatnonzero(a * scanned).astype(np.uint32) for a in activations]
    counts = np.array([len(p) for p in positions])
    tokens = {
        "ids": ids,
        "scanned": scanned,
        "sequence_starts": np.r_[0, np.cumsum([len(s) for s in sequences])],
        "sequence_document": np.array(documents if documents is not None else range(len(sequences)), np.int32),
        "document_label": np.full(len(sequences), -1, np.int32),
        "piece_bytes": np.frombuffer(b"".join(PIECES), np.uint8),
        "piece_lengths": np.array([len(p) for p in PIECES], np.int32),
        "piece_special": np.arange(len(PIECES)) == 0,
    }
    records = {
        "offsets": np.r_[0, np.cumsum(counts)],
        "positions": np.concatenate(positions),
        "values": np.concatenate([a[p] for a, p in zip(activations, positions)]).astype(np.float16),
    }
    info = {"dictionary_crc32": "00000000", "tokens_scanned": int(scanned.sum()), "label_names": []}
    columns = {"count": counts, "max": np.array([(a * scanned).max() for a in activations], np.float32)}
    return FeatureIndex(Path("memory"), info, columns, records, {}, {}, tokens)


def by_rules(sequences: list[list[int]], rules: list[Rule] = RULES) -> FeatureIndex:
    return index_of(sequences, [np.array([rule(s, i) for s in sequences for i in range(len(s))]) for rule in rules])
