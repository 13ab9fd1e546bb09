"""An activation cache on disk or behind a URL: its contents, checks of its files, and its shards as memory-mapped tensors.

n rows · d width of the site
"""

import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from io import RawIOBase
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.activations.files.manifest import THEN, check_file, damaged, read_manifest, verify
from sae.activations.files.number_formats import FORMATS, decode, shard_layout
from sae.activations.text.tokens import SPLITS, Tokens
from sae.disk.reading import SMALL, TensorLayout, layout, map_arrays, read_tensors, require_within
from sae.disk.remote import Place, RemotePath, place
from sae.errors import InputError
from sae.model.sites import in_model, split_model

if TYPE_CHECKING:
    from sae.dictionaries.dictionary import Dictionary
    from sae.model.language_model import LanguageModel

__all__ = ["ActivationCache", "Shard", "Tokens", "verify"]


class Shard(NamedTuple):
    name: str
    """for example "00000" """
    rows: int
    path: Place


class ActivationCache:
    """One site of a cache. `open` makes it; `CachedSource` returns its rows, shuffled."""

    def __init__(self, folder: Place, manifest: dict[str, Any], site: str, shards: dict[str, list[Shard]]):
        self.folder, self.manifest, self.site = folder, manifest, site
        self.d_in: int = manifest["sites"][site]["d_in"]
        self.mean_squared_norm: float = manifest["sites"][site]["mean_squared_norm"]
        """mean of ‖x‖² over all training rows, in the model's own units"""
        self._shards = shards
        self._remote_places: dict[str, dict[str, TensorLayout]] = {}
        self.format = FORMATS[manifest["dtype"]]
        self.dtype = self.format.read
        """dtype of the rows that are read; int8 rows are read as float16"""

    @property
    def own_site(self) -> str:
        """The model's own name of the site, without the name of a second model."""
        return split_model(self.site)[1]

    @property
    def model(self) -> dict[str, Any]:
        """The manifest's facts about the model whose site it is: name, revision, fingerprint."""
        name = split_model(self.site)[0]
        return self.manifest["model"] if name is None else self.manifest["models"][name]

    @classmethod
    def open(cls, folder: str | Place, site: str | None = None, *, skip_damaged: bool = False, verify: bool = False) -> "ActivationCache":
        """Opens a finished cache; `site` may be left out if there is exactly one.

        Sizes and headers of all files are checked, and checksums of token files up to 32 MB; with `verify`, every file of the site is
        read once to compare its checksum. A damaged file raises `InputError` naming it. With `skip_damaged`, checksums are compared too,
        and damaged shards are left out and named on stderr.
        """
        folder = place(folder)
        manifest = read_manifest(folder)
        site = _choose_site(folder, manifest, site)
        cache = cls(folder, manifest, site, {split: [] for split in SPLITS})
        if isinstance(folder, RemotePath):  # sizes of all files at once
            (folder / "tokens").names(), (folder / site).names()
        checksums = skip_damaged or verify
        for entry in manifest["tokens"]:
            _try(skip_damaged, partial(check_file, folder / entry["file"], entry, checksums or entry["bytes"] <= SMALL))
        for entry in manifest["shards"]:
            shard = Shard(entry["name"], entry["rows"], folder / site / f"{entry['name']}.safetensors")
            if _try(skip_damaged, partial(cache._check, shard, entry["files"][site], checksums)):
                cache._shards[entry["split"]].append(shard)
        return cache

    @classmethod
    def of_dictionary(cls, folder: Place, dictionary: "Dictionary", *, named: bool, verify: bool = False) -> "ActivationCache":
        """Opens the cache at the site that the dictionary reads, or at the only site if the dictionary names none; see
        `require_dictionary`."""
        manifest = read_manifest(folder)
        sites, site = manifest["sites"], dictionary.site
        if site is None and len(sites) > 1:
            raise InputError(
                f"the dictionary does not name its site, and {folder} has several, {', '.join(sites)}; copy it with sae import-dictionary "
                'and write the right one into its cfg.json, as "site" under "metadata"'
            )
        cache = cls.open(folder, site and in_model(second_model_of(manifest, dictionary), site), verify=verify)
        cache.require_dictionary(dictionary, named=named)
        return cache

    def rows(self, split: str) -> int:
        """Number of activations in "train" or "held_out"."""
        return sum(shard.rows for shard in self.shards(split))

    def shards(self, split: str) -> list[Shard]:
        if split not in self._shards:
            raise InputError(f"expected a split {' or '.join(SPLITS)}, got {split!r}; choose one of them")
        return self._shards[split]

    def read(self, shard: Shard) -> tuple[Tensor, Tensor]:
        """Activations [n, d_in] of the cache's dtype, and their global token positions, int64 [n]; both memory-mapped (int8: unpacked).

        From a URL they are in memory, and while shards are read in order, the next one is prefetched.
        """
        return self._in_order(shard) if isinstance(shard.path, RemotePath) else self._read(shard)

    @cached_property
    def _in_order(self) -> "_InOrder":
        return _InOrder(self._read, self._shards.values())

    def _read(self, shard: Shard) -> tuple[Tensor, Tensor]:
        stored, _ = read_tensors(shard.path, "a cache's shard", then=THEN)
        rows = stored.pop("rows")
        self._require_positions(rows.numpy(), shard)
        return decode(stored), rows

    def positions(self, shard: Shard) -> np.ndarray:
        """Global token positions of the shard's rows, int64 [n], memory-mapped."""
        if isinstance(shard.path, RemotePath):  # nothing but these
            rows = np.empty(shard.rows, np.int64)
            with shard.path.open() as file:
                _read_into(file, self._places(shard)["rows"].offset, torch.from_numpy(rows), shard.path)
        else:
            rows = map_arrays(shard.path, "a cache's shard", then=THEN)[0]["rows"]
        self._require_positions(rows, shard)
        return rows

    def read_block(self, shard: Shard, start: int, out_nd: Tensor) -> None:
        """Fills `out_nd` (contiguous, the cache's dtype) with the shard's rows from `start` on, by plain sequential reading."""
        places = self._places(shard)
        stored = {"activations": out_nd}
        if self.format.stored != self.dtype:
            stored = {"activations": torch.empty(out_nd.shape, dtype=self.format.stored), "scale": torch.empty(len(out_nd))}
        with shard.path.open("rb", buffering=0) as file:
            for name, values in stored.items():
                _read_into(file, places[name].offset + start * values[:1].nbytes, values, shard.path)
        if self.format.stored != self.dtype:
            out_nd.copy_(decode(stored))

    @cached_property
    def tokens(self) -> Tokens:
        """The text of the activations; raises `InputError` if its files are damaged or it is unknown."""
        if not self.manifest["tokens"]:
            raise InputError(
                f"expected a cache that knows its text, but {self.folder} was imported without token ids; import it with --token-ids"
            )
        tokens = Tokens.read([self.folder / entry["file"] for entry in self.manifest["tokens"]], self.manifest["labels"])
        if len(tokens.ids) != (counted := self.manifest["counts"]["tokens"]):
            raise InputError(
                f"expected {counted:,} tokens in {self.folder}, as its manifest counts, but found {len(tokens.ids):,}; harvest again"
            )
        return tokens

    def verify(self) -> list[str]:
        """Names of the files, of all sites and the tokens, whose size or checksum differs from the manifest."""
        return verify(self.folder)

    def require_model(self, lm: "LanguageModel") -> None:
        """Raises `InputError` unless the cache was made with this model, and all its tokens are of the model's vocabulary."""
        made = self.model
        self.model_name()
        if made["fingerprint"] != lm.fingerprint():
            raise InputError(
                f"expected a cache made with {lm.name} (fingerprint {lm.fingerprint()}), but {self.folder} was made with {made['name']} "
                f"(fingerprint {made['fingerprint']}); use that model or harvest again"
            )
        if self.manifest["tokens"]:
            require_within(self.tokens.ids, 0, lm.model.get_input_embeddings().weight.shape[0], "token ids", self.folder)

    def model_name(self) -> str:
        """Name of the model it was made with; raises `InputError` if that is unknown."""
        name = self.model["name"]
        if name is None:
            raise InputError(
                f"expected a cache that knows its model, but {self.folder} was imported without a model; import it with --model"
            )
        return name

    def at(self, site: str) -> "ActivationCache":
        """The same cache at another site; row i of a shard there belongs to the same token as row i here."""
        return ActivationCache.open(self.folder, site)

    def target_of(self, dictionary: "Dictionary") -> "ActivationCache":
        """The targets of the dictionary: this cache, or for a transcoder the same cache at its output site.

        Raises `InputError` if the cache does not have that site, or with another width.
        """
        if not dictionary.is_transcoder:
            return self
        site_out = in_model(split_model(self.site)[0], str(dictionary.site_out))
        if site_out not in self.manifest["sites"]:
            raise InputError(
                f"expected a cache that holds {site_out} too, where this transcoder writes, but {self.folder} has "
                f"{', '.join(self.manifest['sites'])}; harvest with --sites {self.site} {site_out}"
            )
        target = self.at(site_out)
        if dictionary.d_out != target.d_in:
            raise InputError(
                f"expected a transcoder that writes {target.d_in} values at {target.site}, as {self.folder} has there, got one that writes "
                f"{dictionary.d_out}; use one of the same model and site"
            )
        return target

    def require_dictionary(self, dictionary: "Dictionary", *, named: bool) -> None:
        """Raises `InputError` unless the dictionary was made for activations of this site, width and model.

        `named`: the user named the model, and is trusted if there is no fingerprint.
        """
        dictionary.require_site(self.own_site)
        if dictionary.site is None:
            print(f"the dictionary does not name its site; it is taken to be the cache's, {self.site}", file=sys.stderr)
        if dictionary.d_in != self.d_in:
            raise InputError(
                f"expected activations of width {dictionary.d_in}, but {self.folder} has {self.d_in} at {self.site}; "
                "use a cache of the same model and site"
            )
        made = self.model
        dictionary.require_model(made["name"], made["fingerprint"], named=named)

    def _places(self, shard: Shard) -> dict[str, TensorLayout]:
        """The places of the shard's tensors; raises `InputError` if the file differs from the manifest."""
        if shard.name in self._remote_places:
            return self._remote_places[shard.name]
        places, _ = layout(shard.path, "a cache's shard", THEN)
        expected = shard_layout(self.manifest["dtype"], shard.rows, self.d_in)
        found = {name: (place.dtype, place.shape) for name, place in places.items()}
        if found != expected:
            raise damaged(shard.path, f"it holds {found} where the manifest says {expected}")
        if isinstance(shard.path, RemotePath):  # it does not change while it is read, or reading it fails
            self._remote_places[shard.name] = places
        return places

    def _require_positions(self, rows_n: np.ndarray, shard: Shard) -> None:
        require_within(rows_n, 0, self.manifest["counts"]["tokens"], "rows", shard.path)

    def _check(self, shard: Shard, entry: dict[str, Any], checksum: bool) -> None:
        check_file(shard.path, entry, checksum)
        if not isinstance(shard.path, RemotePath):  # there, when it is read: each would be a request
            self._places(shard)


class _InOrder:
    """Reads shards; if they are read one after the other, a thread prefetches the next one."""

    def __init__(self, read: Callable[[Shard], tuple[Tensor, Tensor]], splits: Iterable[list[Shard]]):
        self._read, self._after = read, {shard: after for shards in splits for shard, after in pairwise(shards)}
        self._thread = ThreadPoolExecutor(1)
        self._last: Shard | None = None
        self._coming: dict[Shard, Future[tuple[Tensor, Tensor]]] = {}

    def __call__(self, shard: Shard) -> tuple[Tensor, Tensor]:
        coming = self._coming.pop(shard, None)
        read = coming.result() if coming else self._read(shard)
        if self._last in self._after and self._after[self._last] == shard and shard in self._after:
            self._coming = {self._after[shard]: self._thread.submit(self._read, self._after[shard])}
        self._last = shard
        return read


def _read_into(file: RawIOBase, offset: int, values: Tensor, path: Place) -> None:
    view = values.view(torch.uint8).numpy().reshape(-1).data
    file.seek(offset)
    filled = 0
    while filled < len(view):
        count = file.readinto(view[filled:])
        if not count:
            raise damaged(path, "it ended while being read")
        filled += count


def _choose_site(folder: Place, manifest: dict[str, Any], site: str | None) -> str:
    sites = list(manifest["sites"])
    if site is None and len(sites) == 1:
        return sites[0]
    if site is None or site not in sites:
        found = "none was named" if site is None else f"{site!r} was asked for"
        raise InputError(f"expected one of the sites in {folder}, {', '.join(sites)}, but {found}; name one")
    return site


def second_model_of(manifest: dict[str, Any], dictionary: "Dictionary") -> str | None:
    """The name of the second model if the dictionary belongs only to it, by its fingerprint, which must differ from the first one's."""
    made_by = dictionary.metadata.get("model_fingerprint")
    if made_by is None or made_by == manifest["model"]["fingerprint"]:
        return None
    return next((name for name, model in manifest.get("models", {}).items() if model["fingerprint"] == made_by), None)


def misaligned(shard: Shard, cache: ActivationCache) -> InputError:
    return InputError(
        f"expected rows of the same tokens at every site, but the shard {shard.name} of {cache.folder} has others at {cache.site}; harvest "
        "the sites again, in one command"
    )


def _try(skip_damaged: bool, check: Callable[[], None]) -> bool:
    try:
        check()
    except InputError as error:
        if not skip_damaged:
            raise
        print(f"left out: {error}", file=sys.stderr)
        return False
    return True
