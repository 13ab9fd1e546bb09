"""Activation addition: the difference between two prompts, position by position.

p positions · d model width
"""

import torch

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.model.sites import parse_site
from sae.text_input import text_list
from steering.vector import SteeringVector


def actadd(lm: LanguageModel, positive: str, negative: str, site: str) -> SteeringVector:
    """`v[p] = h[p](positive) − h[p](negative)` at `resid_pre`, [p, d] (Turner et al. 2023, arXiv 2308.10248).

    As published: both prompts stand after the beginning-of-text token, the shorter one is lengthened on the right with space tokens that
    are attended to, and `steered` adds the rows once, at the first p positions of the prompt. Rows before the first different token are
    exactly zero, the first one above all. Raises `InputError` for another kind of site, for prompts that are one and the same, and for a
    tokenizer without a single token for a space when one is needed.
    """
    lm.width(site)
    if parse_site(site).kind != "resid_pre":
        raise InputError(f"expected a resid_pre site, where activation addition records and adds, got {site!r}")
    rows = [lm.token_ids(text) for text in text_list((positive, negative), "prompts")]
    longest = max(map(len, rows))
    if len(rows[0]) != len(rows[1]):
        rows = [row + [_space(lm)] * (longest - len(row)) for row in rows]
    if rows[0] == rows[1]:
        raise InputError(f"expected two different prompts, got {positive!r} and {negative!r}, which are the same tokens")
    acts_spd = lm.record(torch.tensor(rows, device=lm.device), [site])[site].float().cpu()  # host sync
    difference_pd = acts_spd[0] - acts_spd[1]
    same = next(p for p in range(longest) if rows[0][p] != rows[1][p])
    difference_pd[:same] = 0  # equal by causality; rounding may differ between the rows of a batch
    provenance = {"method": "actadd", "model": lm.name, "positive": positive, "negative": negative, "tokens": rows}
    return SteeringVector.at(site, difference_pd, provenance)


def site_before_block(site: str, n_layers: int) -> str:
    """The `resid_pre` at the same place of the stream. Raises `InputError` where no block begins there."""
    kind, layer = parse_site(site, n_layers)
    if kind == "resid_pre":
        return site
    if kind != "resid_post" or layer + 1 == n_layers:
        raise InputError(f"expected a site in front of a block, where activation addition adds, got {site}")
    return f"resid_pre.{layer + 1}"


def _space(lm: LanguageModel) -> int:
    ids = lm.tokenizer(" ", add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(f"expected the tokenizer to have one token for a space to lengthen the shorter prompt, got {len(ids)}")
    return ids[0]
