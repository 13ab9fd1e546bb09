"""Upper bounds of pre-activations from a product in low precision, so that only entries whose bound is positive need float32.

b rows (tokens) · d width · f features · k columns of an operand

With operands rounded to x̂ = x − δ and Ŵ_f = W_f − ε_f, by Cauchy and Schwarz

    x·W_f ≤ x̂·Ŵ_f + ‖δ‖ ‖W_f‖ + ‖x̂‖ ‖ε_f‖

The bound adds three products of a number of the row and a number of the feature. They are extra columns of the operands, so that the sign
of one matrix product decides (int8.py for whole numbers). Every sum in float32, the one of the exact value too, is
off by at most `slack` times the sum of absolute values, in any order of addition, and the bound includes that.

Both sides may be transformed first: x − c, with c·W_f in the bias, and in each dimension x_d r_d and W_fd / r_d, with r_d a power of
two. The result is the same number, and the bound is tighter if a few dimensions are much larger than the others.
"""

from collections.abc import Iterator
from copy import copy
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sae.entries import Buffers

PREPARED_BYTES = 1 << 20
"""bytes of weights rounded at a time, so that the passes over them stay in the processor's cache"""
LARGEST_NORM = 2.0**48
"""largest norm of rows and features; in a frame, 2¹² times that. Beyond it products could overflow, and the float32 product is used"""
LARGEST_OFFSET = 2.0**96
FRAME_ROWS = 512
"""rows that decide a frame"""
BLOCK = 2048
"""features for which bounds are computed at a time on a CPU"""
SMALLEST = 2.0**-62
"""a component whose square underflows is shorter than this; added to every norm, it also covers denormals that a product treats as 0"""


class Frame(NamedTuple):
    """How rows are shifted and dimensions scaled before rounding. Any frame is correct; a good one keeps bounds tight."""

    centre_d: Tensor
    scale_d: Tensor
    """powers of two"""
    largest: float
    """median over rows of the largest component"""


def frame_of(x_bd: Tensor, W_fd: Tensor) -> Frame:
    """The rows' mean, and scales that split each dimension's size between rows and features."""
    x_bd = x_bd[:: max(1, len(x_bd) // FRAME_ROWS)]
    centre_d = x_bd.mean(0)
    size_d = (W_fd[::16].square().mean(0) / (x_bd - centre_d).square().mean(0)) ** 0.25
    size_d = torch.where(size_d.isfinite() & (size_d > 0), size_d, 1.0)
    exponent_d = (size_d / size_d.median()).log2().round().clamp(-12, 12)
    centre_d, scale_d = centre_d if fits(centre_d[None]) else torch.zeros_like(centre_d), torch.exp2(exponent_d)
    largest = float(((x_bd - centre_d) * scale_d).abs().amax(1).median()) if len(x_bd) else 0.0
    return Frame(centre_d, scale_d, largest if 0 < largest < LARGEST_NORM else 1.0)


def fits(rows: Tensor) -> bool:
    """Whether bounds can be computed for these rows: they are finite and not too large."""
    return bool((rows.norm(dim=1) < LARGEST_NORM).all())  # host sync


def slack_of(d: int, device: torch.device) -> float:
    """How far two float32 sums over d products and some more terms are off, relative to the sum of their absolute values.

    Higham, Accuracy and Stability of Numerical Algorithms, section 3.1: n·u / (1 − n·u) for any order, u = 2⁻²⁴. Tensor cores truncate
    digits instead of rounding; 2⁻²¹ is used for them.
    """
    unit = 2.0**-21 if device.type == "cuda" else 2.0**-24
    return 1.1 * (2 * d + 128) * unit


def norm_above(rows: Tensor) -> Tensor:
    """Upper bounds of the norms of rows, for any rounding or underflow."""
    d = rows.shape[1]
    return rows.norm(dim=1) * (1 + d * 2.0**-23) + d * SMALLEST


def raised(size: Tensor) -> Tensor:
    """Nonnegative numbers rounded up to bfloat16."""
    return (size * (1 + 2.0**-7)).bfloat16()


def parts_of(W_fd: Tensor, frame: Frame | None) -> Iterator[tuple[slice, Tensor]]:
    """The features in the frame, so many at a time that passes over them stay in the processor's cache."""
    size = max(1, PREPARED_BYTES // (4 * W_fd.shape[1]))
    for part in (slice(start, start + size) for start in range(0, len(W_fd), size)):
        yield part, W_fd[part] if frame is None else W_fd[part] / frame.scale_d


def moved(x_bd: Tensor, frame: Frame | None) -> Tensor:
    """The rows in the frame."""
    return x_bd if frame is None else (x_bd - frame.centre_d).mul_(frame.scale_d)


def offsets(W_fd: Tensor, b_f: Tensor, above_f: Tensor | float, norm_f: Tensor, frame: Frame | None) -> Tensor:
    """What the bound of a feature adds for all rows: b − above + c·W_f, raised by the slack of all terms without a row."""
    offset_f, size_f = b_f - above_f, b_f.abs() + torch.as_tensor(above_f).abs()
    if frame is not None:
        moved_f = W_fd @ frame.centre_d
        offset_f, size_f = offset_f + moved_f, size_f + moved_f.abs() + centre_norm(frame) * norm_f
    return offset_f + 4 * slack_of(W_fd.shape[1], W_fd.device) * size_f


def centre_norm(frame: Frame | None) -> Tensor | float:
    return 0.0 if frame is None else norm_above((frame.centre_d * frame.scale_d)[None])


class Features(Protocol):
    """The features' side: encoder rows in low precision, with the numbers for their bounds. For rows that `fits` accepts, and smaller
    offsets."""

    def above(self, floor: float, buffers: Buffers) -> "Features":
        """The same with all thresholds higher by `floor`, at least 0, in memory that the next call with these buffers overwrites."""

    def upper_bounds(self, x_bd: Tensor, more_b: Tensor | None, buffers: Buffers) -> Iterator[tuple[int, Tensor]]:
        """A block of features at a time: its first one, and [features, b] upper bounds of z − threshold − more; 0 means surely not above.
        `more_b`: what is added to all thresholds for a row, also if it is negative. In memory that the next block, or the next call with
        these buffers, overwrites. For rows that `fits` accepts."""


class Bfloat16Features:
    """Operands in bfloat16: the sign of one product with four more columns decides."""

    def __init__(self, W_fd: Tensor, b_f: Tensor, above_f: Tensor | float, frame: Frame | None = None, buffers: Buffers | None = None):
        """With `buffers`, in memory that the next call overwrites."""
        (f, d), device = W_fd.shape, W_fd.device
        self.frame, self.floor = frame, 0.0
        self.operand_fk = empty_operand(f, d, buffers or Buffers(), "bfloat16 features", device)
        norm_f, error_f = W_fd.new_empty(f), W_fd.new_empty(f)
        for part, scaled_fd in parts_of(W_fd, frame):
            stands_fd = self.operand_fk[part, :d].copy_(scaled_fd).float()
            norm_f[part], error_f[part] = norm_above(scaled_fd), norm_above(stands_fd.sub_(scaled_fd))
        offset_f = offsets(W_fd, b_f, above_f, norm_f, frame)
        offset_f = offset_f + 2.0**-14 * offset_f.abs() + SMALLEST**2  # two numbers of 8 digits
        high_f = offset_f.bfloat16()
        low_f = (offset_f - high_f.float()).bfloat16()
        self.operand_fk[:, d : d + 4] = torch.stack((raised(norm_f), raised(error_f), high_f, low_f), 1)

    def above(self, floor: float, buffers: Buffers) -> "Bfloat16Features":
        """See `Features`."""
        higher = copy(self)
        higher.floor = floor
        return higher

    def upper_bounds(self, x_bd: Tensor, more_b: Tensor | None, buffers: Buffers) -> Iterator[tuple[int, Tensor]]:
        """See `Features`. On CUDA all features are one block."""
        (b, d), device = x_bd.shape, x_bd.device
        moved_bd = moved(x_bd, self.frame)
        operand_bk = empty_operand(b, d, buffers, "bfloat16 rows", device)
        stands_bd = operand_bk[:, :d].copy_(moved_bd).float()
        length_b = norm_above(stands_bd)
        error_b = norm_above(stands_bd.sub_(moved_bd)) + slack_of(d, device) * (norm_above(moved_bd) + centre_norm(self.frame))
        one_b = torch.ones_like(error_b).bfloat16()
        operand_bk[:, d : d + 4] = torch.stack([raised(error_b), raised(length_b), one_b, one_b], 1)
        block = len(self.operand_fk) if x_bd.is_cuda else BLOCK
        if more_b is not None:
            more_b = more_b - 2.0**-20 * (self.floor + more_b.abs())  # the rounding of their sum
        low_b = None if more_b is None and not self.floor else below(self.floor + (x_bd.new_zeros(1) if more_b is None else more_b))
        for start in range(0, len(self.operand_fk), block):
            operand_pk = self.operand_fk[start : start + block]
            bound_pb = torch.mm(operand_pk, operand_bk.T, out=buffers.take("bound", (len(operand_pk), b), torch.bfloat16, device))
            yield start, (bound_pb if low_b is None else bound_pb.sub_(low_b)).relu_()


def empty_operand(rows: int, d: int, buffers: Buffers, name: str, device: torch.device) -> Tensor:
    """[rows, columns]: d, those of the bound, and zeros up to a whole tile."""
    out = buffers.take(name, (rows, -(-(d + 4) // 32) * 32), torch.bfloat16, device)
    out[:, d:] = 0
    return out


def below(floor_b: Tensor) -> Tensor:
    """bfloat16 numbers, at least 0, so far below the floors that nothing above a floor rounds to its number: a bound in bfloat16 minus it
    keeps its sign."""
    return (floor_b * (1 - 2.0**-6)).clamp_(min=0).bfloat16()
