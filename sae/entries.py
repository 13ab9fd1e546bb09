"""Sparse codes as lists of entries, and sums over them: what the training step, the index and evaluation compute with.

b rows (tokens) · f features · d width · n entries
"""

import warnings
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

BLOCK_BYTES = 2 << 20
"""of the sums made at a time: memory this small is used again at once, where a whole gradient's would be fresh pages at every step"""


class Buffers:
    """Memory that is used again from call to call: fresh pages for every large tensor cost page faults."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor, the same memory as at the last call while it is large enough."""
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


def active_entries(acts_bf: Tensor, first_row: int, buffers: Buffers) -> Entries:
    """The entries of a chunk that are not 0, row after row; rows are counted from `first_row`.

    Few of eight neighbours in a row are active: as one 64-bit word each, most are dismissed eight at a time.
    """
    size, f = acts_bf.numel(), acts_bf.shape[1]
    mask = buffers.take("mask", (-(-size // 8) * 8,), torch.bool, acts_bf.device)
    mask[size:] = False
    mask[:size].copy_(acts_bf.view(-1))
    words = mask.view(torch.int64)
    word_n = words.nonzero().squeeze(1)
    byte_n = words.index_select(0, word_n).view(torch.bool).nonzero().squeeze(1)
    flat_n = word_n.index_select(0, byte_n >> 3).mul_(8).add_(byte_n & 7)
    row_n = flat_n.div(f, rounding_mode="floor")
    column_n = flat_n.sub(row_n, alpha=f)
    return Entries(row_n.add_(first_row).int(), column_n.int(), acts_bf.view(-1).index_select(0, flat_n))


def starts_of(sorted_n: Tensor, size: int) -> Tensor:
    """Where each of 0 .. size begins among sorted indices, [size + 1] int32."""
    counts = torch.bincount(sorted_n, minlength=size)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def add_weighted_sums(out_kd: Tensor, table_md: Tensor, index_n: Tensor, starts: Tensor, weight_n: Tensor, fresh: bool) -> None:
    """out_k += Σ weight_n · table[index_n] over the n from starts[k] to starts[k + 1]; `fresh`: out_k = that sum."""
    block = max(1, BLOCK_BYTES // (out_kd.shape[1] * out_kd.element_size()))
    firsts = range(0, len(out_kd), block)
    bounds = [*starts[:-1:block].tolist(), len(index_n)]  # host sync
    for first, low, high in zip(firsts, bounds, bounds[1:]):
        part = (index_n[low:high], table_md, starts[first : first + block + 1] - low)
        sums = embedding_bag(*part, mode="sum", per_sample_weights=weight_n[low:high], include_last_offset=True)
        part_kd = out_kd[first : first + block]
        part_kd.copy_(sums) if fresh else part_kd.add_(sums)
