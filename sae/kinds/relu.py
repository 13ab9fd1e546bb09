"""ReLU with an L1 penalty weighted by decoder norms (Anthropic, April 2024 update)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sae.dictionaries.gates import Gate, Threshold
from sae.errors import InputError
from sae.kinds.kind import Now, Resampled
from sae.objective import Goal, Own, Weights
from sae.objective.formula import L1


@dataclass(kw_only=True)
class ReLU(Resampled):
    """Train dictionaries with ReLU and an L1 penalty (Anthropic, April 2024 update)."""

    swept = "l1"

    l1: tuple[float, ...] = (5.0,)
    """L1 coefficients; several are trained together on one stream of batches."""
    l1_warmup: float = 0.05
    """Share of the steps over which the L1 coefficient rises linearly."""

    def check(self, d_sae: int) -> None:
        super().check(d_sae)
        if min(self.l1) < 0:
            raise InputError(f"--l1 must be at least 0, got {min(self.l1)}")
        if not 0 <= self.l1_warmup <= 1:
            raise InputError(f"--l1-warmup is a share of the steps between 0 and 1, got {self.l1_warmup}")

    def goal(self, value: float, now: Now) -> Goal:
        l1 = torch.tensor(value, device=now.dead_f.device) * now.share(self.l1_warmup)
        return L1(l1, now.sites)

    def encoder(self, weights: Weights, own: Own, state: Mapping[str, Tensor], value: float) -> tuple[Tensor, Tensor, Gate]:
        return weights.W_enc_fd, weights.b_enc_f, Threshold()

    def line(self, value: float, now: Now) -> dict[str, float]:
        return {"l1_coefficient": value * now.share(self.l1_warmup)}
