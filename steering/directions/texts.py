"""Activations of texts at a site, without padding and without the beginning-of-text token.

s, t texts · n tokens of a text · d width of the site
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
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
    rows = [row_nd for of_sites in _batches(lm, texts, [site], first_dropped) for row_nd in of_sites[site]]
    return [row_nd[-1:] for row_nd in rows] if tokens == "last" else rows


def means_of_texts(lm: LanguageModel, texts: Sequence[str], sites: Sequence[str]) -> dict[str, Tensor]:
    """The mean of `activations_of_texts` of each text at each site, float32 [t, d]; all sites are recorded in one pass."""
    means: dict[str, list[Tensor]] = {site: [] for site in sites}
    for of_sites in _batches(lm, texts, sites):
        for site, rows in of_sites.items():
            means[site] += [row_nd.mean(0) for row_nd in rows]
    return {site: torch.stack(mean) for site, mean in means.items()}


def _batches(lm: LanguageModel, texts: Sequence[str], sites: Sequence[str], first_dropped: int = 0) -> Iterator[dict[str, list[Tensor]]]:
    """For some texts at a time, by site, the activations of each."""
    texts = text_list(texts)
    for site in sites:
        lm.width(site)
    before = first_dropped + (lm.bos_id is not None)
    for first in range(0, len(texts), BATCH):
        batch = texts[first : first + BATCH]
        ids_sp, mask_sp = lm.encode(batch)
        lengths = mask_sp.sum(1).tolist()  # host sync
        for text, length in zip(batch, lengths):
            if length <= before:
                raise InputError(f"expected texts of over {first_dropped} tokens, got one of {length - before + first_dropped}: {text!r}")
        recorded = lm.record(ids_sp, sites, mask_sp)
        yield {
            site: [row_pd[before - length :] for row_pd, length in zip(recorded[site].float().cpu(), lengths)]  # host sync
            for site in sites
        }
