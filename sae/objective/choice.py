"""The k largest pre-activations of each row, or of a batch, as entries: exact, from the few that pass a guessed threshold.

b rows (tokens) · f features · n entries

torch.topk over [b, f] costs about as much as the encoder product. What passes a threshold that lets through a little more than is kept
is a short list; the choice is made in it. Where the guess was too high for a row, or for the batch, that part is chosen from again
without it, so that the guess decides the time and never the result. Of equal values the lower feature (in a batch: the earlier row) is
kept, as the gates do (sae/dictionaries/gates.py).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sae.entries import Buffers, Entries, entries_above, largest, starts_of

SHORT = 0.05
"""share of the rows whose k-th value the next batch's guess is above; they are chosen from whole"""
LOWER = (0.85, 0.5, 0.2, 0.0)
"""a batch's guesses, as shares of the last batch's threshold, the next where too few pass"""
SAMPLE = 64
"""rows from which the first guess is made"""


def top_of_rows(z_bf: Tensor, k: int, signed: bool, guess: float | None, buffers: Buffers) -> tuple[Entries, float]:
    """The k largest of each row that are above 0, and a guess for the next rows. `signed`: largest without signs, with them."""
    size_bf = torch.abs(z_bf, out=buffers.take("size", tuple(z_bf.shape), z_bf.dtype, z_bf.device)) if signed else z_bf
    rows = len(z_bf)
    if guess is None:
        guess = _low(size_bf[:: max(1, rows // SAMPLE)].topk(k).values[:, -1])
    row_n, column_n, value_n = entries_above(size_bf, guess, 0, buffers)
    starts = starts_of(row_n, rows).long()
    count_b = starts.diff()
    place_n = torch.arange(len(row_n), device=row_n.device) - starts[row_n.long()]
    width = max(k + 1, int(count_b.max()))  # host sync
    list_bn = size_bf.new_zeros(rows, width)
    list_bn[row_n.long(), place_n] = value_n
    kept_bk = largest(list_bn, k)
    value_bk = list_bn.gather(1, kept_bk)
    feature_bk = column_n.new_zeros(rows, width)
    feature_bk[row_n.long(), place_n] = column_n
    feature_bk = feature_bk.gather(1, kept_bk)
    short_m = (count_b < k).nonzero().squeeze(1) if guess > 0 else count_b.new_empty(0)
    if len(short_m):
        again_mf = size_bf.index_select(0, short_m)
        kept_mk = largest(again_mf, k)
        feature_bk[short_m] = kept_mk.int()
        value_bk[short_m] = again_mf.gather(1, kept_mk)
    row_n, at_n = (~(value_bk <= 0)).nonzero(as_tuple=True)  # what is not a number is kept, so that the loss tells of it
    feature_n = feature_bk[row_n, at_n]
    value_n = z_bf[row_n, feature_n.long()] if signed else value_bk[row_n, at_n]
    return Entries(row_n.int(), feature_n, value_n), _low(value_bk.min(1).values)


def _low(kth_b: Tensor) -> float:
    """What all but a share `SHORT` of the rows' k-th values are at least."""
    return max(0.0, float(kth_b.kthvalue(1 + int(SHORT * len(kth_b))).values))  # host sync


def top_of_batch(
    chunks: Callable[[], Iterable[tuple[int, Tensor]]], total: int, share: float, guess: float | None, buffers: Buffers
) -> tuple[Entries, float]:
    """The `total` largest of a batch that are above 0, and the smallest of them (0 if there are none).

    `share` is that of all entries. `chunks` gives the number of the first row and pre-activations [chunk, f], one chunk after another,
    each valid until the next.
    """
    for lower in LOWER:
        found: list[Entries] = []
        for first, z_bf in chunks():
            if guess is None:
                sample_n = z_bf[:: max(1, len(z_bf) // SAMPLE)].flatten()
                below = len(sample_n) - round(share * len(sample_n))
                guess = max(0.0, float(sample_n.kthvalue(max(1, below)).values))  # host sync
            found.append(entries_above(z_bf, guess * lower, first, buffers))
        row_n, feature_n, value_n = (torch.cat(one) for one in zip(*found))
        if len(value_n) >= total or guess == 0:
            break
    if len(value_n) > total:
        smallest = value_n.kthvalue(len(value_n) - total + 1).values
        kept_n = ~(value_n <= smallest)  # what is not a number is kept, so that the loss tells of it
        tied_n = (value_n == smallest).nonzero().squeeze(1)
        kept_n[tied_n[: total - int(kept_n.sum())]] = True  # host sync
        row_n, feature_n, value_n = row_n[kept_n], feature_n[kept_n], value_n[kept_n]
    return Entries(row_n, feature_n, value_n), float(value_n.min()) if len(value_n) else 0.0  # host sync
