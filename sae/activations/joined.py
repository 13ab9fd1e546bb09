"""Several sites of a cache side by side, as a crosscoder reads them.

n rows · d width of all sites together
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.activations.cache import ActivationCache, Shard, misaligned
from sae.errors import InputError
from sae.model.sites import split_model

if TYPE_CHECKING:
    from sae.dictionaries.dictionary import Dictionary
    from sae.dictionaries.parts import Port


class JoinedCache(ActivationCache):
    """Rows [n, d] of several sites of one cache; those of a token stand side by side, in the order of `caches`."""

    def __init__(self, caches: Sequence[ActivationCache]):
        first = caches[0]
        self.caches, self.folder, self.manifest = tuple(caches), first.folder, first.manifest
        self.site = " and ".join(cache.site for cache in caches)
        self.d_in = sum(cache.d_in for cache in caches)
        self.mean_squared_norm = sum(cache.mean_squared_norm for cache in caches)
        self.format, self.dtype = first.format, first.dtype
        self._shards = {split: first.shards(split) for split in ("train", "held_out")}

    @property
    def model(self) -> dict[str, Any]:
        """Facts about the first model; those about a second are in the manifest."""
        return self.manifest["model"]

    def read(self, shard: Shard) -> tuple[Tensor, Tensor]:
        """Activations [n, d] and global token positions int64 [n]. Raises `InputError` where the sites' rows are of other tokens."""
        parts, positions_n = [], None
        for cache in self.caches:
            x_nd, own_n = cache.read(Shard(shard.name, shard.rows, cache.folder / cache.site / shard.path.name))
            positions_n = own_n if positions_n is None else positions_n
            if not torch.equal(positions_n, own_n):
                raise misaligned(shard, cache)
            parts.append(x_nd)
        assert positions_n is not None
        return torch.cat(parts, dim=-1), positions_n


def cache_of(folder: Path, dictionary: "Dictionary", *, named: bool, verify: bool = False) -> ActivationCache:
    """The cache where the dictionary reads: one of its sites, or several side by side.

    Raises `InputError` as `ActivationCache.require_dictionary` does, and for sites without a name.
    """
    if len(dictionary.reads) == 1:
        return ActivationCache.of_dictionary(folder, dictionary, named=named, verify=verify)
    cache = JoinedCache([_opened(folder, port, verify) for port in _named(dictionary.reads)])
    facts = {split_model(one.site)[0]: one.model for one in cache.caches}
    for second, made in facts.items():
        dictionary.require_model(made["name"], made["fingerprint"], named=named, second=second)
    return cache


def targets_of(cache: ActivationCache, dictionary: "Dictionary") -> ActivationCache:
    """What the dictionary rebuilds, for rows of `cache_of`: the same rows, or those where a transcoder writes."""
    if not dictionary.is_transcoder:
        return cache
    if len(dictionary.reads) == len(dictionary.writes) == 1:
        return cache.target_of(dictionary)
    return JoinedCache([_opened(cache.folder, port, False) for port in _named(dictionary.writes)])


def _named(ports: "Sequence[Port]") -> "Sequence[Port]":
    sites = [port.site for port in ports]
    if None in sites or len(set(sites)) < len(sites):
        said = ", ".join(str(site) for site in sites)
        raise InputError(
            f"expected a dictionary that names its sites, each once, got {said}; copy it with sae import-dictionary and write them into "
            'its cfg.json as the cache calls them, as a list, "site" under "metadata"'
        )
    return ports


def _opened(folder: Path, port: "Port", verify: bool) -> ActivationCache:
    cache = ActivationCache.open(folder, port.site, verify=verify)
    if cache.d_in != port.width:
        raise InputError(
            f"expected activations of width {port.width} at {port.site}, but {folder} has {cache.d_in}; use a cache of the same models"
        )
    return cache
