"""Passes over pairs of prompts: parts and gradients at every site, and runs in which only some nodes carry the clean prompt.

s sequences · p positions · d width of the stream · o width of a site · f features · k some features · n nodes of a site · v vocabulary
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.circuits.features.sites import FeatureSite, Split, active, changed
from steering.circuits.tasks.prompts import Prompts

START = "resid_pre.0"
HELD = 1 << 28
"""bytes of activations that a pass may keep"""
BATCH = 64
"""sequences per pass"""

Nodes = list[Tensor]
"""for each site, a number or a bool for each of its nodes, [n]"""


def rows_of_pass(sites: Sequence[FeatureSite], positions: int) -> int:
    """Sequences of a pass, so that a few copies of all activations stay within `HELD`."""
    return max(1, min(BATCH, HELD // (16 * positions * sum(site.n_nodes for site in sites))))


def require_aligned(prompts: Prompts) -> None:
    """Raises `InputError` for pairs whose sides have different lengths."""
    if not prompts.aligned:
        raise InputError("expected pairs of one length, got pieces of different numbers of tokens; passes need one length")


class Line:
    """The line from the clean to the corrupt embeddings of pairs; passes at its points are runs of the unmodified model."""

    def __init__(self, lm: LanguageModel, sites: Sequence[FeatureSite], prompts: Prompts):
        self.lm, self.sites, self.prompts = lm, sites, prompts
        sides = ((prompts.clean_np, prompts.clean_mask_np), (prompts.corrupt_np, prompts.corrupt_mask_np))
        self._clean_spd, self._corrupt_spd = (lm.record(ids, [START], mask)[START] for ids, mask in sides)
        self._splits: dict[float, list[Split]] = {}

    @contextmanager
    def at(self, share: float, *, grad: bool = False) -> Iterator[None]:
        """Inside, passes are those of this point: 0 is clean, 1 corrupt."""
        start_spd = torch.lerp(self._clean_spd, self._corrupt_spd, share).requires_grad_(grad)
        with self.lm.edited({START: lambda _: start_spd.clone()}):
            yield

    def logits(self) -> Tensor:
        """Inside `at`, at the last positions, [s, v]."""
        return self.lm.logits(self.prompts.clean_np, self.prompts.clean_mask_np)[:, -1]

    @torch.no_grad()
    def splits(self, share: float) -> list[Split]:
        """The parts of each site at this point. Those of the last two points are kept."""
        if share not in self._splits:
            found: dict[int, Split] = {}

            def look(number: int, x_spd: Tensor, y_spo: Tensor) -> Tensor:
                found[number] = self.sites[number].split(x_spd, y_spo)
                return y_spo

            with self.at(share), changed(self.lm, self.sites, look):
                self.logits()
            kept = list(self._splits.items())[-1:]
            self._splits = dict([*kept, (share, [found[number] for number in range(len(self.sites))])])
        return self._splits[share]

    def gradients(self, share: float) -> tuple[Tensor, list[Tensor]]:
        """The metric of each pair [s], and its gradient with respect to the value at each site, [s, p, o]."""
        seen: dict[int, Tensor] = {}

        def keep(number: int, x_spd: Tensor, y_spo: Tensor) -> Tensor:
            seen[number] = y_spo.view_as(y_spo)
            return seen[number]

        with torch.enable_grad(), self.at(share, grad=True), changed(self.lm, self.sites, keep):
            metric_s = self.prompts.measure(self.logits())
            found = torch.autograd.grad(metric_s.sum(), [seen[number] for number in range(len(self.sites))])
        return metric_s.detach(), [
            gradient.to(site.dictionary.W_dec_fo.device, site.dictionary.dtype) for gradient, site in zip(found, self.sites)
        ]


class Outside(NamedTuple):
    """The values of a site's nodes outside the circuit."""

    features_k: Tensor
    """those that are active somewhere; all others are 0"""
    value_spk: Tensor
    skip_spo: Tensor
    error_spo: Tensor


class NodePatching:
    """Pairs run with only some nodes unchanged; called with the nodes inside, bool [n] of each site, it returns the metric of every pair.

    A node inside the circuit has the value that the run computes from the clean prompt; one outside has its value of the
    corrupt prompt, or with `mean_of` its mean over all tokens of both sides of those pairs. So the first site's nodes inside have their
    clean values, and those of later sites what the circuit before makes of them. With every node inside the run keeps every bit. Raises
    `InputError` for pairs whose sides have different lengths.
    """

    def __init__(self, lm: LanguageModel, sites: Sequence[FeatureSite], prompts: Prompts, mean_of: Prompts | None = None):
        require_aligned(prompts)
        self.lm, self.sites, self.prompts, self.mean_of = lm, sites, prompts, mean_of
        self.batch = rows_of_pass(sites, prompts.clean_np.shape[1])

    @cached_property
    def _outside(self) -> list[list[Outside]]:
        """Of each batch, of each site."""
        if self.mean_of is not None:
            return [NodePatching(self.lm, self.sites, self.mean_of).means()] * len(self.batches())
        ids, masks = self.prompts.corrupt_np, self.prompts.corrupt_mask_np
        return [[_outside_of(split) for split in self._splits(ids[pairs], masks[pairs])] for pairs in self.batches()]

    @torch.no_grad()
    def _splits(self, ids_sp: Tensor, mask_sp: Tensor) -> list[Split]:
        found: dict[int, Split] = {}

        def look(number: int, x_spd: Tensor, y_spo: Tensor) -> Tensor:
            found[number] = self.sites[number].split(x_spd, y_spo)
            return y_spo

        with changed(self.lm, self.sites, look):
            self.lm.logits(ids_sp, mask_sp)
        return [found[number] for number in range(len(self.sites))]

    def means(self) -> list[Outside]:
        """Of each site, the mean of every node over all tokens of both sides, for all sequences and positions."""
        sums: list[list[Tensor]] = [[] for _ in self.sites]
        prompts, tokens = self.prompts, 0
        for pairs in self.batches():
            for ids, masks in ((prompts.clean_np, prompts.clean_mask_np), (prompts.corrupt_np, prompts.corrupt_mask_np)):
                for number, split in enumerate(self._splits(ids[pairs], masks[pairs])):
                    real = masks[pairs].bool().to(split.value_spf.device)
                    parts = [part[real].sum(0) for part in split]
                    sums[number] = [a + b for a, b in zip(sums[number], parts)] if sums[number] else parts
                tokens += int(masks[pairs].sum())
        return [_outside_of(Split(*(part[None, None] / tokens for part in one))) for one in sums]

    def batches(self) -> list[list[int]]:
        """Numbers of the pairs of each pass."""
        return [list(range(start, min(start + self.batch, len(self.prompts)))) for start in range(0, len(self.prompts), self.batch)]

    @torch.no_grad()
    def __call__(self, inside: Sequence[Tensor]) -> np.ndarray:
        found = []
        for number, pairs in enumerate(self.batches()):
            found.append(self.prompts.subset(pairs).measure(self.logits(inside, number)).double().cpu())
        return torch.cat(found).numpy()  # host sync

    def logits(self, keep: Sequence[Tensor], batch: int) -> Tensor:
        """Of one batch, at the last positions [s, v], float32 or wider. `keep` is 1 inside and 0 outside or anything between, [n] of each
        site, and may ask for gradients."""
        pairs, outside = self.batches()[batch], self._outside[batch]

        def patch(number: int, x_spd: Tensor, y_spo: Tensor) -> Tensor:
            site, cut_n = self.sites[number], 1 - keep[number].to(y_spo.device, self.sites[number].dictionary.dtype)
            if not cut_n.requires_grad and not cut_n.any():  # host sync
                return y_spo
            return _spliced(site, site.split(x_spd, y_spo), outside[number], cut_n).to(y_spo)

        with changed(self.lm, self.sites, patch):
            last_sv = self.lm.logits(self.prompts.clean_np[pairs], self.prompts.clean_mask_np[pairs])[:, -1]
        return last_sv if last_sv.dtype == torch.float64 else last_sv.float()

    def differing(self) -> Nodes:
        """Whether each node but the error may differ between the sides of some pair, bool [n] of each site."""
        found = [torch.zeros(site.n_nodes, dtype=torch.bool) for site in self.sites]
        for pairs, outside in zip(self.batches(), self._outside):
            clean = self._splits(self.prompts.clean_np[pairs], self.prompts.clean_mask_np[pairs])
            for one_n, site, own, there in zip(found, self.sites, clean, outside):
                one_n[torch.cat([active(own.value_spf), there.features_k]).cpu()] = True
                one_n[site.skip] = site.exists_n[site.skip]
        return found

    def clean_logits(self, batch: int) -> Tensor:
        with torch.no_grad():
            return self.logits([torch.ones(site.n_nodes) for site in self.sites], batch)


def _outside_of(split: Split) -> Outside:
    features_k = active(split.value_spf)
    return Outside(features_k, split.value_spf[..., features_k], split.skip_spo, split.error_spo)


def _spliced(site: FeatureSite, own: Split, outside: Outside, cut_n: Tensor) -> Tensor:
    """The site's vector put together again, each node `cut` of the way from its own value to that outside, [s, p, o]."""
    other_spf = torch.zeros_like(own.value_spf).index_copy(-1, outside.features_k, outside.value_spk.expand(*own.value_spf.shape[:-1], -1))
    features_k = torch.cat([active(own.value_spf), outside.features_k]).unique()  # those at 0 too, for the sake of gradients
    mixed = Split(
        own.value_spf + (other_spf - own.value_spf) * cut_n[: site.d_sae],
        own.skip_spo + (outside.skip_spo - own.skip_spo) * cut_n[site.skip],
        own.error_spo + (outside.error_spo - own.error_spo) * cut_n[site.error],
    )
    return site.joined(mixed, features_k)
