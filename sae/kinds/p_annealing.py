"""p-annealing: an L1 penalty whose power falls, so that it approaches a count (Karvonen et al. 2024, arXiv 2408.00113).

loss = mean over b of ( ‖y_b − ŷ_b‖² + c · Σ_f v_bf^p ), v_bf = acts_bf ‖W_dec_f‖

p starts at 1, where this is ReLU with L1, and falls in steps. At each fall c is multiplied so that the penalty of the batch does not
change, as in the authors' trainer. The authors keep decoder rows at length 1; weighting by norms makes that unnecessary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sae.errors import InputError
from sae.kinds.kind import Now
from sae.kinds.relu import ReLU
from sae.objective import Goal, Own, Terms, Weights
from sae.objective.formula import L1, pre_activations, squared_error
from sae.objective.rule import Power, Rule, norms


class PGoal(NamedTuple):
    coefficient: Tensor
    p: float
    sites: int

    def loss(self, x_bd: Tensor, y_bo: Tensor | None, weights: Weights, own: Own) -> Terms:
        acts_bf = torch.relu(pre_activations(x_bd, y_bo, weights))
        v_bf = acts_bf * norms(weights.W_dec_fd, self.sites)
        penalty_b = torch.where(v_bf > 0, torch.where(v_bf > 0, v_bf, 1).pow(self.p), 0).sum(-1)
        error_b = squared_error(x_bd, y_bo, acts_bf, weights, own)
        return Terms((error_b + self.coefficient.to(error_b.dtype) * penalty_b).mean(), acts_bf)

    def rule(self, weights: Weights, own: Own) -> Rule:
        return Rule(price=Power(self.coefficient.to(weights.W_dec_fd.dtype), self.p), sites=self.sites)


@dataclass(kw_only=True)
class PAnnealing(ReLU):
    """Train dictionaries with ReLU and a penalty whose power falls from 1 (Karvonen et al. 2024)."""

    p_end: float = 0.2
    """Final power of the penalty."""
    anneal: tuple[float, float] = (0.2, 0.8)
    """The power falls between these shares of the steps."""
    falls: int = 10
    """Number of equal steps in which the power falls."""

    def check(self, d_sae: int) -> None:
        super().check(d_sae)
        if not 0 < self.p_end < 1:
            raise InputError(f"--p-end must be between 0 and 1, got {self.p_end}")
        if not 0 <= self.anneal[0] < self.anneal[1] <= 1:
            raise InputError(f"--anneal takes two rising shares of the steps from 0 to 1, got {list(self.anneal)}")
        if self.falls < 1:
            raise InputError(f"--falls must be at least 1, got {self.falls}")

    def state(self) -> dict[str, Tensor]:
        return {"factor": torch.ones(())}

    def power(self, step: int, steps: int) -> float:
        begin, end = (share * steps for share in self.anneal)
        done = min(self.falls, max(0, int(self.falls * (step - begin) / max(1.0, end - begin) + 1)) if step >= begin else 0)
        return 1 - (1 - self.p_end) * done / self.falls

    def before(self, x_bd: Tensor, y_bo: Tensor | None, weights: Weights, own: Own, value: float, now: Now) -> None:
        old, new = self.power(now.step - 1, now.steps), self.power(now.step, now.steps)
        if new < old:
            v_bf = torch.relu(pre_activations(x_bd, y_bo, weights)) * norms(weights.W_dec_fd, now.sites)
            v_n = v_bf[v_bf > 0].double()
            before, after = now.mesh.every.sums(v_n.pow(old).sum(), v_n.pow(new).sum())
            if after > 0:
                now.state["factor"].mul_(before / after)

    def goal(self, value: float, now: Now) -> Goal:
        p = self.power(now.step, now.steps)
        coefficient = now.state["factor"] * (value * now.share(self.l1_warmup))
        return L1(coefficient, now.sites) if p == 1 else PGoal(coefficient, p, now.sites)

    def line(self, value: float, now: Now) -> dict[str, float]:
        return {"l1_coefficient": float(now.state["factor"]) * value * now.share(self.l1_warmup), "p": self.power(now.step, now.steps)}
