"""The entries of z = x W_encᵀ + b_enc above a threshold, by the float32 product or by screening.

b rows (tokens) · d width · f features · n entries · g groups of features
"""

from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from sae.encoding.bounds import LARGEST_OFFSET, Bfloat16Features, Features, fits, frame_of
from sae.encoding.int8 import WIDEST, Int8Features, adds_in_whole_numbers
from sae.entries import Buffers, Entries, active_entries, entries_above, joined, starts_of
from sae.errors import InputError

Method = Literal["product", "onednn", "bfloat16", "int8"]
METHODS: tuple[Method, ...] = get_args(Method)

BLOCK = 1024
"""rows for which bounds are computed at a time"""
BLOCK_BYTES = 16 << 20
"""size of the oneDNN product computed at a time: the allocator reuses memory of this size"""
EXACT_BYTES = 16 << 20
"""size of rows gathered at a time for exact values on CUDA"""


class Encoder:
    """Encoder rows prepared for one method; keep it as long as they do not change. Any number of threads may use it.

    `product` is torch's float32 product. `onednn` is the same by oneDNN. `bfloat16` and `int8` compute a product in that precision, whose
    bounds (bounds.py) show which entries cannot be above the threshold; the others are computed in float32 from the original rows.

    Guarantee: an entry is returned if and only if its float32 value is above the threshold. Methods differ in the order of float32
    additions, so an entry within rounding of the threshold may be returned by one and not by another, and values differ in the last digits;
    bfloat16 and int8 return equal bits, for any frame.
    """

    def __init__(
        self,
        method: Method,
        W_fd: Tensor,
        b_f: Tensor,
        above_f: Tensor | float = 0.0,
        *,
        like_bd: Tensor | None = None,
        buffers: Buffers | None = None,
    ):
        """`above_f`, [f] or a number of at least 0: entries above it are returned. `like_bd`: rows like those to be encoded, which keep
        bounds tight if a few dimensions are huge. `buffers`: memory for the prepared operands, which the next encoder with them overwrites.

        Raises `InputError` for a method that this torch or device does not have.
        """
        refuse_missing(method, W_fd)
        self.method, self.W_fd, self.b_f, self.above_f = method, W_fd, b_f, above_f
        self.features: Features | None = None
        if method == "bfloat16" or (method == "int8" and W_fd.shape[1] <= WIDEST):
            offset_f = b_f.abs() + torch.as_tensor(above_f).abs()
            if fits(W_fd) and bool((offset_f < LARGEST_OFFSET).all()):  # host sync
                frame = None if like_bd is None else frame_of(like_bd, W_fd)
                kind = Bfloat16Features if method == "bfloat16" else Int8Features
                self.features = kind(W_fd, b_f, above_f, frame, buffers)

    def entries(self, x_bd: Tensor, buffers: Buffers, first_row: int = 0, floor: float | Tensor = 0.0) -> Entries:
        """Entries above the threshold, row by row; rows are counted from `first_row`. b_in has already been subtracted from the rows [b,
        d].

        With a `floor`, a number or one for each row [b], only those above it too; the threshold must be one for all features. Rows or
        weights too large for a bound, or not finite, use the float32 product.
        """
        low = self._lowest(floor)
        if self.screens(x_bd):
            return self._screened(x_bd, low, buffers, first_row)
        size = max(1, BLOCK_BYTES // (4 * len(self.W_fd))) if self.method == "onednn" else max(1, len(x_bd))
        parts = (slice(start, start + size) for start in range(0, max(1, len(x_bd)), size))
        return joined([kept(self.values(x_bd[part], buffers), of_rows(low, part), first_row + part.start, buffers) for part in parts])

    def _lowest(self, floor: float | Tensor) -> float | Tensor:
        """The number that entries must exceed: one, one for each feature [f], or one for each row [b, 1]."""
        if isinstance(floor, float | int) and not floor:
            return self.above_f
        if isinstance(self.above_f, Tensor):
            raise InputError("expected one threshold for all features with a floor, got one for each; leave the floor at 0")
        return floor.clamp(min=self.above_f)[:, None] if isinstance(floor, Tensor) else max(floor, self.above_f)

    def screens(self, x_bd: Tensor) -> bool:
        """Whether these rows use bounds instead of the float32 product."""
        return self.features is not None and len(x_bd) > 0 and fits(x_bd)

    def candidates(self, x_bd: Tensor, buffers: Buffers, floor: float | Tensor = 0.0) -> int:
        """How many entries of these rows, out of b · f, would be computed in float32; all if they use the float32 product."""
        if not self.screens(x_bd):
            return len(x_bd) * len(self.W_fd)
        features, more_b = self._above(self._lowest(floor), buffers)
        return sum(int(torch.count_nonzero(bound_pb)) for _, bound_pb in features.upper_bounds(x_bd, more_b, buffers))  # host sync

    def values(self, x_bd: Tensor, buffers: Buffers) -> Tensor:
        """All z [b, f] by the float32 product, in memory that the next call may overwrite."""
        if self.method == "onednn":
            return torch.ops.mkldnn._linear_pointwise(x_bd, self.W_fd, self.b_f, "none", [], "")
        z_bf = buffers.take("acts", (len(x_bd), len(self.W_fd)), x_bd.dtype, x_bd.device)
        return torch.addmm(self.b_f, x_bd, self.W_fd.T, out=z_bf)

    def _above(self, low: float | Tensor, buffers: Buffers) -> tuple[Features, Tensor | None]:
        """The features with a threshold for all rows, and what each row's is above it."""
        assert self.features is not None
        if isinstance(self.above_f, Tensor):
            return self.features, None
        common = float(low.median()) if isinstance(low, Tensor) else low  # host sync
        features = self.features.above(common - self.above_f, buffers) if common > self.above_f else self.features
        return features, low[:, 0] - common if isinstance(low, Tensor) else None

    def _screened(self, x_bd: Tensor, low: float | Tensor, buffers: Buffers, first_row: int) -> Entries:
        """Rows and features are taken a block at a time, so that a block's operands, bounds and rows stay in the processor's cache."""
        (features, more_b), blocks = self._above(low, buffers), []
        for block in (slice(start, start + BLOCK) for start in range(0, len(x_bd), BLOCK)):
            found = [Entries(*(x_bd.new_empty(0, dtype=kind) for kind in (torch.int32, torch.int32, x_bd.dtype)))]
            for start, bound_pb in features.upper_bounds(x_bd[block], None if more_b is None else more_b[block], buffers):
                feature_n, row_n, _ = active_entries(bound_pb, 0, buffers)
                value_n = exact_products(self.W_fd[start : start + len(bound_pb)], x_bd[block], feature_n, row_n)
                feature_n = feature_n + start
                value_n += self.b_f.index_select(0, feature_n)
                low_n = low
                if isinstance(low, Tensor):
                    low_n = low.index_select(0, feature_n) if more_b is None else low[block, 0].index_select(0, row_n)
                kept_n = (value_n > low_n).nonzero().squeeze(1)  # host sync
                found.append(Entries(*(one.index_select(0, kept_n) for one in (row_n, feature_n, value_n))))
            row_n, feature_n, value_n = joined(found)
            row_n, order_n = row_n.sort(stable=True)
            row_n.add_(first_row + block.start)
            blocks.append(Entries(row_n, feature_n.index_select(0, order_n), value_n.index_select(0, order_n)))
        return joined(blocks)


def of_rows(low: float | Tensor, part: slice) -> float | Tensor:
    return low[part] if isinstance(low, Tensor) and low.ndim == 2 else low


def kept(z_bf: Tensor, low: float | Tensor, first_row: int, buffers: Buffers) -> Entries:
    """The entries above `low`; overwrites z if that is 0."""
    above_0 = not isinstance(low, Tensor) and low == 0
    return active_entries(z_bf.relu_(), first_row, buffers) if above_0 else entries_above(z_bf, low, first_row, buffers)


def exact_products(W_pd: Tensor, x_bd: Tensor, feature_n: Tensor, row_n: Tensor) -> Tensor:
    """W_feature · x_row in float32, [n]; each value is independent of the other entries. Sorted by feature."""
    if not x_bd.is_cuda:
        shape = (len(W_pd), len(x_bd))
        with torch.sparse.check_sparse_tensor_invariants(False):  # the indices are right by construction, checking them is a pass
            zeros = torch.sparse_csr_tensor(starts_of(feature_n, len(W_pd)), row_n, x_bd.new_zeros(len(row_n)), shape)
            return torch.sparse.sampled_addmm(zeros, W_pd, x_bd.T).values()
    size = max(1, EXACT_BYTES // (4 * x_bd.shape[1]))
    parts = zip(row_n.split(size), feature_n.split(size))
    return torch.cat([(x_bd.index_select(0, rows) * W_pd.index_select(0, features)).sum(1) for rows, features in parts])


def refuse_missing(method: Method, W_fd: Tensor) -> None:
    if method not in METHODS:
        raise InputError(f"expected an encoder out of {', '.join(METHODS)}, got {method!r}")
    if method == "product":
        return
    if W_fd.dtype != torch.float32:
        raise InputError(f"expected float32 weights for the encoder {method}, got {W_fd.dtype}; take the encoder product")
    if method in ("onednn", "int8") and W_fd.device.type != "cpu":
        raise InputError(f"expected the CPU for the encoder {method}, got {W_fd.device}; take the encoder product or bfloat16")
    if method == "onednn" and not torch.backends.mkldnn.is_available():
        raise InputError("expected a torch with oneDNN for the encoder onednn, got one without; take the encoder product")
    if method != "onednn" and not adds_exactly(method, W_fd.device):
        raise InputError(
            f"{method} products on {W_fd.device} lose digits in their sums, so bounds would not hold; take the encoder product"
        )


@cache
def adds_exactly(method: Method, device: torch.device) -> bool:
    """Whether products in low precision are summed in float32 or in whole numbers: only then are the bounds valid, and some implementations
    are not exact enough."""
    if method == "int8":
        return adds_in_whole_numbers()
    ones = torch.ones(32, 1024, device=device)
    large = ones.clone()
    large[:, 0] = 1024  # beyond 256, ones are lost in a bfloat16 sum
    return bool(((ones.bfloat16() @ large.bfloat16().T).float() == (ones @ large.T).bfloat16().float()).all())
