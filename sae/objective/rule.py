"""A kind's rule for the fast step: which entries are active, their penalty, and what else is learned from them.

b rows (tokens) · f features · n entries · v = |activation| · decoder norm, the length that an entry adds
"""

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor


class Price(Protocol):
    """The penalty of an entry of length v; a step's loss contains the sum over its entries, divided by the number of rows."""

    def cost(self, v_n: Tensor) -> Tensor: ...

    def slope(self, v_n: Tensor) -> Tensor:
        """Derivative of the penalty; at 0 the one from above."""


class Linear(NamedTuple):
    """l1 · v"""

    l1: Tensor
    """[]"""

    def cost(self, v_n: Tensor) -> Tensor:
        return self.l1 * v_n

    def slope(self, v_n: Tensor) -> Tensor:
        return self.l1.expand_as(v_n)


class Power(NamedTuple):
    """coefficient · v^p, with p below 1. Its slope is unbounded at 0; only active entries have a penalty."""

    coefficient: Tensor
    p: float

    def cost(self, v_n: Tensor) -> Tensor:
        return self.coefficient * torch.where(v_n > 0, v_n, 1).pow(self.p).where(v_n > 0, 0)

    def slope(self, v_n: Tensor) -> Tensor:
        return self.coefficient * self.p * torch.where(v_n > 0, v_n, 1).pow(self.p - 1).where(v_n > 0, 0)


class Tanh(NamedTuple):
    """coefficient · tanh(c · v)"""

    coefficient: Tensor
    c: float

    def cost(self, v_n: Tensor) -> Tensor:
        return self.coefficient * torch.tanh(self.c * v_n)

    def slope(self, v_n: Tensor) -> Tensor:
        return self.coefficient * self.c * (1 - torch.tanh(self.c * v_n).square())


class Jump(NamedTuple):
    """Thresholds that learn through a window around them (Rajamanoharan et al. 2024, arXiv 2407.14435).

    The step function H(z − θ) is given the derivative −1/window in θ where |z − θ| < window / 2. L0 is its sum over features, and costs
    `l0` · L0 or, with a target, `l0` · (L0 / target − 1)², L0 being the batch's mean.
    """

    theta_f: Tensor
    """at least 0"""
    window: float
    l0: Tensor
    """[]"""
    target: float = 0.0

    def cost(self, l0: Tensor) -> Tensor:
        return self.l0 * ((l0 / self.target - 1).square() if self.target else l0)

    def slope(self, l0: Tensor) -> Tensor:
        return self.l0 * (2 * (l0 / self.target - 1) / self.target if self.target else torch.ones_like(l0))


class Magnitude(NamedTuple):
    """A second path computes the size of the entries that the first path activates: relu(e^r_mag u + b_mag), where u is z without its bias.

    The penalty is then on z, and z must also reconstruct y, through a decoder that gets no gradient from it (Rajamanoharan et al. 2024).
    """

    r_mag_f: Tensor
    b_mag_f: Tensor


class Aid(NamedTuple):
    """Dead features reconstruct the residual (Gao et al. 2024, arXiv 2406.04093): weight · Σ_b ‖e − ê‖² / Σ_b ‖e‖².

    e = y − ŷ, without a gradient; ê is the sum of the `k` dead features of a row with the largest pre-activations above 0. The paper's code
    divides by ‖e‖² too, so that dead features do not learn more slowly when the residual is small.
    """

    dead_f: Tensor
    """bool"""
    k: int
    weight: float


class Rule(NamedTuple):
    price: Price | None = None
    top: int = 0
    """number of entries of a row to keep, the largest ones above 0; 0: all above 0"""
    over: Literal["row", "batch"] = "row"
    """"row": keep the largest of each row; "batch": keep the rows · top largest of the whole batch"""
    signed: bool = False
    """compare absolute values, and keep the signs"""
    jump: Jump | None = None
    """active where z > theta instead of z > 0"""
    magnitude: Magnitude | None = None
    prefixes: tuple[int, ...] = ()
    """ends of the first parts of the features that must each reconstruct y alone; the loss has their mean squared error (Matryoshka)"""
    aid: Aid | None = None
    sites: int = 1
    """a decoder norm is the sum of the norms of this many equal parts of the row (crosscoders)"""

    def kept(self, column_n: Tensor, z_n: Tensor) -> Tensor:
        """The activations of listed entries: 0 for those that are only within a threshold's window."""
        if self.jump is None:
            return z_n
        return torch.where(z_n > self.jump.theta_f.index_select(0, column_n), z_n, 0)

    @property
    def is_relu(self) -> bool:
        """Whether this is ReLU with an L1 penalty and nothing else."""
        return isinstance(self.price, Linear) and self == Rule(price=self.price)


def norms(W_dec_fo: Tensor, sites: int) -> Tensor:
    """Decoder norms, [f]: sums over sites."""
    return W_dec_fo.norm(dim=-1) if sites == 1 else W_dec_fo.unflatten(-1, (sites, -1)).norm(dim=-1).sum(-1)
