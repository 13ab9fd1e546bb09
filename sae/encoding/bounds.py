"""Upper bounds of pre-activations from a product in low precision, so that only entries whose bound is positive need float32.

b rows (tokens) · d width · f features · k columns of an operand

With operands rounded to x̂ = x − δ and Ŵ_f = W_f − ε_f, by Cauchy and Schwarz

    x·W_f ≤ x̂·Ŵ_f + ‖δ‖ ‖W_f‖ + ‖x̂‖ ‖ε_f‖

The bound adds three products of a number of the row and a number of the feature. In bfloat16 they are extra columns of the operands, so
that the sign of one matrix product decides; in int8 they are added in float32. Every sum in float32, the one of the exact value too, is
off by at most `slack` times the sum of absolute values, in any order of addition, and the bound includes that.

Both sides may be transformed first: x − c, with c·W_f in the bias, and in each dimension x_d r_d and W_fd / r_d, with r_d a power of
two. The result is the same number, and the bound is tighter if a few dimensions are much larger than the others.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sae.entries import Buffers

Low = Literal["bfloat16", "int8"]

PREPARED_BYTES = 1 << 20
"""bytes of weights rounded at a time, so that the passes over them stay in the processor's cache"""
LARGEST_NORM = 2.0**48
"""largest norm of rows and features; in a frame, 2¹² times that. Beyond it products could overflow, and the float32 product is used"""
LARGEST_OFFSET = 2.0**96
SMALLEST = 2.0**-62
"""a component whose square underflows is shorter than this; added to every norm, it also covers denormals that a product treats as 0"""


class Frame(NamedTuple):
    """How rows are shifted and dimensions scaled before rounding. Any frame is correct; a good one keeps bounds tight."""

    centre_d: Tensor
    scale_d: Tensor
    """powers of two"""


def frame_of(x_bd: Tensor, W_fd: Tensor) -> Frame:
    """The rows' mean, and scales that split each dimension's size between rows and features."""
    centre_d = x_bd.mean(0)
    size_d = (W_fd[::16].square().mean(0) / (x_bd - centre_d).square().mean(0)) ** 0.25
    size_d = torch.where(size_d.isfinite() & (size_d > 0), size_d, 1.0)
    exponent_d = (size_d / size_d.median()).log2().round().clamp(-12, 12)
    return Frame(centre_d if fits(centre_d[None]) else torch.zeros_like(centre_d), torch.exp2(exponent_d))


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


def write_rounded(rows: Tensor, out: Tensor) -> tuple[Tensor | None, Tensor]:
    """Writes rows in the precision of `out`; returns the step of each row for int8, and the float32 values of the written numbers."""
    if out.dtype == torch.bfloat16:
        return None, out.copy_(rows).float()
    step = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    whole = (rows / step).round_().clamp_(-127, 127)
    out.copy_(whole)
    return step[:, 0], whole.mul_(step)


def columns(d: int, low: Low) -> int:
    """Number of columns of an operand: in bfloat16 including those of the bound, and zeros up to a whole tile."""
    return -(-(d + 4) // 32) * 32 if low == "bfloat16" else -(-d // 8) * 8


def empty_operand(rows: int, d: int, low: Low, buffers: Buffers, name: str, device: torch.device) -> Tensor:
    """[rows, columns]; the columns after d are 0."""
    out = buffers.take(name, (rows, columns(d, low)), torch.bfloat16 if low == "bfloat16" else torch.int8, device)
    out[:, d:] = 0
    return out


class Features:
    """The features' side: encoder rows in low precision, with the numbers for their bounds. For rows that `fits` accepts, and smaller
    offsets."""

    def __init__(
        self, W_fd: Tensor, b_f: Tensor, above_f: Tensor | float, low: Low, frame: Frame | None = None, buffers: Buffers | None = None
    ):
        """With `buffers`, in memory that the next call overwrites."""
        f, d = W_fd.shape
        self.low, self.frame, self.slack = low, frame, slack_of(d, W_fd.device)
        self.operand_fk = empty_operand(f, d, low, buffers or Buffers(), f"{low} features", W_fd.device)
        self.step_f, self.norm_f, self.error_f = (W_fd.new_ones(f) for _ in range(3))
        rows = max(1, PREPARED_BYTES // (4 * d))
        for part in (slice(start, start + rows) for start in range(0, f, rows)):
            scaled_fd = W_fd[part] if frame is None else W_fd[part] / frame.scale_d
            step, stands_fd = write_rounded(scaled_fd, self.operand_fk[part, :d])
            if step is not None:
                self.step_f[part] = step
            self.norm_f[part] = norm_above(scaled_fd)
            self.error_f[part] = norm_above(stands_fd.sub_(scaled_fd))
        self.centre_norm = torch.zeros_like(self.norm_f[:1]) if frame is None else norm_above((frame.centre_d * frame.scale_d)[None])
        offset_f, size_f = b_f - above_f, b_f.abs() + torch.as_tensor(above_f).abs()
        if frame is not None:
            moved_f = W_fd @ frame.centre_d
            offset_f, size_f = offset_f + moved_f, size_f + moved_f.abs() + self.centre_norm * self.norm_f
        self.slack_f = 4 * self.slack * size_f
        if low == "bfloat16":  # the offset in two numbers of 8 digits
            self.slack_f += 2.0**-14 * offset_f.abs() + SMALLEST**2
        self.offset_f = offset_f + self.slack_f
        if low == "bfloat16":
            high_f = self.offset_f.bfloat16()
            low_f = (self.offset_f - high_f.float()).bfloat16()
            self.operand_fk[:, d : d + 4] = torch.stack((raised(self.norm_f), raised(self.error_f), high_f, low_f), 1)

    def rows(self, x_bd: Tensor, buffers: Buffers) -> "Rows":
        """The rows' side, in memory that the next call with these buffers overwrites. For rows that `fits` accepts."""
        d, frame = x_bd.shape[1], self.frame
        moved_bd = x_bd if frame is None else (x_bd - frame.centre_d).mul_(frame.scale_d)
        operand_bk = empty_operand(len(x_bd), d, self.low, buffers, f"{self.low} rows", x_bd.device)
        step_b, stands_bd = write_rounded(moved_bd, operand_bk[:, :d])
        length_b = norm_above(stands_bd)
        error_b = norm_above(stands_bd.sub_(moved_bd)) + self.slack * (norm_above(moved_bd) + self.centre_norm)
        if step_b is None:
            one_b = torch.ones_like(error_b).bfloat16()
            operand_bk[:, d : d + 4] = torch.stack([raised(error_b), raised(length_b), one_b, one_b], 1)
        return Rows(operand_bk, step_b, length_b, error_b)

    def upper_bounds(self, rows: "Rows", part: slice, buffers: Buffers) -> Tensor:
        """Upper bounds of z − above for a part of the features; 0 means surely not active. In memory that the next call
        overwrites."""
        operand_pk = self.operand_fk[part]
        shape, device = (len(rows.operand_bk), len(operand_pk)), operand_pk.device
        bound_bp = buffers.take("bound", shape, self.bound_dtype, device)
        if rows.step_b is None:
            torch.mm(rows.operand_bk, operand_pk.T, out=bound_bp)
        else:
            whole_bp = torch._int_mm(rows.operand_bk, operand_pk.T, out=buffers.take("int8 product", shape, torch.int32, device))
            bound_bp.copy_(whole_bp).mul_(self.step_f[part]).mul_(rows.step_b[:, None])
            wider = 1 + 2.0**-10
            rows_b3 = torch.stack([rows.error_b, rows.length_b, torch.ones_like(rows.error_b)], 1)
            bound_bp.addmm_(rows_b3, torch.stack([self.norm_f[part] * wider, self.error_f[part] * wider, self.offset_f[part]]))
        return bound_bp.relu_()

    @property
    def bound_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.low == "bfloat16" else torch.float32


class Rows(NamedTuple):
    """Rows in low precision, with the numbers for their bounds."""

    operand_bk: Tensor
    step_b: Tensor | None
    """value of one integer step, for int8"""
    length_b: Tensor
    error_b: Tensor


def raised(size: Tensor) -> Tensor:
    """Nonnegative numbers rounded up to bfloat16."""
    return (size * (1 + 2.0**-7)).bfloat16()
