"""The order of the sequences, and which tokens are stored: sequences in a random order, pools of them, batches and shards inside a pool.

All of it follows from the tokens and the settings alone, so a resumed harvest finds the same plan without having kept it.

s sequences · p positions
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sae.activations.text.tokens import SPLITS, Tokens
from sae.errors import InputError

REASONS = ("beginning_of_text", "special_tokens", "outside_positions")
"""reasons why a token's activations are not stored; a token counts under the first that applies"""
COUNTED_AT_ONCE = 1 << 14
"""sequences whose masks are held in memory together"""


class Masks(NamedTuple):
    """Which tokens have no stored activations, as far as the tokens show."""

    bos_id: int | None = None
    special_ids: tuple[int, ...] = ()
    first: int = 0
    """positions of a sequence before this one are left out"""
    last: int | None = None
    """this position and those after it are left out"""

    def reasons(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """For ids and their positions in their sequences, of shapes that broadcast: 0 where stored, else 1 + an index into REASONS."""
        outside = (positions < self.first) | (False if self.last is None else positions >= self.last)
        special = np.isin(ids, self.special_ids) if self.special_ids else False
        found = np.where(special, 2, np.where(outside, 3, 0)).astype(np.uint8)
        return np.where(ids == self.bos_id, np.uint8(1), found) if self.bos_id is not None else np.broadcast_to(found, ids.shape)


def parse_positions(text: str | None) -> tuple[int, int | None]:
    """`"1:64"`, `":64"` or `"16:"` as first and last position; raises `InputError` for anything else."""
    first, colon, last = (text or ":").partition(":")
    if colon and all(part == "" or part.isdecimal() for part in (first, last)):
        begin, end = int(first or 0), int(last) if last else None
        if end is None or begin < end:
            return begin, end
    raise InputError(f"expected --positions as FIRST:LAST with FIRST below LAST, for example 1:64 or 16:, got {text!r}; give both or one")


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
    """tokens that the masks keep; the rows of each site, before norm outliers are taken from them"""
    shard_names: list[str]

    def permutation(self, seed: int, rows: int) -> np.ndarray:
        """The order in which the pool's rows are written, int64 [rows]."""
        rng = np.random.default_rng([seed, SPLITS.index(self.split), self.number + 1])  # + 1: numpy takes [s, t, 0] for [s, t]
        return rng.permutation(rows)

    def shards(self, rows: int) -> list[Shard]:
        """Shards of equal size, so that none is tiny; names that would get no row are skipped."""
        count = len(self.shard_names)
        cuts = [Shard(name, rows * i // count, rows * (i + 1) // count) for i, name in enumerate(self.shard_names)]
        return [shard for shard in cuts if shard.stop > shard.start]


def count_reasons(tokens: Tokens, masks: Masks) -> np.ndarray:
    """int64 [S, 1 + REASONS]: each sequence's stored tokens, and those left out for each reason."""
    starts = np.asarray(tokens.sequence_starts)
    width = 1 + len(REASONS)
    counts = np.empty((len(starts) - 1, width), dtype=np.int64)
    for begin in range(0, len(counts), COUNTED_AT_ONCE):
        ends = starts[begin : begin + COUNTED_AT_ONCE + 1]
        number = np.repeat(np.arange(len(ends) - 1), np.diff(ends))  # of each token's sequence
        reasons = masks.reasons(np.asarray(tokens.ids[ends[0] : ends[-1]]), np.arange(ends[0], ends[-1]) - ends[number])
        table = np.bincount(number * width + reasons, minlength=width * (len(ends) - 1))
        counts[begin : begin + len(ends) - 1] = table.reshape(-1, width)
    return counts


def plan_pools(tokens: Tokens, *, seed: int, pool_tokens: int, shard_tokens: int, masks: Masks) -> list[Pool]:
    """All pools, training ones first. A pool is closed by the sequence that brings it to `pool_tokens`."""
    lengths = np.diff(tokens.sequence_starts)
    kept_rows = count_reasons(tokens, masks)[:, 0]
    pools: list[Pool] = []
    n_shards = 0
    for split, name in enumerate(SPLITS):
        order = np.random.default_rng([seed, split]).permutation(np.flatnonzero(tokens.sequence_split == split))
        begins = np.cumsum(lengths[order]) - lengths[order]  # tokens of the split visited before each sequence
        cuts = np.flatnonzero(np.diff(begins // pool_tokens)) + 1
        for number, sequences in enumerate(np.split(order, cuts) if len(order) else []):
            sequences = sequences[np.argsort(-lengths[sequences], kind="stable")]
            rows = int(kept_rows[sequences].sum())
            names = [f"{n_shards + i:05d}" for i in range(-(-rows // shard_tokens))]
            n_shards += len(names)
            pools.append(Pool(name, number, sequences, rows, names))
    return pools


def count_rows(pools: list[Pool]) -> dict[str, int]:
    """Rows per site in each split, before norm outliers are taken from them."""
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
