"""Sparse codes as lists of entries, and sums over them, used by the training step, the index and evaluation.

b rows (tokens) · f features · d width · n entries
"""

import warnings
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

BLOCK_BYTES = 1 << 20
"""size of the sums computed at a time: such small memory is reused at once, while a whole gradient would need new pages at every step"""
BLOCK_COLUMNS = 64
"""columns of a table summed at a time on a CPU: so much of all rows stays in the processor's cache while rows are read at random"""


class Buffers:
    """Memory that is reused from call to call: new pages for every large tensor cost page faults."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor, in the same memory as at the last call if it is large enough."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < prod(shape) or buffer.dtype != dtype or buffer.device != device:
            buffer = self._buffers[name] = torch.empty(prod(shape), dtype=dtype, device=device)
        return buffer[: prod(shape)].view(shape)


class Entries(NamedTuple):
    """The activations of some rows that are not 0, row after row."""

    row_n: Tensor
    """int32"""
    feature_n: Tensor
    """int32"""
    value_n: Tensor


def joined(parts: list[Entries]) -> Entries:
    """Joins the entries of several chunks of rows."""
    return parts[0] if len(parts) == 1 else Entries(*map(torch.cat, zip(*parts)))


def active_entries(acts_bf: Tensor, first_row: int, buffers: Buffers) -> Entries:
    """The entries of a chunk that are not 0, row after row; rows are counted from `first_row`."""
    mask_bf = _mask(acts_bf.shape, buffers, acts_bf.device)
    return _entries(acts_bf, mask_bf.copy_(acts_bf), first_row, buffers)


def entries_above(z_bf: Tensor, low: float | Tensor, first_row: int, buffers: Buffers) -> Entries:
    """As `active_entries`, for entries above `low`, a number, [f] or [b, 1], with their values unchanged."""
    mask_bf = _mask(z_bf.shape, buffers, z_bf.device)
    torch.le(z_bf, low, out=mask_bf).logical_not_()
    return _entries(z_bf, mask_bf, first_row, buffers)


def _mask(shape: torch.Size, buffers: Buffers, device: torch.device) -> Tensor:
    """[b, f] bool, the beginning of whole 64-bit words, of which what is left over is False."""
    size = prod(shape)
    mask = buffers.take("mask", (-(-size // 8) * 8,), torch.bool, device)
    mask[size:] = False
    return mask[:size].view(shape)


def _entries(value_bf: Tensor, mask_bf: Tensor, first_row: int, buffers: Buffers) -> Entries:
    """Few of eight neighbours in a row are active: as one 64-bit word each, most are dismissed eight at a time."""
    size, f = value_bf.numel(), value_bf.shape[1]
    words = buffers.take("mask", (-(-size // 8) * 8,), torch.bool, mask_bf.device).view(torch.int64)  # the mask's own memory
    word_n = words.nonzero().squeeze(1)
    byte_n = words.index_select(0, word_n).view(torch.bool).nonzero().squeeze(1)
    flat_n = word_n.index_select(0, byte_n >> 3).mul_(8).add_(byte_n & 7)
    row_n = flat_n.div(f, rounding_mode="floor")
    column_n = flat_n.sub(row_n, alpha=f)
    return Entries(row_n.add_(first_row).int(), column_n.int(), value_bf.view(-1).index_select(0, flat_n))


def largest(size_bf: Tensor, k: int) -> Tensor:
    """Places [..., k] of the k largest, ascending; of equal values those of the lower places. All places where there are fewer than k."""
    n = size_bf.shape[-1]
    value_bk, place_bk = size_bf.topk(min(k + 1, n))
    if n > k:
        tied_b = value_bk[..., k - 1] == value_bk[..., k]
        place_bk = place_bk[..., :k]
        if tied_b.any():  # host sync; topk then takes any of them
            place_bk[tied_b] = size_bf[tied_b].sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return place_bk.sort(dim=-1).values


def starts_of(sorted_n: Tensor, size: int) -> Tensor:
    """The start of each of 0 .. size among sorted indices, [size + 1] int32."""
    counts = torch.bincount(sorted_n, minlength=size)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def add_weighted_sums(out_kd: Tensor, table_md: Tensor, index_n: Tensor, starts: Tensor, weight_n: Tensor, fresh: bool) -> None:
    """out_k += Σ weight_n · table[index_n] over the n from starts[k] to starts[k + 1]; `fresh`: out_k = that sum."""
    again = not out_kd.is_cuda and len(index_n) > len(table_md)  # a row is picked more than once, so that copying all of them pays
    width = BLOCK_COLUMNS if again else out_kd.shape[1]
    block = max(1, BLOCK_BYTES // (width * out_kd.element_size()))
    firsts = range(0, len(out_kd), block)
    bounds = [*starts[:-1:block].tolist(), len(index_n)]  # host sync
    for columns in (slice(left, left + width) for left in range(0, out_kd.shape[1], width)):
        table_mw = table_md[:, columns].contiguous()
        for first, low, high in zip(firsts, bounds, bounds[1:]):
            part = (index_n[low:high], table_mw, starts[first : first + block + 1] - low)
            sums = embedding_bag(*part, mode="sum", per_sample_weights=weight_n[low:high], include_last_offset=True)
            part_kw = out_kd[first : first + block, columns]
            part_kw.copy_(sums) if fresh else part_kw.add_(sums)
