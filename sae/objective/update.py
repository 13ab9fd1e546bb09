"""Applying gradients: clipping by each dictionary's whole gradient, then Adam.

k dictionaries of a sweep · b rows (tokens)
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae.errors import InputError
from sae.mesh import Mesh
from sae.objective.step import Weights

ROWS = 256
"""decoder rows for which products are computed at a time on a CPU, so that they stay in the processor's cache"""


class Adam:
    """Adam (Kingma and Ba 2015) over some tensors, with the state and the bits of torch.optim.Adam(fused=True).

    torch's own class imports torch's compiler when the first one is made, which takes longer than all other imports.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ):
        """`lr` may be a tensor on the parameters' device, for a CUDA graph."""
        self.parameters, self.lr, self.betas, self.eps = list(parameters), lr, betas, eps
        self.exp_avg, self.exp_avg_sq = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.steps = [torch.zeros((), device=p.device) for p in self.parameters]

    def require(self, parameters: Sequence[Tensor]) -> None:
        """Raises `InputError` unless it is over exactly these tensors: applying it would not be what was asked for."""
        if len(self.parameters) != len(parameters) or not all(p is q for p, q in zip(self.parameters, parameters)):
            raise InputError(
                f"expected optimizer=Adam(...) over exactly the weights, then their own parameters, got one over {len(self.parameters)} "
                "tensors that are not these; make it of the tensors that are given"
            )

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], bad: Tensor) -> None:
        """One step, or none if `bad` is true, decided on the device."""
        found_inf = bad.float()
        torch._foreach_add_(self.steps, 1)
        torch._fused_adam_(
            self.parameters,
            list(gradients),
            self.exp_avg,
            self.exp_avg_sq,
            [],
            self.steps,
            lr=self.lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=0.0,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
            found_inf=found_inf,
        )
        torch._foreach_sub_(self.steps, [found_inf] * len(self.steps))


class AdamState(NamedTuple):
    """Of an `Adam` over the four weights, without a copy."""

    exp_avg: Weights
    exp_avg_sq: Weights
    optimizer: Adam

    @classmethod
    def of(cls, optimizer: Adam, weights: Weights) -> "AdamState":
        optimizer.require(weights)
        return cls(Weights(*optimizer.exp_avg), Weights(*optimizer.exp_avg_sq), optimizer)

    def stacked(self) -> "AdamState":
        """Views of one dictionary's as those of a sweep of one."""
        return self._replace(exp_avg=self.exp_avg.stacked(), exp_avg_sq=self.exp_avg_sq.stacked())


def leave_across_(gradient_fd: Tensor, rows_fd: Tensor) -> None:
    """Subtracts from each row of the gradient its part along a row of length 1, in place."""
    some = gradient_fd.shape[-2] if gradient_fd.is_cuda else ROWS
    for g_pd, row_pd in zip(gradient_fd.split(some, -2), rows_fd.split(some, -2)):
        g_pd.addcmul_(row_pd, torch.linalg.vecdot(g_pd, row_pd)[..., None], value=-1)


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
