"""Data with known true features, and how much of them a dictionary recovers (Sharkey, Braun and Millidge 2022).

b rows · d width of the data · g true features · f features of the dictionary
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Toy(NamedTuple):
    truth_gd: Tensor
    """unit vectors"""
    probability_g: Tensor
    """of each true feature to be active in a row, falling geometrically"""

    def sample(self, rows: int, generator: torch.Generator) -> Tensor:
        """Rows x [b, d]: the sum of the active true features, each with a coefficient from U(0, 1)."""
        shape = (rows, len(self.truth_gd))
        active_bg = torch.rand(shape, generator=generator) < self.probability_g
        return (active_bg * torch.rand(shape, generator=generator)) @ self.truth_gd

    @property
    def mean_squared_norm(self) -> float:
        """E‖x‖² = Σ p E[c²] + ‖E x‖² − Σ (p E[c])², since coefficients are independent."""
        mean_d = (self.probability_g / 2) @ self.truth_gd
        return float((self.probability_g / 3).sum() + mean_d @ mean_d - (self.probability_g / 2).square().sum())


def toy(d: int = 256, g: int = 512, *, active: float = 5.0, decay: float = 0.99, seed: int = 0) -> Toy:
    """`active` true features per row on average; the i-th commonest is active with a probability proportional to decay^i."""
    generator = torch.Generator().manual_seed(seed)
    truth_gd = torch.nn.functional.normalize(torch.randn(g, d, generator=generator), dim=-1)
    weight_g = decay ** torch.arange(g)
    return Toy(truth_gd, weight_g * (active / weight_g.sum()))


def toy_l1(a: float, d: int, d_sae: int, mean_squared_norm: float) -> float:
    """The L1 coefficient of our objective, in training units, that equals the toy study's `a`.

    The study minimises mean over rows and dimensions of (x − x̂)² + a · mean ‖acts‖₁ / d_sae with unit decoder rows; times d that is
    ‖x − x̂‖² + (a d / d_sae) ‖acts‖₁. Training multiplies x, and with it the activations, by s = √(d / E‖x‖²): the squared error
    grows by s² and the L1 term by s, so the coefficient must grow by s. Weighting by decoder norms makes unit rows unnecessary.
    """
    return a * d / d_sae * (d / mean_squared_norm) ** 0.5


class Recovery(NamedTuple):
    mmcs: float
    """mean over true features of the largest signed cosine with a dictionary feature: recall"""
    mmcs_reverse: float
    """mean over dictionary features of the largest signed cosine with a true feature: precision"""
    fraction_found: float
    """share of the true features whose largest cosine is above 0.9"""
    one_to_one: float
    """mean cosine of the best matching that uses each feature at most once, over the smaller of the two sets"""


def recovery(truth_gd: Tensor, W_dec_fd: Tensor) -> Recovery:
    """Compares directions only; a zero row has cosine 0 with everything."""
    from scipy.optimize import linear_sum_assignment

    normalize = torch.nn.functional.normalize
    cosine_gf = normalize(truth_gd.double(), dim=-1) @ normalize(W_dec_fd.detach().double(), dim=-1).T
    best_g = cosine_gf.max(1).values
    matched = linear_sum_assignment(cosine_gf.numpy(), maximize=True)
    return Recovery(
        mmcs=float(best_g.mean()),
        mmcs_reverse=float(cosine_gf.max(0).values.mean()),
        fraction_found=float((best_g > 0.9).double().mean()),
        one_to_one=float(cosine_gf.numpy()[matched].mean()),
    )
