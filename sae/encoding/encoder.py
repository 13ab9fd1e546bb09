"""The entries of z = x W_encᵀ + b_enc above a threshold, by the float32 product or by screening.

b rows (tokens) · d width · f features · n entries · g groups of features
"""

from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from sae.encoding.bounds import LARGEST_OFFSET, Features, Low, fits, frame_of
from sae.entries import Buffers, Entries, active_entries, entries_above, joined, starts_of
from sae.errors import InputError

Method = Literal["product", "onednn", "bfloat16", "int8"]
METHODS: tuple[Method, ...] = get_args(Method)

BLOCK_BYTES = 16 << 20
"""of the bounds or the oneDNN product made at a time: the allocator uses memory of this size again"""
EXACT_BYTES = 16 << 20
"""of rows gathered at a time for exact values on CUDA"""


class Encoder:
    """Encoder rows prepared for one way of computing; keep it as long as they do not change. Any number of threads may use it.

    `product` is torch's float32 product. `onednn` is the same by oneDNN. `bfloat16` and `int8` make a product in that precision, whose
    bounds (bounds.py) show which entries cannot be above the threshold; the others are computed in float32 from the original rows.

    What is promised: an entry is given if and only if its float32 value is above the threshold. Ways differ in how they add in float32, so
    an entry within rounding of the threshold may be there with one and not with another, and values differ in the last digits; bfloat16
    and int8 give equal bits, for any frame.
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
        """`above_f`, [f] or a number of at least 0: the entries above it are wanted. `like_bd`: rows such as will be encoded, which keep
        bounds tight where few dimensions are huge. `buffers`: memory for what is prepared, which the next encoder with them overwrites.

        Raises `InputError` for a method that this torch or device does not have.
        """
        refuse_missing(method, W_fd)
        self.method, self.W_fd, self.b_f, self.above_f = method, W_fd, b_f, above_f
        self.features: Features | None = None
        if method == "bfloat16" or method == "int8":
            offset_f = b_f.abs() + torch.as_tensor(above_f).abs()
            if fits(W_fd) and bool((offset_f < LARGEST_OFFSET).all()):  # host sync
                frame = None if like_bd is None else frame_of(like_bd, W_fd)
                self.features = Features(W_fd, b_f, above_f, method, frame, buffers)

    def entries(self, x_bd: Tensor, buffers: Buffers, first_row: int = 0, floor: float = 0.0) -> Entries:
        """Entries above the threshold, row after row; rows are counted from `first_row`. Rows [b, d] have b_in taken off already.

        With a `floor`, a number above one threshold that all features have, those above the floor. Rows or weights too large for a bound,
        or not finite, go through the float32 product.
        """
        if floor and isinstance(self.above_f, Tensor):
            raise InputError("expected one threshold for all features with a floor, got one for each; leave the floor at 0")
        return self._gathered(x_bd, buffers, first_row, floor)

    def top(self, x_bd: Tensor, k: int, buffers: Buffers) -> Entries:
        """Entries above the threshold, and of each row at least the k largest of those; a few more, none of them wrong.

        Without screening these are all entries above the threshold. Raises `InputError` where features have thresholds of their own.
        """
        if isinstance(self.above_f, Tensor):
            raise InputError("expected one threshold for all features when the k largest are wanted, got one for each; leave it at 0")
        return self._gathered(x_bd, buffers, 0, 0.0, k)

    def _gathered(self, x_bd: Tensor, buffers: Buffers, first_row: int, floor: float, k: int | None = None) -> Entries:
        if self.method != "onednn" and (self.features is None or not fits(x_bd)):
            acts_bf = buffers.take("acts", (len(x_bd), len(self.W_fd)), x_bd.dtype, x_bd.device)
            return self._kept(torch.addmm(self.b_f, x_bd, self.W_fd.T, out=acts_bf), buffers, first_row, floor)
        width = 4 if self.features is None else self.features.bound_dtype.itemsize
        size = max(1, BLOCK_BYTES // (width * len(self.W_fd)))
        starts = range(0, max(1, len(x_bd)), size)
        found = [self._of_block(x_bd[start : start + size], buffers, first_row + start, floor, k) for start in starts]
        return joined(found)

    def _of_block(self, x_bd: Tensor, buffers: Buffers, first_row: int, floor: float, k: int | None) -> Entries:
        if self.features is None:
            z_bf = torch.ops.mkldnn._linear_pointwise(x_bd, self.W_fd, self.b_f, "none", [], "")
            return self._kept(z_bf, buffers, first_row, floor)
        bound_bf = buffers.take("bound", (len(x_bd), len(self.W_fd)), self.features.bound_dtype, x_bd.device)
        excess_b = self.features.upper_bounds(x_bd, bound_bf, buffers)
        above_f = self.above_f
        if k is not None:
            bound_bf.sub_(below(surely_reached(bound_bf, excess_b, k))[:, None]).relu_()
        elif floor and not isinstance(above_f, Tensor):
            bound_bf.sub_(float(below(torch.tensor(floor - above_f)))).relu_()
            above_f = max(above_f, floor)
        row_n, feature_n, _ = active_entries(bound_bf, 0, buffers)
        value_n = exact_products(x_bd, self.W_fd, row_n, feature_n)
        value_n += self.b_f.index_select(0, feature_n)
        kept_n = (
            (value_n > (above_f.index_select(0, feature_n) if isinstance(above_f, Tensor) else above_f)).nonzero().squeeze(1)
        )  # host sync
        row_n, feature_n, value_n = (one.index_select(0, kept_n) for one in (row_n, feature_n, value_n))
        return Entries(row_n.add_(first_row), feature_n, value_n)

    def _kept(self, z_bf: Tensor, buffers: Buffers, first_row: int, floor: float) -> Entries:
        if isinstance(self.above_f, Tensor):
            return entries_above(z_bf, self.above_f, first_row, buffers)
        low = max(self.above_f, floor)
        return entries_above(z_bf, low, first_row, buffers) if low else active_entries(z_bf.relu_(), first_row, buffers)


def surely_reached(bound_bf: Tensor, excess_b: Tensor, k: int) -> Tensor:
    """A number for each row below k of its values at least, [b], or less than 0, from bounds that exceed the values by `excess_b` at most.

    Of the largest bounds of k groups of features each belongs to another feature, so k values are at least the smallest of these, less the
    excess. Groups are many times more than k, so that it seldom happens that two of the k largest share one.
    """
    f = bound_bf.shape[1]
    size = max(1, f // (16 * k))
    whole = f // size * size
    largest_bg = bound_bf[:, :whole].unflatten(1, (-1, size)).amax(2)
    if largest_bg.shape[1] < k:
        return torch.zeros_like(excess_b)
    reached_b = largest_bg.topk(k, dim=1).values[:, -1].float()
    return reached_b * (1 - 2.0**-7) - excess_b


def below(floor: Tensor) -> Tensor:
    """A number of bfloat16, or 0, so far below that nothing above the floor rounds to it: a bound in bfloat16 less it keeps its sign."""
    return (floor * (1 - 2.0**-6)).bfloat16().float().clamp(min=0)


def exact_products(x_bd: Tensor, W_fd: Tensor, row_n: Tensor, feature_n: Tensor) -> Tensor:
    """x_row · W_feature in float32, [n]; each is the same for any others beside it. Sorted by row."""
    if not x_bd.is_cuda:
        shape = (len(x_bd), len(W_fd))
        with torch.sparse.check_sparse_tensor_invariants(False):  # the indices are right by construction, checking them is a pass
            zeros = torch.sparse_csr_tensor(starts_of(row_n, len(x_bd)), feature_n, x_bd.new_zeros(len(row_n)), shape)
            return torch.sparse.sampled_addmm(zeros, x_bd, W_fd.T).values()
    size = max(1, EXACT_BYTES // (4 * x_bd.shape[1]))
    parts = zip(row_n.split(size), feature_n.split(size))
    return torch.cat([(x_bd.index_select(0, rows) * W_fd.index_select(0, features)).sum(1) for rows, features in parts])


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
    if (method == "bfloat16" or method == "int8") and not adds_exactly(method, W_fd.device):
        raise InputError(
            f"{method} products on {W_fd.device} lose digits in their sums, so bounds would not hold; take the encoder product"
        )


@cache
def adds_exactly(low: Low, device: torch.device) -> bool:
    """Whether products in low precision are summed in float32 or int32: the bounds hold only then, and some implementations do not."""
    ones = torch.ones(32, 1024, device=device)
    if low == "int8":
        return bool((torch._int_mm((127 * ones).to(torch.int8), (-127 * ones).to(torch.int8).T) == -127 * 127 * 1024).all())
    large = ones.clone()
    large[:, 0] = 1024  # beyond 256, ones are lost in a bfloat16 sum
    return bool(((ones.bfloat16() @ large.bfloat16().T).float() == (ones @ large.T).bfloat16().float()).all())
