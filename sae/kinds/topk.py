"""TopK: the k largest pre-activations of each row (Gao et al. 2024, arXiv 2406.04093), and AbsTopK, by absolute value (2510.00404).

loss = mean over b of ‖y_b − ŷ_b‖², for TopK plus AuxK's (sae/kinds/kind.py); decoder rows have length 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sae.dictionaries.gates import AbsTopK as AbsTopKGate
from sae.dictionaries.gates import Gate
from sae.dictionaries.gates import TopK as TopKGate
from sae.kinds.kind import Aided, KeepsK, Now, Resampled, aid_loss
from sae.objective import Goal, Own, Terms, Weights
from sae.objective.formula import pre_activations, squared_error
from sae.objective.rule import Aid, Rule


class TopKGoal(NamedTuple):
    k: int
    signed: bool = False
    aid: Aid | None = None

    def loss(self, x_bd: Tensor, y_bo: Tensor | None, weights: Weights, own: Own) -> Terms:
        gate = AbsTopKGate(self.k) if self.signed else TopKGate(self.k)
        acts_bf = gate(pre_activations(x_bd, y_bo, weights))
        aid = aid_loss(x_bd, y_bo, acts_bf, weights, own, self.aid)
        return Terms(squared_error(x_bd, y_bo, acts_bf, weights, own).mean() + aid, acts_bf)

    def rule(self, weights: Weights, own: Own) -> Rule:
        return Rule(top=self.k, signed=self.signed, aid=self.aid)


@dataclass(kw_only=True)
class TopK(Aided):
    """Train dictionaries that keep the k largest pre-activations of each row (Gao et al. 2024)."""

    def goal(self, value: int, now: Now) -> Goal:
        return TopKGoal(value, aid=self.aid(now))

    def encoder(self, weights: Weights, own: Own, state: Mapping[str, Tensor], value: int) -> tuple[Tensor, Tensor, Gate]:
        return weights.W_enc_fd, weights.b_enc_f, TopKGate(value)


@dataclass(kw_only=True)
class AbsTopK(KeepsK, Resampled):
    """Train dictionaries that keep the k largest of each row by absolute value, with their signs (arXiv 2510.00404)."""

    def goal(self, value: int, now: Now) -> Goal:
        return TopKGoal(value, signed=True)

    def encoder(self, weights: Weights, own: Own, state: Mapping[str, Tensor], value: int) -> tuple[Tensor, Tensor, Gate]:
        return weights.W_enc_fd, weights.b_enc_f, AbsTopKGate(value)
