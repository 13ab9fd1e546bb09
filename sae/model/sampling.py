"""Sampling of text: the settings, the next token from logits without sorting the vocabulary, and the loss of a token.

s sequences · v vocabulary
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How text is sampled."""  # shown by --help; `lm.generate(ids_sp, **vars(sampling))` takes it

    max_new_tokens: int = 40
    """Length of each continuation."""
    temperature: float = 1.0
    """0 always takes the likeliest token."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of the sampling; equal seeds produce equal text."""


def sample(logits_sv: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token per row, [s]: from the smallest set of likeliest tokens that holds `top_p` of the probability.

    Of equally likely tokens those with smaller ids come first; temperature 0 takes the likeliest. A token is drawn from the whole
    distribution and, when the tokens ahead of it already hold `top_p`, drawn again from those: what is accepted has exactly the
    distribution of the set, and no sort is needed to know the set.
    """
    if temperature == 0:
        return logits_sv.argmax(-1)
    probs_sv = (logits_sv - logits_sv.amax(-1, keepdim=True)).div_(temperature).softmax(-1)
    drawn_s = _draw(probs_sv, generator)
    if top_p == 1:
        return drawn_s
    # A token with more than 1 - top_p is in the set for any tokens ahead of it: so are most; the others are checked.
    rows_s = (probs_sv.gather(-1, drawn_s[:, None])[:, 0] <= 1 - top_p).nonzero()[:, 0]  # host sync
    probs_sv = probs_sv[rows_s]
    while len(rows_s):
        ahead_sv, mass_s = _ahead(probs_sv, drawn_s[rows_s, None])
        again_s = mass_s >= top_p
        rows_s, probs_sv = rows_s[again_s], probs_sv[again_s] * ahead_sv[again_s]  # host sync
        drawn_s[rows_s] = _draw(probs_sv, generator)
    return drawn_s


def token_losses(logits_spv: Tensor, ids_sp: Tensor) -> Tensor:
    """Nats of each token under the logits of its position, float32 [s, p]; a row at a time, so that a large vocabulary needs no second
    table of all of them."""
    rows = zip(logits_spv, ids_sp.to(logits_spv.device))
    return torch.stack([torch.nn.functional.cross_entropy(logits_pv.float(), ids_p, reduction="none") for logits_pv, ids_p in rows])


def _ahead(probs_sv: Tensor, drawn_s1: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens come before the drawn one, likeliest first, and how much probability [s] they hold."""
    p_s1 = probs_sv.gather(-1, drawn_s1)
    ids_v = torch.arange(probs_sv.shape[1], device=probs_sv.device, dtype=torch.int32)
    ratio_sv = probs_sv / p_s1  # 1 for equals; a threshold that is a number is several times as fast as comparing with [s, 1]
    ties_sv = (ratio_sv == 1) & (ids_v < drawn_s1.int())
    more_sv = torch.threshold(ratio_sv, 1.0, 0.0).add_(ties_sv.float())
    return more_sv > 0, more_sv.sum(-1) * p_s1[:, 0]


def _draw(weights_sv: Tensor, generator: torch.Generator) -> Tensor:
    """One index per row with probability in proportion to its weight: first a block of the row, then an index in it.

    Running sums are in float64: the steps of a float32 random number are wider than the share of a rare token.
    """
    s, v = weights_sv.shape
    whole = v - v % BLOCK
    blocks_sb = weights_sv[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1)
    blocks_sb = torch.cat([blocks_sb, weights_sv[:, whole:].sum(-1, keepdim=True)], dim=1)
    uniform_s1 = torch.rand(s, 1, generator=generator, device=generator.device, dtype=torch.float64).to(weights_sv.device)
    block_s1, rest_s1 = _invert(blocks_sb, uniform_s1)
    ids_sc = block_s1 * BLOCK + torch.arange(BLOCK, device=weights_sv.device)
    inner_sc = weights_sv.gather(-1, ids_sc.clamp(max=v - 1)) * (ids_sc < v)
    index_s1, _ = _invert(inner_sc, rest_s1)
    return (block_s1 * BLOCK + index_s1)[:, 0].clamp(max=v - 1)


def _invert(weights_sn: Tensor, uniform_s1: Tensor) -> tuple[Tensor, Tensor]:
    """The index at which the running sum passes that share of the total, and how far into its weight, from 0 to 1."""
    sums_sn = weights_sn.double().cumsum(-1)
    target_s1 = uniform_s1 * sums_sn[:, -1:]
    index_s1 = torch.searchsorted(sums_sn, target_s1, right=True).clamp(max=weights_sn.shape[1] - 1)
    weight_s1 = weights_sn.gather(-1, index_s1).double()
    rest_s1 = (target_s1 - (sums_sn.gather(-1, index_s1) - weight_s1)) / weight_s1
    return index_s1, rest_s1.clamp(0, 1)
