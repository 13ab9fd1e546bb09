"""The ReLU + L1 objective: one entrance, several ways to compute the same thing."""

from typing import Literal

from torch import Tensor

from sae.errors import InputError
from sae.objective.fast import Workspace, fast_step
from sae.objective.reference import reference_step
from sae.objective.step import Step, Weights

Backend = Literal["auto", "dense", "sparse", "reference"]
__all__ = ["Backend", "Step", "Weights", "Workspace", "objective"]


def objective(x_bd: Tensor, weights: Weights, l1: float, backend: Backend = "auto", workspace: Workspace | None = None) -> Step:
    """Loss, its parts, firing counts and exact gradients for a batch `x_bd` in training units (mean squared norm d).

    `backend`: "reference" is the formula in float64; "dense" and "sparse" give the same to rounding; "auto" picks between those two
    by the share of active entries. The gradients may live in `workspace` and are then overwritten by the next call with it.
    Raises `InputError` for a batch that does not fit the dictionary.
    """
    d_in = weights.W_dec_fd.shape[1]
    if x_bd.ndim != 2 or x_bd.shape[1] != d_in or not len(x_bd) or not x_bd.is_floating_point():
        raise InputError(f"expected a batch of floating point rows [b, {d_in}], got {x_bd.dtype} {list(x_bd.shape)}")
    if backend == "reference":
        return reference_step(x_bd, weights, l1)
    return fast_step(x_bd.to(weights.W_dec_fd.dtype), weights, l1, backend, workspace)
