"""The interface of a kind of dictionary: its options, what it minimises, and the trained dictionary. A new kind is one file and one row.

b rows (tokens) · d width that is read · o width that is written · f features
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sae.dictionaries.gates import Gate, Threshold, TopK
from sae.entries import largest
from sae.errors import InputError
from sae.mesh import ALONE, Mesh
from sae.objective import Goal, Own, Step, Weights
from sae.objective.formula import pre_activations, written
from sae.objective.rule import Aid


class Now(NamedTuple):
    """The state of one dictionary of a sweep at one step."""

    step: int
    """from 0"""
    steps: int
    d: int
    """mean squared norm of the target, in training units"""
    dead_f: Tensor
    """features that have been silent for `dead_steps` steps, bool"""
    state: Mapping[str, Tensor]
    """what the kind keeps from step to step, changed in place"""
    sites: int = 1
    """number of parts of a decoder row (crosscoders)"""
    mesh: Mesh = ALONE
    """processes among which features are split: `dead_f` has those of this process"""

    @property
    def d_sae(self) -> int:
        return len(self.dead_f) * self.mesh.features.size

    def share(self, of_steps: float) -> float:
        """The fraction, up to 1, of a linear rise over this share of the steps."""
        return min(1.0, (self.step + 1) / max(1, of_steps * self.steps))


@dataclass(kw_only=True)
class Kind(ABC):
    """Its fields are the flags of `sae train NAME`."""

    swept: ClassVar[str]
    """the option whose values train together on one stream of batches"""
    unit_rows: ClassVar[bool] = False
    """decoder rows keep length 1: otherwise the choice of the largest activations would depend on how encoder and decoder share their
    lengths"""

    @property
    def values(self) -> tuple[Any, ...]:
        """The values of the swept option, one for each dictionary."""
        return getattr(self, self.swept)

    def check(self, d_sae: int) -> None:
        """Raises `InputError` for options that make no sense."""
        values = self.values
        if not values or len(set(values)) < len(values):
            raise InputError(f"{flag(self.swept)} takes one or several different values, got {list(values)}")

    def own(self, d: int, d_sae: int) -> dict[str, Tensor]:
        """Initial values of parameters that are trained in addition to the weights."""
        return {}

    def taken_over(self, gate: Gate) -> dict[str, Tensor] | None:
        """Own parameters, continued from a trained dictionary with this gate; None if this kind cannot."""
        plain = isinstance(gate, Threshold) and (gate.theta_f is None or not gate.theta_f.any())
        return {} if plain else None

    def state(self) -> dict[str, Tensor]:
        """Initial values of what is kept from step to step and is not trained."""
        return {}

    def before(  # noqa: B027 (most kinds do nothing)
        self, x_bd: Tensor, y_bo: Tensor | None, weights: Weights, own: Own, value: Any, now: Now
    ) -> None:
        """Called before a step."""

    @abstractmethod
    def goal(self, value: Any, now: Now) -> Goal:
        """What is minimised at this step."""

    def after(self, result: Step, own: Own, now: Now) -> None:  # noqa: B027
        """Called after a step."""

    def resamples_every(self) -> int:
        """Steps between resamplings of dead features; 0: never."""
        return 0

    @abstractmethod
    def encoder(self, weights: Weights, own: Own, state: Mapping[str, Tensor], value: Any) -> tuple[Tensor, Tensor, Gate]:
        """W_enc [f, d], b_enc [f] and gate of the current dictionary."""

    def line(self, value: Any, now: Now) -> dict[str, float]:
        """The options that change during training, for the lines of metrics."""
        return {self.swept: value}


@dataclass(kw_only=True)
class Resampled(Kind):
    """A kind that resamples its dead features."""

    resample_every: int = 2500
    """Steps between resamplings of dead features (to residuals of badly reconstructed rows), until the learning rate falls; 0: never."""

    def check(self, d_sae: int) -> None:
        super().check(d_sae)
        if self.resample_every < 0:
            raise InputError(f"--resample-every must be 0 (off) or greater, got {self.resample_every}")

    def resamples_every(self) -> int:
        return self.resample_every


@dataclass(kw_only=True)
class KeepsK(Kind):
    """A kind that keeps the k largest pre-activations."""

    swept = "k"
    unit_rows = True

    k: tuple[int, ...] = (32,)
    """Active features per row; several values are trained together."""

    def taken_over(self, gate: Gate) -> dict[str, Tensor] | None:
        return {} if isinstance(gate, Threshold | TopK) else None  # which are active is decided by k from the first step

    def check(self, d_sae: int) -> None:
        super().check(d_sae)
        for k in self.k:
            if not 1 <= k <= d_sae:
                raise InputError(f"--k must be from 1 to the number of features, {d_sae}, got {k}")


@dataclass(kw_only=True)
class Aided(KeepsK):
    """A kind whose dead features reconstruct the residual (AuxK; Gao et al. 2024)."""

    aux_k: int | None = None
    """Dead features per row that reconstruct the residual. Default: half the width of the activations."""
    aux_coefficient: float = 1 / 32
    """Weight of the dead features' loss, in units where the activations' mean squared norm is 1; 0 turns it off."""

    def check(self, d_sae: int) -> None:
        super().check(d_sae)
        if self.aux_k is not None and not 1 <= self.aux_k <= d_sae:
            raise InputError(f"--aux-k must be from 1 to the number of features, {d_sae}, got {self.aux_k}")
        if self.aux_coefficient < 0:
            raise InputError(f"--aux-coefficient must be 0 (off) or greater, got {self.aux_coefficient}")

    def aid(self, now: Now) -> Aid | None:
        if not self.aux_coefficient:
            return None
        return Aid(now.dead_f, self.aux_k or max(1, now.d // 2), self.aux_coefficient * now.d)


def aid_loss(x_bd: Tensor, y_bo: Tensor | None, acts_bf: Tensor, weights: Weights, own: Own, aid: Aid | None) -> Tensor:
    """weight · Σ_b ‖e − ê‖² / Σ_b ‖e‖², where e is the residual of the code, without a gradient."""
    if aid is None or not aid.dead_f.any():  # host sync
        return acts_bf.new_zeros(())
    left_bo = ((x_bd if y_bo is None else y_bo) - written(x_bd, acts_bf, weights, own)).detach()
    dead_m = aid.dead_f.nonzero().squeeze(1)
    z_bm = pre_activations(x_bd, y_bo, weights)[:, dead_m]
    kept_bk = largest(z_bm.detach(), min(aid.k, len(dead_m)))
    aid_bm = torch.zeros_like(z_bm).scatter(1, kept_bk, z_bm.gather(1, kept_bk).relu())
    return aid.weight * (left_bo - aid_bm @ weights.W_dec_fd[dead_m]).square().sum() / left_bo.square().sum()


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
