"""Gated: one path decides whether a feature is active, another computes its size (Rajamanoharan et al. 2024, arXiv 2404.16014).

u = (x − b_dec) W_encᵀ, π_gate = u + b_enc, π_mag = e^r u + b_mag, acts = H(π_gate) relu(π_mag)

loss = mean over b of ( ‖y_b − ŷ(acts)_b‖² + l1 Σ_f relu(π_gate)_bf ‖W_dec_f‖ + ‖y_b − ŷ_frozen(relu(π_gate))_b‖² )

The decoder of the last term is frozen: the term trains only the path that decides. Decoder rows have length 1, as in the paper, so that the
norm in the penalty matters only for crosscoders, whose rows have one norm per site.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sae.dictionaries.gates import Gate, gated
from sae.kinds.kind import Now
from sae.kinds.relu import ReLU
from sae.objective import Goal, Own, Terms, Weights
from sae.objective.formula import pre_activations, squared_error
from sae.objective.rule import Linear, Magnitude, Rule, norms


class GatedGoal(NamedTuple):
    l1: Tensor
    sites: int

    def loss(self, x_bd: Tensor, y_bo: Tensor | None, weights: Weights, own: Own) -> Terms:
        gate_bf = pre_activations(x_bd, y_bo, weights)
        magnitude_bf = own["r_mag_f"].exp() * (gate_bf - weights.b_enc_f) + own["b_mag_f"]
        acts_bf = (gate_bf > 0) * magnitude_bf.relu()
        decides_bf = gate_bf.relu()
        frozen = Weights(*(w.detach() for w in weights))
        frozen_own = {name: w.detach() for name, w in own.items()}
        error_b = squared_error(x_bd, y_bo, acts_bf, weights, own) + squared_error(x_bd, y_bo, decides_bf, frozen, frozen_own)
        penalty_b = (decides_bf * norms(weights.W_dec_fd, self.sites)).sum(-1)
        return Terms((error_b + self.l1.to(error_b.dtype) * penalty_b).mean(), acts_bf)

    def rule(self, weights: Weights, own: Own) -> Rule:
        price = Linear(self.l1.to(weights.W_dec_fd.dtype))
        return Rule(price=price, magnitude=Magnitude(own["r_mag_f"], own["b_mag_f"]), sites=self.sites)


@dataclass(kw_only=True)
class Gated(ReLU):
    """Train dictionaries in which one path decides what is active and another computes its size (Rajamanoharan et al. 2024)."""

    unit_rows = True

    def own(self, d: int, d_sae: int) -> dict[str, Tensor]:
        return {"r_mag_f": torch.zeros(d_sae), "b_mag_f": torch.zeros(d_sae)}

    def taken_over(self, gate: Gate) -> None:
        return None  # a saved one has lost which of its biases decided

    def goal(self, value: float, now: Now) -> Goal:
        return GatedGoal(torch.tensor(value, device=now.dead_f.device) * now.share(self.l1_warmup), now.sites)

    def encoder(self, weights: Weights, own: Own, state: Mapping[str, Tensor], value: float) -> tuple[Tensor, Tensor, Gate]:
        W_enc_fd, gate = gated(weights.W_enc_fd, own["r_mag_f"], own["b_mag_f"], weights.b_enc_f)
        return W_enc_fd, own["b_mag_f"], gate
