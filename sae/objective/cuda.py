"""The exact gradient of the ReLU + L1 objective in four Triton kernels, without a [b, f] tensor and without a host sync.

k dictionaries of a sweep · b rows (tokens) · d model width · f features · c capacity of a row's list of active entries

    encode    z = (x − b_dec) W_encᵀ + b_enc tile by tile; the active entries of each row are appended to its list, [k, b, c]
    decode    one program per row: x̂ from its list, g = 2(x̂ − x)/B; counts the entries of each feature
    scatter   the lists in feature order
    learn     one program per few features: reads g_b and x_b of a feature's active rows once and makes
              dW_dec_f = Σ_b acts_bf g_b + …, a_bf = g_b·W_dec_f + (l1/B)‖W_dec_f‖, dW_enc_f = Σ_b a_bf (x_b − b_dec), db_enc_f = Σ_b a_bf;
              with an optimizer, Adam is applied to both rows at once and no gradient is written

A row with more active entries than fit into its list is computed densely instead: `decode` visits all features for it, and `learn`
checks each feature for it. This is slow, but needs no decision by the host, and the result is the same.
In deterministic mode lists are sorted, so that every sum has one order. Formulas: sae/objective/fast.py, which has equal results.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.objective.step import Step, Weights
from sae.objective.update import AdamState
from sae.objective.workspace import Workspace

INTERPRETED = triton.knobs.runtime.interpret
UPCAST = tl.constexpr(INTERPRETED)  # the interpreter's dot takes bfloat16 bits for integers
COUNTS = ["B", "F", "CAPACITY"]
"""sizes for which kernels are not recompiled; only the divisibility of D makes loads faster"""
FEATURES_PER_PROGRAM = 8
"""of `learn`; each program writes one row of partial sums for the decoder bias"""

BLOCKS = [  # of the encoder product; the fastest is measured at the first call and remembered on disk
    triton.Config({"BLOCK_B": b, "BLOCK_F": f, "BLOCK_D": d}, num_warps=w, num_stages=s)
    for b, f, d, w, s in [(128, 128, 64, 8, 3), (128, 128, 64, 16, 3), (64, 128, 64, 8, 3), (64, 128, 64, 4, 4), (64, 64, 32, 4, 4)]
]


@triton.autotune(BLOCKS[-1:] if INTERPRETED else BLOCKS, key=["B", "F", "D", "PRECISION"], reset_to_zero=["active_ptr"], cache_results=True)
@triton.jit(do_not_specialize=COUNTS)
def encode(
    x_ptr, W_enc_ptr, b_enc_ptr, active_ptr, column_ptr, value_ptr, B, F, D, CAPACITY,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(1).to(tl.int64)
    # neighbouring programs share their features' weights, so that those come from the L2 cache
    row_tiles = tl.cdiv(B, BLOCK_B)
    rows = (tl.program_id(0) % row_tiles) * BLOCK_B + tl.arange(0, BLOCK_B)
    features = (tl.program_id(0) // row_tiles) * BLOCK_F + tl.arange(0, BLOCK_F)
    x_rows = x_ptr + (k * B + rows)[:, None] * D
    W_rows = W_enc_ptr + (k * F + features)[None, :] * D
    z = tl.zeros((BLOCK_B, BLOCK_F), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_rows + d[None, :], mask=(rows < B)[:, None] & (d < D)[None, :], other=0.0)
        W = tl.load(W_rows + d[:, None], mask=(features < F)[None, :] & (d < D)[:, None], other=0.0)
        if UPCAST:
            x, W = x.to(tl.float32), W.to(tl.float32)
        z = tl.dot(x, W, z, input_precision=PRECISION)
    z += tl.load(b_enc_ptr + k * F + features, mask=features < F, other=0.0)[None, :]
    active = (z > 0) & (rows < B)[:, None] & (features < F)[None, :]
    found = tl.sum(active.to(tl.int32), 1)
    first = tl.atomic_add(active_ptr + k * B + rows, found, mask=(rows < B) & (found > 0))
    place = first[:, None] + tl.cumsum(active.to(tl.int32), 1) - 1
    kept = active & (place < CAPACITY)
    # from the tile's first list on 32 bits suffice, which spares registers
    lists = (k * B + (tl.program_id(0) % row_tiles) * BLOCK_B) * CAPACITY
    at = tl.arange(0, BLOCK_B)[:, None] * CAPACITY + place
    tl.store(column_ptr + lists + at, tl.broadcast_to(features[None, :], (BLOCK_B, BLOCK_F)), mask=kept)
    tl.store(value_ptr + lists + at, z, mask=kept)


@triton.jit(do_not_specialize=COUNTS)
def decode(
    x_ptr, xc_ptr, W_enc_ptr, b_enc_ptr, W_dec_ptr, b_dec_ptr, active_ptr, column_ptr, value_ptr,
    g_ptr, error_ptr, count_ptr, place_ptr, overflow_ptr, overflows_ptr, B, F, D, CAPACITY,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(1).to(tl.int64)
    row = k * B + tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    n = tl.load(active_ptr + row)
    x_hat = tl.load(b_dec_ptr + k * D + d, mask=d < D, other=0.0)
    if n <= CAPACITY:
        for start in range(0, n, BLOCK_N):
            i = start + tl.arange(0, BLOCK_N)
            f = tl.load(column_ptr + row * CAPACITY + i, mask=i < n, other=0)
            acts = tl.load(value_ptr + row * CAPACITY + i, mask=i < n, other=0.0)
            W = tl.load(W_dec_ptr + (k * F + f)[:, None] * D + d[None, :], mask=(i < n)[:, None] & (d < D)[None, :], other=0.0)
            x_hat += tl.sum(acts[:, None] * W, 0)
            place = tl.atomic_add(count_ptr + k * F + f, 1, mask=i < n)
            tl.store(place_ptr + row * CAPACITY + i, place, mask=i < n)
    else:
        tl.store(overflow_ptr + k * B + tl.atomic_add(overflows_ptr + k, 1), tl.program_id(0))
        xc = tl.load(xc_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        for start in range(0, F, BLOCK_N):
            f = start + tl.arange(0, BLOCK_N)
            at = (k * F + f)[:, None] * D + d[None, :]
            inside = (f < F)[:, None] & (d < D)[None, :]
            W_enc = tl.load(W_enc_ptr + at, mask=inside, other=0.0).to(tl.float32)
            z = tl.sum(W_enc * xc[None, :], 1) + tl.load(b_enc_ptr + k * F + f, mask=f < F, other=0.0)
            x_hat += tl.sum(tl.maximum(z, 0.0)[:, None] * tl.load(W_dec_ptr + at, mask=inside, other=0.0), 0)
    error = x_hat - tl.load(x_ptr + tl.program_id(0).to(tl.int64) * D + d, mask=d < D, other=0.0)
    tl.store(g_ptr + row * D + d, error * (2.0 / B), mask=d < D)
    tl.store(error_ptr + row, tl.sum(error * error, 0))


@triton.jit(do_not_specialize=COUNTS)
def scatter(active_ptr, column_ptr, value_ptr, place_ptr, start_ptr, entry_row_ptr, entry_value_ptr, B, F, CAPACITY, BLOCK_N: tl.constexpr):
    k = tl.program_id(1).to(tl.int64)
    row = k * B + tl.program_id(0)
    n = tl.load(active_ptr + row)
    if n <= CAPACITY:
        for start in range(0, n, BLOCK_N):
            i = start + tl.arange(0, BLOCK_N)
            f = tl.load(column_ptr + row * CAPACITY + i, mask=i < n, other=0)
            to = k * B * CAPACITY + tl.load(start_ptr + k * F + f, mask=i < n, other=0)
            to += tl.load(place_ptr + row * CAPACITY + i, mask=i < n, other=0)
            tl.store(entry_row_ptr + to, tl.zeros((BLOCK_N,), tl.int32) + tl.program_id(0), mask=i < n)
            tl.store(entry_value_ptr + to, tl.load(value_ptr + row * CAPACITY + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def write(gradient, W_ptr, out_ptr, square_ptr, at, mask, rates_ptr, beta1, beta2, eps, ADAM: tl.constexpr):
    """Writes the gradient itself, or applies Adam's update as `Adam` does."""
    if ADAM:
        step_size, root_correction = tl.load(rates_ptr), tl.load(rates_ptr + 1)
        moment = tl.load(out_ptr + at, mask=mask, other=0.0)
        square = tl.load(square_ptr + at, mask=mask, other=0.0)
        moment += (1 - beta1) * (gradient - moment)
        square = beta2 * square + (1 - beta2) * gradient * gradient
        W = tl.load(W_ptr + at, mask=mask, other=0.0)
        tl.store(out_ptr + at, moment, mask=mask)
        tl.store(square_ptr + at, square, mask=mask)
        tl.store(W_ptr + at, W - step_size * moment / (tl.sqrt_rn(square) / root_correction + eps), mask=mask)
    else:
        tl.store(out_ptr + at, gradient, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def learn(
    xc_ptr, g_ptr, W_enc_ptr, b_enc_ptr, W_dec_ptr, start_ptr, count_ptr, entry_row_ptr, entry_value_ptr, overflow_ptr, overflows_ptr,
    l1_ptr, fired_ptr, penalty_ptr, db_dec_ptr,
    out_W_enc_ptr, out_b_enc_ptr, out_W_dec_ptr, square_W_enc_ptr, square_b_enc_ptr, square_W_dec_ptr,
    rates_ptr, bad_ptr, beta1, beta2, eps, B, F, D, CAPACITY,
    ADAM: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    l1 = tl.load(l1_ptr + k) / B
    writes = True
    if ADAM:
        writes = tl.load(bad_ptr) == 0  # a row that is not finite must leave the weights alone
    overflows = tl.load(overflows_ptr + k)
    db_dec = tl.zeros((BLOCK_D,), tl.float32)
    for member in range(GROUP):
        f = tl.program_id(0) * GROUP + member
        inside = d < tl.where(f < F, D, 0)
        feature = k * F + f
        at = feature * D + d
        W_enc = tl.load(W_enc_ptr + at, mask=inside, other=0.0)
        W_dec = tl.load(W_dec_ptr + at, mask=inside, other=0.0)
        b_enc = tl.load(b_enc_ptr + feature, mask=f < F, other=0.0)
        norm = tl.sqrt_rn(tl.sum(W_dec * W_dec, 0))
        dW_dec = tl.zeros((BLOCK_D,), tl.float32)
        dW_enc = tl.zeros((BLOCK_D,), tl.float32)
        a_n = tl.zeros((BLOCK_N,), tl.float32)  # summed over the blocks of rows, as are the next two
        acts_n = tl.zeros((BLOCK_N,), tl.float32)
        fired_n = tl.zeros((BLOCK_N,), tl.int32)

        n = tl.load(count_ptr + feature, mask=f < F, other=0)
        first = k * B * CAPACITY + tl.load(start_ptr + feature, mask=f < F, other=0)
        for start in range(0, n, BLOCK_N):
            i = start + tl.arange(0, BLOCK_N)
            rows = k * B + tl.load(entry_row_ptr + first + i, mask=i < n, other=0)
            acts = tl.load(entry_value_ptr + first + i, mask=i < n, other=0.0)
            tile = (i < n)[:, None] & (d < D)[None, :]
            g = tl.load(g_ptr + rows[:, None] * D + d[None, :], mask=tile, other=0.0)
            xc = tl.load(xc_ptr + rows[:, None] * D + d[None, :], mask=tile, other=0.0).to(tl.float32)
            a = tl.where(i < n, tl.sum(g * W_dec[None, :], 1) + l1 * norm, 0.0)
            dW_dec += tl.sum(acts[:, None] * g, 0)
            dW_enc += tl.sum(a[:, None] * xc, 0)
            a_n += a
            acts_n += acts
            fired_n += (i < n).to(tl.int32)

        W_operand = W_enc.to(xc_ptr.dtype.element_ty).to(tl.float32)  # as the encoder product had it
        for start in range(0, overflows, BLOCK_N):
            i = start + tl.arange(0, BLOCK_N)
            there = i < tl.where(f < F, overflows, 0)
            rows = k * B + tl.load(overflow_ptr + k * B + i, mask=there, other=0)
            tile = there[:, None] & (d < D)[None, :]
            g = tl.load(g_ptr + rows[:, None] * D + d[None, :], mask=tile, other=0.0)
            xc = tl.load(xc_ptr + rows[:, None] * D + d[None, :], mask=tile, other=0.0).to(tl.float32)
            acts = tl.where(there, tl.maximum(tl.sum(xc * W_operand[None, :], 1) + b_enc, 0.0), 0.0)
            a = tl.where(acts > 0, tl.sum(g * W_dec[None, :], 1) + l1 * norm, 0.0)
            dW_dec += tl.sum(acts[:, None] * g, 0)
            dW_enc += tl.sum(a[:, None] * xc, 0)
            a_n += a
            acts_n += acts
            fired_n += (acts > 0).to(tl.int32)

        activity = tl.sum(acts_n, 0)
        db_enc = tl.sum(a_n, 0)
        dW_dec += (l1 * activity / tl.maximum(norm, 1.2e-38)) * W_dec  # a smaller constant would be a double, and make all here one
        db_dec += db_enc * W_enc
        tl.store(fired_ptr + feature, tl.sum(fired_n, 0), mask=f < F)
        tl.store(penalty_ptr + feature, activity * norm, mask=f < F)
        if writes:
            write(dW_enc, W_enc_ptr, out_W_enc_ptr, square_W_enc_ptr, at, inside, rates_ptr, beta1, beta2, eps, ADAM)
            write(dW_dec, W_dec_ptr, out_W_dec_ptr, square_W_dec_ptr, at, inside, rates_ptr, beta1, beta2, eps, ADAM)
            write(db_enc, b_enc_ptr, out_b_enc_ptr, square_b_enc_ptr, feature, f < F, rates_ptr, beta1, beta2, eps, ADAM)
    groups = tl.num_programs(0)
    tl.store(db_dec_ptr + (k * groups + tl.program_id(0)) * D + d, db_dec, mask=d < D)


class Lists(NamedTuple):
    """The active entries row by row; a row's list is complete only if its count does not exceed the capacity."""

    active_kb: Tensor
    column_kbc: Tensor
    value_kbc: Tensor


class Entries(NamedTuple):
    """The same entries feature by feature: `count_kf` of them, starting at `start_kf`."""

    start_kf: Tensor
    count_kf: Tensor
    row_kn: Tensor
    value_kn: Tensor


class Decoded(NamedTuple):
    g_kbd: Tensor
    """gradient with respect to x̂"""
    error_kb: Tensor
    """squared"""
    overflow_kb: Tensor
    """the rows whose list overflowed: the first `overflows_k` entries; the rest is undefined"""
    overflows_k: Tensor


class Batch(NamedTuple):
    """A batch and a sweep's weights, prepared for all kernels."""

    x_bd: Tensor
    centred_kbd: Tensor
    """x − b_dec in the operands' precision"""
    W_enc_kfd: Tensor
    """also in the operands' precision"""
    weights: Weights
    workspace: Workspace
    sizes: tuple[int, int, int, int]
    """b, f, d, c"""

    def take(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.workspace.take(f"triton.{name}", shape, dtype, self.x_bd.device)

    @property
    def sweep(self) -> int:
        return len(self.weights.W_dec_fd)

    @property
    def blocks(self) -> dict[str, int]:
        """Tile sizes for programs that hold whole rows of width d, as many at a time as registers allow."""
        block_d = triton.next_power_of_2(self.sizes[2])
        return {"BLOCK_D": block_d, "BLOCK_N": max(1, min(16, 8192 // block_d)), "num_warps": max(1, min(16, block_d // 256))}


def triton_step(x_bd: Tensor, weights: Weights, l1_k: Tensor, workspace: Workspace, adam: AdamState | None = None) -> Step:
    """Weights with a leading k, contiguous, in float32, on one CUDA device; with `adam` its update is applied as well.

    Launches the same kernels on the same memory at every call, so that a CUDA graph can hold it (then give the optimizer's lr as a tensor
    on the device, and change it and `l1_k` in place).
    """
    batch = prepare(x_bd, weights, workspace)
    lists = encode_rows(batch)
    decoded, entries = decode_rows(batch, lists)
    bad_b = ~decoded.error_kb.isfinite().all(0)
    workspace.note_bad_rows(bad_b)
    fired_kf, penalty_kf, gradients = learn_features(batch, decoded, entries, l1_k, bad_b.any(), adam)
    b = len(x_bd)
    squared_error_k, sparsity_k = decoded.error_kb.sum(-1) / b, penalty_kf.sum(-1) / b
    return Step(
        loss=squared_error_k + l1_k * sparsity_k,
        squared_error=squared_error_k,
        sparsity=sparsity_k,
        l0=fired_kf.sum(-1) / b,
        fired_f=fired_kf.long(),
        gradients=gradients,
        sparse_share=1 - decoded.overflows_k / b,
        threshold=torch.zeros_like(squared_error_k),
    )


def prepare(x_bd: Tensor, weights: Weights, workspace: Workspace) -> Batch:
    """Centres the batch in float32, so that a large mean loses no digits when operands are rounded to bfloat16."""
    (k, f, d), b = weights.W_dec_fd.shape, len(x_bd)
    batch = Batch(x_bd, x_bd, weights.W_enc_fd, weights, workspace, (b, f, d, int(workspace.plan[2])))
    centred_kbd = torch.sub(x_bd, weights.b_dec_d[:, None], out=batch.take("centred", k, b, d))
    if workspace.precision != "bfloat16":
        return batch._replace(centred_kbd=centred_kbd)
    rounded = batch.take("rounded", k, b, d, dtype=torch.bfloat16).copy_(centred_kbd)
    W_enc_kfd = batch.take("W_enc", k, f, d, dtype=torch.bfloat16).copy_(weights.W_enc_fd)
    return batch._replace(centred_kbd=rounded, W_enc_kfd=W_enc_kfd)


def encode_rows(batch: Batch) -> Lists:
    (b, f, d, capacity), k, deterministic = batch.sizes, batch.sweep, batch.workspace.deterministic
    active_kb = batch.take("active", k, b, dtype=torch.int32).zero_()
    lists = Lists(active_kb, batch.take("column", k, b, capacity, dtype=torch.int32), batch.take("value", k, b, capacity))
    precision = "tf32" if batch.workspace.precision == "tf32" else "ieee"
    encode[lambda meta: (triton.cdiv(b, meta["BLOCK_B"]) * triton.cdiv(f, meta["BLOCK_F"]), k)](
        batch.centred_kbd, batch.W_enc_kfd, batch.weights.b_enc_f, *lists, b, f, d, capacity, PRECISION=precision
    )
    if deterministic:
        # unused places sort behind the used ones; marked only now, since where shapes were tried out some hold entries of another shape
        lists.column_kbc.masked_fill_(torch.arange(capacity, device=active_kb.device) >= active_kb[..., None], f)
        sorted_kbc, order_kbc = lists.column_kbc.sort(dim=-1)
        lists.column_kbc.copy_(sorted_kbc)
        lists.value_kbc.copy_(lists.value_kbc.gather(-1, order_kbc))
    return lists


def decode_rows(batch: Batch, lists: Lists) -> tuple[Decoded, Entries]:
    (b, f, d, capacity), k, weights = batch.sizes, batch.sweep, batch.weights
    decoded = Decoded(
        batch.take("g", k, b, d),
        batch.take("error", k, b),
        batch.take("overflow", k, b, dtype=torch.int32).fill_(b),
        batch.take("overflows", k, dtype=torch.int32).zero_(),
    )
    count_kf = batch.take("count", k, f, dtype=torch.int32).zero_()
    place_kbc = batch.take("place", k, b, capacity, dtype=torch.int32)
    decode[(b, k)](
        batch.x_bd, batch.centred_kbd, batch.W_enc_kfd, weights.b_enc_f, weights.W_dec_fd, weights.b_dec_d, *lists,
        decoded.g_kbd, decoded.error_kb, count_kf, place_kbc, decoded.overflow_kb, decoded.overflows_k, b, f, d, capacity, **batch.blocks,
    )  # fmt: skip
    start_kf = torch.cumsum(count_kf, -1, dtype=torch.int32).sub_(count_kf)
    row_kn, value_kn = batch.take("entry_row", k, b * capacity, dtype=torch.int32), batch.take("entry_value", k, b * capacity)
    if batch.workspace.deterministic:
        decoded.overflow_kb.copy_(decoded.overflow_kb.sort(dim=-1).values)
        lists.column_kbc.masked_fill_((lists.active_kb > capacity)[..., None], f)  # what overflowed is not taken from the lists
        order_kn = lists.column_kbc.view(k, -1).argsort(dim=-1, stable=True)
        row_kn.copy_(order_kn // capacity)
        value_kn.copy_(lists.value_kbc.view(k, -1).gather(-1, order_kn))
    else:
        scatter[(b, k)](*lists, place_kbc, start_kf, row_kn, value_kn, b, f, capacity, BLOCK_N=64)
    return decoded, Entries(start_kf, count_kf, row_kn, value_kn)


def learn_features(
    batch: Batch, decoded: Decoded, entries: Entries, l1_k: Tensor, bad: Tensor, adam: AdamState | None
) -> tuple[Tensor, Tensor, Weights | None]:
    """Firing counts, L1 terms summed over rows, and gradients unless they were applied."""
    (b, f, d, capacity), k, weights = batch.sizes, batch.sweep, batch.weights
    fired_kf, penalty_kf = batch.take("fired", k, f, dtype=torch.int32), batch.take("penalty", k, f)
    groups = triton.cdiv(f, FEATURES_PER_PROGRAM)
    db_dec_kgd = batch.take("db_dec", k, groups, d)
    if adam:
        gradients, out, square, rates = None, adam.exp_avg, adam.exp_avg_sq, adam_rates(adam, bad)
        (beta1, beta2), eps = adam.optimizer.betas, adam.optimizer.eps
    else:
        gradients = out = square = Weights(*(batch.take(f"d{name}", *w.shape) for name, w in zip(Weights._fields, weights)))
        rates, beta1, beta2, eps = penalty_kf, 0.0, 0.0, 0.0  # not read
    learn[(groups, k)](
        batch.centred_kbd, decoded.g_kbd, weights.W_enc_fd, weights.b_enc_f, weights.W_dec_fd, *entries,
        decoded.overflow_kb, decoded.overflows_k,
        l1_k, fired_kf, penalty_kf, db_dec_kgd, out.W_enc_fd, out.b_enc_f, out.W_dec_fd, square.W_enc_fd, square.b_enc_f, square.W_dec_fd,
        rates, bad.int(), beta1, beta2, eps, b, f, d, capacity,
        ADAM=adam is not None, GROUP=FEATURES_PER_PROGRAM, **batch.blocks,
    )  # fmt: skip
    db_dec_kd = decoded.g_kbd.sum(1) - db_dec_kgd.sum(1)
    if adam:
        adam_bias(adam, weights.b_dec_d, db_dec_kd, rates, bad)
    else:
        out.b_dec_d.copy_(db_dec_kd)
    return fired_kf, penalty_kf, gradients


def adam_rates(adam: AdamState, bad: Tensor) -> Tensor:
    """Counts the step unless it is bad; returns [lr / (1 − β1ᵗ), √(1 − β2ᵗ)], without a host sync."""
    for step in adam.optimizer.steps:
        step += ~bad
    beta1, beta2 = adam.optimizer.betas
    t = adam.optimizer.steps[0].double()
    return torch.stack([adam.optimizer.lr / (1 - beta1**t), (1 - beta2**t).sqrt()]).float()


def adam_bias(adam: AdamState, b_kd: Tensor, gradient_kd: Tensor, rates: Tensor, bad: Tensor) -> None:
    """Adam on the decoder bias, whose gradient is complete only after all features' programs."""
    (beta1, beta2), moment_kd, square_kd = adam.optimizer.betas, adam.exp_avg.b_dec_d, adam.exp_avg_sq.b_dec_d
    new_moment_kd = moment_kd.lerp(gradient_kd, 1 - beta1)
    new_square_kd = beta2 * square_kd + (1 - beta2) * gradient_kd.square()
    new_b_kd = b_kd - rates[0] * new_moment_kd / (new_square_kd.sqrt() / rates[1] + adam.optimizer.eps)
    for old, new in ((moment_kd, new_moment_kd), (square_kd, new_square_kd), (b_kd, new_b_kd)):
        old.copy_(torch.where(bad, old, new))
