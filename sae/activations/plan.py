"""What is visited when: sequences in a random order, pools of them, batches and shards inside a pool.

All of it follows from the tokens and the settings alone, so a resumed harvest finds the same plan without having kept it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sae.activations.tokens import SPLITS, Tokens


class Shard(NamedTuple):
    """A file to be written per site: rows `start` to `stop` of the pool's shuffled rows."""

    name: str
    start: int
    stop: int


class Pool(NamedTuple):
    """The unit of shuffling in memory and of resuming."""

    split: str
    number: int
    """counted within the split"""
    sequences: np.ndarray
    """int64, longest first, so that a batch holds sequences of nearly one length"""
    rows: int
    """kept tokens: the rows of each site"""
    shards: list[Shard]

    def permutation(self, seed: int) -> np.ndarray:
        """The order in which the pool's rows are written, int64 [rows]."""
        rng = np.random.default_rng([seed, SPLITS.index(self.split), self.number + 1])  # + 1: numpy takes [s, t, 0] for [s, t]
        return rng.permutation(self.rows)


def kept(ids: np.ndarray, left_out_id: int | None) -> np.ndarray:
    """Which tokens have their activations stored, bool of the same shape."""
    return np.ones(ids.shape, dtype=bool) if left_out_id is None else ids != left_out_id


def plan_pools(tokens: Tokens, *, seed: int, pool_tokens: int, shard_tokens: int, left_out_id: int | None) -> list[Pool]:
    """All pools, training ones first. A pool is closed by the sequence that brings it to `pool_tokens`."""
    starts = tokens.sequence_starts
    lengths = np.diff(starts)
    kept_rows = np.add.reduceat(kept(tokens.ids, left_out_id), starts[:-1], dtype=np.int64)
    pools: list[Pool] = []
    n_shards = 0
    for split, name in enumerate(SPLITS):
        order = np.random.default_rng([seed, split]).permutation(np.flatnonzero(tokens.sequence_split == split))
        begins = np.cumsum(lengths[order]) - lengths[order]  # tokens of the split visited before each sequence
        cuts = np.flatnonzero(np.diff(begins // pool_tokens)) + 1
        for number, sequences in enumerate(np.split(order, cuts) if len(order) else []):
            sequences = sequences[np.argsort(-lengths[sequences], kind="stable")]
            rows = int(kept_rows[sequences].sum())
            count = -(-rows // shard_tokens)
            bounds = [rows * i // count for i in range(count + 1)] if count else []  # of equal size, so that none is tiny
            shards = [Shard(f"{n_shards + i:05d}", bounds[i], bounds[i + 1]) for i in range(count)]
            n_shards += count
            pools.append(Pool(name, number, sequences, rows, shards))
    return pools


def count_rows(pools: list[Pool]) -> dict[str, int]:
    """Rows per site in each split."""
    return {split: sum(pool.rows for pool in pools if pool.split == split) for split in SPLITS}


def plan_batches(sequences: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Cuts `sequences` (longest first, of `lengths`) into batches that hold at most `batch_tokens` with their padding, or one sequence."""
    start = 0
    while start < len(sequences):
        count = max(1, batch_tokens // int(lengths[start]))
        yield sequences[start : start + count]
        start += count


def padding(pools: list[Pool], tokens: Tokens, batch_tokens: int) -> int:
    """Positions that are computed only to make batches rectangular."""
    lengths = np.diff(tokens.sequence_starts)
    total = 0
    for pool in pools:
        for batch in plan_batches(pool.sequences, lengths[pool.sequences], batch_tokens):
            total += len(batch) * int(lengths[batch].max()) - int(lengths[batch].sum())
    return total
