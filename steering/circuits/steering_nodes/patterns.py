"""Steering attention patterns: chosen heads attend more, or less, to chosen columns.

s sequences · h heads · q positions of the pass · k columns
"""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from sae.errors import InputError
from sae.model.language_model import LanguageModel


@contextmanager
def attending_to(lm: LanguageModel, heads: Mapping[int, Collection[int]], marked_sk: Tensor, amount: float) -> Iterator[None]:
    """Inside, each of `heads`, by layer, attends to the marked columns as if its attention's logits were higher by `amount` there.

    So their attention is multiplied by e^amount and every row is divided by its new sum; PASTA (arXiv 2311.02262), which multiplies the
    other columns by α, is the amount −log α. The model runs its eager attention; every other head keeps the bits it has there. `marked_sk`
    is bool over the columns of a pass of as many. Raises `InputError` for a layer or head that there is not, an amount that is not finite,
    a pass of other columns, and a model whose attention cannot be seen.
    """
    if not math.isfinite(amount):
        raise InputError(f"expected a finite amount by which the attention's logits rise, got {amount}")
    if unknown := [layer for layer in heads if not 0 <= layer < lm.n_layers]:
        raise InputError(f"expected layers from 0 to {lm.n_layers - 1}, got {unknown[0]}")

    def edit(layer: int, pattern_shqk: Tensor, value_sgkz: Tensor) -> tuple[Tensor, Tensor]:
        chosen = sorted(heads.get(layer, ()))
        if not chosen:
            return pattern_shqk, value_sgkz
        if not 0 <= chosen[0] <= chosen[-1] < pattern_shqk.shape[1]:
            raise InputError(f"expected heads from 0 to {pattern_shqk.shape[1] - 1}, got {', '.join(map(str, chosen))}")
        if marked_sk.shape != (pattern_shqk.shape[0], pattern_shqk.shape[3]):
            raise InputError(
                f"expected marks of {pattern_shqk.shape[0]} sequences by {pattern_shqk.shape[3]} columns, got {tuple(marked_sk.shape)}"
            )
        old_shqk = pattern_shqk[:, chosen]
        raised_shqk = old_shqk.log() + amount * marked_sk[:, None, None].to(old_shqk)
        new_shqk = raised_shqk.softmax(-1) * old_shqk.sum(-1, keepdim=True)  # a row with a sink adds up to less than 1
        return pattern_shqk.index_copy(1, torch.tensor(chosen, device=old_shqk.device), new_shqk), value_sgkz

    with lm.attention_edited(edit):
        yield
