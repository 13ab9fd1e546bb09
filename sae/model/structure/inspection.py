"""Finds the modules of a model's sites by inspecting one pass of three tokens (trace.py), so no family needs a table.

A site exists only if its value in that pass is as defined: the stream grows by `attn_out` and by `mlp_out`, and `attn_in` and `mlp_in`
are the norms' outputs. Otherwise the reason is stored.

t tokens · d width of the stream
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae.model.opening.offload import on_hand
from sae.model.sites import EMBED, KINDS
from sae.model.structure.branches import ATTENTION_WORDS, UNEXPLAINED, Branch, branches
from sae.model.structure.heads import SEPARATE, Attention, projections_among
from sae.model.structure.places import InPlace, Kept, Place, Scaled, ungained
from sae.model.structure.trace import NOTHING, Block, Call, Seen, first_tensor, own, same, trace, values_of

NO_HEADS = "the block has no attention heads with one output projection"
NO_NEURONS = "the MLP does not end in one projection, as with experts"
REPEATED = "a pass goes several times through the module that takes or gives it"
UNCLEAR = "not one module takes the stream, or what a norm made of it"


class Inspection(NamedTuple):
    found: dict[str, Place | str]
    """where each site but q, k and v is, or why it is not there"""
    attentions: list[Attention | str]
    """of each block, in which q, k and v are looked for, or why there is none"""
    final_norm: nn.Module | None
    norms: dict[str, nn.Module | None]
    """the norm that made what is at attn_in and mlp_in of the stream; None where they read the stream itself"""


class Found(NamedTuple):
    """A place, and its tensor in the pass."""

    place: Place
    seen: Seen | None


def inspect(model: Any, decoder: Any, blocks: Sequence[nn.Module], run: Callable[[], Any]) -> Inspection:
    """`run` makes a pass of three tokens."""
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings()
    embedded: list[tuple[Tensor, Seen]] = []
    normed: list[tuple[nn.Module, Tensor]] = []  # norms outside the blocks, with their inputs
    inside = {id(part) for block in blocks for part in block.modules()}
    outer = [part for part in decoder.modules() if id(part) not in inside and "norm" in type(part).__name__.lower()]

    def embeds(_module: nn.Module, _args: tuple, out: Tensor) -> None:
        embedded.append((values_of(out), Seen.now(out)))

    def norms(module: nn.Module, args: tuple, kwargs: dict) -> None:
        _, x = first_tensor(args, kwargs)
        normed.append((module, NOTHING if x is None else values_of(x)))

    with ExitStack() as stack:
        stack.callback(embedding.register_forward_hook(own(embeds)).remove)
        for part in outer:
            stack.callback(part.register_forward_pre_hook(own(norms), with_kwargs=True).remove)
        constants = [float(value) for value in vars(config).values() if isinstance(value, float)]
        traced = trace(blocks, constants, run)
    found: dict[str, Found | str] = {EMBED: _embed(embedding, embedded, traced[0])}
    attentions, before = [], dict[str, nn.Module | None]()
    for layer, block in enumerate(traced):
        sites, attention, norms_of = _sites(block)
        found |= {f"{kind}.{layer}": place for kind, place in sites.items()}
        attentions.append(attention)
        before |= {f"{kind}.{layer}": norm for kind, norm in norms_of.items()}
    finished = {site: f if isinstance(f, str) else _finished(f) for site, f in found.items()}
    final = [norm for norm, x_td in normed if same(x_td, traced[-1].post)]
    return Inspection(finished, attentions, final[0] if final else None, before)


def _finished(found: Found) -> Place:
    place, seen = found
    return place._replace(view=Kept()) if place.view is None and seen is not None and seen.overwritten else place


def _embed(embedding: nn.Module, embedded: list[tuple[Tensor, Seen]], first: Block) -> Found | str:
    """The embeddings, times the constant by which the model multiplies them on the way to block 0."""
    if not embedded:
        return "the pass does not go through the module of its input embeddings"
    values, seen = embedded[0]
    if not values.numel():
        return "its input embeddings give more than one vector a token"
    factor = 1.0
    if first.pre.shape == values.shape:
        factor = first.factor(torch.zeros_like(values), first.pre, values) or 1.0
    return Found(Place(embedding, True, values.shape[1], view=None if factor == 1 else Scaled(factor)), seen)


def _sites(block: Block) -> tuple[dict[str, Found | str], Attention | str, dict[str, nn.Module | None]]:
    """All of a block's but q, k and v by kind: where it is or why it is not there; its attention; the norms before its branches."""
    reason = ""
    if block.times != 1:
        reason = f"a pass goes through the block {block.times} times"
    elif not block.pre.numel() or block.pre.shape != block.post.shape:
        reason = "the block does not take and give one vector a token"
    if reason:
        return {kind: reason for kind in KINDS if kind not in SEPARATE}, reason, {}
    width = block.pre.shape[1]
    attention, mlp, middle = branches(block)
    sites, heads = _attention_sites(attention)
    sites |= {
        "resid_pre": Found(Place(block.module, False, width, block.argument), block.pre_seen),
        "resid_mid": middle if isinstance(middle, str) else Found(_taken(middle).place._replace(view=InPlace()), None),
        **_mlp_sites(mlp, block.precision),
        "resid_post": Found(Place(block.module, True, width), block.post_seen),
    }
    for kind, found in sites.items():
        if isinstance(found, Found) and block.repeats(found.place.module):
            sites[kind] = REPEATED
    if isinstance(heads, Attention):
        single = {kind: module for kind, module in heads.projections.items() if not block.repeats(module)}
        heads = REPEATED if block.repeats(heads.output) else heads._replace(projections=single)
    read = {"attn_in": attention, "mlp_in": mlp}
    received = {kind: _received(branch) for kind, branch in read.items() if isinstance(branch, Branch)}
    return sites, heads, {kind: one.norm.module if one.norm else None for kind, one in received.items() if one is not None}


def _attention_sites(branch: Branch | str) -> tuple[dict[str, Found | str], Attention | str]:
    if isinstance(branch, str):
        return dict.fromkeys(("attn_in", "head_out", "attn_out"), branch), branch
    received = _received(branch)
    sites: dict[str, Found | str] = {"attn_in": UNCLEAR if received is None else received.found, "attn_out": _added(branch)}
    last = _projection(branch)
    if last is None or not any(last.within(call) and call.named(ATTENTION_WORDS) for call in branch.calls):
        return sites | {"head_out": NO_HEADS}, NO_HEADS
    takers = [call for call in branch.calls if received is not None and same(call.x, received.x)]
    modules = {call.path.rpartition(".")[2]: call.module for call in takers}
    return sites | {"head_out": _taken(last)}, Attention(projections_among(modules), last.module, last.argument)


def _mlp_sites(branch: Branch | str, precision: float) -> dict[str, Found | str]:
    if isinstance(branch, str):
        return dict.fromkeys(("mlp_in_nogain", "mlp_in", "mlp_act", "mlp_out"), branch)
    received, last = _received(branch), _projection(branch)
    return {
        "mlp_in_nogain": _before_gain(branch, received, precision),
        "mlp_in": UNCLEAR if received is None else received.found,
        "mlp_act": _taken(last) if last else NO_NEURONS if branch.call else branch.reason,
        "mlp_out": _added(branch),
    }


def _taken(call: Call) -> Found:
    return Found(Place(call.module, False, call.x.shape[1], call.argument), call.x_seen)


def _added(branch: Branch) -> Found | str:
    if branch.call is None or branch.factor is None:
        return branch.reason
    view = None if branch.factor == 1 else Scaled(branch.factor)
    return Found(Place(branch.call.module, True, branch.call.y.shape[1], view=view), branch.call.y_seen)


class Received(NamedTuple):
    """The input of a branch."""

    found: Found
    x: Tensor
    norm: Call | None
    """which made it of the stream"""
    shared: bool
    """another branch reads it too"""


def _received(branch: Branch) -> Received | None:
    """The stream, or what a norm made of it, where one module of the branch takes it, or several that share it with no other branch."""
    norms = [call for call in branch.calls if call.is_norm and any(same(call.x, stream) for stream in branch.streams)]
    takers = _takers(branch, [norm.y for norm in norms] or branch.streams)
    out = branch.call
    mine = takers
    if out is not None:
        mine = [call for call in takers if out.within(call)] or [call for call in takers if call.began < out.began]
    if not mine or any(not same(call.x, mine[0].x) for call in mine):
        return None
    norm = next((norm for norm in norms if same(norm.y, mine[0].x)), None)
    shared = len([call for call in takers if same(call.x, mine[0].x)]) > len(mine)
    if len(mine) == 1:
        return Received(_taken(mine[0]), mine[0].x, norm, shared)
    if norm is None or shared:
        return None
    return Received(Found(Place(norm.module, True, norm.y.shape[1]), norm.y_seen), norm.y, norm, shared)


def _takers(branch: Branch, sources: Sequence[Tensor]) -> list[Call]:
    """The outermost modules whose input is one of the values."""
    takers = [call for call in branch.calls if not call.is_norm and not call.passes_on and any(same(call.x, x) for x in sources)]
    return [call for call in takers if not any(call is not other and call.within(other) for other in takers)]


def _projection(branch: Branch) -> Call | None:
    """The last linear map of a branch, before the norm that may follow it."""
    if branch.call is None:
        return None
    result = branch.call.x if branch.call.is_norm else branch.call.y
    last = [call for call in branch.calls if call.is_projection and same(call.y, result)]
    return max(last, key=Call.order, default=None)


def _before_gain(branch: Branch, received: Received | None, precision: float) -> Found | str:
    if received is None or received.norm is None:
        return "no norm stands right before the MLP"
    if branch.reason == UNEXPLAINED and branch.factor is None:
        return UNEXPLAINED  # the norm may be one of the stream itself
    if received.shared:
        return "the MLP shares its norm with the attention"
    norm = received.norm
    with on_hand(norm.module):
        view = ungained(norm.module, norm.x, norm.raw, precision)
    if view is None or norm.argument != 0:
        return "the norm before the MLP is neither a LayerNorm nor an RMSNorm"
    return Found(Place(norm.module, True, norm.y.shape[1], view=view), None)
