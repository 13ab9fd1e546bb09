"""Several sites of a cache concatenated, as a crosscoder reads them.

n rows · d width of all sites together
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.activations.cache import ActivationCache, Shard, misaligned, second_model_of
from sae.activations.files.manifest import read_manifest
from sae.disk.remote import Place
from sae.errors import InputError
from sae.model.sites import in_model, split_model

if TYPE_CHECKING:
    from sae.dictionaries.dictionary import Dictionary
    from sae.dictionaries.parts import Port


class JoinedCache(ActivationCache):
    """Rows [n, d] of several sites of one cache; the parts of a token are in the order of `caches`."""

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
        """Facts about the first model whose sites these are; those about a second are in the manifest."""
        names = [split_model(cache.site)[0] for cache in self.caches]
        return self.manifest["model"] if None in names else self.caches[0].model

    def read(self, shard: Shard) -> tuple[Tensor, Tensor]:
        """Activations [n, d] and global token positions int64 [n]. Raises `InputError` if the sites' rows belong to different tokens."""
        parts, positions_n = [], None
        for cache in self.caches:
            x_nd, own_n = cache.read(Shard(shard.name, shard.rows, cache.folder / cache.site / shard.path.name))
            positions_n = own_n if positions_n is None else positions_n
            if not torch.equal(positions_n, own_n):
                raise misaligned(shard, cache)
            parts.append(x_nd)
        assert positions_n is not None
        return torch.cat(parts, dim=-1), positions_n


def cache_of(folder: Place, dictionary: "Dictionary", *, named: bool, verify: bool = False) -> ActivationCache:
    """The cache at the dictionary's input: one site, or several concatenated.

    Raises `InputError` as `ActivationCache.require_dictionary` does, and for sites without a name.
    """
    if len(dictionary.reads) == 1:
        return ActivationCache.of_dictionary(folder, dictionary, named=named, verify=verify)
    cache = JoinedCache(_opened(folder, dictionary, dictionary.reads, verify))
    facts = {split_model(one.site)[0]: one.model for one in cache.caches}
    for second, made in facts.items():
        dictionary.require_model(made["name"], made["fingerprint"], named=named, second=second if len(facts) > 1 else None)
    return cache


def targets_of(cache: ActivationCache, dictionary: "Dictionary") -> ActivationCache:
    """The dictionary's targets for rows of `cache_of`: the same rows, or those of a transcoder's output site."""
    if not dictionary.is_transcoder:
        return cache
    if len(dictionary.reads) == len(dictionary.writes) == 1:
        return cache.target_of(dictionary)
    return JoinedCache(_opened(cache.folder, dictionary, dictionary.writes, False))


def _opened(folder: Place, dictionary: "Dictionary", ports: "Sequence[Port]", verify: bool) -> list[ActivationCache]:
    sites = [port.site for port in ports]
    if None in sites or len(set(sites)) < len(sites):
        said = ", ".join(str(site) for site in sites)
        raise InputError(
            f"expected a dictionary that names its sites, each once, got {said}; copy it with sae import-dictionary and write them into "
            'its cfg.json as the cache calls them, as a list, "site" under "metadata"'
        )
    every = [port for port in (*dictionary.reads, *dictionary.writes) if port.site is not None]
    of_one = all(split_model(str(port.site))[0] is None for port in every)
    second = second_model_of(read_manifest(folder), dictionary) if of_one else None
    caches = [ActivationCache.open(folder, in_model(second, str(port.site)), verify=verify) for port in ports]
    for port, cache in zip(ports, caches):
        if cache.d_in != port.width:
            raise InputError(
                f"expected activations of width {port.width} at {port.site}, but {folder} has {cache.d_in}; use a cache of the same models"
            )
    return caches
