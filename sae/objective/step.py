"""What the objective takes and gives; one shape for every path.

b rows (tokens) · d model width · f features
"""

from typing import NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """A dictionary's parameters, or their gradients."""

    W_enc_fd: Tensor
    b_enc_f: Tensor
    W_dec_fd: Tensor
    b_dec_d: Tensor


class Step(NamedTuple):
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
    gradients: Weights
    """of the loss"""
    sparse_share: float
    """share of the rows that went through the sparse path, the rest through the dense one"""
