"""Shuffled batches of a cache's rows, epoch after epoch, the same for the same seed, from any position on.

An epoch visits blocks of consecutive rows in random order. A group of blocks fills a buffer, whose rows are dealt out in random order.
Every shard was shuffled when it was written, so a block is a fair sample of its shard and reading stays sequential.

b rows of a batch · d width of the site
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.errors import InputError

BUFFER_BYTES = 1 << 28
BLOCKS_PER_BUFFER = 64


class Block(NamedTuple):
    shard: int
    start: int
    rows: int


class Order(NamedTuple):
    """One epoch."""

    blocks: np.ndarray
    """int64, block numbers in the order in which they are read"""
    group_starts: np.ndarray
    """int64 [groups + 1], rows of the epoch before each group"""


class ActivationBatches:
    """Endless batches [batch_size, d_in] of `dtype` on `device`; the rows of a last short batch carry over into the next epoch.

    Memory: a buffer of `buffer_bytes` (256 MB by default, less for a smaller cache) in the cache's format, filled from 64 blocks.
    """

    def __init__(
        self,
        cache: ActivationCache,
        batch_size: int,
        *,
        seed: int = 0,
        split: str = "train",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        buffer_bytes: int = BUFFER_BYTES,
    ):
        self.cache, self.batch_size, self.seed, self.device, self.dtype = cache, batch_size, seed, device, dtype
        self._shards = cache.shards(split)
        self.rows = cache.rows(split)
        if self.rows == 0:
            raise InputError(f"expected rows in the split {split!r} of {cache.folder}, but there are none; harvest more documents")
        if batch_size < 1:
            raise InputError(f"expected a batch size of at least 1, but {batch_size} came; give a larger number")
        if seed < 0:
            raise InputError(f"expected a seed of at least 0, but {seed} came; give another")
        self.position = 0
        """batches drawn so far"""
        block_rows = max(1, buffer_bytes // BLOCKS_PER_BUFFER // (cache.d_in * cache.dtype.itemsize))
        self._blocks = [
            Block(number, start, min(block_rows, shard.rows - start))
            for number, shard in enumerate(self._shards)
            for start in range(0, shard.rows, block_rows)
        ]
        capacity = min(BLOCKS_PER_BUFFER * block_rows, self.rows)
        self._buffer_nd = torch.empty(capacity, cache.d_in, dtype=cache.dtype)
        self._in_buffer: tuple[int, int] | None = None  # epoch, group
        self._order_n = torch.empty(0, dtype=torch.int64)
        self._order_of = lru_cache(maxsize=2)(self._make_order)

    @property
    def batches_per_epoch(self) -> float:
        return self.rows / self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        parts = []
        row = self.position * self.batch_size  # counted over all epochs
        left = self.batch_size
        while left:
            chosen_n = self._rows_from(row, left)
            parts.append(self._buffer_nd[chosen_n].to(self.device, self.dtype))
            row += len(chosen_n)
            left -= len(chosen_n)
        self.position += 1
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def seek(self, position: int) -> None:
        """Makes the next batch the one that an uninterrupted reader gives after `position` batches; reads nothing before it is drawn."""
        if position < 0:
            raise InputError(f"expected a position of at least 0, but {position} came; give the number of batches drawn")
        self.position = position

    def _rows_from(self, row: int, most: int) -> Tensor:
        """Buffer rows to deal out for the rows `row`, `row + 1`, ... of all epochs: at most `most`, and no further than the group."""
        epoch, within = divmod(row, self.rows)
        starts = self._order_of(epoch).group_starts
        group = int(np.searchsorted(starts, within, side="right")) - 1
        if self._in_buffer != (epoch, group):
            self._fill(epoch, group)
        offset = within - int(starts[group])
        return self._order_n[offset : offset + most]

    def _make_order(self, epoch: int) -> Order:
        blocks = np.random.default_rng([self.seed, epoch]).permutation(len(self._blocks))
        ends = np.cumsum([self._blocks[number].rows for number in blocks])
        return Order(blocks, np.concatenate([[0], ends[BLOCKS_PER_BUFFER - 1 :: BLOCKS_PER_BUFFER], ends[-1:]]))

    def _fill(self, epoch: int, group: int) -> None:
        self._in_buffer = None  # stays so if a shard turns out to be damaged
        filled = 0
        for number in self._order_of(epoch).blocks[group * BLOCKS_PER_BUFFER : (group + 1) * BLOCKS_PER_BUFFER]:
            shard, start, rows = self._blocks[number]
            self.cache.read_block(self._shards[shard], start, self._buffer_nd[filled : filled + rows])
            filled += rows
        rng = np.random.default_rng([self.seed, epoch, group + 1])  # + 1: numpy takes [s, e, 0] for [s, e]
        order = rng.permutation(filled)
        self._order_n = torch.from_numpy(order)
        self._in_buffer = (epoch, group)
