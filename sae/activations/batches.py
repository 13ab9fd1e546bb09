"""Shuffled batches of a cache's rows, epoch after epoch, the same for the same seed, from any position on.

An epoch visits blocks of consecutive rows in random order, spread so that every stretch of it has of each shard its share. A group of
blocks fills a buffer, whose rows are dealt out in random order, while a thread reads the next group. Every shard was shuffled when it was
written, so a block is a fair sample of its shard and reading stays sequential.

Several readers ("ranks") share an epoch: its blocks, in their random order, are cut into as many stretches of equal length, and each rank
reads one. From epoch to epoch the ranks take turns, so that none is ever more than a row ahead.

b rows of a batch · d width of the site
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.errors import InputError

if TYPE_CHECKING:
    from sae.activations.cache import ActivationCache

BUFFER_BYTES = 1 << 27
BLOCKS_PER_BUFFER = 64
READERS = 4  # blocks read at a time: one alone leaves the disk idle between two, and was measured a third slower


class Order(NamedTuple):
    """One rank's share of an epoch."""

    blocks_n3: np.ndarray
    """int64 [blocks, 3]: shard, first row, rows; in the order in which they are read"""
    group_blocks: np.ndarray
    """int64 [groups + 1], blocks before each group"""
    group_starts: np.ndarray
    """int64 [groups + 1], rows of the share before each group"""


Group = tuple[int, int]
"""epoch, number within this rank's share of it"""


class ActivationBatches:
    """Endless batches [batch_size, d_in] of `dtype` on `device`; the rows of a last short batch carry over into the next epoch.

    Of `world` readers with the same cache, seed and buffer, each has its own `rank`, from 0: together they deal out every row once in an
    epoch, each `batch_size` rows a step. `rows` and `position` are then still those of the whole cache and of one reader.

    Memory: two buffers of `buffer_bytes` (128 MB by default, less for a smaller cache) in the cache's format, filled from 64 blocks each.
    """

    def __init__(
        self,
        cache: "ActivationCache",
        batch_size: int,
        *,
        seed: int = 0,
        split: str = "train",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        buffer_bytes: int = BUFFER_BYTES,
        rank: int = 0,
        world: int = 1,
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
        if not 0 <= rank < world:
            raise InputError(f"expected a rank from 0 to {world - 1}, below the number of readers, but {rank} came; count them from 0")
        self.rank, self.world = rank, world
        self.position = 0
        """batches drawn so far"""
        block_rows = max(1, buffer_bytes // BLOCKS_PER_BUFFER // (cache.d_in * cache.dtype.itemsize))
        blocks = [
            (number, start, min(block_rows, shard.rows - start))
            for number, shard in enumerate(self._shards)
            for start in range(0, shard.rows, block_rows)
        ]
        self._blocks_n3 = np.array(blocks, dtype=np.int64)
        cuts = np.array([self.rows * i // world for i in range(world + 1)])
        shares = np.diff(cuts)[(rank + np.arange(world)) % world]  # rows of this rank in `world` epochs, after which all have had all
        self._cuts, self._share_starts = cuts, np.concatenate([[0], np.cumsum(shares)])
        capacity = min(BLOCKS_PER_BUFFER * block_rows, self.rows)
        self._buffers_2nd = torch.empty(2, capacity, cache.d_in, dtype=cache.dtype)
        self._dealt = 0  # which of them is dealt out; the thread reads into the other
        self._group: Group | None = None  # that is in it
        self._order_n = torch.empty(0, dtype=torch.int64)
        self._reading: tuple[Group, Future[Tensor]] | None = None
        self._thread = ThreadPoolExecutor(1)
        self._order_of = lru_cache(maxsize=2)(self._make_order)

    @property
    def batches_per_epoch(self) -> float:
        return self.rows / (self.batch_size * self.world)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        parts = []
        row = self.position * self.batch_size  # of this rank, counted over all epochs
        left = self.batch_size
        while left:
            chosen_n = self._rows_from(row, left)
            # widened where they go: to a GPU half as many bytes travel
            parts.append(self._buffers_2nd[self._dealt].index_select(0, chosen_n).to(self.device).to(self.dtype))
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
        turn, within = divmod(row, self.rows)
        share = int(np.searchsorted(self._share_starts, within, side="right")) - 1
        epoch, within = turn * self.world + share, within - int(self._share_starts[share])
        starts = self._order_of(epoch).group_starts
        group = int(np.searchsorted(starts, within, side="right")) - 1
        if self._group != (epoch, group):
            self._turn_to((epoch, group))
        offset = within - int(starts[group])
        return self._order_n[offset : offset + most]

    def _make_order(self, epoch: int) -> Order:
        blocks_n3 = self._blocks_n3[_spread(self._blocks_n3[:, 0], np.random.default_rng([self.seed, epoch]))]
        ends_n = np.cumsum(blocks_n3[:, 2])
        starts_n = ends_n - blocks_n3[:, 2]
        share = (self.rank + epoch) % self.world
        first, last = self._cuts[share], self._cuts[share + 1]
        mine_n = (ends_n > first) & (starts_n < last)
        blocks_n3 = blocks_n3[mine_n]
        before_n = np.maximum(first - starts_n[mine_n], 0)  # rows of a block that belong to the rank before, and to the one after
        after_n = np.maximum(ends_n[mine_n] - last, 0)
        blocks_n3 += np.stack([0 * before_n, before_n, -before_n - after_n], axis=1)
        ends_n = np.cumsum(blocks_n3[:, 2])
        groups = max(1, -(-len(blocks_n3) // BLOCKS_PER_BUFFER))
        group_blocks = np.arange(groups + 1) * len(blocks_n3) // groups  # of equal length, so that none is mixed less than others
        return Order(blocks_n3, group_blocks, np.concatenate([[0], ends_n])[group_blocks])

    def _turn_to(self, group: Group) -> None:
        """Deals out another group from now on, and has the thread read the one after it."""
        self._group = None  # stays so if a shard turns out to be damaged
        reading, self._reading = self._read(group), None
        self._order_n = reading.result()
        self._group, self._dealt = group, 1 - self._dealt
        epoch, number = group
        last = len(self._order_of(epoch).group_blocks) - 2
        after = (epoch, number + 1) if number < last else (epoch + 1, 0)
        self._reading = after, self._read(after)

    def _read(self, group: Group) -> Future[Tensor]:
        """What will be the group's order when its rows are in the other buffer; nothing is begun if they are already on their way."""
        if self._reading and self._reading[0] == group:
            return self._reading[1]
        epoch, number = group
        order = self._order_of(epoch)
        first, last = order.group_blocks[number : number + 2]
        return self._thread.submit(self._fill, group, order.blocks_n3[first:last], self._buffers_2nd[1 - self._dealt])

    def _fill(self, group: Group, blocks_n3: np.ndarray, out_nd: Tensor) -> Tensor:
        """Reads blocks; returns the order in which their rows are dealt out, int64 [n]."""
        ends_n = np.cumsum(blocks_n3[:, 2])
        filled = int(ends_n[-1])

        def read(end: int, block: list[int]) -> None:
            shard, start, rows = block
            self.cache.read_block(self._shards[shard], start, out_nd[end - rows : end])

        with ThreadPoolExecutor(READERS) as readers:
            list(readers.map(read, ends_n.tolist(), blocks_n3.tolist()))  # raises what one of them raised
        epoch, number = group
        rng = np.random.default_rng([self.seed, epoch, number + 1, self.rank])  # + 1: numpy takes [s, e, 0] for [s, e]
        return torch.from_numpy(rng.permutation(filled))


def _spread(shard_n: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order of blocks, int64 [n], in which every stretch has of each shard its share, to within a block or so.

    `shard_n` rises. The blocks of a shard, in random order, each fall at random into an equal part of the epoch.
    """
    within_n = np.lexsort((rng.random(len(shard_n)), shard_n))
    number_n = np.arange(len(shard_n)) - np.searchsorted(shard_n, shard_n)
    place_n = (number_n + rng.random(len(shard_n))) / np.bincount(shard_n)[shard_n]
    return within_n[np.argsort(place_n)]
