"""The step of every kind of dictionary: one entry point, several ways to compute the same result."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from sae.encoding import Method
from sae.encoding.encoder import refuse_missing
from sae.errors import InputError
from sae.objective.fast import fast_step
from sae.objective.formula import L1, formula_step
from sae.objective.rule import Linear, Rule
from sae.objective.step import WHOLE, Goal, Own, Step, Terms, Weights, of
from sae.objective.update import Adam, AdamState, clip, leave_across_
from sae.objective.workspace import DECIDE_EVERY, Precision, Workspace


class NotFinite(InputError):
    """Rows of a batch are not finite."""


Backend = Literal["auto", "dense", "sparse", "triton", "reference"]
__all__ = ["Adam", "Backend", "Goal", "NotFinite", "Own", "Precision", "Step", "Terms", "Weights", "Workspace", "objective"]

TRITON_BELOW = 1 / 128
"""share of active entries below which `auto` chooses the Triton path on CUDA: an estimate from bytes and operations, not measured"""


@torch.no_grad()
def objective(
    x_bd: Tensor,
    weights: Weights,
    goal: float | Tensor | Goal | Sequence[Goal],
    backend: Backend = "auto",
    workspace: Workspace | None = None,
    optimizer: Adam | None = None,
    largest_norm: float = 0.0,
    *,
    y_bo: Tensor | None = None,
    own: Own | None = None,
    unit_rows: bool = False,
) -> Step:
    """Loss, its parts, firing counts and exact gradients for a batch `x_bd` in training units (mean squared norm d).

    Weights with a leading k are a sweep of dictionaries on one batch; every output then has a leading k. `goal`: what is minimised, one
    for all or one each; a number, or a tensor of one each, is the L1 coefficient of ReLU + L1. `y_bo`: the target of a transcoder.
    `own`: the kind's own parameters.

    `backend`: "reference" is the formula in float64; "dense" and "sparse" (torch, any device) and "triton" (CUDA, ReLU + L1) give the
    same to rounding. "auto" picks on a CPU by the share of active entries of each chunk of rows; on CUDA every 32 calls, at the cost of a
    host sync, between dense and triton by that share at the last call, dense at first. "triton" never syncs. Goals that keep the k largest
    always use a sparse path, and a goal without a rule uses autograd.
    `optimizer`, an `Adam` over exactly these weights and then `own`, is applied directly, after clipping each dictionary's
    whole gradient to `largest_norm` if that is not 0. With `unit_rows` decoder rows keep length 1: gradients lose the part along
    them, and they are rescaled to it after the update. Without `optimizer` the gradients are returned; if they are in `workspace`, the
    next call with it overwrites them.
    With several processes (the workspace's `mesh`) each has its part of the features and of the rows, and the step's numbers are those of
    the whole. If rows are split, the optimizer is over this process's part of the weights, and all get the others' parts after the update.

    Raises `InputError` for a batch that does not fit the dictionary, and for rows that are not finite, which it names; nothing is
    updated then. On CUDA, where this check would cost a host sync, such a batch does not change the weights either but is only noted in the
    workspace (`bad_steps`, `bad_rows_b`).
    """
    refuse_misfit(x_bd, y_bo, weights)
    workspace = workspace or Workspace()
    one = weights.W_dec_fd.ndim == 2
    swept, own = weights.stacked() if one else weights, own or {}
    own_swept = {name: tensor[None] for name, tensor in own.items()} if one else own
    dtype = weights.W_dec_fd.dtype
    x_bd = x_bd.to(dtype).contiguous()
    y_bo = None if y_bo is None else y_bo.to(dtype).contiguous()
    goals = goals_of(goal, len(swept.W_dec_fd), x_bd)
    rules = [g.rule(swept.of(i), of(own_swept, i)) for i, g in enumerate(goals)]
    path = chosen(backend, x_bd, weights, rules, y_bo, workspace)
    if not x_bd.is_cuda:
        refuse_not_finite(x_bd)
        if y_bo is not None:
            refuse_not_finite(y_bo)
    if path == "triton":
        from sae.objective.cuda import triton_step

        l1_k = torch.stack([rule.price.l1 for rule in rules if rule is not None and isinstance(rule.price, Linear)])
        state = AdamState.of(optimizer, weights) if optimizer is not None and not largest_norm else None
        with torch.cuda.device_of(x_bd):  # Triton launches on the current device, not on the tensors' device
            step = triton_step(x_bd, swept, l1_k, workspace, state.stacked() if state and one else state)
    else:
        with matmul_precision(x_bd, workspace.precision):
            step = one_by_one(x_bd, y_bo, swept, own_swept, goals, rules, path, workspace)
    workspace.l0 = step.l0
    if one:
        step = step.of(0)
    if optimizer is None or step.gradients is None:
        return step
    whole, split = [*weights, *own.values()], [name not in WHOLE for name in [*Weights._fields, *own]]
    gradients = [g.to(w.dtype) for g, w in zip([*step.gradients, *step.own_gradients.values()], whole)]
    parameters, rows, along = whole, workspace.mesh.rows, 0 if one else 1
    if not rows.alone:
        parameters = optimizer.parameters
        gradients = [rows.sum_of_part(g, along) if is_split else g for g, is_split in zip(gradients, split)]
    if unit_rows:
        leave_across_(gradients[2], parameters[2])
    if largest_norm:
        clip([g[None] for g in gradients] if one else gradients, largest_norm, split, workspace.mesh)
    optimizer.require(parameters)
    optimizer.step(gradients, ~step.loss.isfinite().all())
    if unit_rows:
        parameters[2].div_(parameters[2].norm(dim=-1, keepdim=True))
    for one_whole, part, is_split in zip(whole, parameters, split):
        if is_split:
            rows.gather_parts_(one_whole, part, along)
    return step._replace(gradients=None, own_gradients={})


def goals_of(goal: float | Tensor | Goal | Sequence[Goal], k: int, x_bd: Tensor) -> Sequence[Goal]:
    if isinstance(goal, float | int | Tensor):
        l1_k = torch.as_tensor(goal, dtype=x_bd.dtype, device=x_bd.device).expand(k)
        return [L1(l1) for l1 in l1_k]
    return goal if isinstance(goal, list) else [goal] * k  # type: ignore[list-item]  # a goal may be a tuple too


def one_by_one(
    x_bd: Tensor,
    y_bo: Tensor | None,
    weights: Weights,
    own: Own,
    goals: Sequence[Goal],
    rules: Sequence[Rule | None],
    path: str,
    workspace: Workspace,
) -> Step:
    """For the paths that take one dictionary at a time: calls them for each dictionary of a sweep."""
    buffers = Weights(*(workspace.take(name, w.shape, w.dtype, w.device) for name, w in zip(Weights._fields, weights)))
    own_buffers = {name: workspace.take(f"own.{name}", w.shape, w.dtype, w.device) for name, w in own.items()}
    steps, by_formula = [], path == "reference" or None in rules
    for i, (goal, rule) in enumerate(zip(goals, rules)):
        mine = x_bd, y_bo, weights.of(i), of(own, i)
        if path == "reference" or rule is None:
            steps.append(formula_step(*mine, goal, torch.float64 if path == "reference" else x_bd.dtype))
        else:
            steps.append(fast_step(*mine, rule, path, workspace, buffers.of(i), of(own_buffers, i), str(i)))
    if x_bd.is_cuda:
        workspace.note_bad_rows(~x_bd.isfinite().all(-1))
    if by_formula:
        return Step.stack(steps)
    alone = [s._replace(gradients=None, own_gradients={}) for s in steps]
    return Step.stack(alone)._replace(gradients=buffers, own_gradients=own_buffers)


def screens(rule: Rule | None) -> bool:
    """Whether an encoder other than the product can find the entries."""
    return rule is not None and not rule.signed


def refuse_encoder(encoder: Method, backend: Backend, rules: Sequence[Rule | None], weights: Weights) -> None:
    """Raises `InputError` for an encoder that would not be used or is not available here."""
    if encoder == "product":
        return
    refuse_missing(encoder, weights.W_enc_fd)
    cuda = weights.W_enc_fd.is_cuda
    if backend not in (("sparse",) if cuda else ("auto", "sparse")):
        raise InputError(f"expected the backend {'sparse' if cuda else 'auto or sparse'} for the encoder {encoder}, got {backend}; "
                         "take that, or the encoder product")  # fmt: skip
    if not all(map(screens, rules)):
        raise InputError(f"expected a kind that keeps what is large with its sign for the encoder {encoder}, got one that compares without "
                         "signs or has no fast rule; take the encoder product")  # fmt: skip


def chosen(
    backend: Backend, x_bd: Tensor, weights: Weights, rules: Sequence[Rule | None], y_bo: Tensor | None, workspace: Workspace
) -> str:
    """The path for this call. Raises `InputError` for one that this device or kind lacks, and for an encoder that the path does not use."""
    refuse_encoder(workspace.encoder, backend, rules, weights)
    relu = y_bo is None and all(rule is not None and rule.is_relu for rule in rules) and workspace.mesh.alone
    if backend == "triton":
        if not workspace.mesh.alone:
            raise InputError("expected one process for the triton backend, got several that share a dictionary; use backend auto")
        if not relu:
            raise InputError("expected autoencoders with ReLU and an L1 penalty for the triton backend, got others; use backend auto")
        if weights.W_dec_fd.dtype != torch.float32:
            raise InputError(f"expected float32 weights for the triton backend, got {weights.W_dec_fd.dtype}")
    refuse_device(backend, workspace.precision, x_bd.device)
    if backend != "auto" or not x_bd.is_cuda:
        return backend
    if not relu or why_no_triton(x_bd.device) or weights.W_dec_fd.dtype != torch.float32:
        return "auto"
    calls = int(workspace.plan[0])
    if calls % DECIDE_EVERY == 0 and workspace.l0 is not None:
        workspace.decide(weights.b_enc_f.shape[-1], TRITON_BELOW)
    workspace.plan[0] += 1
    return "triton" if workspace.plan[1] else "dense"


def refuse_device(backend: Backend, precision: Precision, device: torch.device) -> None:
    """Raises `InputError` for a backend or a precision that a device lacks."""
    if backend == "triton" and (reason := why_no_triton(device)):
        raise InputError(f"the triton backend cannot run: {reason}; use backend auto")
    if backend != "triton" and device.type != "cuda" and precision != "float32":
        raise InputError(f"expected precision float32 on {device}, got {precision}, which only CUDA has here")


@cache
def why_no_triton(device: torch.device) -> str | None:
    """The reason why the Triton path cannot run on a device, printed once if `auto` would have chosen it; None if it can run."""
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
    """On CUDA, torch's own products round operands to tf32 for both lower precisions."""
    before = torch.get_float32_matmul_precision()
    if x_bd.is_cuda:
        torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def refuse_misfit(x_bd: Tensor, y_bo: Tensor | None, weights: Weights) -> None:
    d_in, d_out = weights.W_enc_fd.shape[-1], weights.W_dec_fd.shape[-1]
    for what, rows, width in (("a batch", x_bd, d_in), ("a target", x_bd if y_bo is None else y_bo, d_out)):
        if rows.ndim != 2 or rows.shape[1] != width or not len(rows) or not rows.is_floating_point():
            raise InputError(f"expected {what} of floating point rows [b, {width}], got {rows.dtype} {list(rows.shape)}")
        if rows.device != weights.W_dec_fd.device:
            raise InputError(
                f"expected {what.replace('a ', 'the ')} on the weights' device, {weights.W_dec_fd.device}, got one on {rows.device}"
            )
        if len(rows) != len(x_bd):
            raise InputError(f"expected as many rows to write as are read, {len(x_bd)}, got {len(rows)}")


def refuse_not_finite(x_bd: Tensor) -> None:
    if x_bd.sum().isfinite():  # a sum of finite numbers may overflow, then each is looked at
        return
    rows = (~x_bd.isfinite().all(-1)).nonzero().flatten().tolist()
    if rows:
        raise NotFinite(
            f"{len(rows)} of {len(x_bd):,} rows of the batch are not finite ({bad_rows_text(rows)}); the weights were left alone"
        )


def bad_rows_text(rows: list[int]) -> str:
    return "rows " + ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
