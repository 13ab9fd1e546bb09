"""Passes of a steered model in which some of its parts are those of another pass, such as the unsteered one.

"norms" freezes the scale by which every norm divides, at each token: the value itself, not only its gradient. Norms behind a branch
(Gemma's), the final norm and the norms of queries and keys (Qwen 3's, one scale per token and head) are among them; a LayerNorm's mean,
which is linear, is not. "patterns" freezes where each head attends, "values" what it reads there; with both, attention has the output
of the other pass.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sae.errors import InputError
from sae.model.language_model import LanguageModel

PARTS = ("norms", "patterns", "values")


@dataclass(eq=False)
class Internals:
    """Parts of one pass."""

    scales: dict[str, Tensor] = field(default_factory=dict)
    """norm -> its divisor, [s, p, 1], or with one number for each head"""
    patterns: dict[int, Tensor] = field(default_factory=dict)
    """layer -> [s, heads, p, columns]"""
    values: dict[int, Tensor] = field(default_factory=dict)
    """layer -> [s, heads of keys and values, columns, width]"""


@contextmanager
def internals(lm: LanguageModel, parts: Collection[str] = PARTS) -> Iterator[Internals]:
    """Yields the `parts` of the latest pass inside; inside `steered`, those of the steered pass.

    A pass that records patterns or values uses the model's eager attention: compare frozen passes with one that recorded the same parts; at
    coefficient 0 their bits are then equal. Raises `InputError` as `frozen` does.
    """
    kept = Internals()

    def keep_scale(name: str, scale: Tensor) -> Tensor:
        kept.scales[name] = scale
        return scale

    def keep_attention(layer: int, pattern: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        kept.patterns[layer], kept.values[layer] = pattern, value
        return pattern, value

    with _edited(lm, parts, keep_scale, keep_attention):
        yield kept


@contextmanager
def frozen(lm: LanguageModel, parts: Collection[str], at: Internals) -> Iterator[None]:
    """Inside, `parts` of every pass are those of `at`, under any edits; the tokens must be the ones of the pass that `at` was kept from.

    Raises `InputError` for other parts than "norms", "patterns" and "values", for a model with a norm whose formula is not known or an
    attention that cannot be frozen, and (in the pass) for tokens of another shape or parts that `at` lacks.
    """

    def scale_of(name: str, scale: Tensor) -> Tensor:
        return _same_shape(f"the norm {name}", at.scales.get(name), scale)

    def attention_of(layer: int, pattern: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return (
            _same_shape(f"the patterns of block {layer}", at.patterns.get(layer), pattern) if "patterns" in parts else pattern,
            _same_shape(f"the values of block {layer}", at.values.get(layer), value) if "values" in parts else value,
        )

    with _edited(lm, parts, scale_of, attention_of):
        yield


@contextmanager
def frozen_as_unsteered(lm: LanguageModel, parts: Collection[str]) -> Iterator[None]:
    """Inside, `parts` of every pass are those that the unsteered model has on the same tokens, in `lm.logits` and `lm.generate`.

    Each pass first runs once more without edits, with its own cache, so generated text is read by both models. Takes the place of
    `frozen` where the tokens are not known beforehand. Raises `InputError` as `frozen` does, and for a pass with a cache that was not
    started inside, such as those of Hugging Face's own `generate`.
    """
    unsteered, reading = Internals(), False
    caches: tuple[Any, Any] = (None, None)  # of the pass and of the unsteered one
    unsteered_cache: Any = None

    def scale_of(name: str, scale: Tensor) -> Tensor:
        if reading:
            unsteered.scales[name] = scale
        return unsteered.scales[name]

    def attention_of(layer: int, pattern: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if reading:
            unsteered.patterns[layer], unsteered.values[layer] = pattern, value
        return (
            unsteered.patterns[layer] if "patterns" in parts else pattern,
            unsteered.values[layer] if "values" in parts else value,
        )

    def read_unsteered(model: Any, args: tuple, kwargs: dict) -> None:
        nonlocal reading, unsteered_cache
        if reading:
            return
        cache = kwargs.get("past_key_values")
        if cache is not None and cache is not caches[0]:
            raise InputError("expected a text that is read from its beginning inside, got a cache; generate with lm.generate")
        reading = True
        try:
            with lm.unedited(), torch.no_grad():
                own = {} if cache is None else {"past_key_values": caches[1]}
                unsteered_cache = getattr(model(*args, **kwargs | own), "past_key_values", None)
        finally:
            reading = False

    def note_cache(_model: Any, _args: tuple, output: Any) -> None:
        nonlocal caches
        if not reading:
            caches = (getattr(output, "past_key_values", None), unsteered_cache)

    with ExitStack() as stack:
        stack.enter_context(_edited(lm, parts, scale_of, attention_of))
        # ahead of the hooks of edits, which take note of the pass they are in
        stack.callback(lm.model.register_forward_pre_hook(read_unsteered, with_kwargs=True, prepend=True).remove)
        stack.callback(lm.model.register_forward_hook(note_cache).remove)
        yield


@contextmanager
def _edited(lm: LanguageModel, parts: Collection[str], scale_edit: Callable, attention_edit: Callable) -> Iterator[None]:
    if isinstance(parts, str) or not parts or not set(parts) <= set(PARTS):
        raise InputError(f"expected parts to freeze as a list of {', '.join(PARTS)}, got {parts!r}")
    with ExitStack() as stack:
        if "norms" in parts:
            stack.enter_context(lm.scales_edited(scale_edit))
        if "patterns" in parts or "values" in parts:
            stack.enter_context(lm.attention_edited(attention_edit))
        yield


def _same_shape(what: str, kept: Tensor | None, now: Tensor) -> Tensor:
    if kept is None or kept.shape != now.shape:
        got = "nothing" if kept is None else f"shape {tuple(kept.shape)}"
        raise InputError(f"expected {what} of a pass of the same tokens, shape {tuple(now.shape)}, got {got}; keep the internals of one")
    return kept
