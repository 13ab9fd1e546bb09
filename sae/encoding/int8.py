"""Upper bounds of pre-activations from an int8 product on a CPU, one byte each.

b rows (tokens) · d width · f features · p features of a block · k columns of an operand

With whole numbers q_b and w_f, a row is t_b q_b + δ_b and a feature is s_f w_f + ε_f. The bound of bounds.py, divided by s_f t_b > 0, which
keeps its sign, is

    q_b·w_f + c_b (offset_f / s_f S) + (‖δ_b‖ / t_b) (‖W_f‖ / s_f) + ‖q_b‖ (‖ε_f‖ / s_f)

with t_b = S / c_b for a whole number c_b of at most 127. So the offset is more columns of the product: c_b in the rows, and in the features
whole numbers that add up to the second factor, rounded up (`of_offset` columns). ‖δ_b‖ / t_b is nearly the same in all rows: a typical
value of it times ‖W_f‖ / s_f becomes columns too (`of_norm`). What ‖δ_b‖ / t_b has above that value, and the last term, are added for each
row with the largest factor among the features of a block, between which these factors differ little. oneDNN adds that number to the
product and writes one byte, which is 0 where the sum is not positive.
"""

from collections.abc import Iterator
from copy import copy
from math import sqrt

import torch
from torch import Tensor

from sae.encoding.bounds import BLOCK, SMALLEST, Frame, centre_norm, moved, norm_above, offsets, parts_of, slack_of
from sae.entries import Buffers

WIDEST = 60_000
"""width up to which sums of products of two bytes stay below 2³¹"""
MIDDLE = 64
"""c_b of a typical row: half as long ones and many times longer ones have steps that fit them"""
WIDER = 1 + 2.0**-10
"""covers the rounding of the bound's own numbers"""
ALWAYS = 2.0**30
"""makes every bound positive"""


class Int8Features:
    """Operands in int8: features as bytes in which 128 stands for 0, as oneDNN has them."""

    def __init__(self, W_fd: Tensor, b_f: Tensor, above_f: Tensor | float, frame: Frame | None = None, buffers: Buffers | None = None):
        """With `buffers`, in memory that the next call overwrites."""
        (f, d), self.frame = W_fd.shape, frame
        self.of_norm = d // 400 + 1
        columns = -(-int(d + self.of_norm + 1.3 * sqrt(d)) // 32) * 32  # whole tiles, and offsets of up to six deviations of a product
        self.of_offset = columns - d - self.of_norm
        self.operand_fk = (buffers or Buffers()).take("int8 features", (f, columns), torch.uint8, W_fd.device)
        self.step_f, norm_f, error_f = (W_fd.new_empty(f) for _ in range(3))
        for part, scaled_fd in parts_of(W_fd, frame):
            step_p = self.step_f[part] = scaled_fd.abs().amax(1).clamp_(min=d * SMALLEST) / 127
            whole_pd = (scaled_fd / step_p[:, None]).round_().clamp_(-127, 127)
            self.operand_fk[part, :d].view(torch.int8).copy_(whole_pd)
            norm_f[part], error_f[part] = norm_above(scaled_fd), norm_above(whole_pd.mul_(step_p[:, None]).sub_(scaled_fd))
        self.operand_fk[:, :d] ^= 128  # adds it
        self.offset_f = offsets(W_fd, b_f, above_f, norm_f, frame)
        self.unit = MIDDLE * max(1.0 if frame is None else frame.largest, d * SMALLEST) / 127
        self.norm_f, self.error_f = WIDER * norm_f / self.step_f, WIDER * error_f / self.step_f
        self.typical = 1.02 * sqrt(d / 12)  # rounding errors are uniform within a step
        write_sum((self.typical * self.norm_f / 127).ceil_(), self.operand_fk[:, d + self.of_offset :])
        self.always_f = self._offset_in_units(0.0) > 127 * self.of_offset
        self.operand_fk[self.always_f.nonzero().squeeze(1), :d] = 128
        self._write_offsets(0.0)

    def _offset_in_units(self, floor: float) -> Tensor:
        return (self.offset_f - floor + 2.0**-20 * (self.offset_f.abs() + floor)) / self.step_f / self.unit

    def _write_offsets(self, floor: float) -> None:
        """Of features whose offset is beyond the columns, weights are 0 and the columns' sum is positive: every row is a candidate."""
        n, d = self.of_offset, self.operand_fk.shape[1] - self.of_offset - self.of_norm
        total_f = self._offset_in_units(floor).ceil_().clamp_(-127 * n, 127 * n)
        write_sum(total_f.masked_fill_(self.always_f, 127 * n), self.operand_fk[:, d : d + n])

    def above(self, floor: float, buffers: Buffers) -> "Int8Features":
        """See `Features`."""
        higher, shape = copy(self), tuple(self.operand_fk.shape)
        higher.operand_fk = buffers.take("int8 floor", shape, torch.uint8, self.operand_fk.device).copy_(self.operand_fk)
        higher._write_offsets(floor)
        return higher

    def upper_bounds(self, x_bd: Tensor, more_b: Tensor | None, buffers: Buffers) -> Iterator[tuple[int, Tensor]]:
        """See `Features`."""
        (b, d), device = x_bd.shape, x_bd.device
        moved_bd = moved(x_bd, self.frame)
        share_b = (127 * self.unit / moved_bd.abs().amax(1)).floor_().clamp_(1, 127)
        step_b = self.unit / share_b
        whole_bd = (moved_bd / step_b[:, None]).round_().clamp_(-127, 127)
        operand_bk = buffers.take("int8 rows", (b, self.operand_fk.shape[1]), torch.int8, device)
        operand_bk[:, :d], operand_bk[:, d : -self.of_norm], operand_bk[:, -self.of_norm :] = whole_bd, share_b[:, None], 127
        length_b = norm_above(whole_bd)
        error_b = norm_above(whole_bd.mul_(step_b[:, None]).sub_(moved_bd))
        error_b += slack_of(d, device) * (norm_above(moved_bd) + centre_norm(self.frame))
        beyond_b = (error_b / step_b - self.typical).clamp_(min=0)
        rows = Packed(operand_bk)
        for start in range(0, len(self.operand_fk), BLOCK):
            part = slice(start, start + BLOCK)
            added_b = WIDER * (beyond_b * self.norm_f[part].max() + length_b * self.error_f[part].max())
            if more_b is not None:
                highest = 0.0 if self.always_f[part].any() else torch.inf  # their bounds stay positive
                least_b = torch.where(more_b > 0, more_b / self.step_f[part].max(), more_b / self.step_f[part].min()).clamp_(max=highest)
                added_b -= (least_b - 2.0**-20 * least_b.abs()) / step_b
            added_b = added_b.clamp_(max=ALWAYS).ceil_() + d // 256 + 2
            yield start, rows.product(self.operand_fk[part], added_b)


def write_sum(total_p: Tensor, out_pn: Tensor) -> None:
    """Writes columns of at most 127, with 128 for 0, that add up to whole numbers."""
    n = out_pn.shape[1]
    each_p = (total_p / n).floor_()
    out_pn.copy_(each_p[:, None] + 128 + (torch.arange(n) < (total_p - n * each_p)[:, None]))


class Packed:
    """Rows [b, k] in int8, in oneDNN's own order."""

    def __init__(self, operand_bk: Tensor):
        self.packed = torch.ops.onednn.qlinear_prepack(operand_bk, None)
        self.one_b, self.zero_b = torch.ones(len(operand_bk)), torch.zeros(len(operand_bk), dtype=torch.int64)

    def product(self, operand_pk: Tensor, added_b: Tensor) -> Tensor:
        """(operand_pk − 128) · rows + added_b as bytes, at least 0 and at most 255, [p, b]."""
        product = torch.ops.onednn.qlinear_pointwise
        return product(operand_pk, 1.0, 128, self.packed, self.one_b, self.zero_b, added_b, 1.0, 0, torch.uint8, "none", [], "")


def adds_in_whole_numbers() -> bool:
    """Whether torch has these products, and sums them without saturation, which some processors have in pairs of products."""
    added_b = 127.0 * 127 * 1024 + torch.tensor([-1.0, 0, 1, 300]).repeat(8)
    try:
        bytes_pb = Packed(torch.full((32, 1024), -127, dtype=torch.int8)).product(torch.full((32, 1024), 255, dtype=torch.uint8), added_b)
    except (AttributeError, RuntimeError):  # no such function in this torch, or not for this processor
        return False
    return bool((bytes_pb == torch.tensor([0, 0, 1, 255]).repeat(8)).all())
