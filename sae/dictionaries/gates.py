"""Gates: which pre-activations become activations. All kinds of dictionaries differ, at inference, only here.

b rows (tokens) · f features

| kind | gate |
|---|---|
| ReLU with L1, p-annealing | `Threshold()` |
| JumpReLU; BatchTopK and Matryoshka once trained | `Threshold(theta_f)` |
| gated | `Threshold(theta_f)`, by `gated` |
| TopK | `TopK(k)` |
| AbsTopK | `AbsTopK(k)` |
| GroupMax (sparsify) | `GroupMax(k)` |
| TopK without ReLU (circuit-tracer) | `BareTopK(k)` |

A gate is called with pre-activations z [..., f] and may overwrite them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from sae.errors import InputError


class Gate(nn.Module, ABC):
    """What all gates have. A new kind is a subclass with `forward`, and `of` and `scaled` where they are possible."""

    signed: ClassVar[bool] = False
    """activations may be negative"""

    @abstractmethod
    def forward(self, z_bf: Tensor) -> Tensor:
        """Activations [..., f], perhaps in the memory of `z_bf`."""

    def of(self, features: Sequence[int] | Tensor) -> "Gate | None":
        """The gate of these features alone, or None where an activation depends on the others too."""
        return None

    def scaled(self, factor_f: Tensor) -> "Gate | None":
        """The gate g' with g'(factor · z) = factor · g(z) for factors above 0, or None where there is no such gate."""
        return None


class Threshold(Gate):
    """z where z > theta, else 0. `theta_f` [f] is at least 0; without one it is 0 everywhere, which is ReLU."""

    def __init__(self, theta_f: Tensor | None = None):
        super().__init__()
        # a threshold below 0 would let negative values through; the published JumpReLU takes the ReLU first
        self.theta_f = None if theta_f is None else nn.Parameter(theta_f.clamp(min=0), requires_grad=False)

    def forward(self, z_bf: Tensor) -> Tensor:
        return z_bf.relu_() if self.theta_f is None else z_bf.masked_fill_(z_bf <= self.theta_f, 0)

    def of(self, features: Sequence[int] | Tensor) -> "Threshold":
        return Threshold(None if self.theta_f is None else self.theta_f[features])

    def scaled(self, factor_f: Tensor) -> "Threshold":
        return Threshold(None if self.theta_f is None else self.theta_f * factor_f)


def gated(W_enc_fd: Tensor, r_mag_f: Tensor, b_mag_f: Tensor, b_gate_f: Tensor) -> tuple[Tensor, Threshold]:
    """W_enc and gate of a gated dictionary, whose b_enc is then b_mag (Rajamanoharan et al. 2024, arXiv 2404.16014).

    Exact: x W + b_gate > 0 is e^r x W + b_mag > b_mag − e^r b_gate, a threshold of the magnitude's own pre-activation.
    """
    gain_f = r_mag_f.exp()
    return W_enc_fd * gain_f[:, None], Threshold(b_mag_f - gain_f * b_gate_f)


class TopK(Gate):
    """The k largest of a row, those of them that are above 0."""

    def __init__(self, k: int):
        super().__init__()
        if k < 1:
            raise InputError(f"expected k of at least 1, got {k}")
        self.k = k

    def forward(self, z_bf: Tensor) -> Tensor:
        value_bk, index_bk = z_bf.topk(min(self.k, z_bf.shape[-1]), sorted=False)
        return z_bf.zero_().scatter_(-1, index_bk, value_bk.relu())

    def extra_repr(self) -> str:
        return f"k={self.k}"


class AbsTopK(TopK):
    """The k of a row that are largest without their signs, with their signs (arXiv 2510.00404)."""

    signed = True

    def forward(self, z_bf: Tensor) -> Tensor:
        index_bk = z_bf.abs().topk(min(self.k, z_bf.shape[-1]), sorted=False).indices
        value_bk = z_bf.gather(-1, index_bk)
        return torch.zeros_like(z_bf).scatter_(-1, index_bk, value_bk)


class BareTopK(TopK):
    """The k largest of a row as they are, those below 0 too: circuit-tracer's TopK, which has no ReLU."""

    signed = True

    def forward(self, z_bf: Tensor) -> Tensor:
        value_bk, index_bk = z_bf.topk(min(self.k, z_bf.shape[-1]), sorted=False)
        return z_bf.zero_().scatter_(-1, index_bk, value_bk)


class GroupMax(Gate):
    """The largest of each of k equal groups of neighbouring features, those of them that are above 0."""

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, z_bf: Tensor) -> Tensor:
        value_bk1, index_bk1 = z_bf.unflatten(-1, (self.k, -1)).max(dim=-1, keepdim=True)
        z_bf.zero_().unflatten(-1, (self.k, -1)).scatter_(-1, index_bk1, value_bk1.relu())
        return z_bf

    def extra_repr(self) -> str:
        return f"k={self.k}"
