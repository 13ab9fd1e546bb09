"""JumpReLU: each feature is active above its own learned threshold (Rajamanoharan et al. 2024, arXiv 2407.14435).

acts_f = z_f H(z_f − θ_f), θ ≥ 0 in float32. The step function H has the derivative −1/ε in θ where |z − θ| < ε/2, and none in z. The
loss is the mean over b of ‖y_b − ŷ_b‖² plus one of

    target   c d (L0 / target − 1)²           L0 the batch's mean, with H's derivative (Rajamanoharan et al., section on fixed L0)
    step     c d L0
    tanh     c Σ_f tanh(4 acts_f ‖W_dec_f‖)   (Anthropic, January 2025 update), without a constraint on decoder rows

d is the mean squared norm of the activations in training units: c is in the paper's, in which that is 1, and so is ε, times √d.
With target and step decoder rows have length 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sae.dictionaries.gates import Gate, Threshold
from sae.errors import InputError
from sae.kinds.kind import Now, Resampled, flag
from sae.objective import Goal, Own, Step, Terms, Weights
from sae.objective.formula import pre_activations, squared_error
from sae.objective.rule import Jump, Rule, Tanh, norms

STEEPNESS = 4.0
"""of tanh, as in the update"""


class _Jump(torch.autograd.Function):
    """z H(z − θ), and as second output H(z − θ), with the derivatives above."""

    @staticmethod
    def forward(ctx: Any, z_bf: Tensor, theta_f: Tensor, window: float) -> tuple[Tensor, Tensor]:
        active_bf = z_bf > theta_f
        ctx.save_for_backward(active_bf, (z_bf - theta_f).abs() < window / 2, theta_f)
        ctx.window = window
        return z_bf * active_bf, active_bf.to(z_bf.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        active_bf, near_bf, theta_f = ctx.saved_tensors
        of_acts_bf, of_step_bf = gradients
        return of_acts_bf * active_bf, -(near_bf * (theta_f * of_acts_bf + of_step_bf)).sum(0) / ctx.window, None


class JumpGoal(NamedTuple):
    loss_kind: Literal["target", "step", "tanh"]
    coefficient: Tensor
    target: float
    window: float
    sites: int

    def loss(self, x_bd: Tensor, y_bo: Tensor | None, weights: Weights, own: Own) -> Terms:
        acts_bf, step_bf = _Jump.apply(pre_activations(x_bd, y_bo, weights), own["theta_f"], self.window)
        loss = squared_error(x_bd, y_bo, acts_bf, weights, own).mean()
        l0, coefficient = step_bf.sum(-1).mean(), self.coefficient.to(loss.dtype)
        if self.loss_kind == "target":
            loss = loss + coefficient * (l0 / self.target - 1).square()
        elif self.loss_kind == "step":
            loss = loss + coefficient * l0
        else:
            loss = loss + coefficient * torch.tanh(STEEPNESS * acts_bf * norms(weights.W_dec_fd, self.sites)).sum(-1).mean()
        return Terms(loss, acts_bf)

    def rule(self, weights: Weights, own: Own) -> Rule:
        coefficient = self.coefficient.to(weights.W_dec_fd.dtype)
        counts = self.loss_kind != "tanh"
        jump = Jump(own["theta_f"], self.window, coefficient if counts else torch.zeros_like(coefficient), self.target)
        return Rule(price=None if counts else Tanh(coefficient, STEEPNESS), jump=jump, sites=self.sites)


@dataclass(kw_only=True)
class JumpReLU(Resampled):
    """Train dictionaries whose features are active above learned thresholds (Rajamanoharan et al. 2024)."""

    loss: Literal["target", "step", "tanh"] = "target"
    """Penalty: the distance of L0 from a target, L0 itself, or tanh of the activations (Anthropic, January 2025 update)."""
    target_l0: tuple[float, ...] = (32.0,)
    """L0 that --loss target aims at; several values are trained together."""
    coefficient: tuple[float, ...] = ()
    """Weight of the penalty. Default: 1 with target, 0.001 with step, 5 with tanh. Several values are trained together, but not with
    target."""
    warmup: float = 0.05
    """Share of the steps over which the weight of the penalty rises linearly."""
    bandwidth: float = 0.001
    """Width of the window around a threshold in which it gets a gradient, in units where the activations' mean squared norm is 1."""
    threshold: float = 0.001
    """Initial thresholds, in the same units."""

    @property
    def swept(self) -> str:  # type: ignore[override]
        return "target_l0" if self.loss == "target" else "coefficient"

    @property
    def unit_rows(self) -> bool:  # type: ignore[override]
        return self.loss != "tanh"

    @property
    def values(self) -> tuple[float, ...]:
        return self.target_l0 if self.loss == "target" else self.coefficient or (DEFAULTS[self.loss],)

    def check(self, d_sae: int) -> None:
        super().check(d_sae)
        if self.loss == "target" and not all(0 < target <= d_sae for target in self.target_l0):
            raise InputError(f"--target-l0 must be above 0 and at most the number of features, {d_sae}, got {list(self.target_l0)}")
        if self.loss == "target" and len(self.coefficient) > 1:
            raise InputError(f"expected one --coefficient with --loss target, got {list(self.coefficient)}; give several --target-l0")
        if self.loss != "target" and self.target_l0 != JumpReLU.target_l0:
            raise InputError(f"--target-l0 is for --loss target, got it with --loss {self.loss}; leave it out")
        for name in ("bandwidth", "threshold", *(["coefficient"] if self.coefficient else [])):
            value = getattr(self, name)
            if not (min(value) if isinstance(value, tuple) else value) > 0:
                raise InputError(f"{flag(name)} must be greater than 0, got {value}")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"--warmup is a share of the steps between 0 and 1, got {self.warmup}")

    def own(self, d: int, d_sae: int) -> dict[str, Tensor]:
        return {"theta_f": torch.full((d_sae,), self.threshold * d**0.5)}

    def taken_over(self, gate: Gate) -> dict[str, Tensor] | None:
        if not isinstance(gate, Threshold):
            return None
        return {} if gate.theta_f is None else {"theta_f": gate.theta_f.detach().float()}

    def goal(self, value: float, now: Now) -> Goal:
        target, weight = (value, (self.coefficient or (DEFAULTS["target"],))[0]) if self.loss == "target" else (0.0, value)
        weight *= (1 if self.loss == "tanh" else now.d) * now.share(self.warmup)
        return JumpGoal(self.loss, torch.tensor(weight, device=now.dead_f.device), target, self.bandwidth * now.d**0.5, now.sites)

    def after(self, result: Step, own: Own, now: Now) -> None:
        own["theta_f"].clamp_(min=0)

    def encoder(self, weights: Weights, own: Own, state: Mapping[str, Tensor], value: float) -> tuple[Tensor, Tensor, Gate]:
        return weights.W_enc_fd, weights.b_enc_f, Threshold(own["theta_f"])


DEFAULTS = {"target": 1.0, "step": 0.001, "tanh": 5.0}
