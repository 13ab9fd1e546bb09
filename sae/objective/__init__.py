"""The ReLU + L1 objective: one entrance, several ways to compute the same thing."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from sae.errors import InputError
from sae.objective.fast import fast_step
from sae.objective.reference import reference_step
from sae.objective.step import Step, Weights
from sae.objective.update import adam_state, apply, clip
from sae.objective.workspace import DECIDE_EVERY, Precision, Workspace

Backend = Literal["auto", "dense", "sparse", "triton", "reference"]
__all__ = ["Backend", "Precision", "Step", "Weights", "Workspace", "objective"]

TRITON_BELOW = 1 / 128
"""share of active entries under which `auto` takes the Triton path on CUDA: an estimate from bytes and operations, not measured"""


@torch.no_grad()
def objective(
    x_bd: Tensor,
    weights: Weights,
    l1: float | Tensor,
    backend: Backend = "auto",
    workspace: Workspace | None = None,
    optimizer: torch.optim.Adam | None = None,
    largest_norm: float = 0.0,
) -> Step:
    """Loss, its parts, firing counts and exact gradients for a batch `x_bd` in training units (mean squared norm d).

    Weights with a leading k are a sweep of dictionaries on one batch, with one `l1` or k of them; every output then has a leading k.

    `backend`: "reference" is the formula in float64; "dense" and "sparse" (torch, any device) and "triton" (CUDA) give the same to
    rounding. "auto" picks on a CPU by the share of active entries of each chunk of rows; on CUDA every 32 calls, at the cost of a host
    sync, between dense and triton by that share at the last call, dense at first. "triton" never syncs.
    `optimizer`, a fused torch.optim.Adam over exactly these weights, is applied at once, after clipping each dictionary's whole gradient
    to `largest_norm` if that is not 0. Otherwise the gradients are given; they may live in `workspace` and are then overwritten by
    the next call with it.

    Raises `InputError` for a batch that does not fit the dictionary, and for rows that are not finite, which it names; nothing is
    updated then. On CUDA, where knowing would cost a host sync, such a batch leaves the weights alone as well but is only noted in the
    workspace (`bad_steps`, `bad_rows_b`).
    """
    refuse_misfit(x_bd, weights)
    workspace = workspace or Workspace()
    path = chosen(backend, x_bd, weights, workspace)
    x_bd = x_bd.to(weights.W_dec_fd.dtype).contiguous()
    if not x_bd.is_cuda:
        refuse_not_finite(x_bd)
    one = weights.W_dec_fd.ndim == 2
    swept = weights.stacked() if one else weights
    k = len(swept.W_dec_fd)
    l1_k = l1.to(x_bd.dtype).expand(k).contiguous() if isinstance(l1, Tensor) else x_bd.new_full((k,), l1)
    if path == "triton":
        from sae.objective.cuda import triton_step

        state = adam_state(optimizer, weights) if optimizer is not None and not largest_norm else None
        with torch.cuda.device_of(x_bd):  # Triton launches on the current device, whatever the tensors' is
            step = triton_step(x_bd, swept, l1_k, workspace, state.stacked() if state and one else state)
    else:
        with matmul_precision(x_bd, workspace.precision):
            step = one_by_one(x_bd, swept, l1_k, path, workspace)
    workspace.l0 = step.l0
    if one:
        step = step.of(0)
    if optimizer is None or step.gradients is None:
        return step
    gradients = Weights(*(g.to(w.dtype) for g, w in zip(step.gradients, weights)))
    if largest_norm:
        clip(gradients.stacked() if one else gradients, largest_norm)
    apply(optimizer, weights, gradients, ~step.loss.isfinite().all())
    return step._replace(gradients=None)


def one_by_one(x_bd: Tensor, weights: Weights, l1_k: Tensor, path: str, workspace: Workspace) -> Step:
    """The paths that know of one dictionary at a time, over a sweep's."""
    if path == "reference":
        return Step.stack([reference_step(x_bd, weights.of(i), float(l1)) for i, l1 in enumerate(l1_k)])  # host sync
    buffers = Weights(*(workspace.take(name, w.shape, w.dtype, w.device) for name, w in zip(Weights._fields, weights)))
    steps = [fast_step(x_bd, weights.of(i), l1, path, workspace, buffers.of(i)) for i, l1 in enumerate(l1_k)]
    if x_bd.is_cuda:
        workspace.note_bad_rows(~x_bd.isfinite().all(-1))
    return Step.stack([s._replace(gradients=None) for s in steps])._replace(gradients=buffers)


def chosen(backend: Backend, x_bd: Tensor, weights: Weights, workspace: Workspace) -> str:
    """The path for this call. Raises `InputError` for one that this device lacks."""
    if backend == "triton":
        if reason := why_no_triton(x_bd.device):
            raise InputError(f"the triton backend cannot run: {reason}; use backend auto")
        if weights.W_dec_fd.dtype != torch.float32:
            raise InputError(f"expected float32 weights for the triton backend, got {weights.W_dec_fd.dtype}")
    elif not x_bd.is_cuda and workspace.precision != "float32":
        raise InputError(f"expected precision float32 on {x_bd.device}, got {workspace.precision}, which only CUDA has here")
    if backend != "auto" or not x_bd.is_cuda:
        return backend
    if why_no_triton(x_bd.device) or weights.W_dec_fd.dtype != torch.float32:
        return "auto"
    calls = int(workspace.plan[0])
    if calls % DECIDE_EVERY == 0 and workspace.l0 is not None:
        workspace.decide(weights.b_enc_f.shape[-1], TRITON_BELOW)
    workspace.plan[0] += 1
    return "triton" if workspace.plan[1] else "dense"


@cache
def why_no_triton(device: torch.device) -> str | None:
    """What keeps the Triton path from running on a device, said once where `auto` would have taken it; None if nothing does."""
    try:
        from sae.objective.cuda import INTERPRETED
    except ImportError:
        reason = "the triton package is not installed"
    else:
        if INTERPRETED:
            return None
        if device.type != "cuda":
            return f"it needs a CUDA device, and the batch is on {device} (with TRITON_INTERPRET=1 it is interpreted, slowly)"
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return None
        reason = f"it needs compute capability 8.0, and {torch.cuda.get_device_name(device)} is older"
    if device.type == "cuda":
        print(f"the sparse and dense paths of torch are used on {device}, and the host waits for each step: {reason}", file=sys.stderr)
    return reason


@contextmanager
def matmul_precision(x_bd: Tensor, precision: Precision) -> Iterator[None]:
    """On CUDA, torch's own products round operands to tf32 for either of the lower precisions."""
    before = torch.get_float32_matmul_precision()
    if x_bd.is_cuda:
        torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def refuse_misfit(x_bd: Tensor, weights: Weights) -> None:
    d_in = weights.W_dec_fd.shape[-1]
    if x_bd.ndim != 2 or x_bd.shape[1] != d_in or not len(x_bd) or not x_bd.is_floating_point():
        raise InputError(f"expected a batch of floating point rows [b, {d_in}], got {x_bd.dtype} {list(x_bd.shape)}")
    if x_bd.device != weights.W_dec_fd.device:
        raise InputError(f"expected the batch on the weights' device, {weights.W_dec_fd.device}, got one on {x_bd.device}")


def refuse_not_finite(x_bd: Tensor) -> None:
    if x_bd.sum().isfinite():  # a sum of finite numbers may overflow, then each is looked at
        return
    rows = (~x_bd.isfinite().all(-1)).nonzero().flatten().tolist()
    if rows:
        raise InputError(
            f"{len(rows)} of {len(x_bd):,} rows of the batch are not finite ({bad_rows_text(rows)}); the weights were left alone"
        )


def bad_rows_text(rows: list[int]) -> str:
    return "rows " + ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
