"""How well a cache's batches are shuffled: the number of documents in a batch, compared with a perfect shuffle of the same rows.

b rows of a batch · n rows of a split
"""

from math import inf, lgamma
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.activations.cache import ActivationCache, Shard
from sae.activations.cached import BLOCKS_PER_BUFFER, BUFFER_BYTES, CachedSource
from sae.activations.text.tokens import Tokens


class Mixing(NamedTuple):
    documents: float
    """distinct ones among the rows of a batch"""
    pairs: float
    """share of all pairs of its rows that come from one document"""


class ShuffleQuality(NamedTuple):
    batch_size: int
    measured: Mixing
    """mean over batches of the whole first epoch"""
    perfect: Mixing
    """expected value for batches drawn from all rows of the split"""

    @property
    def ratio(self) -> Mixing:
        """Measured over perfect: 1 and 1 for a perfect shuffle; fewer documents and more pairs for a poor one."""
        pairs = self.measured.pairs / self.perfect.pairs if self.perfect.pairs else 1.0
        return Mixing(self.measured.documents / self.perfect.documents, pairs)


def shuffle_quality(
    cache: ActivationCache,
    batch_size: int = 4096,
    *,
    batches: int = 16,
    seed: int = 0,
    split: str = "train",
    buffer_rows: int | None = None,
) -> ShuffleQuality:
    """Shuffle measures of the batches that `CachedSource` returns; only the rows' token positions are read, not the activations.

    `buffer_rows` is by default that of the cache's width. Raises `InputError` for a split without rows, and for damaged files.
    """
    positions = TokenPositions(cache)
    block_rows = (buffer_rows or BUFFER_BYTES // (cache.d_in * cache.dtype.itemsize)) // BLOCKS_PER_BUFFER
    buffer_bytes = max(1, block_rows) * BLOCKS_PER_BUFFER * positions.dtype.itemsize
    batch_size = min(batch_size, cache.rows(split)) or batch_size
    stand_in: Any = positions  # all of a cache that a reader asks for
    reader = CachedSource(stand_in).batches(batch_size, seed=seed, split=split, dtype=torch.int64, buffer_bytes=buffer_bytes)
    found = []
    for number in range(batches):
        reader.seek(int(number * reader.batches_per_epoch / batches))
        found.append(mixing(next(reader)[cache.site][:, 0].numpy(), cache.tokens))
    documents = np.zeros(len(cache.tokens.document_label), dtype=np.int64)
    for shard in cache.shards(split):
        documents += np.bincount(documents_of(positions.of(shard), cache.tokens), minlength=len(documents))
    return ShuffleQuality(batch_size, Mixing(*np.mean(found, axis=0).tolist()), perfect_mixing(documents, batch_size))


def mixing(positions_b: np.ndarray, tokens: Tokens) -> Mixing:
    """Shuffle measures of one batch, given the global token positions of its rows."""
    rows = np.unique(documents_of(positions_b, tokens), return_counts=True)[1]
    return Mixing(len(rows), _pairs(rows))


def perfect_mixing(document_rows: np.ndarray, batch_size: int) -> Mixing:
    """Expected value for `batch_size` rows drawn without replacement from documents with these numbers of rows, int64 [documents].

    A document with k of all n rows is absent with probability C(n - k, b) / C(n, b); a pair is from it with k (k - 1) / (n (n - 1)).
    """
    n = int(document_rows.sum())
    sizes, count = np.unique(document_rows, return_counts=True)
    absent = np.exp([_log_choose(n - int(k), batch_size) - _log_choose(n, batch_size) for k in sizes])
    return Mixing(float(count @ (1 - absent)), _pairs(document_rows))


def documents_of(positions_n: np.ndarray, tokens: Tokens) -> np.ndarray:
    """Numbers of the documents that hold these global token positions, int64 [n]."""
    return tokens.sequence_document[tokens.sequence_of(positions_n)]


class TokenPositions:
    """A cache whose rows are their own global token positions, int64 [n, 1], so that batches show which rows they contain."""

    d_in, dtype = 1, torch.int64

    def __init__(self, cache: ActivationCache):
        self.cache, self.folder, self.site = cache, cache.folder, cache.site
        self.rows, self.shards = cache.rows, cache.shards

    def of(self, shard: Shard) -> np.ndarray:
        """int64 [n], memory-mapped"""
        return self.cache.positions(shard)

    def read_block(self, shard: Shard, start: int, out_n1: Tensor) -> None:
        out_n1.copy_(torch.from_numpy(self.of(shard)[start : start + len(out_n1)].copy())[:, None])


def _pairs(rows: np.ndarray) -> float:
    """Share of pairs from one document, for documents with these numbers of rows."""
    n = int(rows.sum())
    return float((rows.astype(np.float64) * (rows - 1)).sum() / (n * (n - 1))) if n > 1 else 0.0


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) if n >= k else -inf
