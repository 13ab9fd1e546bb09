"""The exact gradient of the ReLU + L1 objective by hand, at little more than the cost of the encoder product once the code is sparse.

b rows (tokens) · d model width · f features · n active entries

With z = (x − b_dec) W_encᵀ + b_enc, acts = relu(z), g = 2(x̂ − x)/B and a_bf = g_b·W_dec_f + (l1/B)‖W_dec_f‖ on active entries:

    dW_dec_f = Σ_b acts_bf g_b + (l1/B)(Σ_b acts_bf) W_dec_f/‖W_dec_f‖      dW_enc_f = Σ_b a_bf (x_b − b_dec)
    db_enc_f = Σ_b a_bf                                                    db_dec   = Σ_b g_b − Σ_f db_enc_f W_enc_f

Rows are taken a chunk at a time, so that no [b, f] tensor is larger than a chunk, and the chunk's buffers are reused from step to
step (fresh ones cost page faults). A chunk whose code is sparse goes on through compressed sparse rows, where only active entries
are touched; a dense one, as early in training, through matrix products.
"""

import warnings

import torch
from torch import Tensor

from sae.objective.step import Step, Weights

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

CHUNK_BYTES = 64 << 20
"""of one [chunk, f] buffer; two are held"""
SPARSE_BELOW = 1 / 8
"""share of active entries under which the sparse path is the faster one (measured on two CPU cores, d_in 256 to 512)"""


class Workspace:
    """Buffers that one training run keeps between steps."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor, the same memory as at the last call while it is large enough."""
        size = 1
        for n in shape:
            size *= n
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != like.dtype or buffer.device != like.device:
            buffer = self._buffers[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        return buffer[:size].view(shape)


@torch.no_grad()
def fast_step(x_bd: Tensor, weights: Weights, l1: float, path: str, workspace: Workspace | None = None) -> Step:
    """`path`: "dense", "sparse", or "auto", which picks by the share of active entries of each chunk of rows."""
    workspace = workspace or Workspace()
    rows, f = len(x_bd), weights.W_dec_fd.shape[0]
    centred_bd = x_bd - weights.b_dec_d
    norm_f = weights.W_dec_fd.norm(dim=-1)
    gradients = Weights(*(workspace.take(name, w.shape, w).zero_() for name, w in zip(Weights._fields, weights)))
    fired_f = torch.zeros(f, dtype=torch.int64, device=x_bd.device)
    activity_f = torch.zeros_like(norm_f)
    squared_error = x_bd.new_zeros(())
    sparse_rows = 0

    chunk = max(1, CHUNK_BYTES // (f * x_bd.element_size()))
    for start in range(0, rows, chunk):
        centred = centred_bd[start : start + chunk]
        acts = workspace.take("acts", (len(centred), f), x_bd)
        torch.addmm(weights.b_enc_f, centred, weights.W_enc_fd.T, out=acts).relu_()
        active = torch.count_nonzero(acts).item()  # host sync
        sparse = path == "sparse" or (path == "auto" and active < SPARSE_BELOW * acts.numel())
        backward = sparse_chunk if sparse else dense_chunk
        sparse_rows += len(centred) * sparse
        with torch.sparse.check_sparse_tensor_invariants(False):  # the indices are right by construction, checking them is a pass
            squared_error += backward(centred, acts, weights, norm_f, l1, rows, gradients, fired_f, activity_f, workspace)

    unit_fd = weights.W_dec_fd / norm_f.clamp(min=torch.finfo(norm_f.dtype).tiny)[:, None]
    gradients.W_dec_fd.addcmul_(unit_fd, (l1 / rows * activity_f)[:, None])
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
        sparse_share=sparse_rows / rows,
    )


def dense_chunk(centred, acts, weights, norm_f, l1, rows, gradients, fired_f, activity_f, workspace) -> Tensor:
    """Adds a chunk's gradients, firing counts and activity; gives its sum of squared errors."""
    error = torch.addmm(centred, acts, weights.W_dec_fd, beta=-1)  # x̂ − x, since both lack b_dec
    g = error * (2 / rows)
    gradients.W_dec_fd.addmm_(acts.T, g)
    gradients.b_dec_d.add_(g.sum(0))
    activity_f.add_(acts.sum(0))
    a = workspace.take("a", acts.shape, acts)
    torch.addmm(norm_f * (l1 / rows), g, weights.W_dec_fd.T, out=a)
    mask = acts > 0
    fired_f.add_(mask.sum(0))
    a.mul_(mask)
    gradients.W_enc_fd.addmm_(a.T, centred)
    gradients.b_enc_f.add_(a.sum(0))
    return error.square().sum()


def sparse_chunk(centred, acts, weights, norm_f, l1, rows, gradients, fired_f, activity_f, workspace) -> Tensor:
    """The same numbers from the active entries alone."""
    f = acts.shape[1]
    csr = acts.to_sparse_csr()
    columns_n, values_n = csr.col_indices(), csr.values()
    error = torch.addmm(centred, csr, weights.W_dec_fd, beta=-1)
    g = error * (2 / rows)
    zeros = torch.sparse_csr_tensor(csr.crow_indices(), columns_n, torch.zeros_like(values_n), csr.shape)
    a_n = torch.sparse.sampled_addmm(zeros, g, weights.W_dec_fd.T).values() + norm_f[columns_n] * (l1 / rows)

    counts_f = torch.bincount(columns_n, minlength=f)
    fired_f.add_(counts_f)
    order_n = torch.argsort(columns_n, stable=True)
    row_n = torch.repeat_interleave(torch.arange(len(acts), device=acts.device), csr.crow_indices().diff())[order_n]
    starts = torch.cat([counts_f.new_zeros(1), counts_f.cumsum(0)])

    def by_feature(entries_n: Tensor) -> Tensor:
        return torch.sparse_csr_tensor(starts, row_n, entries_n[order_n], (f, len(acts)))

    gradients.W_dec_fd.addmm_(by_feature(values_n), g)
    gradients.W_enc_fd.addmm_(by_feature(a_n), centred)
    gradients.b_dec_d.add_(g.sum(0))
    gradients.b_enc_f.index_add_(0, columns_n, a_n)
    activity_f.index_add_(0, columns_n, values_n)
    return error.square().sum()
