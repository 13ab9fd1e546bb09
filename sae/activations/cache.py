"""An activation cache on disk: what is in it, whether it is whole, and its shards as memory-mapped tensors.

n rows · d width of the site
"""

import sys
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sae.activations.ledger import FORMAT_VERSION, require_little_endian
from sae.activations.mapped import Place, layout
from sae.activations.massive import sampled, sentence
from sae.activations.storage import FORMATS, decode, shard_layout
from sae.activations.tokens import SPLITS, Tokens
from sae.errors import InputError
from sae.files import crc32, read_json

if TYPE_CHECKING:
    from sae.activations.batches import ActivationBatches
    from sae.dictionary import SparseAutoencoder
    from sae.language_model import LanguageModel

__all__ = ["ActivationCache", "Shard", "Tokens", "verify"]


class Shard(NamedTuple):
    name: str
    """for example "00000" """
    rows: int
    path: Path


class ActivationCache:
    """One site of a cache. `open` makes it; `ActivationBatches` deals out its rows."""

    def __init__(self, folder: Path, manifest: dict[str, Any], site: str, shards: dict[str, list[Shard]]):
        self.folder, self.manifest, self.site = folder, manifest, site
        self.d_in: int = manifest["sites"][site]["d_in"]
        self.mean_squared_norm: float = manifest["sites"][site]["mean_squared_norm"]
        """mean of ‖x‖² over all training rows, in the model's own units"""
        self._shards = shards
        self.format = FORMATS[manifest["dtype"]]
        self.dtype = self.format.read
        """of the rows that are read; those of int8 are float16"""

    @classmethod
    def open(cls, folder: str | Path, site: str | None = None, *, skip_damaged: bool = False) -> "ActivationCache":
        """Opens a finished cache; `site` may be left out when there is exactly one. Sizes and headers of all files are checked.

        With `skip_damaged`, every shard of the site is read once to compare its checksum, and damaged ones are left out and named on
        stderr. Without it, a file of the wrong size or with a damaged header raises `InputError` naming it; a flipped bit among the
        numbers is found by `verify` alone.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        site = _choose_site(folder, manifest, site)
        cache = cls(folder, manifest, site, {split: [] for split in SPLITS})
        for entry in manifest["tokens"]:
            _try(skip_damaged, partial(_check_file, folder / entry["file"], entry, skip_damaged))
        for entry in manifest["shards"]:
            shard = Shard(entry["name"], entry["rows"], folder / site / f"{entry['name']}.safetensors")
            if _try(skip_damaged, partial(cache._check, shard, entry["files"][site], skip_damaged)):
                cache._shards[entry["split"]].append(shard)
        return cache

    def rows(self, split: str) -> int:
        """Number of activations in "train" or "held_out"."""
        return sum(shard.rows for shard in self.shards(split))

    def shards(self, split: str) -> list[Shard]:
        if split not in self._shards:
            raise InputError(f"expected a split {' or '.join(SPLITS)}, but {split!r} came; choose one of them")
        return self._shards[split]

    def read(self, shard: Shard) -> tuple[Tensor, Tensor]:
        """Activations [n, d_in] of the cache's dtype, and their global token positions, int64 [n]; both memory-mapped (int8: unpacked)."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(shard.path, framework="pt") as file:
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise _damaged(shard.path, str(error)) from None
        rows = stored.pop("rows")
        return decode(stored), rows

    def read_block(self, shard: Shard, start: int, out_nd: Tensor) -> None:
        """Fills `out_nd` (contiguous, the cache's dtype) with the shard's rows from `start` on, by plain sequential reading."""
        places = self._places(shard)
        stored = {"activations": out_nd}
        if self.format.stored != self.dtype:
            stored = {"activations": torch.empty(out_nd.shape, dtype=self.format.stored), "scale": torch.empty(len(out_nd))}
        with open(shard.path, "rb", buffering=0) as file:
            for name, values in stored.items():
                _read_into(file, places[name].offset + start * values[:1].nbytes, values, shard.path)
        if self.format.stored != self.dtype:
            out_nd.copy_(decode(stored))

    def batches(self, batch_size: int, *, seed: int, device: str | torch.device) -> "ActivationBatches":
        """Endless shuffled training batches, float32 [batch_size, d_in]."""
        from sae.activations.batches import ActivationBatches

        return ActivationBatches(self, batch_size, seed=seed, device=device)

    def first_rows(self) -> Tensor:
        """[n, d_in], a fair sample of the training rows: the first shard's."""
        return self.read(self.shards("train")[0])[0]

    def about_massive(self) -> str | None:
        """What a person should know of the rows with massive norms: from the manifest, or from a sample where it says nothing of them."""
        found = self.manifest.get("massive")
        return sentence(found, self.site) if found else sampled(self.first_rows()[: 1 << 16])

    @cached_property
    def tokens(self) -> Tokens:
        """The text behind the activations; raises `InputError` if its files are damaged, or if it is unknown."""
        if not self.manifest["tokens"]:
            raise InputError(
                f"expected a cache that knows its text, but {self.folder} was imported without token ids; import it with --token-ids"
            )
        return Tokens.read([self.folder / entry["file"] for entry in self.manifest["tokens"]], self.manifest["labels"])

    def verify(self) -> list[str]:
        """Names of the files, of all sites and the tokens, whose size or checksum is not that of the manifest."""
        return verify(self.folder)

    def require_model(self, lm: "LanguageModel") -> None:
        """Raises `InputError` unless the cache was made with this model."""
        made = self.manifest["model"]
        self.model_name()
        if made["fingerprint"] != lm.fingerprint():
            raise InputError(
                f"expected a cache made with {lm.name} (fingerprint {lm.fingerprint()}), but {self.folder} was made with {made['name']} "
                f"(fingerprint {made['fingerprint']}); use that model or harvest again"
            )

    def model_name(self) -> str:
        """Name of the model it was made with; raises `InputError` if that is unknown."""
        name = self.manifest["model"]["name"]
        if name is None:
            raise InputError(f"expected a cache that knows its model, but {self.folder} was imported without one; import it with --model")
        return name

    def require_dictionary(self, dictionary: "SparseAutoencoder", *, named: bool) -> None:
        """Raises `InputError` unless the dictionary was made for activations of this site, width and model.

        `named`: a person named the model, so that where no fingerprint tells, their word counts.
        """
        dictionary.require_site(self.site)
        if dictionary.site is None:
            print(f"the dictionary does not name its site; it is taken to be the cache's, {self.site}", file=sys.stderr)
        if dictionary.d_in != self.d_in:
            raise InputError(
                f"expected activations of width {dictionary.d_in}, but {self.folder} has {self.d_in} at {self.site}; "
                "use a cache of the same model and site"
            )
        made = self.manifest["model"]
        dictionary.require_model(made["name"], made["fingerprint"], named=named)

    def _places(self, shard: Shard) -> dict[str, Place]:
        """Where the shard's tensors lie; raises `InputError` if the file is not what the manifest says."""
        places, _ = layout(shard.path, "a cache's shard")
        expected = shard_layout(self.manifest["dtype"], shard.rows, self.d_in)
        found = {name: (place.dtype, place.shape) for name, place in places.items()}
        if found != expected:
            raise _damaged(shard.path, f"it holds {found} where the manifest says {expected}")
        return places

    def _check(self, shard: Shard, entry: dict[str, Any], checksum: bool) -> None:
        _check_file(shard.path, entry, checksum)
        self._places(shard)


def _read_into(file: IO[bytes], offset: int, values: Tensor, path: Path) -> None:
    view = values.view(torch.uint8).numpy().reshape(-1).data
    file.seek(offset)
    filled = 0
    while filled < len(view):
        count = file.readinto(view[filled:])  # type: ignore[attr-defined]
        if not count:
            raise _damaged(path, "it ended while being read")
        filled += count


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises `InputError` for a folder that is no finished cache of a known format."""
    require_little_endian()
    if not (folder / "manifest.json").exists() and (folder / "harvest.json").exists():
        raise InputError(f"the harvest into {folder} has not finished; give its command again to let it go on")
    manifest = read_json(folder / "manifest.json", "an activation cache's manifest")
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"expected an activation cache of format version {FORMAT_VERSION} at {folder}, but its version is {version!r}; "
            "use the release of this software that wrote it, or harvest again"
        )
    missing = [key for key in ("model", "dtype", "sites", "counts", "labels", "shards", "tokens") if key not in manifest]
    if missing or manifest["dtype"] not in FORMATS:
        raise InputError(
            f"expected an activation cache's manifest in {folder}, but {missing or ['dtype']} is missing or unknown; harvest again"
        )
    return manifest


def verify(folder: str | Path) -> list[str]:
    """Names of the files whose size or checksum is not that of the manifest, relative to the folder; reads all of them."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    files = {entry["file"]: entry for entry in manifest["tokens"]}
    for entry in manifest["shards"]:
        files |= {f"{site}/{entry['name']}.safetensors": file for site, file in entry["files"].items()}
    damaged = []
    for name, file in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file["bytes"] or crc32(path) != file["crc32"]:
            damaged.append(name)
    return damaged


def _choose_site(folder: Path, manifest: dict[str, Any], site: str | None) -> str:
    sites = list(manifest["sites"])
    if site is None and len(sites) == 1:
        return sites[0]
    if site is None or site not in sites:
        came = "none was named" if site is None else f"{site!r} was asked for"
        raise InputError(f"expected one of the sites in {folder}, {', '.join(sites)}, but {came}; name one")
    return site


def _try(skip_damaged: bool, check: Callable[[], None]) -> bool:
    try:
        check()
    except InputError as error:
        if not skip_damaged:
            raise
        print(f"left out: {error}", file=sys.stderr)
        return False
    return True


def _check_file(path: Path, entry: dict[str, Any], checksum: bool) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != entry["bytes"]:
        raise _damaged(path, "it is missing" if size is None else f"it has {size} bytes instead of {entry['bytes']}")
    if checksum and crc32(path) != entry["crc32"]:
        raise _damaged(path, "its checksum is wrong")


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"expected a whole file at {path}, but {why}; read the others with skip_damaged, or harvest again")
