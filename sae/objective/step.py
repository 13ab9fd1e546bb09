"""Arguments and results of the objective; the same for every path and every kind.

k dictionaries of a sweep · b rows (tokens) · d width that is read · o width that is written · f features
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sae.objective.rule import Rule


class Weights(NamedTuple):
    """The parameters that every dictionary has, or their gradients; for a sweep each has a leading k."""

    W_enc_fd: Tensor
    b_enc_f: Tensor
    W_dec_fd: Tensor
    """[f, o] for a transcoder"""
    b_dec_d: Tensor
    """[o] for a transcoder"""

    def of(self, k: int) -> "Weights":
        """Views of one dictionary of a sweep."""
        return Weights(*(w[k] for w in self))

    def stacked(self) -> "Weights":
        """Views of one dictionary as a sweep of one."""
        return Weights(*(w[None] for w in self))


Own = Mapping[str, Tensor]
"""parameters that only some kinds have, by name: theta_f, W_skip_od, ...; for a sweep each has a leading k"""


WHOLE = "b_dec_d", "W_skip_od"
"""parameters that every process has completely; the others have an entry for each feature, and are split with the features"""


def of(own: Own, k: int) -> dict[str, Tensor]:
    """Views of one dictionary's parameters in a sweep's."""
    return {name: tensor[k] for name, tensor in own.items()}


class Terms(NamedTuple):
    """The results of a formula for a batch."""

    loss: Tensor
    """what is minimised, []"""
    acts_bf: Tensor


class Goal(Protocol):
    """What a kind minimises at one step, for one value of its swept option.

    With a target y the dictionary is a transcoder: it reads x and predicts y. By default it is an autoencoder: it reconstructs x, and its
    decoder bias is first subtracted from x.
    """

    def loss(self, x_bd: Tensor, y_bo: Tensor | None, weights: Weights, own: Own) -> Terms:
        """The published formula, in plain torch and in the dtype of its arguments: the reference for every faster path."""

    def rule(self, weights: Weights, own: Own) -> Rule | None:
        """The same for the fast step; None if there is no rule, so that the step is autograd on the formula."""


class Step(NamedTuple):
    """For a sweep every tensor has a leading k."""

    loss: Tensor
    """what is minimised, []"""
    squared_error: Tensor
    """mean over rows of ‖y − ŷ‖², []"""
    sparsity: Tensor
    """mean over rows of Σ_f |activation| · decoder norm, []"""
    l0: Tensor
    """mean number of active features in a row, []"""
    fired_f: Tensor
    """rows in which each feature was active, [f] int64"""
    gradients: Weights | None
    """of the loss; None if an optimizer was given and has been applied"""
    sparse_share: Tensor
    """share of the rows that used a sparse path, the others a dense one, []"""
    threshold: Tensor
    """the smallest kept activation if the whole batch chooses, otherwise 0, []"""
    own_gradients: Own = MappingProxyType({})
    """of the kind's own parameters, as `gradients`"""

    def of(self, k: int) -> "Step":
        """Views of one dictionary of a sweep."""
        tensors = {name: getattr(self, name)[k] for name in TENSORS}
        return Step(**tensors, gradients=self.gradients and self.gradients.of(k), own_gradients=of(self.own_gradients, k))

    @classmethod
    def stack(cls, steps: Iterable["Step"]) -> "Step":
        """Joins the steps of a sweep's dictionaries."""
        steps = list(steps)
        gradients = [s.gradients for s in steps if s.gradients is not None]
        own = {name: torch.stack([s.own_gradients[name] for s in steps]) for name in steps[0].own_gradients}
        stacked = Weights(*map(torch.stack, zip(*gradients))) if gradients else None
        tensors = {name: torch.stack([getattr(s, name) for s in steps]) for name in TENSORS}
        return cls(**tensors, gradients=stacked, own_gradients=own)


TENSORS = ("loss", "squared_error", "sparsity", "l0", "fired_f", "sparse_share", "threshold")
