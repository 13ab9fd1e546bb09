"""Gradients of rows of a gated dictionary, whose two paths share the entries that pass the gate. Formula: sae/kinds/gated.py.

b rows (tokens) · d width that is read · o width that is written · f features · n entries

With π = u + b_enc where that is above 0, m = e^r u + b_mag, acts = relu(m), g = 2(ŷ(acts) − y)/B and h = 2(ŷ_frozen(π) − y)/B, on these
entries μ_bf = (g_b·W_dec_f where m > 0), γ_bf = h_b·W_dec_f + l1 ‖W_dec_f‖/B:

    db_mag_f = Σ_b μ_bf     dr_f = Σ_b μ_bf e^r u_bf     db_enc_f = Σ_b γ_bf     dW_enc_f = Σ_b (γ_bf + e^r μ_bf) x_b
    dW_dec_f = Σ_b acts_bf g_b + (l1 Σ_b π_bf/B) W_dec_f/‖W_dec_f‖
"""

import torch
from torch import Tensor

from sae.entries import Entries, add_weighted_sums, starts_of
from sae.objective.rule import Magnitude
from sae.objective.sparse import Sums, products_with, sort_by_feature


def add_dense_gated_rows(sums: Sums, part: slice, gate_bf: Tensor) -> None:
    """As `add_dense_rows`, for relu(π)."""
    paths, gradients, rows, beta = magnitude_of(sums), sums.gradients, sums.rows, 0 if sums.fresh else 1
    open_bf = gate_bf > 0
    grown_bf = (gate_bf - sums.weights.b_enc_f) * paths.r_mag_f.exp()
    acts_bf = (grown_bf + paths.b_mag_f).relu_().mul_(open_bf)
    W_dec_fo, axis = sums.weights.W_dec_fd, sums.workspace.mesh.features
    base = axis.leave_to_first_(sums.base(part))
    error, frozen_error = (axis.sum_(torch.addmm(base, code_bf, W_dec_fo)) for code_bf in (acts_bf, gate_bf))
    g = error * (2 / rows)
    gradients.W_dec_fd.addmm_(acts_bf.T, g, beta=beta)
    measures_bf = (g @ W_dec_fo.T).mul_(acts_bf > 0)
    decides_bf = torch.addmm(sums.norm_f * (sums.l1 / rows), frozen_error, W_dec_fo.T, alpha=2 / rows).mul_(open_bf)
    sums.own_gradients["r_mag_f"].add_((measures_bf * grown_bf).sum(0))
    sums.own_gradients["b_mag_f"].add_(measures_bf.sum(0))
    gradients.b_enc_f.add_(decides_bf.sum(0))
    gradients.W_enc_fd.addmm_(decides_bf.addcmul_(measures_bf, paths.r_mag_f.exp()).T, sums.input_bd[part], beta=beta)
    sums.activity_f.add_(acts_bf.sum(0))
    sums.fired_f.add_((acts_bf > 0).sum(0))
    sums.add_of_rows(part, g)
    add_costs(sums, gate_bf.sum(0), error, frozen_error)


def add_sparse_gated_rows(sums: Sums, part: slice, entries: list[Entries]) -> None:
    """As `add_sparse_rows`; the entries are π where it is above 0."""
    paths, gradients, rows, f = magnitude_of(sums), sums.gradients, sums.rows, len(sums.norm_f)
    row_n, column_n, gate_n = map(torch.cat, zip(*entries))
    axis = sums.workspace.mesh.features
    error = axis.leave_to_first_(sums.base(part))
    frozen_error, starts = error.clone(), starts_of(row_n, len(error))
    for summed, code_n in ((error, measured(sums, column_n, gate_n)[1]), (frozen_error, gate_n)):
        add_weighted_sums(summed, sums.weights.W_dec_fd, column_n, starts, code_n, False)
        axis.sum_(summed)
    g, h = error * (2 / rows), frozen_error * (2 / rows)
    row_n, column_n, gate_n, starts = sort_by_feature(row_n, column_n, gate_n, f)
    grown_n, acts_n = measured(sums, column_n, gate_n)
    measures_n = products_with(g, sums.weights.W_dec_fd, row_n, starts, acts_n).masked_fill_(acts_n == 0, 0)
    decides_n = products_with(h, sums.weights.W_dec_fd, row_n, starts, gate_n)
    decides_n.add_((sums.norm_f * (sums.l1 / rows)).index_select(0, column_n))
    sums.own_gradients["r_mag_f"].index_add_(0, column_n, measures_n * grown_n)
    sums.own_gradients["b_mag_f"].index_add_(0, column_n, measures_n)
    gradients.b_enc_f.index_add_(0, column_n, decides_n)
    moved_n = decides_n.addcmul_(measures_n, paths.r_mag_f.exp().index_select(0, column_n))
    add_weighted_sums(gradients.W_dec_fd, g, row_n, starts, acts_n, sums.fresh)
    add_weighted_sums(gradients.W_enc_fd, sums.input_bd[part], row_n, starts, moved_n, sums.fresh)
    sums.activity_f.index_add_(0, column_n, acts_n)
    sums.fired_f += torch.bincount(column_n[acts_n > 0], minlength=f)
    sums.add_of_rows(part, g)
    add_costs(sums, torch.zeros_like(sums.norm_f).index_add_(0, column_n, gate_n), error, frozen_error)


def magnitude_of(sums: Sums) -> Magnitude:
    assert sums.rule.magnitude is not None
    return sums.rule.magnitude


def measured(sums: Sums, column_n: Tensor, gate_n: Tensor) -> tuple[Tensor, Tensor]:
    """e^r u and acts of entries, [n] each."""
    r_mag_f, b_mag_f = magnitude_of(sums)
    grown_n = (gate_n - sums.weights.b_enc_f.index_select(0, column_n)).mul_(r_mag_f.exp().index_select(0, column_n))
    return grown_n, (grown_n + b_mag_f.index_select(0, column_n)).relu_()


def add_costs(sums: Sums, gate_f: Tensor, error: Tensor, frozen_error: Tensor) -> None:
    """Adds these rows' part of the loss, and the deciding path's penalty to the gradient of the decoder norms."""
    squared_error = error.square().sum()
    sums.squared_error += squared_error
    sums.part_error += squared_error + frozen_error.square().sum()
    sums.cost += sums.l1 * (gate_f @ sums.norm_f)
    sums.pull_f.add_(sums.l1 * gate_f)
    sums.fresh = False
