"""Hard-concrete gates (Louizos, Welling and Kingma 2018, arXiv 1712.01312), which can be exactly 0 and 1 and still have gradients.

z = min(1, max(0, γ + (ζ − γ) · σ((log u − log(1 − u) + log α) / β))), u uniform
"""

import math

import torch
from torch import Tensor

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def drawn(log_alpha: Tensor, generator: torch.Generator) -> Tensor:
    """z of every gate, on the CPU."""
    u = torch.rand(log_alpha.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    return (GAMMA + (ZETA - GAMMA) * ((u.logit() + log_alpha) / BETA).sigmoid()).clamp(0, 1)


def opened(log_alpha: Tensor) -> Tensor:
    """The probability that each gate is above 0; the sum is the expected number of open ones."""
    return (log_alpha - BETA * math.log(-GAMMA / ZETA)).sigmoid()
