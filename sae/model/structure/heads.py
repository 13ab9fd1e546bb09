"""Which outputs of an attention's projections are queries, keys and values, found by what depends on them in a pass of three tokens.

A query reaches the heads' output at its own token alone, a key that of later tokens alone (the first token can attend to nothing but
itself, for any query and key), a value both. So the layout of a fused projection needs no table, and a gate that a projection outputs
beside the queries, which acts on the first token too, is not taken for a query.

t tokens · c outputs of a projection · z width of the heads' output
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae.errors import InputError
from sae.model.structure.places import Columns, Place
from sae.model.structure.trace import TOKENS, own

SEPARATE = {"q": ("q_proj", "query", "wq", "q"), "k": ("k_proj", "key", "wk", "k"), "v": ("v_proj", "value", "wv", "v")}
FUSED = ("c_attn", "qkv_proj", "query_key_value", "wqkv", "qkv", "att_proj")
WORDS = {"q": "queries", "k": "keys", "v": "values"}
NO_MODULE = "no one module of the attention makes it of what the attention receives"


class Attention(NamedTuple):
    """Of one block."""

    projections: dict[str, nn.Module]
    """the modules that may make q, k and v of what the attention receives"""
    output: nn.Module
    argument: int | str
    """which input of the output projection the heads' output is"""


class Reached(NamedTuple):
    """Which outputs of a projection reach the heads' output, [c] each."""

    first_c: Tensor
    """from the first token to the first"""
    later_c: Tensor
    """from the first token to later ones"""
    own_c: Tensor
    """from the last token to the last"""


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
        """Returns noise of sizes 0.5 to 1.5, so that with any weights no gate is closed, no value is 0 and no softmax is certain."""
        if not isinstance(out, Tensor):
            return out
        signed = 2 * torch.rand(out.shape, generator=noise) - 1
        leaves[module] = (signed + signed.sign() / 2).to(out).requires_grad_()
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
    modules = {kind: module for kind, module in attention.projections.items() if module in leaves}
    try:
        reached = _reached(z_tz, {module: leaves[module] for module in modules.values()})
    except RuntimeError as error:  # its own kernel without a backward pass
        return dict.fromkeys(SEPARATE, f"no gradient goes through the attention ({' '.join(str(error).split()):.200})")
    found: dict[str, Place | str] = dict.fromkeys(SEPARATE, NO_MODULE)
    for kind in (kind for kind in ("v", "k", "q") if kind in modules):
        module, (k, v) = modules[kind], (found["k"], found["v"])
        fused, n_queries = len([one for one in modules.values() if one is module]) > 1, z_tz.shape[1]
        if isinstance(k, Place) and isinstance(v, Place):  # their heads may differ in width, and so queries from z
            n_queries = n_queries * k.width // v.width
        part_c = _part(kind, reached[module], fused, n_queries)
        found[kind] = (
            f"what the attention's projection gives does not act as {WORDS[kind]} do" if part_c is None else _place(module, part_c)
        )
    return found


def _part(kind: str, reached: Reached, fused: bool, n_queries: int) -> Tensor | None:
    """Which outputs are of the kind, [c]."""
    first_c, later_c, own_c = reached
    if kind == "q":
        queries_c = own_c & ~later_c & ~first_c
        if queries_c.sum() == n_queries or (queries_c.all() and not fused):  # the others are gates
            return queries_c
        alone_c = own_c & ~later_c  # a sink gives the first token a choice
        return alone_c if alone_c.all() and len(alone_c) == n_queries and not fused else None
    if fused:
        part_c = later_c & (first_c if kind == "v" else ~first_c)
        return part_c if part_c.any() else None
    return later_c if later_c.all() else None


def _place(module: nn.Module, part_c: Tensor) -> Place:
    index = part_c.nonzero().flatten()
    return Place(module, True, len(index), view=None if part_c.all() else Columns(index))


def _reached(z_tz: Tensor, leaves: Mapping[nn.Module, Tensor]) -> dict[nn.Module, Reached]:
    weight_tz = torch.linspace(0.5, 1.5, z_tz.numel()).view_as(z_tz).to(z_tz)  # the plain sum of what a norm gave would not move
    rounding = 1e-3 if z_tz.dtype in (torch.float32, torch.float64) else 0.1

    def moved(given: int, rows: slice, least: float) -> list[Tensor]:
        total = (z_tz[rows] * weight_tz[rows]).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, materialize_grads=True)
        sizes = [gradient.reshape(TOKENS, -1)[given].abs() for gradient in gradients]
        return [size_c > least * size_c.max() for size_c in sizes]

    if not leaves or not z_tz.requires_grad:
        return {module: Reached(*[torch.zeros(leaf.shape[-1], dtype=torch.bool)] * 3) for module, leaf in leaves.items()}
    measured = zip(moved(0, slice(0, 1), rounding), moved(0, slice(1, None), 0), moved(2, slice(2, None), 0), strict=True)
    return {module: Reached(*three) for module, three in zip(leaves, measured, strict=True)}
