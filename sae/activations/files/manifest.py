"""A cache's manifest.json, checked against its schema, and the files that it names, checked against their sizes and checksums."""

import json
import os
import zlib
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from sae.activations.files.ledger import FORMAT_VERSION, ShardEntry, TokenEntry, require_little_endian
from sae.activations.text.tokens import SPLITS
from sae.disk.checksum import crc32
from sae.disk.reading import Count, LongList, Number, read_json, require
from sae.disk.remote import Place, RemotePath, place
from sae.errors import InputError
from sae.model.sites import EMBED, KINDS, MODEL, split_model

THEN = "read the others with skip_damaged, or harvest again"
SITE = rf"^({MODEL}/)?({EMBED}|({'|'.join(KINDS)})\.[0-9]{{1,5}})$"


class SiteEntry(TypedDict):
    d_in: Annotated[Count, Field(gt=0)]
    mean_squared_norm: Annotated[Number, Field(ge=0)]


class ModelEntry(TypedDict):
    name: str | None
    revision: str | None
    fingerprint: str | None


class Rows(TypedDict):
    train: Count
    held_out: Count


class Counts(TypedDict):
    tokens: Count
    rows: Rows
    left_out: dict[str, Count]


class Manifest(TypedDict):
    """The parts of a manifest that readers use."""

    model: ModelEntry
    models: NotRequired[dict[str, ModelEntry]]
    """models other than `model`, by the name before their sites"""
    dataset: dict[str, Any] | None
    context: Count | None
    dtype: Literal["float16", "bfloat16", "float32", "int8"]
    seed: int
    held_out: Number
    sites: dict[Annotated[str, Field(pattern=SITE)], SiteEntry]
    counts: Counts
    labels: list[str]
    shards: LongList[ShardEntry]
    tokens: LongList[TokenEntry]


def manifest_crc32(manifest: dict[str, Any]) -> str:
    """Identifies a cache's content, also in a copy: the manifest has the checksums of all files."""
    return f"{zlib.crc32(json.dumps(manifest, sort_keys=True).encode()):08x}"


def read_manifest(folder: Place) -> dict[str, Any]:
    """Raises `InputError` for a folder that is not a finished cache of a known format."""
    require_little_endian()
    if isinstance(folder, RemotePath):
        folder.names()  # so that nothing is taken from an earlier look
    if not _exists(folder / "manifest.json") and _exists(folder / "harvest.json"):
        raise InputError(f"the harvest into {folder} has not finished; run its command again to continue")
    manifest = read_json(folder / "manifest.json", "an activation cache's manifest")
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"expected an activation cache of format version {FORMAT_VERSION} at {folder}, but its version is {version!r}; "
            "use the release of this software that wrote it, or harvest again"
        )
    require(manifest, Manifest, f"a cache's manifest in {folder}")
    for site in manifest["sites"]:
        name = split_model(site)[0]
        if name is not None and name not in manifest.get("models", {}):
            raise InputError(f"expected facts about the model {name!r} of the site {site} in {folder}, found none; harvest again")
    rows = dict.fromkeys(SPLITS, 0)
    for shard in manifest["shards"]:
        rows[shard["split"]] += shard["rows"]
        if lacking := sorted(set(manifest["sites"]) - set(shard["files"])):
            raise InputError(f"expected the shard {shard['name']} in {folder} at every site, but it is not at {lacking[0]}; harvest again")
    counted = manifest["counts"]["rows"]
    if rows != {split: counted[split] for split in SPLITS}:
        raise InputError(f"expected shards of {counted} rows in {folder}, as its manifest counts, but it lists {rows}; harvest again")
    return manifest


def _exists(path: Place) -> bool:
    """False if permission is missing."""
    return path.exists() if isinstance(path, RemotePath) else os.path.exists(path)


def verify(folder: str | Place) -> list[str]:
    """Names of the files whose size or checksum differs from the manifest, relative to the folder; reads all of them."""
    folder = place(folder)
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


def check_file(path: Place, entry: dict[str, Any], checksum: bool) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != entry["bytes"]:
        raise damaged(path, "it is missing" if size is None else f"it has {size} bytes instead of {entry['bytes']}")
    if checksum and crc32(path) != entry["crc32"]:
        raise damaged(path, "its checksum is wrong")


def damaged(path: Place, why: str) -> InputError:
    return InputError(f"expected a whole file at {path}, but {why}; {THEN}")
