"""The exact gradient of the ReLU + L1 objective by hand, at little more than the cost of the encoder product once the code is sparse.

b rows (tokens) · d model width · f features · n active entries

With z = (x − b_dec) W_encᵀ + b_enc, acts = relu(z), g = 2(x̂ − x)/B and a_bf = g_b·W_dec_f + (l1/B)‖W_dec_f‖ on active entries:

    dW_dec_f = Σ_b acts_bf g_b + (l1/B)(Σ_b acts_bf) W_dec_f/‖W_dec_f‖      dW_enc_f = Σ_b a_bf (x_b − b_dec)
    db_enc_f = Σ_b a_bf                                                    db_dec   = Σ_b g_b − Σ_f db_enc_f W_enc_f

Rows are taken a chunk at a time, so that no [b, f] tensor is larger than a chunk, and the chunk's buffers are reused from step to
step (fresh ones cost page faults). Of a chunk whose code is sparse only the active entries are kept, and those of all rows then go
through the rest at once, so that no gradient is passed over twice; a dense chunk, as early in training, goes through matrix products.
What else was tried, with numbers: benchmarks/cpu_experiments.md.
"""

import torch
from torch import Tensor

from sae.entries import active_entries, add_weighted_sums, starts_of
from sae.objective.step import Step, Weights
from sae.objective.workspace import Workspace

CHUNK_BYTES = 128 << 20
"""of one [chunk, f] buffer, of which the dense path holds two; eight times that on CUDA; half costs the product time"""
SPARSE_BELOW = 1 / 8
"""share of active entries under which the sparse path is the faster one (measured on two CPU cores, d_in 256 to 512)"""
HELD_ENTRIES = 2 << 20
"""active entries after which the sparse path does not wait for more rows; they take about 70 bytes each"""


def fast_step(x_bd: Tensor, weights: Weights, l1: Tensor, path: str, workspace: Workspace, gradients: Weights) -> Step:
    """`path`: "dense", "sparse", or "auto", which picks by the share of active entries of each chunk of rows.

    Overwrites `gradients`. "dense" has no host sync.
    """
    rows, f = len(x_bd), weights.W_dec_fd.shape[0]
    centred_bd = x_bd - weights.b_dec_d
    norm_f = weights.W_dec_fd.norm(dim=-1)
    fired_f = torch.zeros(f, dtype=torch.int64, device=x_bd.device)
    activity_f = torch.zeros_like(norm_f)
    squared_error = x_bd.new_zeros(())
    sparse_rows = 0
    entries: list[tuple[Tensor, Tensor, Tensor]] = []  # of the rows since `first`, which are still to go through the sparse path
    first = 0
    fresh = True  # nothing is in the gradients yet: the first to add to the large ones overwrites them
    gradients.b_enc_f.zero_()
    gradients.b_dec_d.zero_()
    sums = (weights, norm_f, l1, rows, gradients, fired_f, activity_f, workspace)

    chunk = max(1, CHUNK_BYTES * (8 if x_bd.is_cuda else 1) // (f * x_bd.element_size()))
    for start in range(0, rows, chunk):
        centred = centred_bd[start : start + chunk]
        acts = workspace.take("acts", (len(centred), f), x_bd.dtype, x_bd.device)
        torch.addmm(weights.b_enc_f, centred, weights.W_enc_fd.T, out=acts).relu_()
        sparse = path == "sparse"
        if path == "auto":
            sample = acts[::64]  # counting every entry would be a pass of its own
            sparse = torch.count_nonzero(sample).item() < SPARSE_BELOW * sample.numel()  # host sync
        stop = start + len(centred)
        if sparse:
            entries.append(active_entries(acts, start - first, workspace))
            sparse_rows += len(centred)
        if entries and (not sparse or stop == rows or sum(len(e[0]) for e in entries) >= HELD_ENTRIES):
            squared_error += sparse_rows_backward(centred_bd[first : stop if sparse else start], entries, fresh, *sums)
            entries, fresh = [], False
        if not sparse:
            squared_error += dense_chunk(centred, acts, fresh, *sums)
            fresh = False
        if not entries:
            first = stop

    per_row_f = l1 / rows * activity_f / norm_f.clamp(min=torch.finfo(norm_f.dtype).tiny)
    gradients.W_dec_fd.addcmul_(weights.W_dec_fd, per_row_f[:, None])
    gradients.b_dec_d.sub_(gradients.b_enc_f @ weights.W_enc_fd)
    squared_error = squared_error / rows
    sparsity = activity_f @ norm_f / rows
    return Step(
        loss=squared_error + l1 * sparsity,
        squared_error=squared_error,
        sparsity=sparsity,
        l0=fired_f.sum() / rows,
        fired_f=fired_f,
        gradients=gradients,
        sparse_share=norm_f.new_full((), sparse_rows / rows),
    )


def dense_chunk(centred, acts, fresh, weights, norm_f, l1, rows, gradients, fired_f, activity_f, workspace) -> Tensor:
    """Adds a chunk's gradients, firing counts and activity; gives its sum of squared errors."""
    error = torch.addmm(centred, acts, weights.W_dec_fd, beta=-1)  # x̂ − x, since both lack b_dec
    g = error * (2 / rows)
    gradients.W_dec_fd.addmm_(acts.T, g, beta=0 if fresh else 1)
    gradients.b_dec_d.add_(g.sum(0))
    activity_f.add_(acts.sum(0))
    a = workspace.take("a", acts.shape, acts.dtype, acts.device)
    torch.addmm(norm_f * (l1 / rows), g, weights.W_dec_fd.T, out=a)
    torch.ops.aten.threshold_backward.grad_input(a, acts, 0, grad_input=a)  # a where acts > 0, in one pass
    fired_f.add_(positive_counts(acts, workspace))
    gradients.W_enc_fd.addmm_(a.T, centred, beta=0 if fresh else 1)
    gradients.b_enc_f.add_(a.sum(0))
    return error.square().sum()


def positive_counts(acts: Tensor, workspace: Workspace) -> Tensor:
    """How many rows of each column are above zero, [f] int64.

    Torch widens every byte before it sums; here eight are summed in one 64-bit word, over too few rows for a byte to overflow.
    """
    rows, f = acts.shape
    wide = -(-f // 8) * 8
    mask = workspace.take("positive", (rows, wide), torch.bool, acts.device)
    mask[:, f:] = False
    torch.gt(acts, 0, out=mask[:, :f])
    words = mask.view(torch.int64)
    bytes_of = torch.stack([part.sum(0) for part in words.split(255)]).view(torch.uint8)
    return bytes_of.sum(0, dtype=torch.int64)[:f]


def sparse_rows_backward(centred, entries, fresh, weights, norm_f, l1, rows, gradients, fired_f, activity_f, workspace) -> Tensor:
    """As `dense_chunk`, for any number of rows, from their active entries alone."""
    row_n, column_n, value_n = map(torch.cat, zip(*entries))
    f = len(norm_f)
    error, g = (workspace.take(name, centred.shape, centred.dtype, centred.device) for name in ("error", "g"))
    torch.neg(centred, out=error)
    add_weighted_sums(error, weights.W_dec_fd, column_n, starts_of(row_n, len(centred)), value_n, False)
    torch.mul(error, 2 / rows, out=g)

    column_n, order_n = torch.sort(column_n, stable=True)
    row_n, value_n = row_n.index_select(0, order_n), value_n.index_select(0, order_n)
    starts = starts_of(column_n, f)
    with torch.sparse.check_sparse_tensor_invariants(False):  # the indices are right by construction, checking them is a pass
        zeros = torch.sparse_csr_tensor(starts, row_n, torch.zeros_like(value_n), (f, len(centred)))
        a_n = torch.sparse.sampled_addmm(zeros, weights.W_dec_fd, g.T).values()
    a_n.add_((norm_f * (l1 / rows)).index_select(0, column_n))

    add_weighted_sums(gradients.W_dec_fd, g, row_n, starts, value_n, fresh)
    add_weighted_sums(gradients.W_enc_fd, centred, row_n, starts, a_n, fresh)
    gradients.b_dec_d.add_(g.sum(0))
    gradients.b_enc_f.index_add_(0, column_n, a_n)
    activity_f.index_add_(0, column_n, value_n)
    fired_f.add_(starts.diff())
    return error.square_().sum()
