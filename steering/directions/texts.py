"""Activations of texts at a site, without padding and without the beginning-of-text token.

s texts · n tokens of a text · d width of the site
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.text_input import text_list

BATCH = 16


def activations_of_texts(
    lm: LanguageModel, texts: Sequence[str], site: str, *, tokens: Literal["all", "last"] = "all", first_dropped: int = 0
) -> list[Tensor]:
    """One float32 [n, d] on the CPU for each text: all its tokens after the first `first_dropped`, or the last alone.

    The beginning-of-text token is never among them. Raises `InputError` for a text that keeps no token.
    """
    if tokens not in ("all", "last") or first_dropped < 0:
        raise InputError(f'expected tokens to be "all" or "last" and first_dropped at least 0, got {tokens!r} and {first_dropped}')
    texts = text_list(texts)
    lm.width(site)
    before = first_dropped + (lm.bos_id is not None)
    rows: list[Tensor] = []
    for first in range(0, len(texts), BATCH):
        batch = texts[first : first + BATCH]
        ids_sp, mask_sp = lm.encode(batch)
        lengths = mask_sp.sum(1).tolist()  # host sync
        for text, length in zip(batch, lengths):
            if length <= before:
                raise InputError(f"expected texts of over {first_dropped} tokens, got one of {length - before + first_dropped}: {text!r}")
        value_spd = lm.record(ids_sp, [site], mask_sp)[site].float().cpu()  # host sync
        rows += [row_pd[-1:] if tokens == "last" else row_pd[before - length :] for row_pd, length in zip(value_spd, lengths)]
    return rows
