"""Opens a feature index's folder: its files are checked against their schemas and checksums.

f features · n tokens · s sequences · o documents · v vocabulary · e entries (activations above 0)
"""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from sae.activations.files.manifest import SITE, ModelEntry
from sae.disk.arrays import open_arrays
from sae.disk.checksum import crc32
from sae.disk.reading import SMALL, Arrays, Count, Number, read_json, require, require_starts, require_within
from sae.errors import InputError
from sae.features.index import examples, neighbours
from sae.features.index.lens import BINS

FORMAT_VERSION = 2
FILES = ("columns", "records", "details", "token_features", "tokens")
CHECKED = (*FILES, "sums")


Site = Annotated[str, Field(pattern=SITE)]


class Info(TypedDict):
    """index.json."""

    dictionary: str
    dictionary_crc32: str
    dictionary_crc32_of: NotRequired[Literal["samples"]]
    """the part of the weights that the checksum covers; default: all"""
    cache: str
    model: ModelEntry
    site: Site | Annotated[list[Site], Field(min_length=2)]
    """several of a crosscoder"""
    site_out: NotRequired[Site | Annotated[list[Site], Field(min_length=2)]]
    """of a transcoder, with d_out"""
    d_out: NotRequired[Count]
    d_in: Count
    d_sae: Annotated[Count, Field(gt=0)]
    splits: list[str]
    activations: Count
    activations_cut_to_65504: Count
    label_names: list[str]
    logit_lens: str
    cosine_neighbours: NotRequired[str]
    """why there are none"""
    tokens_scanned: Annotated[Count, Field(gt=0)]
    fvu: Number | None
    crc32: NotRequired[dict[str, str]]
    """of every file except this one, by name without .safetensors; missing in indexes of an earlier version"""


DETAILS: Arrays = {
    "histogram": ("U32", f"f {examples.BINS}"),
    "top_entries": ("U32", f"f {examples.TOP}"),
    "bucket_entries": ("U32", f"f {examples.BUCKETS} {examples.BUCKET_SAMPLES}"),
    "token_ids": ("I32", f"f {examples.TOKENS}"),
    "token_shares": ("F32", f"f {examples.TOKENS}"),
    "coactive_ids": ("I32", f"f {neighbours.KEPT}"),
    "coactive_counts": ("U32", f"f {neighbours.KEPT}"),
    "neighbour_ids": ("I32", f"f {neighbours.KEPT}"),
    "neighbour_cosines": ("F32", f"f {neighbours.KEPT}"),
    "lens_counts": ("U32", f"f {BINS}"),
}
SCHEMAS: dict[str, Arrays] = {
    "columns": {
        **dict.fromkeys(("count", "top_position", "sequences", "documents"), ("I64", "f")),
        "sum": ("F64", "f"),
        **dict.fromkeys(("max", "mean", "std", "skewness", "kurtosis", "decoder_norm", "density", "fvu_contribution"), ("F32", "f")),
        "top_token": ("I32", "f"),
    },
    "records": {"offsets": ("I64", "f+1"), "positions": ("U32", "e"), "values": ("F16", "e")},
    "details": DETAILS,
    "token_features": {"offsets": ("I64", "t+1"), "features": ("U32", "m"), "shares": ("F32", "m")},
    "tokens": {
        "ids": ("I32", "n"),
        "scanned": ("BOOL", "n"),
        "sequence_starts": ("I64", "s+1"),
        "sequence_document": ("I64", "s"),
        "sequence_split": ("U8", "s"),
        "document_label": ("I32", "o"),
        "piece_bytes": ("U8", "b"),
        "piece_lengths": ("I32", "v"),
        "piece_special": ("BOOL", "v"),
    },
    "sums": {"feature": ("I64", "2 f"), "x": ("I64", "2 d"), "square": ("I64", "2 1"), "error": ("I64", "2 1")},
}
LENS: Arrays = {f"{side}_token_{what}": (dtype, "f k") for side in ("top", "bottom") for what, dtype in (("ids", "I32"), ("values", "F32"))}
"""columns that an index has together, or none of them"""


SIGNED: Arrays = {"values": ("F16", "e"), "negative": ("BOOL", "e")}
"""records of a dictionary whose activations may be negative"""


def details_layout(f: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Arrays of details.safetensors; see docs/features.md."""
    return {name: (dtype, (f, *map(int, shape.split()[1:]))) for name, (dtype, shape) in DETAILS.items()}


def open_index(folder: Path, verify: bool) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """index.json and the arrays of each of `FILES`, memory-mapped.

    Checksums of files up to 32 MB are compared, with `verify` those of all. Raises `InputError` if the folder is not a complete feature
    index.
    """
    what = "a feature index (made by `sae index`)"
    info = read_json(folder / "index.json", what, dict[str, Any])
    if info.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{folder} is a feature index of format {info.get('format_version')!r}, expected {FORMAT_VERSION}; build the index again"
        )
    require(info, Info, f"{what} at {folder}")
    if verify and "crc32" not in info:
        print(f"{folder} has no checksums to compare, because an earlier version built it; build it again to have them", file=sys.stderr)
    for name in CHECKED:
        path = folder / f"{name}.safetensors"
        if path.is_file() and "crc32" in info and (verify or path.stat().st_size <= SMALL) and crc32(path) != info["crc32"].get(name):
            raise InputError(f"expected {path} as it was written, but its checksum is another, so it is damaged; build the index again")
    f = info["d_sae"]
    arrays = {name: open_arrays(folder / f"{name}.safetensors", schema=SCHEMAS[name], in_order=False, f=f) for name in FILES}
    if LENS.keys() & arrays["columns"].keys():
        open_arrays(folder / "columns.safetensors", schema=LENS, f=f)
    if "negative" in arrays["records"]:
        open_arrays(folder / "records.safetensors", schema=SIGNED)
    _require_content(folder, info, arrays)
    return info, arrays


def open_sums(folder: Path, info: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arrays of sums.safetensors."""
    return open_arrays(folder / "sums.safetensors", schema=SCHEMAS["sums"], f=info["d_sae"], d=info.get("d_out", info["d_in"]))


def _require_content(folder: Path, info: dict[str, Any], arrays: dict[str, dict[str, np.ndarray]]) -> None:
    """Checks small arrays with which readers index other arrays; for larger files `verify` finds the damage."""
    tokens, records, by_token = arrays["tokens"], arrays["records"], arrays["token_features"]
    require_starts(records["offsets"], len(records["positions"]), "offsets of records", folder)
    require_starts(by_token["offsets"], len(by_token["features"]), "offsets of token_features", folder)
    require_starts(tokens["sequence_starts"], len(tokens["ids"]), "sequence_starts", folder)
    require_within(tokens["sequence_document"], 0, len(tokens["document_label"]), "sequence_document", folder)
    require_within(tokens["document_label"], -1, len(info["label_names"]), "document_label", folder)
    ends = np.cumsum(np.r_[0, tokens["piece_lengths"]], dtype=np.int64)
    require_starts(ends, len(tokens["piece_bytes"]), "the ends of pieces", folder)
    v, n, f = len(tokens["piece_lengths"]), len(tokens["ids"]), info["d_sae"]
    for numbers, high, name in ((tokens["ids"], v, "ids"), (records["positions"], n, "positions"), (by_token["features"], f, "features")):
        if numbers.nbytes <= SMALL:
            require_within(numbers, 0, high, name, folder)
