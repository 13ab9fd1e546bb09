"""Comparisons for circuits of features: other directions of the same sites, and random features that fire as often.

n nodes of a site · s sequences · p positions · d, o widths of a site · f features
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sae.model.language_model import LanguageModel
from steering.circuits.features.passes import Nodes
from steering.circuits.features.scores import parts_of
from steering.circuits.features.sites import FeatureSite, basis_site, changed
from steering.circuits.tasks.prompts import Prompts

NEAREST = 10
"""number of features with the nearest frequency, one of which replaces a feature of the circuit"""
BASES = ("neurons", "principal directions", "random directions")


def other_bases(lm: LanguageModel, sites: Sequence[FeatureSite], prompts: Prompts, seed: int) -> dict[str, list[FeatureSite]]:
    """By name, for each site: the dimensions of its vectors, their principal directions over all tokens of the pairs, random directions."""
    found: dict[str, list[FeatureSite]] = {name: [] for name in BASES}
    generator = torch.Generator().manual_seed(seed)
    for site, covariance_oo in zip(sites, _covariances(lm, sites, prompts)):
        like, width = covariance_oo, len(covariance_oo)
        random_oo = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
        directions = torch.eye(width), torch.linalg.eigh(covariance_oo.cpu().double()).eigenvectors.T.flip(0), random_oo
        for name, directions_oo in zip(BASES, directions):
            found[name].append(basis_site(site, directions_oo.to(like).contiguous()))
    return found


@torch.no_grad()
def _covariances(lm: LanguageModel, sites: Sequence[FeatureSite], prompts: Prompts) -> list[Tensor]:
    seen: dict[int, list[Tensor]] = {number: [] for number in range(len(sites))}
    for part in parts_of(sites, prompts):
        for ids, mask in ((part.clean_np, part.clean_mask_np), (part.corrupt_np, part.corrupt_mask_np)):

            def look(number: int, x_spd: Tensor, y_spo: Tensor, mask: Tensor = mask) -> Tensor:
                seen[number].append(y_spo[mask.bool()].to(sites[number].dictionary.W_dec_fo.device, sites[number].dictionary.dtype))
                return y_spo

            with changed(lm, sites, look):
                lm.logits(ids, mask)
    return [torch.cov(torch.cat(seen[number]).T) for number in range(len(sites))]


@torch.no_grad()
def frequencies(lm: LanguageModel, sites: Sequence[FeatureSite], prompts: Prompts) -> list[Tensor]:
    """Share of the tokens of both sides of the pairs on which each feature is active, [f] of each site."""
    fired, tokens = [torch.zeros(site.d_sae, dtype=torch.int64) for site in sites], 0
    for part in parts_of(sites, prompts):
        for ids, mask in ((part.clean_np, part.clean_mask_np), (part.corrupt_np, part.corrupt_mask_np)):

            def look(number: int, x_spd: Tensor, y_spo: Tensor, mask: Tensor = mask) -> Tensor:
                value_spf = sites[number].split(x_spd, y_spo).value_spf
                fired[number] += (value_spf[mask.bool().to(value_spf.device)] != 0).sum(0).cpu()
                return y_spo

            with changed(lm, sites, look):
                lm.logits(ids, mask)
            tokens += int(mask.sum())
    return [one_f / tokens for one_f in fired]


def matched_nodes(sites: Sequence[FeatureSite], inside: Nodes, frequency: Sequence[Tensor], rng: np.random.Generator) -> Nodes | None:
    """Random features of the circuit's frequencies: for each feature inside, one of the `NEAREST` in frequency that are outside and active.

    None if too few are left to draw from. Skips and errors stay as they are.
    """
    drawn = []
    for site, one_n, one_f in zip(sites, inside, frequency):
        result_n, chosen = one_n.clone(), one_n[: site.d_sae].nonzero()[:, 0]
        result_n[: site.d_sae] = False
        left = ((one_f > 0) & ~one_n[: site.d_sae]).nonzero()[:, 0].numpy()
        if len(left) < len(chosen):
            return None
        for feature in rng.permutation(chosen.numpy()):
            distance = np.abs(np.log(one_f[left].numpy()) - np.log(max(float(one_f[feature]), 1e-12)))
            near = np.argsort(distance, kind="stable")[:NEAREST]
            at = int(rng.choice(near))
            result_n[int(left[at])] = True
            left = np.delete(left, at)
        drawn.append(result_n)
    return drawn
