"""Which outputs of an attention's projections are queries, keys and values, found by what depends on them in a pass of three tokens.

A query reaches the heads' output at its own token alone, a key that of later tokens alone (the first token can attend to nothing but
itself, whatever the key), a value both. So the layout of a fused projection needs no table.

t tokens · c outputs of a projection · z width of the heads' output
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae.errors import InputError
from sae.model.places import Columns, Place
from sae.model.trace import TOKENS, own

SEPARATE = {"q": ("q_proj", "query", "wq", "q"), "k": ("k_proj", "key", "wk", "k"), "v": ("v_proj", "value", "wv", "v")}
FUSED = ("c_attn", "qkv_proj", "query_key_value", "wqkv", "qkv", "att_proj")
NO_MODULE = "the attention makes it by no module of its own from what it receives"
UNLIKE = "what the attention's modules make does not act as queries, keys and values"


class Attention(NamedTuple):
    """Of one block."""

    projections: dict[str, nn.Module]
    """the modules that may make q, k and v of what the attention receives"""
    output: nn.Module
    argument: int | str
    """which input of the output projection the heads' output is"""


def projections_among(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """By q, k and v, of modules by name."""
    found = {}
    for kind, names in SEPARATE.items():
        for name, module in modules.items():
            if name.lower() in (*names, *FUSED):
                found[kind] = module
    return found


def find_heads(attentions: Sequence[Attention | str], run: Callable[[], Any]) -> list[dict[str, Place | str]]:
    """For each block, where q, k and v are or why they are not there. `run` makes the pass."""
    leaves: dict[nn.Module, Tensor] = {}
    heads: dict[nn.Module, Tensor] = {}
    noise = torch.Generator().manual_seed(0)

    def cut(module: nn.Module, _args: tuple, out: Any) -> Any:
        if not isinstance(out, Tensor):
            return out
        size = float(out.detach().float().pow(2).mean().sqrt()) or 1.0  # host sync
        noisy = out.detach() + (size * torch.randn(out.shape, generator=noise)).to(out)
        leaves[module] = noisy.requires_grad_()
        return leaves[module]

    def end(key: int | str) -> Callable:
        def end(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            heads[module] = args[key] if isinstance(key, int) else kwargs[key]
            rest = heads[module].detach()
            return ((*args[:key], rest, *args[key + 1 :]), kwargs) if isinstance(key, int) else (args, {**kwargs, key: rest})

        return end

    with ExitStack() as stack, torch.enable_grad():
        for attention in attentions:
            if isinstance(attention, Attention):
                stack.callback(attention.output.register_forward_pre_hook(own(end(attention.argument)), with_kwargs=True).remove)
                for module in set(attention.projections.values()):
                    stack.callback(module.register_forward_hook(own(cut)).remove)
        try:
            run()
        except InputError as error:
            return [dict.fromkeys(SEPARATE, str(error))] * len(attentions)
        return [_of_block(attention, leaves, heads) for attention in attentions]


def _of_block(attention: Attention | str, leaves: dict[nn.Module, Tensor], heads: dict[nn.Module, Tensor]) -> dict[str, Place | str]:
    if isinstance(attention, str):
        return dict.fromkeys(SEPARATE, attention)
    z_tz = heads[attention.output].reshape(TOKENS, -1)
    rounding = 1e-4 if z_tz.dtype in (torch.float32, torch.float64) else 0.1
    modules = {kind: module for kind, module in attention.projections.items() if module in leaves}
    if not modules or not z_tz.requires_grad:
        return dict.fromkeys(SEPARATE, UNLIKE if modules else NO_MODULE)
    fused = len(set(modules.values())) < len(modules)
    parts: dict[str, Tensor] = {}  # which of the module's outputs each is
    for kind in (kind for kind in ("v", "k", "q") if kind in modules):
        now_c, later_c = _reached(z_tz[:1], leaves[modules[kind]], rounding), _reached(z_tz[1:], leaves[modules[kind]], 0)
        if kind == "q":  # what is none of it is a gate on the heads' output; a sink gives the first token a choice
            width = z_tz.shape[1] * int(parts["k"].sum()) // int(parts["v"].sum()) if parts.keys() >= {"k", "v"} else z_tz.shape[1]
            choices = [~later_c & ~now_c, *([] if fused else [~later_c])]
            parts["q"] = next((part_c for part_c in choices if part_c.sum() == width), later_c & ~later_c)
        else:
            parts[kind] = later_c if not fused else later_c & (now_c if kind == "v" else ~now_c)
        if not parts[kind].any() or not (fused or kind == "q" or parts[kind].all()):
            return dict.fromkeys(SEPARATE, UNLIKE)
    return {kind: _place(modules[kind], parts[kind]) if kind in modules else NO_MODULE for kind in SEPARATE}


def _place(module: nn.Module, part_c: Tensor) -> Place:
    index = part_c.nonzero().flatten()
    return Place(module, True, len(index), view=None if part_c.all() else Columns(index))


def _reached(z_tz: Tensor, leaf: Tensor, rounding: float) -> Tensor:
    """Which outputs at the first token the given tokens' heads depend on, [c]."""
    (gradient,) = torch.autograd.grad(z_tz.sum(), leaf, retain_graph=True, allow_unused=True)
    size_c = leaf.new_zeros(leaf.shape[-1]) if gradient is None else gradient.reshape(TOKENS, -1)[0].abs()
    return size_c > rounding * size_c.max()
