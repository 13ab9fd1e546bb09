"""Rows of a weight matrix for computations: in float32 at least, checked if they are on the disk, a block of them at a time.

Weights in half precision stay so in memory and on the disk; a product of them is of float32 copies of a block, which is exact but for
float32's own rounding of the sum. f features · w width of a row
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae.disk.mapped import fetch, is_mapped, let_go, read_ahead
from sae.errors import InputError

BLOCK_BYTES = 1 << 26
"""size of the float32 copy of one block"""
RUNS, FEW = 64, 16
DRAWN = 1 << 14
"""random rows made at a time; torch draws sixteen numbers together, so that a multiple of that gives the rows of one drawing"""


def computing_dtype(W_fw: Tensor) -> torch.dtype:
    return torch.promote_types(W_fw.dtype, torch.float32)


def at_once(W_fw: Tensor) -> int:
    """Rows of a block: all rows of a matrix that needs no conversion or loading."""
    if W_fw.dtype == computing_dtype(W_fw) and not is_mapped(W_fw):
        return len(W_fw)
    return max(1, BLOCK_BYTES // (4 * W_fw.shape[1]))


def ranges(f: int, size: int) -> Iterator[slice]:
    """0 to f in steps of `size`."""
    return (slice(low, min(f, low + size)) for low in range(0, f, size))


def rows_of(W_fw: Tensor, which: slice | Tensor) -> Tensor:
    """Some rows, [k, w], in the dtype of computations. Raises `InputError` for NaN or infinity in rows that stayed on the disk."""
    if not is_mapped(W_fw):
        return W_fw[which].to(computing_dtype(W_fw))
    rows_kw = _copied(W_fw, which)
    if rows_kw.numel() and not all(bool(end.isfinite()) for end in rows_kw.aminmax()):  # NaN is both ends
        bad_k = (~rows_kw.isfinite()).any(-1).nonzero()[:, 0]
        j = int(bad_k[0]) + which.start if isinstance(which, slice) else int(which[bad_k[0]])
        raise InputError(f"the weights of feature {j} hold NaN or infinity; copy or download the dictionary again")
    return rows_kw


def _copied(W_fw: Tensor, which: slice | Tensor) -> Tensor:
    """Rows of a matrix on the disk. Every run of neighbouring numbers may bring megabytes of the system's cache into this process, so few
    runs are copied before they are let go."""
    read_ahead(W_fw, isinstance(which, slice))
    k, w, dtype = len(range(*which.indices(len(W_fw)))) if isinstance(which, slice) else len(which), W_fw.shape[1], computing_dtype(W_fw)
    if W_fw.stride(0) < W_fw.stride(1):  # as SAELens writes W_enc: a feature is a column
        rows_kw = torch.empty(w, k, dtype=dtype).T
        if isinstance(which, Tensor) and k <= FEW:
            places_kw = which[:, None] * W_fw.stride(0) + torch.arange(w) * W_fw.stride(1)
            fetch(W_fw, places_kw.add(int(W_fw.storage_offset())).flatten().tolist(), 1)
        for part in ranges(w, RUNS):
            rows_kw[:, part] = W_fw[:, part][which]
            let_go(W_fw)
        return rows_kw
    rows_kw = torch.empty(k, w, dtype=dtype)
    if isinstance(which, Tensor):
        fetch(W_fw, which.mul(W_fw.stride(0)).add(int(W_fw.storage_offset())).tolist(), w)
    for part in ranges(k, k if isinstance(which, slice) else RUNS):
        rows_kw[part] = W_fw[which] if isinstance(which, slice) else W_fw[which[part]]
        let_go(W_fw)
    return rows_kw


def random_rows(d: int, f: int, seed: int, features: slice = slice(None)) -> Tensor:
    """Of f random rows of length 1 these alone, [features, d], in little more memory than they take; the same rows for any part."""
    generator, found = torch.Generator().manual_seed(seed), []
    first, last, _ = features.indices(f)
    for start in range(0, f, DRAWN):
        drawn_fd = torch.randn(min(DRAWN, f - start), d, generator=generator)
        found.append(normalize(drawn_fd[max(0, first - start) : max(0, last - start)], dim=-1))
    return torch.cat(found)
