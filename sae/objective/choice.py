"""The k largest pre-activations of each row, or of a batch, as entries: exact, from the few that pass a guessed threshold.

b rows (tokens) · f features · n entries

torch.topk over [b, f] costs about as much as the encoder product. The entries that pass a threshold slightly below the k-th value
are a short list; the choice is made in it. If the guess was too high, those rows or the batch are tried again with a lower one, so
that the guess affects the time and never the result. Of equal values the lower feature (in a batch: the earlier row) is kept,
as the gates do (sae/dictionaries/gates.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sae.encoding import Encoder
from sae.encoding.guess import Line
from sae.entries import Buffers, Entries, entries_above, largest, starts_of
from sae.mesh import ALONE, Axis, Mesh

LOWER = (0.97, 0.85, 0.5, 0.2, 0.0)
"""guesses as shares of the last batch's threshold; the next one is used if too few entries pass"""
LIST_BYTES = 64 << 20
"""size of the lists in which the choice is made at a time: one row may list every feature"""
SAMPLE = 64
"""number of rows for the first guess"""


def top_of_rows(
    above: Callable[[Tensor, Tensor | None], Entries], length_b: Tensor, k: int, guess: Line, features: Axis = ALONE.features
) -> tuple[Entries, Line]:
    """The k largest entries above 0 of each row, and a guess for the next rows. `above` returns all entries of some rows, or of all, above
    a number for each; `length_b`: the rows' lengths.

    If features are split, returns this process's entries among the k largest of all.
    """
    low_b = guess.at(length_b)
    feature_bk, value_bk, count_b = top_of_lists(above(low_b, None), len(length_b), k)
    for lower in LOWER[1:]:
        short_m = ((count_b < k) & (low_b > 0)).nonzero().squeeze(1)  # host sync
        if not len(short_m):
            break
        low_b[short_m] = guess.at(length_b[short_m]) * lower
        again = top_of_lists(above(low_b[short_m], short_m), len(short_m), k)
        feature_bk[short_m], value_bk[short_m], count_b[short_m] = again
    return positive(feature_bk, kept_of_rows(value_bk, k, features)), Line.below(value_bk.min(1).values, length_b)


def some_of(rows: Tensor, rows_m: Tensor | None) -> Tensor:
    return rows if rows_m is None else rows.index_select(0, rows_m)


def above_in(size_bf: Tensor, buffers: Buffers) -> Callable[[Tensor, Tensor | None], Entries]:
    """`above` of `top_of_rows` for given values."""
    return lambda low_b, rows_m: entries_above(some_of(size_bf, rows_m), low_b[:, None], 0, buffers)


def above_of(encoder: Encoder, input_bd: Tensor, buffers: Buffers) -> Callable[[Tensor, Tensor | None], Entries]:
    """`above` of `top_of_rows` by an encoder. The float32 product may have other last digits for fewer rows, so it is computed only
    once."""
    if not encoder.screens(input_bd):
        return above_in(encoder.values(input_bd, buffers), buffers)
    return lambda low_b, rows_m: encoder.entries(some_of(input_bd, rows_m), buffers, floor=low_b)


def first_of_rows(sample_bf: Tensor, k: int, length_b: Tensor) -> Line:
    """A first guess, from a sample of rows."""
    return Line.below(sample_bf.topk(min(k, sample_bf.shape[1])).values[:, -1].clamp(min=0), length_b)


def top_by(encoder: Encoder, input_bd: Tensor, k: int, buffers: Buffers) -> Entries:
    """The k largest entries above 0 of each row, by an encoder."""
    length_b, some = input_bd.norm(dim=1), slice(None, None, max(1, len(input_bd) // SAMPLE))
    guess = first_of_rows(torch.addmm(encoder.b_f, input_bd[some], encoder.W_fd.T), k, length_b[some])
    return top_of_rows(above_of(encoder, input_bd, buffers), length_b, k, guess)[0]


def top_of_lists(entries: Entries, rows: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features and values [rows, k] of the k largest listed entries of each row, 0 where there are fewer; how many are listed, [rows]."""
    starts = starts_of(entries.row_n, rows).long()
    width = max(k + 1, int(starts.diff().max()))  # host sync
    size = max(1, LIST_BYTES // (entries.value_n.element_size() * width))
    cuts = [0, rows] if size >= rows else [*range(0, rows, size), rows]
    ends = [0, len(entries.row_n)] if size >= rows else starts[cuts].tolist()
    found = []
    for first, end, low, high in zip(cuts, cuts[1:], ends, ends[1:]):
        row_n, column_n, value_n = (one[low:high] for one in entries)
        row_n = row_n.long()
        place_n = torch.arange(low, high, device=row_n.device) - starts[row_n]
        list_bn = value_n.new_zeros(end - first, width)
        list_bn[row_n - first, place_n] = value_n
        kept_bk = largest(list_bn, k)
        feature_bn = column_n.new_zeros(end - first, width)
        feature_bn[row_n - first, place_n] = column_n
        found.append((feature_bn.gather(1, kept_bk), list_bn.gather(1, kept_bk)))
    feature_bk, value_bk = found[0] if len(found) == 1 else map(torch.cat, zip(*found))
    return feature_bk, value_bk, starts.diff()


def kept_of_rows(value_bk: Tensor, k: int, features: Axis, width: int | None = None) -> Tensor:
    """The values, at least 0, with 0 for those that are not among the k largest of their row in all processes.

    Each process passes its own largest values of each row in the order of the features; of equal ones the lower feature's is kept. A
    process decides for its part of the rows: it receives their values and returns one byte for each. `width`: the largest number of values
    of a row in any process.
    """
    if features.alone:
        return value_bk
    (rows, own), size = value_bk.shape, features.size
    width = width or own
    part = -(-rows // size)
    padded = torch.nn.functional.pad(value_bk.clamp(min=0), (0, width - own, 0, part * size - rows))  # NaN stays
    value_bn = features.exchange(padded.view(size, part, width)).transpose(0, 1).flatten(1)
    kept_bn = torch.zeros_like(value_bn, dtype=torch.uint8).scatter_(1, largest(value_bn, k), 1)
    kept_bk = features.exchange(kept_bn.unflatten(1, (size, width)).transpose(0, 1).contiguous()).flatten(0, 1)[:rows, :own]
    return value_bk.masked_fill(kept_bk == 0, 0)


def positive(feature_bk: Tensor, value_bk: Tensor) -> Entries:
    """Values above 0, and NaN, so that the loss shows it."""
    row_n, at_n = (~(value_bk <= 0)).nonzero(as_tuple=True)  # host sync
    return Entries(row_n.int(), feature_bk[row_n, at_n], value_bk[row_n, at_n])


def top_of_batch(above: Callable[[float], Entries], total: int, guess: float, rows: int, mesh: Mesh) -> tuple[Entries, float]:
    """The `total` largest entries of a batch that are above 0, and the smallest of them (0 if there are none); `above` returns all above a
    number.

    With several processes all pass the same guess and get their own entries; each has `rows` of the batch.
    """
    for lower in LOWER:
        row_n, feature_n, value_n = above(guess * lower)
        found = mesh.every.total(len(value_n))
        if found >= total or guess == 0:
            break
    if not mesh.alone:
        threshold, ties, equal = kth_largest(value_n, min(total, found), mesh.every)
        kept_n = ~(value_n < threshold)
        if ties < equal:
            tied_n = (value_n == threshold).nonzero().squeeze(1)
            kept_n[tied_n[first_of(ties, row_n[tied_n], rows, mesh) :]] = False
        return Entries(row_n[kept_n], feature_n[kept_n], value_n[kept_n]), threshold
    if len(value_n) > total:
        smallest = value_n.kthvalue(len(value_n) - total + 1).values
        kept_n = ~(value_n <= smallest)  # what is not a number is kept, so that the loss tells of it
        tied_n = (value_n == smallest).nonzero().squeeze(1)
        kept_n[tied_n[: total - int(kept_n.sum())]] = True  # host sync
        row_n, feature_n, value_n = row_n[kept_n], feature_n[kept_n], value_n[kept_n]
    return Entries(row_n, feature_n, value_n), float(value_n.min()) if len(value_n) else 0.0  # host sync


def kth_largest(value_n: Tensor, k: int, every: Axis) -> tuple[float, int, int]:
    """The k-th largest of the values above 0 of all processes; how many equal to it are among the k largest, and how many there are in
    total.

    The bits of positive numbers are in the order of the numbers, so it is found byte after byte: counts of the 256 values of a byte are
    summed over processes.
    """
    bits_n = value_n.nan_to_num(nan=torch.inf, posinf=torch.inf).view(torch.int32 if value_n.itemsize == 4 else torch.int64)
    found, left, equal = 0, k, 0
    for shift in range(8 * value_n.itemsize - 8, -1, -8):
        byte_n = (bits_n >> shift) & 255
        counts = every.sum_(torch.bincount(byte_n, minlength=256)).tolist()  # host sync
        byte = 255 if k else 0
        while byte and left > counts[byte]:
            left -= counts[byte]
            byte -= 1
        bits_n, found, equal = bits_n[byte_n == byte], (found << 8) | byte, counts[byte]
    return float(torch.tensor(found, dtype=bits_n.dtype).view(value_n.dtype)), left, equal


def first_of(count: int, row_n: Tensor, rows: int, mesh: Mesh) -> int:
    """How many of the first `count` items of a batch, counted row by row and within a row process by process, belong to this process.

    `row_n`: the rows of its own items, rising.
    """
    here_rb = mesh.every.gather(torch.bincount(row_n, minlength=rows))
    order_jbi = here_rb.view(mesh.features.size, mesh.rows.size, rows).permute(1, 2, 0)
    before_jbi = (order_jbi.flatten().cumsum(0).view_as(order_jbi) - order_jbi)[mesh.rows.rank, :, mesh.features.rank]
    mine_b = (count - before_jbi).clamp(min=0).minimum(here_rb[mesh.every.rank])
    return int(mine_b.sum())  # host sync


def first_guess(sample_bf: Tensor, share: float) -> float:
    """A threshold that about this share of entries exceeds, from the pre-activations of a few rows."""
    sample_n = sample_bf.flatten()
    return max(0.0, float(sample_n.kthvalue(max(1, len(sample_n) - round(share * len(sample_n)))).values))  # host sync
