"""The two parts of a block that add to the stream, distinguished by sums of what flowed in a pass (trace.py)."""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from torch import Tensor

from sae.model.structure.trace import Added, Block, Call, same

MLP_WORDS = ("mlp", "moe", "feed_forward", "feedforward", "ffn", "expert")  # in the name or class of a module
ATTENTION_WORDS = ("attn", "attention")
UNEXPLAINED = "the stream does not grow by the outputs of two modules, an attention and an MLP"
SEVERAL = "what the MLP adds is the sum of several modules' outputs"
SIDE_BY_SIDE = "nothing lies between the block's attention and MLP, which read the same stream"


class Branch(NamedTuple):
    """Attention (or its replacement) or MLP."""

    call: Call | None
    """of the module whose output is added; None: of several modules"""
    factor: float | None
    """factor of the output in the sum; None: more than that is added"""
    streams: Sequence[Tensor]
    """candidates for the stream that it reads"""
    calls: Sequence[Call]
    """the calls that contain its modules"""
    reason: str = UNEXPLAINED
    """why there is no factor"""


class Branches(NamedTuple):
    """Each branch, or why it does not exist."""

    attention: Branch | str
    mlp: Branch | str
    middle: Call | str
    """the first module that takes the stream between them"""


def branches(block: Block) -> Branches:
    if block.mid is not None and block.first is not None:
        return _one_after_the_other(block, block.mid, block.first)
    outputs, streams = _outputs(block, block.calls), [block.pre]
    if (single := block.added(block.pre, block.post, outputs)) is not None:
        found = Branch(*single, streams, block.calls)
        if single.call.named(MLP_WORDS):
            return Branches("the block has only an MLP", found, "the block has only an MLP")
        return Branches(found, "the block has no MLP", "the block has no MLP")
    for one, other in combinations(outputs, 2):
        factor = block.factor(block.pre, block.post, one.y + other.y)
        if factor is not None and one.named(MLP_WORDS) != other.named(MLP_WORDS):
            first, second = (other, one) if one.named(MLP_WORDS) else (one, other)
            found = Branch(first, factor, streams, block.calls)
            return Branches(found, found._replace(call=second), SIDE_BY_SIDE)
    return Branches(_named(block, ATTENTION_WORDS), _last(block) or _named(block, MLP_WORDS), UNEXPLAINED)


def _one_after_the_other(block: Block, mid: Call, first: Added) -> Branches:
    before = [call for call in block.calls if call.began < mid.began]
    after = [call for call in block.calls if call.began >= mid.began]
    attention = Branch(*first, [block.pre], before)
    outputs = _outputs(block, after)
    second = block.added(mid.x, block.post, outputs) or _ahead_of_a_third(block, mid, after) or block.rescaled(mid.x, block.post, outputs)
    if second is not None:
        return Branches(attention, Branch(*second, [mid.x], after), mid)
    for one, other in combinations(outputs, 2):
        if block.factor(mid.x, block.post, one.y + other.y) is not None:
            return Branches(attention, Branch(None, None, [mid.x], after, SEVERAL), mid)
    if not first.call.named(ATTENTION_WORDS):
        attention = attention._replace(factor=None)
    return Branches(attention, Branch(None, None, [mid.x], after), UNEXPLAINED)


def _ahead_of_a_third(block: Block, mid: Call, after: Sequence[Call]) -> Added | None:
    """An MLP behind which the block adds a third part to the stream, as Gemma 4's do."""
    outputs = _outputs(block, after)
    for stream in (call.x for call in after if call.x.shape == mid.x.shape):
        second = block.added(mid.x, stream, [call for call in outputs if call.named(MLP_WORDS)])
        if second is not None and (block.added(stream, block.post, outputs) or block.rescaled(stream, block.post, outputs)):
            return second
    return None


def _outputs(block: Block, calls: Sequence[Call]) -> list[Call]:
    return [call for call in sorted(calls, key=Call.order) if call.y.shape == block.pre.shape]


def _last(block: Block) -> Branch | None:
    """An MLP of which only what stands before it is not understood: it adds to the stream that its norm reads."""
    for norm in block.calls:
        if norm.is_norm and norm.x.shape == block.pre.shape and not same(norm.x, block.pre):
            after = [call for call in block.calls if call.began > norm.began]
            if (found := block.added(norm.x, block.post, _outputs(block, after))) is not None:
                return Branch(*found, [norm.x], [norm, *after])
    return None


def _named(block: Block, words: Sequence[str]) -> Branch | str:
    """By the names of modules, if no sum shows it."""
    call = next((call for call in _outputs(block, block.calls) if call.named(words) and not call.is_norm), None)
    streams = [block.pre, *(norm.x for norm in block.calls if norm.is_norm)]
    return Branch(call, None, streams, block.calls) if call else UNEXPLAINED
