"""Hooks and products used by the engine's passes.

s sequences · p positions · d width of the stream · n some readers · m some writers · h heads · z width of a head
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sae.model.hooks import register
from sae.model.structure.places import Place
from sae.model.structure.trace import first_tensor
from steering.circuits.model_graph.blocks import Block, HeadInput


class Latest:
    """The value that was recorded last."""

    value: Tensor

    def __call__(self, value: Tensor) -> None:
        self.value = value

    def unchanged(self, value: Tensor) -> Tensor:
        """An edit that only records."""
        self.value = value
        return value


def change_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Runs the module on `change` of its first input; returns the function that ends this."""

    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        key, value = first_tensor(args, kwargs)
        assert value is not None
        new = change(value)
        return ((*args[:key], new, *args[key + 1 :]), kwargs) if isinstance(key, int) else (args, {**kwargs, key: new})

    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


def change_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Replaces the module's output by `change` of it; returns the function that ends this."""
    return module.register_forward_hook(lambda _module, _args, output: change(output)).remove


def see(place: Place, look: Callable[[Tensor], Any]) -> Callable[[], None]:
    """`look` gets the value at the place."""

    def change(raw: Tensor, received: Tensor) -> Tensor:
        look(raw if place.view is None else place.view.read(raw, received))
        return raw

    return register(place, change)


def see_stream(norm: nn.Module | None, place: Place, look: Callable[[Tensor], Any]) -> Callable[[], None]:
    """`look` gets the stream that is read through the norm, or at the place if there is none."""
    if norm is None:
        return see(place, look)

    def change(x: Tensor) -> Tensor:
        look(x)
        return x

    return change_input(norm, change)


def see_heads(block: Block, look: Callable[[Tensor], Any]) -> Callable[[], None]:
    """`look` gets the output of every head of the block to the stream, [h, s, p, d]."""
    key = block.heads_out.argument

    def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        z_spc = args[key] if isinstance(key, int) else kwargs[key]
        z_sphz = z_spc.unflatten(-1, block.output_hzd.shape[:2])
        now_hspd = torch.einsum("sphz,hzd->hspd", z_sphz, block.output_hzd)
        if block.post is not None:  # an RMSNorm at the scale of the sum: a factor for each number
            norm, one_d = block.post, torch.ones_like(output[..., :1, :])
            factor_spd = norm.module.forward(one_d) * (1 + norm.formula.eps) ** 0.5 / norm.scale(output)
            now_hspd = now_hspd * factor_spd.to(now_hspd.dtype)
        look(now_hspd if block.factor == 1 else now_hspd * block.factor)

    return block.heads_out.module.register_forward_hook(hook, with_kwargs=True).remove


def widen(stack: ExitStack, block: Block) -> None:
    """Until the stack is left, the block's attention gets a key and a value for each query head."""
    wide = block.widened
    if wide is None or all(getattr(wide.attention, name) == value for name, value in wide.settings.items()):
        return
    for name, value in wide.settings.items():
        stack.callback(setattr, wide.attention, name, getattr(wide.attention, name))
        setattr(wide.attention, name, value)
    for module, columns in wide.columns.items():
        stack.callback(change_output(module, partial(_select, columns)))


def _select(columns: Tensor, output: Tensor) -> Tensor:
    return output.index_select(-1, columns)


def normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    """The norm without the hooks on it."""
    return x if norm is None else norm.forward(x)


def through_norm(run_norm: Callable[[Tensor], Tensor] | None, x_spd: Tensor, gradient_nspd: Tensor) -> Tensor:
    """The gradients with respect to the norm's output, propagated to its input."""
    if run_norm is None:
        return gradient_nspd
    with torch.enable_grad():
        x_nspd = x_spd.detach().expand_as(gradient_nspd).requires_grad_()
        return torch.autograd.grad(run_norm(x_nspd), x_nspd, gradient_nspd)[0]


def back_through(one: HeadInput, gradient: Tensor) -> Tensor:
    """The gradient of the projection's output, propagated to the input of each head, [h, s, p, d]."""
    gradient_sphz = gradient.index_select(-1, one.columns_hz.flatten()).unflatten(-1, one.columns_hz.shape)
    weight_hzd = one.weight_gzd.repeat_interleave(one.shared, dim=0)
    return torch.einsum("sphz,hzd->hspd", gradient_sphz, weight_hzd)


def projected(one: HeadInput, heads: Sequence[int], x_nspd: Tensor) -> Tensor:
    """Of each head of `heads` from its own input, [n, s, p, z]."""
    groups = [head // one.shared for head in heads]
    new_nspz = torch.einsum("nspd,nzd->nspz", x_nspd, one.weight_gzd[groups])
    return new_nspz if one.bias_gz is None else new_nspz + one.bias_gz[groups][:, None, None]


def weighted(cut_snm: Tensor, difference_mspd: Tensor) -> Tensor:
    """Sums over m, [n, s, p, d]; the cut may have one row for all sequences."""
    cut_snm = cut_snm.to(difference_mspd.dtype)
    if len(cut_snm) == 1:
        return torch.einsum("nm,mspd->nspd", cut_snm[0], difference_mspd)
    return torch.einsum("snm,mspd->nspd", cut_snm, difference_mspd)
