"""The sums of a step, and the gradients of rows from their active entries alone. Formulas: fast.py.

b rows (tokens) · d width that is read · o width that is written · f features · n active entries
"""

from itertools import pairwise

import torch
from torch import Tensor

from sae.entries import Entries, add_weighted_sums, largest, starts_of
from sae.objective.choice import kept_of_rows
from sae.objective.rule import Aid, Jump, Linear, Rule, norms
from sae.objective.step import Own, Step, Weights
from sae.objective.workspace import Workspace


class Sums:
    """The inputs of one step of one dictionary, and the sums that its chunks of rows add to."""

    def __init__(
        self,
        x_bd: Tensor,
        y_bo: Tensor | None,
        weights: Weights,
        own: Own,
        rule: Rule,
        workspace: Workspace,
        gradients: Weights,
        own_gradients: Own,
    ):
        self.x_bd, self.y_bo, self.weights, self.own, self.rule, self.workspace = x_bd, y_bo, weights, own, rule, workspace
        self.gradients, self.own_gradients = gradients, own_gradients
        self.rows = len(x_bd) * workspace.mesh.rows.size
        """of all processes"""
        self.input_bd = x_bd - weights.b_dec_d if y_bo is None else x_bd
        self.norm_f = norms(weights.W_dec_fd, rule.sites)
        zero = x_bd.new_zeros(())
        self.l1 = rule.price.l1 if isinstance(rule.price, Linear) else zero
        self.fired_f = torch.zeros(len(self.norm_f), dtype=torch.int64, device=x_bd.device)
        self.activity_f = torch.zeros_like(self.norm_f)
        """Σ |activation|"""
        self.squared_error = zero.clone()
        self.part_error = zero.clone()
        """for the prefixes, or for both paths, as in the loss"""
        self.cost = zero.clone()
        self.aid = zero
        self.fresh = True
        """nothing is in the gradients yet: the first addition to the large ones overwrites them"""
        gradients.b_enc_f.zero_()
        gradients.b_dec_d.zero_()
        for gradient in own_gradients.values():
            gradient.zero_()
        self.pull_f = torch.zeros_like(self.norm_f)
        """Σ slope · |activation| for penalties that are not linear; Σ slope · z for a second path"""
        if rule.jump is not None:
            self.low_f = rule.jump.theta_f - rule.jump.window / 2
            self.near_f, self.near_pull_f = torch.zeros_like(self.fired_f), torch.zeros_like(self.norm_f)
        if rule.aid is not None:
            self.left_bo = workspace.take("left", (len(x_bd), weights.W_dec_fd.shape[1]), x_bd.dtype, x_bd.device)

    def base(self, part: slice) -> Tensor:
        """ŷ − y of these rows if no feature were active, [b, o], in memory that may be overwritten."""
        if self.y_bo is None:
            input_bd = self.input_bd[part]  # both x̂ and x lack b_dec
            return torch.neg(input_bd, out=self.workspace.take("error", tuple(input_bd.shape), input_bd.dtype, input_bd.device))
        y_bo = self.y_bo[part]
        error = self.workspace.take("error", tuple(y_bo.shape), y_bo.dtype, y_bo.device)
        torch.sub(self.weights.b_dec_d, y_bo, out=error)
        return error.addmm_(self.x_bd[part], self.own["W_skip_od"].T) if "W_skip_od" in self.own else error

    def add_of_rows(self, part: slice, g: Tensor) -> None:
        """Adds the terms that depend only on the rows' g."""
        self.gradients.b_dec_d.add_(g.sum(0))
        if "W_skip_od" in self.own:
            self.own_gradients["W_skip_od"].addmm_(g.T, self.x_bd[part])

    def step(self, sparse_share: float, threshold: float) -> Step:
        """The loss, and the terms that are complete only after all rows."""
        weights, gradients, rows, rule, mesh = self.weights, self.gradients, self.rows, self.rule, self.workspace.mesh
        linear = isinstance(rule.price, Linear) and rule.magnitude is None
        if rule.price is not None:
            per_row_f = self.l1 / rows * self.activity_f if linear else self.pull_f / rows
            tiny = torch.finfo(self.norm_f.dtype).tiny
            if rule.sites == 1:
                gradients.W_dec_fd.addcmul_(weights.W_dec_fd, (per_row_f / self.norm_f.clamp(min=tiny))[:, None])
            else:
                W_fsd = weights.W_dec_fd.unflatten(-1, (rule.sites, -1))
                per_site_fs = per_row_f[:, None] / W_fsd.norm(dim=-1).clamp(min=tiny)
                gradients.W_dec_fd.unflatten(-1, (rule.sites, -1)).addcmul_(W_fsd, per_site_fs[..., None])
        dz_f = gradients.b_enc_f
        if rule.magnitude is not None:
            dz_f = dz_f + rule.magnitude.r_mag_f.exp() * self.own_gradients["b_mag_f"]
        pull_d = dz_f @ weights.W_enc_fd if self.y_bo is None else self.norm_f.new_zeros(0)
        lengths, fired = self.activity_f @ self.norm_f, self.fired_f.sum().to(self.norm_f.dtype)
        pull_d, *of_features = mesh.features.sums(pull_d, lengths, fired, self.cost)
        if self.y_bo is None:
            gradients.b_dec_d.sub_(pull_d)
        of_rows = *of_features, self.squared_error, self.part_error, self.norm_f.new_tensor(sparse_share)
        lengths, fired, cost, squared_error, part_error, sparse = mesh.rows.sums(*of_rows)
        mesh.rows.sum_(gradients.b_dec_d)
        mesh.rows.sum_(self.fired_f)
        if "W_skip_od" in self.own_gradients:
            mesh.rows.sum_(self.own_gradients["W_skip_od"])
        squared_error, sparsity, l0 = squared_error / rows, lengths / rows, fired / rows
        loss = part_error / rows if rule.prefixes or rule.magnitude is not None else squared_error
        if rule.price is not None:
            loss = loss + (self.l1 * sparsity if linear else cost / rows)
        if rule.jump is not None:
            theta_f, window = rule.jump.theta_f, rule.jump.window
            loss = loss + rule.jump.cost(l0)
            pull_f = theta_f * self.near_pull_f + rule.jump.slope(l0) * self.near_f / rows
            self.own_gradients["theta_f"].add_(pull_f, alpha=-1 / window)
        return Step(
            loss=loss + self.aid,
            squared_error=squared_error,
            sparsity=sparsity,
            l0=l0,
            fired_f=self.fired_f,
            gradients=gradients,
            sparse_share=sparse / mesh.rows.size,
            threshold=self.norm_f.new_full((), threshold),
            own_gradients=self.own_gradients,
        )


def add_sparse_rows(sums: Sums, part: slice, entries: list[Entries]) -> None:
    """As `add_dense_rows`, for any number of rows; the entries' rows count from the first of them."""
    rule, rows, axis = sums.rule, sums.rows, sums.workspace.mesh.features
    row_n, column_n, value_n = map(torch.cat, zip(*entries))
    error = sums.base(part)
    b, f = len(error), len(sums.norm_f)
    cuts = [min(max(0, end - f * axis.rank), f) for end in (0, *rule.prefixes)] if rule.prefixes else [0, f]
    parts: list[tuple[slice, Tensor, Tensor, Tensor, Tensor]] = []
    for number, (low, high) in enumerate(pairwise(cuts)):
        mine = row_n, column_n, value_n
        if rule.prefixes:
            inside_n = (column_n >= low) & (column_n < high)
            mine = row_n[inside_n], column_n[inside_n], value_n[inside_n]
        axis.leave_to_first_(error)
        add_weighted_sums(error, sums.weights.W_dec_fd, mine[1], starts_of(mine[0], b), rule.kept(*mine[1:]), False)
        axis.sum_(error)
        g = sums.workspace.take(f"g{number}", tuple(error.shape), error.dtype, error.device)
        torch.mul(error, 2 / rows / (len(cuts) - 1), out=g)
        parts.append((slice(low, high), g, *mine))
        if rule.prefixes:
            sums.part_error += error.square().sum() / (len(cuts) - 1)
    for later, earlier in zip(parts[::-1], parts[-2::-1]):
        earlier[1].add_(later[1])  # a feature is in its own prefix and in all longer ones
    if rule.aid is not None:
        torch.neg(error, out=sums.left_bo[part])
    sums.add_of_rows(part, parts[0][1])
    gradients = sums.gradients
    for features, g, row_n, column_n, value_n in parts:
        if features.start == features.stop:  # other processes have all of this prefix
            continue
        W_dec_fo, norm_f = sums.weights.W_dec_fd[features], sums.norm_f[features]
        row_n, column_n, z_n, starts = sort_by_feature(row_n, column_n - features.start, value_n, len(norm_f))
        value_n = rule.kept(column_n, z_n)
        a_n = products_with(g, W_dec_fo, row_n, starts, value_n)
        size_n = value_n.abs() if rule.signed else value_n
        if isinstance(rule.price, Linear):
            a_n.add_((norm_f * (sums.l1 / rows)).index_select(0, column_n))
        elif rule.price is not None:
            norm_n = norm_f.index_select(0, column_n)
            slope_n = rule.price.slope(size_n * norm_n)
            sums.cost += rule.price.cost(size_n * norm_n).sum()
            sums.pull_f[features].index_add_(0, column_n, slope_n * size_n)
            a_n.add_(slope_n * norm_n / rows)
        if rule.jump is None:
            sums.fired_f[features].add_(starts.diff())
        else:
            add_thresholds(sums, rule.jump, column_n, z_n, a_n)
            a_n.masked_fill_(value_n == 0, 0)
            sums.fired_f += torch.bincount(column_n[value_n != 0], minlength=len(norm_f))
        add_weighted_sums(gradients.W_dec_fd[features], g, row_n, starts, value_n, sums.fresh)
        add_weighted_sums(gradients.W_enc_fd[features], sums.input_bd[part], row_n, starts, a_n, sums.fresh)
        gradients.b_enc_f[features].index_add_(0, column_n, a_n)
        sums.activity_f[features].index_add_(0, column_n, size_n)
    sums.fresh = False
    sums.squared_error += error.square_().sum()


def sort_by_feature(row_n: Tensor, column_n: Tensor, value_n: Tensor, f: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The entries sorted by feature, and the start of each feature's entries, [f + 1]."""
    column_n, order_n = torch.sort(column_n, stable=True)
    return row_n.index_select(0, order_n), column_n, value_n.index_select(0, order_n), starts_of(column_n, f)


def products_with(g_bo: Tensor, W_dec_fo: Tensor, row_n: Tensor, starts: Tensor, value_n: Tensor) -> Tensor:
    """g_b · W_dec_f of entries that are sorted by feature, [n]."""
    with torch.sparse.check_sparse_tensor_invariants(False):  # the indices are right by construction, checking them is a pass
        zeros = torch.sparse_csr_tensor(starts, row_n, torch.zeros_like(value_n), (len(W_dec_fo), len(g_bo)))
        return torch.sparse.sampled_addmm(zeros, W_dec_fo, g_bo.T).values()


def add_thresholds(sums: Sums, jump: Jump, column_n: Tensor, z_n: Tensor, a_n: Tensor) -> None:
    """Adds the thresholds' gradients from the entries within their windows; a_n: the gradients of all entries as if they were active."""
    near_n = (z_n - jump.theta_f.index_select(0, column_n)).abs_() < jump.window / 2
    sums.near_f += torch.bincount(column_n[near_n], minlength=len(sums.near_f))
    sums.near_pull_f.index_add_(0, column_n, torch.where(near_n, a_n, 0))


def add_dead_features(sums: Sums, aid: Aid) -> None:
    """Adds the loss of the dead features' second code and its gradients, from the residual of the first code for all rows."""
    mesh, dead_m = sums.workspace.mesh, aid.dead_f.nonzero().squeeze(1)  # host sync
    dead = [int(number) for number in mesh.features.numbers(len(dead_m))]  # of each process
    if not sum(dead):
        return
    weights, gradients, rows = sums.weights, sums.gradients, len(sums.x_bd)
    W_enc_md, W_dec_mo = weights.W_enc_fd.index_select(0, dead_m), weights.W_dec_fd.index_select(0, dead_m)
    z_bm = torch.addmm(weights.b_enc_f.index_select(0, dead_m), sums.input_bd, W_enc_md.T)
    kept_bk = largest(z_bm, aid.k)
    value_bk = z_bm.gather(1, kept_bk)
    if sum(dead) > aid.k:
        value_bk = kept_of_rows(value_bk, aid.k, mesh.features, min(aid.k, max(dead)))
    row_n, at_n = (value_bk > 0).nonzero(as_tuple=True)
    column_n, value_n = kept_bk[row_n, at_n].int(), value_bk[row_n, at_n]
    error = mesh.features.leave_to_first_(torch.neg(sums.left_bo))
    add_weighted_sums(error, W_dec_mo, column_n, starts_of(row_n, rows), value_n, False)
    mesh.features.sum_(error)
    left, missed = mesh.rows.sums(sums.left_bo.square().sum(), error.square().sum())
    weight = aid.weight / left.clamp(min=torch.finfo(error.dtype).tiny)
    sums.aid = weight * missed
    if not len(dead_m):
        return
    g = error.mul_(2 * weight)
    row_n, column_n, value_n, starts = sort_by_feature(row_n.int(), column_n, value_n, len(dead_m))
    a_n = products_with(g, W_dec_mo, row_n, starts, value_n)
    for gradient, table, weight_n in ((gradients.W_dec_fd, g, value_n), (gradients.W_enc_fd, sums.input_bd, a_n)):
        part_m = torch.empty(len(dead_m), gradient.shape[1], dtype=g.dtype, device=g.device)
        add_weighted_sums(part_m, table, row_n, starts, weight_n, True)
        gradient.index_add_(0, dead_m, part_m)
    gradients.b_enc_f.index_add_(0, dead_m, a_n.new_zeros(len(dead_m)).index_add_(0, column_n, a_n))
