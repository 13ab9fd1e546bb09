"""Attention patterns and values of a model, recorded and replaced by one attention function that is registered with transformers.

The function runs the model's own eager attention, so soft caps, sinks, windows and masks stay its own.

s sequences · h heads · g heads of keys and values · q positions of the pass · k columns so far · z width of a head
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sae.errors import InputError

NAME = "sae_patterns"  # among the attention functions of transformers

AttentionEdit: TypeAlias = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""gets the layer, the pattern [s, h, q, k] and the values [s, g, k, z], and returns those to continue with"""

Step: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""of the heads' output [s, q, h, z], pattern and values"""

_STEPS: dict[nn.Module, list[Step]] = {}  # of the attention modules of all models that are edited now, in the order to be done


def mixed(pattern_shqk: Tensor, value_sgkz: Tensor) -> Tensor:
    """The heads' output, [s, q, h, z]: each pattern times the values of its group."""
    value_shkz = value_sgkz.repeat_interleave(pattern_shqk.shape[1] // value_sgkz.shape[1], dim=1)
    return torch.matmul(pattern_shqk, value_shkz).transpose(1, 2).contiguous()


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    eager = _eager(module)
    if eager is None:
        raise InputError(f"expected an eager attention in the file of {type(module).__name__}, found none; leave its attention as it is")
    out, pattern = eager(module, query, key, value, attention_mask, **kwargs)
    for step in _STEPS.get(module, ()):
        out, pattern, value = step(out, pattern, value)
    return out, pattern


def _eager(module: nn.Module) -> Callable | None:
    """The eager attention of the file in which the module's class is written."""
    files = (sys.modules.get(kind.__module__) for kind in type(module).__mro__)
    return next((function for file in files if (function := getattr(file, "eager_attention_forward", None))), None)


@contextmanager
def _through_ours(decoder: Any) -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(NAME)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


@contextmanager
def _stepping(steps: Mapping[nn.Module, Step]) -> Iterator[None]:
    for module, step in steps.items():
        _STEPS.setdefault(module, []).append(step)
    try:
        yield
    finally:
        for module, step in steps.items():
            _STEPS[module].remove(step)
            if not _STEPS[module]:
                del _STEPS[module]


def find_attentions(decoder: Any, blocks: Sequence[nn.Module], run: Callable[[], Any]) -> list[nn.Module | str]:
    """Of each block, the module whose heads give pattern times values, or why there is none. `run` makes a pass of three tokens."""
    if not decoder._can_set_attn_implementation():
        reason = f"{type(decoder).__name__} has its own attention code, not the attention functions of transformers"
        return [reason] * len(blocks)
    found: list[nn.Module | str] = ["none of its modules attends through the attention functions of transformers"] * len(blocks)

    def look(layer: int, module: nn.Module, out: Tensor, pattern: Any, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        whole = isinstance(pattern, Tensor) and pattern.shape[1] % value.shape[1] == 0
        if isinstance(found[layer], nn.Module):
            found[layer] = "more than one of its modules attends"
        elif whole and torch.allclose(out, mixed(pattern, value), rtol=1e-2, atol=1e-3):
            found[layer] = module
        else:
            found[layer] = "what its heads give is not a pattern times values"
        return out, pattern, value

    steps = {module: partial(look, layer, module) for layer, block in enumerate(blocks) for module in block.modules()}
    with _stepping(steps), _through_ours(decoder):
        run()
    return found


@contextmanager
def attention_edited(decoder: Any, attentions: Sequence[nn.Module | str], edit: AttentionEdit, name: str) -> Iterator[None]:
    """Inside, each block's heads mix what `edit` returns. Raises `InputError` for a model with a block whose attention has no pattern."""
    for layer, module in enumerate(attentions):
        if isinstance(module, str):
            raise InputError(f"expected attention patterns in all blocks of {name!r}, but block {layer} has none: {module}")

    def step(layer: int, out: Tensor, pattern: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        new_pattern, new_value = edit(layer, pattern, value)
        if new_pattern is pattern and new_value is value:
            return out, pattern, value
        return mixed(new_pattern, new_value), new_pattern, new_value

    steps = {module: partial(step, layer) for layer, module in enumerate(attentions) if isinstance(module, nn.Module)}
    with _stepping(steps):
        if decoder.config._attn_implementation == NAME:
            yield
        else:
            with _through_ours(decoder):
                yield
