"""What the objective takes and gives; one shape for every path.

k dictionaries of a sweep · b rows (tokens) · d model width · f features
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """A dictionary's parameters, or their gradients; for a sweep each has a leading k."""

    W_enc_fd: Tensor
    b_enc_f: Tensor
    W_dec_fd: Tensor
    b_dec_d: Tensor

    def of(self, k: int) -> "Weights":
        """Views of one dictionary of a sweep."""
        return Weights(*(w[k] for w in self))

    def stacked(self) -> "Weights":
        """Views of one dictionary as a sweep of one."""
        return Weights(*(w[None] for w in self))


class Step(NamedTuple):
    """For a sweep every tensor has a leading k."""

    loss: Tensor
    """squared_error + l1 · sparsity, []"""
    squared_error: Tensor
    """mean over rows of ‖x − x̂‖², []"""
    sparsity: Tensor
    """mean over rows of Σ_f activation · decoder norm, []"""
    l0: Tensor
    """mean number of active features in a row, []"""
    fired_f: Tensor
    """rows in which each feature was active, [f] int64"""
    gradients: Weights | None
    """of the loss; None where an optimizer was given and has been applied"""
    sparse_share: Tensor
    """share of the rows that went through a sparse path, the rest through a dense one, []"""

    def of(self, k: int) -> "Step":
        """Views of one dictionary of a sweep."""
        fields = {name: getattr(self, name)[k] for name in self._fields if name != "gradients"}
        return Step(**fields, gradients=self.gradients and self.gradients.of(k))

    @classmethod
    def stack(cls, steps: list["Step"]) -> "Step":
        """The step of a sweep, from those of its dictionaries."""
        gradients = [s.gradients for s in steps if s.gradients is not None]
        stacked = Weights(*map(torch.stack, zip(*gradients))) if gradients else None
        fields = [name for name in cls._fields if name != "gradients"]
        return cls(**{name: torch.stack([getattr(s, name) for s in steps]) for name in fields}, gradients=stacked)
