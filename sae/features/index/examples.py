"""Examples of a feature, chosen while a block of features is in memory: top examples, samples, histogram, tokens.

s features of a block · n entries of the block, feature after feature, positions ascending within a feature (see csc.py)

Everything is exact and depends on the set of activations alone, not on their order: merged parts of a corpus have the same choice as one
pass.
"""

from typing import NamedTuple

import numpy as np

TOP = 32  # examples kept of each feature
BEFORE, AFTER = 24, 16  # tokens of an example's window around the firing one
PER_DOCUMENT = 2
OCTAVE = 4  # histogram bins per doubling
LOWEST = -24  # log2 of the smallest float16 above 0
BINS = (16 - LOWEST) * OCTAVE
BUCKETS, BUCKET_SAMPLES = 12, 5  # of one octave each, from the feature's maximum down; the last takes all below
TOKENS = 10
NONE = np.uint32(0xFFFFFFFF)


class Text(NamedTuple):
    """Facts about every token of the corpus."""

    ids: np.ndarray
    sequence: np.ndarray
    """number of its sequence, int32"""
    document: np.ndarray
    """number of its document, int32; the sequences of a document follow one another"""

    @classmethod
    def of(cls, ids: np.ndarray, sequence_starts: np.ndarray, sequence_document: np.ndarray) -> "Text":
        lengths = np.diff(sequence_starts)
        return cls(ids, np.repeat(np.arange(len(lengths), dtype=np.int32), lengths), np.repeat(sequence_document.astype(np.int32), lengths))


def bins_of(values: np.ndarray) -> np.ndarray:
    """Histogram bin of float16 values: bin k starts at 2^(k / 4 - 24); 255 for 0, to which float16 rounds values below 3e-8."""
    return _BIN_OF[values.view(np.uint16)]


def _bin_table() -> np.ndarray:
    values = np.arange(1 << 15, dtype=np.uint16).view(np.float16).astype(np.float64)
    table = np.full(1 << 16, 255, np.uint8)
    finite = np.flatnonzero((values > 0) & np.isfinite(values))
    table[finite] = np.floor(np.log2(values[finite]) * OCTAVE) - LOWEST * OCTAVE
    return table


_BIN_OF = _bin_table()


def examples(begin: int, block: dict[str, np.ndarray], text: Text) -> dict[str, np.ndarray]:
    """Rows [s, ...] of details.safetensors for the block whose first feature is `begin`."""
    offsets, positions, values = block["offsets"], block["positions"], block["values"]
    feature_n = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    bin_n = bins_of(values)
    histogram = np.bincount(feature_n * 256 + bin_n, minlength=256 * (len(offsets) - 1)).reshape(-1, 256)[:, :BINS]
    token_ids, token_shares = top_tokens(offsets, feature_n, values, text.ids[positions])
    return {
        "top_entries": top_examples(offsets, feature_n, positions, values, text),
        "bucket_entries": bucket_samples(begin, offsets, feature_n, positions, bin_n),
        "histogram": histogram.astype(np.uint32),
        "token_ids": token_ids,
        "token_shares": token_shares,
    }


def smallest(group_n: np.ndarray, groups: int, score_n: np.ndarray, k: int) -> np.ndarray:
    """Entry numbers [groups, k] of each group's lowest scores (uint32), lowest first, the earlier of equals first; -1: there is none."""
    count = np.bincount(group_n, minlength=groups)
    ends = np.cumsum(count)
    key = group_n.astype(np.uint64) << np.uint64(32)
    key |= score_n
    ordered = np.sort(key)
    limit = np.zeros(groups, np.uint64)
    some = np.flatnonzero(count)
    limit[some] = ordered[(ends - count + np.minimum(count, k) - 1)[some]]
    kept = np.flatnonzero(key <= limit[group_n])
    kept = kept[np.argsort(key[kept], kind="stable")]
    group = group_n[kept]
    place = np.arange(len(kept)) - np.searchsorted(group, group)  # in its group
    out = np.full((groups, k), -1, np.int64)
    fits = place < k
    out[group[fits], place[fits]] = kept[fits]
    return out


def numbered(chosen: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Entries of a block [s, k] as uint32 numbers within their feature; -1 becomes `NONE`."""
    return np.where(chosen < 0, int(NONE), chosen - offsets[:-1, None]).astype(np.uint32)


def top_examples(offsets: np.ndarray, feature_n: np.ndarray, positions: np.ndarray, values: np.ndarray, text: Text) -> np.ndarray:
    """The highest activations whose windows share no token, at most `PER_DOCUMENT` from one document: entry numbers [s, TOP].

    Taken greedily from the highest down; of equal activations the earlier token is first. A round takes one example of every
    feature and strikes out what it excludes, so that the cost does not depend on how many candidates must be passed over.
    """
    s, n = len(offsets) - 1, len(positions)
    chosen = np.full((s, TOP), -1, np.int64)
    fires = np.flatnonzero(np.diff(offsets))
    if not len(fires):
        return numbered(chosen, offsets)
    # the value from the top, then the place from the end; 0: struck out
    rank_n = (values.view(np.uint16).astype(np.uint64) + np.uint64(1)) << np.uint64(32)
    rank_n |= np.arange(n - 1, -1, -1, dtype=np.uint64)
    sequence_n, document_n = text.sequence[positions], text.document[positions]
    new_run = np.r_[True, (document_n[1:] != document_n[:-1]) | (feature_n[1:] != feature_n[:-1])]
    run_n = np.cumsum(new_run) - 1  # of entries of one feature in one document
    run_bounds = np.r_[np.flatnonzero(new_run), n]
    taken = np.zeros(len(run_bounds) - 1, np.uint8)
    reach = BEFORE + AFTER  # windows of tokens this far apart still share one
    around = np.arange(-reach, reach + 1)
    for k in range(TOP):
        best = np.maximum.reduceat(rank_n, offsets[fires])
        left = best > 0
        if not left.any():
            break
        entry = n - 1 - (best[left] & np.uint64(0xFFFFFFFF)).astype(np.int64)
        feature = fires[left]
        chosen[feature, k] = entry
        near = np.clip(entry[:, None] + around, offsets[feature][:, None], offsets[feature + 1][:, None] - 1)
        apart = np.abs(positions[near].astype(np.int64) - positions[entry][:, None].astype(np.int64))
        rank_n[near[(apart <= reach) & (sequence_n[near] == sequence_n[entry][:, None])]] = 0
        run = run_n[entry]
        taken[run] += 1
        full = run[taken[run] == PER_DOCUMENT]
        lengths = run_bounds[full + 1] - run_bounds[full]
        rank_n[np.repeat(run_bounds[full + 1] - np.cumsum(lengths), lengths) + np.arange(lengths.sum())] = 0
    return numbered(chosen, offsets)


def bucket_samples(begin: int, offsets: np.ndarray, feature_n: np.ndarray, positions: np.ndarray, bin_n: np.ndarray) -> np.ndarray:
    """In each octave of activation below the feature's maximum, the entries with the lowest hash: [s, BUCKETS, BUCKET_SAMPLES]."""
    s = len(offsets) - 1
    octave_n = np.where(bin_n == 255, 0, bin_n // OCTAVE).astype(np.int64)
    fires = np.flatnonzero(np.diff(offsets))
    highest = np.zeros(s, np.int64)
    if len(fires):
        highest[fires] = np.maximum.reduceat(octave_n, offsets[fires])
    group_n = feature_n * BUCKETS + np.minimum(highest[feature_n] - octave_n, BUCKETS - 1)
    chosen = smallest(group_n, s * BUCKETS, hash_of(positions, feature_n + begin), BUCKET_SAMPLES)
    return numbered(chosen.reshape(s, -1), offsets).reshape(s, BUCKETS, BUCKET_SAMPLES)


def hash_of(positions: np.ndarray, features: np.ndarray) -> np.ndarray:
    """32 bits for each (position, feature), independent of the activation: the finaliser of splitmix64."""
    x = positions.astype(np.uint64) << np.uint64(24)
    x ^= features.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    return (x >> np.uint64(32)).astype(np.uint32)


def top_tokens(offsets: np.ndarray, feature_n: np.ndarray, values: np.ndarray, ids_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens with most of each feature's activation, most first, and their shares of it: [s, TOKENS] each; -1: there are no more."""
    s = len(offsets) - 1
    key = feature_n.astype(np.uint64) << np.uint64(48)
    key |= ids_n.astype(np.uint64) << np.uint64(16)
    key |= values.view(np.uint16)
    key.sort()
    pair = key >> np.uint64(16)
    heads = np.flatnonzero(np.r_[True, pair[1:] != pair[:-1]]) if len(pair) else np.zeros(0, np.int64)
    mass = np.add.reduceat(key.astype(np.uint16).view(np.float16).astype(np.float64), heads) if len(heads) else np.zeros(0)
    feature = (pair[heads] >> np.uint64(32)).astype(np.int64)
    falling = np.uint32(0xFFFFFFFF) - mass.astype(np.float32).view(np.uint32)
    chosen = smallest(feature, s, falling, TOKENS)
    total = np.bincount(feature, mass, s)
    ids, shares = np.full((s, TOKENS), -1, np.int32), np.zeros((s, TOKENS), np.float32)
    some = chosen >= 0
    ids[some] = (pair[heads[chosen[some]]] & np.uint64(0xFFFFFFFF)).astype(np.int32)
    shares[some] = mass[chosen[some]] / np.maximum(np.repeat(total, some.sum(1)), 1e-30)
    return ids, shares


def reach(block: dict[str, np.ndarray], text: Text) -> dict[str, np.ndarray]:
    """The number of sequences and documents on which each feature of the block fires."""
    feature_n = np.repeat(np.arange(len(block["offsets"]) - 1), np.diff(block["offsets"]))
    counts = {}
    for name, of in (("sequences", text.sequence), ("documents", text.document)):
        place = of[block["positions"]]
        new = np.r_[True, (place[1:] != place[:-1]) | (feature_n[1:] != feature_n[:-1])][: len(place)]
        counts[name] = np.bincount(feature_n[new], minlength=len(block["offsets"]) - 1)
    return counts


def by_top_token(token_ids: np.ndarray, token_shares: np.ndarray) -> dict[str, np.ndarray]:
    """Features by token, from the features' top tokens [f, TOKENS]: those of token t are from offsets[t] to offsets[t + 1], the largest
    share first, the lower feature first of equals."""
    feature, place = np.nonzero(token_ids >= 0)
    token, share = token_ids[feature, place], token_shares[feature, place]
    key = token.astype(np.uint64) << np.uint64(32)
    key |= np.uint32(0xFFFFFFFF) - share.view(np.uint32)
    order = np.argsort(key, kind="stable")
    counts = np.bincount(token, minlength=1)
    return {"offsets": np.r_[0, np.cumsum(counts)], "features": feature[order].astype(np.uint32), "shares": share[order]}
