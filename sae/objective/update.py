"""Applying gradients: clipping by each dictionary's whole gradient, then Adam. The state is that of the given torch.optim.Adam.

k dictionaries of a sweep · b rows (tokens)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.errors import InputError
from sae.mesh import Mesh
from sae.objective.step import Weights


class AdamState(NamedTuple):
    """The state of a torch.optim.Adam for the four parameters, without a copy."""

    exp_avg: Weights
    exp_avg_sq: Weights
    steps: tuple[Tensor, ...]
    options: dict[str, Any]
    """lr, betas, eps"""

    def stacked(self) -> "AdamState":
        """Views of one dictionary's as those of a sweep of one."""
        return self._replace(exp_avg=self.exp_avg.stacked(), exp_avg_sq=self.exp_avg_sq.stacked())


def adam_state(optimizer: torch.optim.Adam, weights: Weights) -> AdamState:
    """The optimizer's state for exactly these weights, as `moments` returns it."""
    states = moments(optimizer, weights)
    exp_avg, exp_avg_sq = (Weights(*(s[name] for s in states)) for name in ("exp_avg", "exp_avg_sq"))
    return AdamState(exp_avg, exp_avg_sq, tuple(s["step"] for s in states), optimizer.param_groups[0])


def moments(optimizer: torch.optim.Adam, parameters: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """The optimizer's state for exactly these tensors, created if it does not exist yet.

    Raises `InputError` for another kind of optimizer, or one over other tensors: applying it would not do what was requested.
    """
    options = optimizer.param_groups[0]
    held = [p for g in optimizer.param_groups for p in g["params"]]
    same = len(held) == len(parameters) and all(p is w for p, w in zip(held, parameters))
    plain = type(optimizer) is torch.optim.Adam and not (options["weight_decay"] or options["amsgrad"] or options["maximize"])
    if not (same and plain and options["fused"]):
        raise InputError(
            "expected optimizer=torch.optim.Adam(weights, fused=True) over exactly the weights, without weight decay, amsgrad or "
            f"maximize; got {type(optimizer).__name__} over {len(held)} tensors{'' if same else ' that are not the weights'}"
        )
    for parameter in parameters:
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return [optimizer.state[parameter] for parameter in parameters]


def clip(gradients: Sequence[Tensor], largest: float, split: Sequence[bool], mesh: Mesh) -> None:
    """Scales each dictionary's gradients (leading k) in place so that their joint norm is at most `largest`.

    `split`: which of them are this process's part of the whole.
    """
    norm_pk = torch.stack([g.flatten(1).norm(dim=1) for g in gradients])
    if not mesh.alone:
        mine_p = torch.tensor(split, device=norm_pk.device)
        norm_pk = torch.cat([mesh.every.gather(norm_pk[mine_p]).flatten(0, 1), norm_pk[~mine_p]])
    norm_k = norm_pk.T.contiguous().norm(dim=1)  # a row each, which is added in one order for any k
    factor_k = (largest / (norm_k + 1e-6)).clamp(max=1)
    for g in gradients:
        g.mul_(factor_k.view(-1, *[1] * (g.ndim - 1)))


def apply(optimizer: torch.optim.Adam, parameters: Sequence[Tensor], gradients: Sequence[Tensor], bad: Tensor) -> None:
    """One step of the optimizer, or none if `bad` is true, decided on the device."""
    moments(optimizer, parameters)
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # torch's fused step asks it before it writes
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None
