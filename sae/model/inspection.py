"""Which modules of a model its sites are, found by looking at one pass of three tokens (sae/model/trace.py), so no family needs a table.

A site is there only if it is in that pass what its name says: the stream grows by `attn_out` and by `mlp_out`, and `attn_in` and `mlp_in`
are what the norms gave. Otherwise the reason is kept.

t tokens · d width of the stream
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae.errors import InputError
from sae.model.offload import device_of, on_hand
from sae.model.places import InPlace, Kept, Place, Scaled, ungained
from sae.model.sites import EMBED, KINDS, Site
from sae.model.trace import TOKENS, Block, Branch, Call, Seen, same, trace, values_of

MLP_WORDS = ("mlp", "moe", "feed_forward", "feedforward", "ffn", "expert")  # in the name or class of a branch
ATTENTION_WORDS = ("attn", "attention")
UNEXPLAINED = "the stream does not grow by the outputs of two modules, an attention and an MLP"
UNCLEAR = "not one module takes the stream, or what a norm made of it"


class Inspection(NamedTuple):
    places: dict[str, Place]
    """by site, in the order of the pass"""
    refused: dict[str, str]
    """why the other sites are not there"""
    final_norm: nn.Module | None


class Found(NamedTuple):
    """A place, and its tensor in the pass."""

    place: Place
    seen: Seen | None


def inspect(model: Any, decoder: Any, blocks: Sequence[nn.Module], name: str) -> Inspection:
    """Raises `InputError` where the model does not run on three tokens."""
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings()
    embedded: list[tuple[Tensor, Seen]] = []
    normed: list[tuple[nn.Module, Tensor]] = []  # norms outside the blocks, with their inputs
    inside = {id(part) for block in blocks for part in block.modules()}
    outer = [part for part in decoder.modules() if id(part) not in inside and "norm" in type(part).__name__.lower()]

    def run() -> None:
        hooks = [embedding.register_forward_hook(lambda _m, _args, out: embedded.append((values_of(out), Seen.now(out))))]
        hooks += [part.register_forward_pre_hook(lambda part, args: normed.append((part, values_of(args[0])))) for part in outer]
        try:
            ids_1t = torch.tensor([_tokens(embedding.num_embeddings, config.pad_token_id)], device=device_of(embedding))
            decoder(input_ids=ids_1t, use_cache=False)
        except Exception as error:  # whatever a model's own code does
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"expected {name!r} to run on {TOKENS} tokens, but it failed ({reason:.300})") from error
        finally:
            for hook in hooks:
                hook.remove()

    constants = [float(value) for value in vars(config).values() if isinstance(value, float)]
    traced = trace(blocks, constants, run)
    found: dict[str, Found | str] = {EMBED: _embed(embedding, embedded, traced[0])}
    for layer, block in enumerate(traced):
        own = _sites(block)
        found |= {str(Site(kind, layer)): own[kind] for kind in KINDS}
    places = {site: _finished(f) for site, f in found.items() if isinstance(f, Found)}
    refused = {site: f for site, f in found.items() if isinstance(f, str)}
    final = [norm for norm, x_td in normed if same(x_td, traced[-1].post)]
    return Inspection(places, refused, final[0] if final else None)


def _tokens(vocabulary: int, pad: int | None) -> list[int]:
    """Different ones from the middle of the vocabulary, where no special tokens are."""
    middle = [token for token in range(vocabulary // 2, vocabulary) if token != pad]
    return [*middle, 0, 0, 0][:TOKENS]


def _finished(found: Found) -> Place:
    place, seen = found
    return place._replace(view=Kept()) if place.view is None and seen is not None and seen.overwritten else place


def _embed(embedding: nn.Module, embedded: list[tuple[Tensor, Seen]], first: Block) -> Found | str:
    """The embeddings, times the constant by which the model multiplies them on the way to block 0."""
    if not embedded:
        return "the pass does not go through the module of its input embeddings"
    values, seen = embedded[0]
    factor = 1.0
    if first.pre is not None and first.pre.shape == values.shape:
        factor = first.factor(torch.zeros_like(values), first.pre, values) or 1.0
    return Found(Place(embedding, True, values.shape[1], view=None if factor == 1 else Scaled(factor)), seen)


def _sites(block: Block) -> dict[str, Found | str]:
    """All of a block's, by kind: where it is or why it is not there."""
    if block.times != 1:
        return dict.fromkeys(KINDS, f"a pass goes through the block {block.times} times")
    if not block.pre.numel() or block.pre.shape != block.post.shape:
        return dict.fromkeys(KINDS, "the block does not take and give one vector a token")
    width = block.pre.shape[1]
    attention, mlp = _branches(block)
    return {
        "resid_pre": Found(Place(block.module, False, width, block.argument), block.pre_seen),
        **_attention_sites(block, attention),
        "resid_mid": _middle(block, mlp),
        **_mlp_sites(block, mlp),
        "resid_post": Found(Place(block.module, True, width), block.post_seen),
    }


def _branches(block: Block) -> tuple[Branch | str, Branch | str]:
    """What stands for attention and what for the MLP, or why nothing does."""
    if block.mid is not None and block.first is not None:
        later = [call for call in block.calls if call.began >= block.mid.began]
        return block.first, block.added(block.mid.x, block.post, later) or UNEXPLAINED
    if (single := block.added(block.pre, block.post, block.calls)) is not None:
        return ("the block has only an MLP", single) if single.call.named(MLP_WORDS) else (single, "the block has no MLP")
    outputs = sorted((call for call in block.calls if call.y.shape == block.pre.shape), key=Call.order)
    for one, other in combinations(outputs, 2):
        factor = block.factor(block.pre, block.post, one.y + other.y)
        if factor is not None and one.named(MLP_WORDS) != other.named(MLP_WORDS):
            one, other = (other, one) if one.named(MLP_WORDS) else (one, other)
            return Branch(one, factor), Branch(other, factor)
    return UNEXPLAINED, UNEXPLAINED


def _middle(block: Block, mlp: Branch | str) -> Found | str:
    if block.mid is not None:
        return mlp if isinstance(mlp, str) else Found(_taken(block.mid).place._replace(view=InPlace()), None)
    return mlp if mlp == UNEXPLAINED else "nothing lies between the block's attention and MLP"


def _attention_sites(block: Block, branch: Branch | str) -> dict[str, Found | str]:
    if isinstance(branch, str):
        return dict.fromkeys(("attn_in", "head_out", "attn_out"), branch)
    calls = [call for call in block.calls if block.mid is None or call.began < block.mid.began]
    taker, _ = _taker(block.pre, calls, branch.call)
    last = _projection(calls, branch.call)
    heads = last is not None and (last.named(ATTENTION_WORDS) or (taker is not None and taker.named(ATTENTION_WORDS)))
    return {
        "attn_in": _taken(taker) if taker else UNCLEAR,
        "head_out": _taken(last) if last and heads else "the block has no attention heads with one output projection",
        "attn_out": _added(branch),
    }


def _mlp_sites(block: Block, branch: Branch | str) -> dict[str, Found | str]:
    if isinstance(branch, str):
        return dict.fromkeys(("mlp_in_nogain", "mlp_in", "mlp_act", "mlp_out"), branch)
    calls = [call for call in block.calls if block.mid is None or call.began >= block.mid.began]
    taker, norm = _taker(block.pre if block.mid is None else block.mid.x, calls, branch.call)
    last = _projection(calls, branch.call)
    return {
        "mlp_in_nogain": _before_gain(block, norm, calls),
        "mlp_in": _taken(taker) if taker else UNCLEAR,
        "mlp_act": _taken(last) if last else "the MLP does not end in one projection, as with experts",
        "mlp_out": _added(branch),
    }


def _taken(call: Call) -> Found:
    return Found(Place(call.module, False, call.x.shape[1], call.argument), call.x_seen)


def _added(branch: Branch) -> Found:
    view = None if branch.factor == 1 else Scaled(branch.factor)
    return Found(Place(branch.call.module, True, branch.call.y.shape[1], view=view), branch.call.y_seen)


def _taker(stream: Tensor, calls: Sequence[Call], out: Call) -> tuple[Call | None, Call | None]:
    """The module that takes the stream, or what a norm made of it, on the way to the output; and that norm."""
    norms = [call for call in calls if call.is_norm and same(call.x, stream)]
    sources = [norm.y for norm in norms] or [stream]
    takers = [call for call in calls if not call.is_norm and not call.passes_on and any(same(call.x, x) for x in sources)]
    takers = [call for call in takers if not any(call is not other and call.within(other) for other in takers)]
    own = [call for call in takers if out.within(call)] or [call for call in takers if call.began < out.began]
    if len(own) != 1:
        return None, None
    return own[0], next((norm for norm in norms if same(norm.y, own[0].x)), None)


def _projection(calls: Sequence[Call], out: Call) -> Call | None:
    """The last linear map of a branch, ahead of the norm that may follow it."""
    result = out.x if out.is_norm else out.y
    last = [call for call in calls if call.is_projection and same(call.y, result)]
    return max(last, key=Call.order, default=None)


def _before_gain(block: Block, norm: Call | None, calls: Sequence[Call]) -> Found | str:
    if norm is None:
        return "no norm stands right before the MLP"
    takers = [call for call in calls if same(call.x, norm.y) and not call.passes_on]
    if len([call for call in takers if not any(call is not other and call.within(other) for other in takers)]) > 1:
        return "the MLP shares its norm with the attention"
    with on_hand(norm.module):
        view = ungained(norm.module, norm.x, norm.raw, block.precision)
    if view is None or norm.argument != 0:
        return "the norm before the MLP is neither a LayerNorm nor an RMSNorm"
    return Found(Place(norm.module, True, norm.y.shape[1], view=view), None)
