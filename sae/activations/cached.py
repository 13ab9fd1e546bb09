"""Training rows from a cache.

An epoch visits blocks of consecutive rows in random order, spread so that every part of it has its share of each shard. A group of
blocks fills a buffer, whose rows are returned in random order, while a thread reads the next group. Every shard was shuffled when it was
written, so a block is a fair sample of its shard and reading stays sequential. All sites of a cache have the same order, and keep it here.

Several readers ("ranks") share an epoch: its blocks, in their random order, are cut into equal parts, and each rank
reads one. The ranks change places in each epoch, so that none is ever more than a row ahead.

n rows · d width of a site
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.activations.cache import ActivationCache, Shard, misaligned
from sae.activations.harvest.massive import sampled, sentence
from sae.activations.source import Batches, Group
from sae.disk.remote import RemotePath
from sae.errors import InputError

BUFFER_BYTES = 1 << 27
BLOCKS_PER_BUFFER = 64
MEASURED = 1 << 15
READERS = 4  # blocks read at a time: one alone leaves the disk idle between two, and was measured a third slower
REMOTE_READERS = 16  # behind a URL each waits tens of milliseconds for its first byte


class CachedSource:
    """A `Source` that reads a cache at one or several of its sites.

    If one of `caches` left out a damaged shard, it is left out at every site. Raises `InputError` for sites of different caches, whose
    rows belong to different tokens. `dealt`: sites that batches have, all by default; their rows come in the order of all sites.
    """

    def __init__(self, *caches: ActivationCache, dealt: Sequence[str] | None = None):
        if len({cache.folder.resolve() for cache in caches}) > 1:
            folders = " and ".join(str(cache.folder) for cache in caches)
            raise InputError(f"expected sites of one cache, got {folders}; harvest all sites into one")
        self.caches = {cache.site: cache for cache in caches}
        self.dealt = self.caches if dealt is None else {site: self.caches[site] for site in self.caches if site in dealt}
        self.widths = {site: cache.d_in for site, cache in self.caches.items()}
        self.rows = _rows(self.shards("train"))

    @property
    def manifest(self) -> dict[str, Any]:
        return next(iter(self.caches.values())).manifest

    def shards(self, split: str) -> dict[str, list[Shard]]:
        """site -> the shards that all sites have, in one order."""
        shards_of = {site: cache.shards(split) for site, cache in self.caches.items()}
        common = set.intersection(*({shard.name for shard in shards} for shards in shards_of.values()))
        return {site: [shard for shard in shards if shard.name in common] for site, shards in shards_of.items()}

    def mean_squared_norm(self, site: str) -> float:
        return self.caches[site].mean_squared_norm

    def first_rows(self, site: str) -> Tensor:
        """[n, d], a fair sample of the training rows: those of the first shard."""
        return self.caches[site].read(self.shards("train")[site][0])[0]

    def rows_for_measuring(self, sites: Sequence[str]) -> tuple[bool, dict[str, Tensor]]:
        """True and the first held-out shard's rows, at most `MEASURED`; False and training rows if nothing was held out."""
        held_out = _rows(self.shards("held_out")) > 0
        shards = self.shards("held_out" if held_out else "train")
        return held_out, {site: self.caches[site].read(shards[site][0])[0][:MEASURED].float() for site in sites}

    def about_massive(self, site: str) -> str | None:
        """From the manifest, or from a sample if the manifest has no information."""
        found = self.manifest.get("massive")
        return sentence(found, site) if found else sampled(self.first_rows(site)[: 1 << 16])

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        split: str = "train",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        buffer_bytes: int = BUFFER_BYTES,
        rank: int = 0,
        world: int = 1,
    ) -> Batches:
        """Endless shuffled batches.

        Each of `world` readers with the same cache, sites, seed and buffer has its own `rank`, from 0: together they return every row
        once in an epoch, each `batch_size` rows a step.

        Memory: two buffers of `buffer_bytes` (128 MB by default, less for a smaller cache), all sites together, in the cache's format,
        filled from 64 blocks each. Raises `InputError` for a split without rows and for impossible numbers.
        """
        epochs = CachedEpochs(self, split, seed=seed, buffer_bytes=buffer_bytes, rank=rank, world=world)
        return Batches(epochs, batch_size, device=device, dtype=dtype)


class Order(NamedTuple):
    """One rank's share of an epoch."""

    blocks_n3: np.ndarray
    """int64 [blocks, 3]: shard, first row, rows; in the order in which they are read"""
    group_blocks: np.ndarray
    """int64 [groups + 1], blocks before each group"""
    group_starts: np.ndarray
    """int64 [groups + 1], rows of the share before each group"""


class CachedEpochs:
    """The `Epochs` of one rank."""

    def __init__(self, source: CachedSource, split: str, *, seed: int, buffer_bytes: int, rank: int, world: int):
        if seed < 0:
            raise InputError(f"expected a seed of at least 0, got {seed}; give another")
        if not 0 <= rank < world:
            raise InputError(f"expected a rank from 0 to {world - 1}, below the number of readers, got {rank}; count them from 0")
        self.seed, self.rank, self.world = seed, rank, world
        self._caches, self._shards = source.dealt, source.shards(split)
        rows = _rows(self._shards)
        if rows == 0:
            folder = next(iter(source.caches.values())).folder
            raise InputError(f"expected rows in the split {split!r} of {folder}, but there are none; harvest more documents")
        row_bytes = sum(cache.d_in * cache.dtype.itemsize for cache in source.caches.values())
        block_rows = max(1, buffer_bytes // BLOCKS_PER_BUFFER // row_bytes)
        blocks = [
            (number, start, min(block_rows, shard.rows - start))
            for number, shard in enumerate(next(iter(self._shards.values())))
            for start in range(0, shard.rows, block_rows)
        ]
        self._blocks_n3 = np.array(blocks, dtype=np.int64)
        cuts = np.array([rows * i // world for i in range(world + 1)])
        shares = np.diff(cuts)[(rank + np.arange(world)) % world]  # rows of this rank in `world` epochs, after which all have had all
        self._cuts, self._share_starts = cuts, np.concatenate([[0], np.cumsum(shares)])
        self.rows_per_epoch = rows / world
        capacity = min(BLOCKS_PER_BUFFER * block_rows, rows)
        self._buffers = [
            {site: torch.empty(capacity, cache.d_in, dtype=cache.dtype) for site, cache in self._caches.items()} for _ in range(2)
        ]
        self._aligned: set[int] = set()  # shards whose rows were found to be of the same tokens at every site
        self._dealt = 0  # which of them is dealt out; the thread reads into the other
        self._held: tuple[int, int] | None = None  # epoch and number of the group that is in it
        self._order_n = torch.empty(0, dtype=torch.int64)
        self._reading: tuple[tuple[int, int], Future[Tensor]] | None = None
        self._thread = ThreadPoolExecutor(1)
        self._order_of = lru_cache(maxsize=2)(self._make_order)

    def place(self, row: int) -> tuple[int, int]:
        turn, within = divmod(row, int(self._cuts[-1]))
        share = int(np.searchsorted(self._share_starts, within, side="right")) - 1
        return turn * self.world + share, within - int(self._share_starts[share])

    def starts(self, epoch: int) -> np.ndarray:
        return self._order_of(epoch).group_starts

    def group(self, epoch: int, number: int) -> Group:
        if self._held != (epoch, number):
            self._turn_to(epoch, number)
        return Group(self._buffers[self._dealt], self._order_n)

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

    def _turn_to(self, epoch: int, number: int) -> None:
        """Switches to another group, and starts reading the one after it in the thread."""
        self._held = None  # stays so if a shard turns out to be damaged
        reading, self._reading = self._read(epoch, number), None
        self._order_n = reading.result()
        self._held, self._dealt = (epoch, number), 1 - self._dealt
        last = len(self._order_of(epoch).group_blocks) - 2
        after = (epoch, number + 1) if number < last else (epoch + 1, 0)
        self._reading = after, self._read(*after)

    def _read(self, epoch: int, number: int) -> Future[Tensor]:
        """Starts reading a group into the other buffer, unless this is already running; returns the future of its order."""
        if self._reading and self._reading[0] == (epoch, number):
            return self._reading[1]
        order = self._order_of(epoch)
        first, last = order.group_blocks[number : number + 2]
        return self._thread.submit(self._fill, epoch, number, order.blocks_n3[first:last], self._buffers[1 - self._dealt])

    def _fill(self, epoch: int, number: int, blocks_n3: np.ndarray, out: dict[str, Tensor]) -> Tensor:
        """Reads blocks; returns the order in which their rows are returned, int64 [n]."""
        ends_n = np.cumsum(blocks_n3[:, 2])

        def read(end: int, block: list[int]) -> None:
            shard, start, rows = block
            if len(self._caches) > 1 and shard not in self._aligned:
                self._require_aligned(shard)
            for site, cache in self._caches.items():
                cache.read_block(self._shards[site][shard], start, out[site][end - rows : end])

        remote = any(isinstance(cache.folder, RemotePath) for cache in self._caches.values())
        with ThreadPoolExecutor(REMOTE_READERS if remote else READERS) as readers:
            list(readers.map(read, ends_n.tolist(), blocks_n3.tolist()))  # raises what one of them raised
        rng = np.random.default_rng([self.seed, epoch, number + 1, self.rank])  # + 1: numpy takes [s, e, 0] for [s, e]
        return torch.from_numpy(rng.permutation(int(ends_n[-1])))

    def _require_aligned(self, shard: int) -> None:
        """Raises `InputError` unless row i of the shard belongs to the same token at every site. Reads 8 bytes per row and site, once."""
        first, *others = self._caches.items()
        positions_n = first[1].positions(self._shards[first[0]][shard])
        for site, cache in others:
            if not np.array_equal(positions_n, cache.positions(self._shards[site][shard])):
                raise misaligned(self._shards[site][shard], cache)
        self._aligned.add(shard)


def _rows(shards_of: dict[str, list[Shard]]) -> int:
    return sum(shard.rows for shard in next(iter(shards_of.values())))


def _spread(shard_n: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order of blocks, int64 [n], in which every part has its share of each shard, up to about one block.

    `shard_n` rises. The blocks of a shard, in random order, each fall at random into an equal part of the epoch.
    """
    within_n = np.lexsort((rng.random(len(shard_n)), shard_n))
    number_n = np.arange(len(shard_n)) - np.searchsorted(shard_n, shard_n)
    place_n = (number_n + rng.random(len(shard_n))) / np.bincount(shard_n)[shard_n]
    return within_n[np.argsort(place_n)]
