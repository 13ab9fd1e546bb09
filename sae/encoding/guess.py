"""Guesses of the k-th largest pre-activation of rows, from their lengths: TopK looks only at entries above them.

On activations of language models this value differs several times between rows, and much of that is the row's length: with a TopK of 32
on SmolLM2, one guess for all rows that 95 % of them reach lists 11 entries for each one kept, and a line that 90 % are above lists 3.
"""

from typing import NamedTuple

from torch import Tensor

SHORT = 0.1
"""share of the rows whose k-th value is below the line; these rows are tried again with a lower guess"""


class Line(NamedTuple):
    """slope · ‖x‖ + level for a row x, or 0 if that is negative."""

    slope: float
    level: float

    def at(self, length_b: Tensor) -> Tensor:
        return (self.slope * length_b + self.level).nan_to_num_(0, 0, 0).clamp_(min=0)

    @classmethod
    def below(cls, kth_b: Tensor, length_b: Tensor) -> "Line":
        """Fitted to rows by least squares of relative errors, then lowered until a share `SHORT` of the rows is below it."""
        kth_b, length_b = kth_b.double(), length_b.double()
        weight_b = length_b.clamp(min=float(length_b.median()) / 2) ** -2  # host sync
        weight_b = (weight_b / weight_b.sum()).nan_to_num(0, 0, 0)
        length, kth = weight_b @ length_b, weight_b @ kth_b
        away_b = length_b - length
        slope = ((weight_b * away_b) @ (kth_b - kth) / (weight_b @ away_b.square())).nan_to_num(0, 0, 0)
        line_b = slope * length_b + (kth - slope * length)
        share_b = (kth_b / line_b)[line_b > 0]
        if not len(share_b):
            return cls(0.0, 0.0)
        share = share_b.kthvalue(1 + int(SHORT * len(share_b))).values.clamp(min=0)
        return cls(float(share * slope), float(share * (kth - slope * length)))
