"""Neighbours of a feature: those whose decoder rows point the same way, and those that fire on the same tokens.

d model width · f features · n tokens of the corpus
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sae.dictionaries.rows import at_once, ranges, rows_of
from sae.features.index.examples import NONE, smallest
from sae.features.index.parallel import in_order
from sae.progress import progress

KEPT = 20
BLOCK_BYTES = 1 << 26  # of one block of cosines
PAIRS = 1 << 20  # pairs of entries of one token counted at a time: about 40 bytes of memory each


@torch.no_grad()
def cosine_neighbours(W_dec_fd: Tensor, ids_fk: np.ndarray, cosines_fk: np.ndarray) -> None:
    """Fills in the features with the highest cosine of decoder rows, highest first; unfilled places keep their value.

    Costs 2 f² d operations: nothing at 65,536 features, a day on a CPU at a million.
    """
    f, size = len(W_dec_fd), at_once(W_dec_fd)
    kept = min(ids_fk.shape[1], f - 1)
    if not kept:
        return

    @lru_cache(maxsize=1)
    def unit(low: int, high: int) -> Tensor:
        return torch.nn.functional.normalize(rows_of(W_dec_fd, slice(low, high)).float(), dim=-1)

    step = max(1, BLOCK_BYTES // (4 * min(f, size)))
    for low in range(0, f, step):
        own_bd = unit(0, f)[low : low + step] if size >= f else unit(low, min(f, low + step))
        best: list[Tensor] = []
        for part in ranges(f, size):
            block_bf = own_bd @ unit(part.start, part.stop).T
            if part.start - len(own_bd) < low < part.stop:
                block_bf.diagonal(low - part.start).fill_(-2)  # not itself
            cosine_bk, place_bk = block_bf.topk(min(kept, block_bf.shape[1]))
            found = [cosine_bk, place_bk + part.start]
            if best:
                both = [torch.cat(pair, dim=1) for pair in zip(best, found)]
                order_bk = both[0].topk(min(kept, both[0].shape[1])).indices
                found = [one.gather(1, order_bk) for one in both]
            best = found
        cosines_fk[low : low + step, :kept] = best[0].cpu().numpy()  # host sync
        ids_fk[low : low + step, :kept] = best[1].cpu().numpy()  # host sync


def by_token(offsets: np.ndarray, positions: np.ndarray, n: int, features_n: np.ndarray, block_entries: int) -> np.ndarray:
    """The matrix in token order. Fills `features_n` [entries] with the features of each token, ascending; returns where a token's begin."""
    counts = np.zeros(n, np.int64)
    for low in range(0, len(positions), block_entries):
        counts += np.bincount(positions[low : low + block_entries], minlength=n)
    starts = np.r_[0, np.cumsum(counts)]
    free = starts[:-1].copy()
    for low in range(0, len(positions), block_entries):
        part = positions[low : low + block_entries]
        bounds = np.clip(offsets, low, low + len(part)) - low
        key = np.repeat(np.arange(len(offsets) - 1, dtype=np.uint64), np.diff(bounds))
        key |= part.astype(np.uint64) << np.uint64(32)
        key.sort()
        token = (key >> np.uint64(32)).astype(np.int64)
        new = np.r_[True, token[1:] != token[:-1]]
        heads = np.flatnonzero(new)
        lengths = np.diff(np.r_[heads, len(token)])
        features_n[free[token] + np.arange(len(token)) - np.repeat(heads, lengths)] = key.astype(np.uint32)
        free[token[heads]] += lengths
    return starts


def coactive(
    offsets: np.ndarray, positions: np.ndarray, starts: np.ndarray, features_n: np.ndarray, ids_fk: np.ndarray, counts_fk: np.ndarray
) -> None:
    """Fills in the features that fire on most of the same tokens, most first, the lower of equals first: exact, the sparse Xᵀ X.

    `starts`, `features_n`: from `by_token`. Costs the sum over tokens of the square of the features that fire there.
    """
    f, k = len(offsets) - 1, ids_fk.shape[1]
    lengths = np.diff(starts)
    pairs = np.r_[0, np.cumsum([_sum_of(lengths, positions[a:b]) for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist())])]
    ranges, low = [], 0
    while low < f:
        high = max(low + 1, int(np.searchsorted(pairs, pairs[low] + PAIRS, "right")) - 1)
        ranges.append((low, high))
        low = high

    def fill(bounds: tuple[int, int]) -> int:
        low, high = bounds
        count = _count_pairs(offsets, positions, starts, lengths, features_n, low, high)
        best = _best_of_table(count, low, k) if isinstance(count, torch.Tensor) else _best_of_pairs(*count, low, high, f, k)
        kept = best[0].shape[1]
        ids_fk[low:high, :kept], counts_fk[low:high, :kept] = best
        return high - low

    with progress("co-activation", f, "features") as bar:
        for features in in_order(fill, ranges):
            bar.advance(features)


def _sum_of(lengths: np.ndarray, positions: np.ndarray) -> int:
    return int(lengths[positions].sum())


def _best_of_table(count_bf: torch.Tensor, low: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Features and counts [b, k] from the counts of features from `low` on with all; -1 and 0: there are no more."""
    f = count_bf.shape[1]
    count_bf[:, low : low + len(count_bf)].fill_diagonal_(0)  # not with itself
    key_bf = count_bf.mul_(f).add_(torch.arange(f - 1, -1, -1))  # the count from the top, then the lower feature
    key_bk = key_bf.topk(min(k, f)).values
    count_bk = key_bk // f
    return torch.where(count_bk > 0, f - 1 - key_bk % f, -1).numpy(), count_bk.numpy()


def _best_of_pairs(pair_n: np.ndarray, count_n: np.ndarray, low: int, high: int, f: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The same from the existing pairs."""
    feature_n, other_n = pair_n // f, pair_n % f
    apart = feature_n + low != other_n  # not with itself
    feature_n, other_n, count_n = feature_n[apart], other_n[apart], count_n[apart]
    best = smallest(feature_n, high - low, (int(NONE) - count_n).astype(np.uint32), k)
    if not len(other_n):
        return best, np.zeros_like(best)
    return np.where(best < 0, -1, other_n[best]), np.where(best < 0, 0, count_n[best])


def _count_pairs(offsets, positions, starts, lengths, features_n, low: int, high: int) -> Tensor | tuple[np.ndarray, np.ndarray]:
    """On how many tokens features `low` to `high` - 1 fire together with every other: a table [high - low, f] where that is small, else
    (feature - low) * f + other feature, ascending, and the counts."""
    f = len(offsets) - 1
    begin, end = int(offsets[low]), int(offsets[high])
    row_n = np.repeat(np.arange(0, (high - low) * f, f), np.diff(offsets[low : high + 1]))
    few = (high - low) * f <= 4 * PAIRS  # then every pair has its own counter, else they are sorted
    kind = np.int32 if few and len(positions) < 1 << 31 else np.int64  # half the memory is nearly half the time
    counters, sorted_n = torch.zeros((high - low) * f if few else 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    others_n = torch.from_numpy(features_n.view(np.int32))  # fewer than 2^31 features, so the same numbers
    done = begin
    while done < end:  # once, unless a single feature has more pairs than fit
        part = positions[done : min(end, done + PAIRS)]
        many = np.cumsum(lengths[part])
        part = part[: max(1, int(np.searchsorted(many, PAIRS, "right")))] if many[-1] > PAIRS else part
        many, length = many[: len(part)], lengths[part]
        first_n, length_n = torch.from_numpy((starts[part] - (many - length)).astype(kind)), torch.from_numpy(length)
        where = first_n.repeat_interleave(length_n, output_size=int(many[-1]))
        where += torch.arange(int(many[-1]), dtype=where.dtype)
        pair_n = torch.from_numpy(row_n[done - begin : done - begin + len(part)].astype(kind)).repeat_interleave(length_n)
        pair_n += others_n.index_select(0, where)
        if few:
            counters += torch.bincount(pair_n, minlength=len(counters))
        else:
            sorted_n = torch.cat([sorted_n, pair_n]).sort().values
        done += len(part)
    if few:
        return counters.view(-1, f)
    pair_n, count_n = sorted_n.unique_consecutive(return_counts=True)
    return pair_n.numpy(), count_n.numpy()
