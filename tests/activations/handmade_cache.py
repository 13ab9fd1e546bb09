"""A cache written by the documented format alone, without the code that harvests, so that readers are held against the document."""

import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file

SITE = "resid_post.1"


def write_cache(
    folder: Path,
    shard_rows: list[int],
    d_in: int = 3,
    dtype: str = "float32",
    held_out: tuple[int, ...] = (),
    more_sites: dict[str, int] | None = None,
) -> Path:
    """A cache whose row with global token position r is [r, 0, 0, ...], at the i-th of the sites in `more_sites` (site -> width)
    [r, i, 0, ...] with i from 1; one sequence of all tokens; `held_out` are shard numbers."""
    widths = {SITE: d_in} | (more_sites or {})
    shards, start = [], 0
    for number, rows in enumerate(shard_rows):
        positions = torch.arange(start, start + rows)
        files = {}
        for i, (site, width) in enumerate(widths.items()):
            activations = torch.zeros(rows, width, dtype=getattr(torch, dtype))
            activations[:, 1:2] = i
            activations[:, 0] = positions
            files[site] = _save(folder / site / f"{number:05d}.safetensors", {"activations": activations, "rows": positions})
        split = "held_out" if number in held_out else "train"
        shards.append({"name": f"{number:05d}", "split": split, "rows": rows, "files": files})
        start += rows
    tokens = {
        "ids": torch.arange(start, dtype=torch.int32),
        "sequence_starts": torch.tensor([0, start]),
        "sequence_document": torch.tensor([0]),
        "document_label": torch.tensor([-1], dtype=torch.int32),
        "sequence_split": torch.tensor([0], dtype=torch.uint8),
    }
    file = _save(folder / "tokens" / "00000.safetensors", tokens)
    sites = {site: {"d_in": width, "mean_squared_norm": 1.0} for site, width in widths.items()}
    write_manifest(folder, dtype, sites, shards, [{"file": "tokens/00000.safetensors", **file}])
    return folder


def write_manifest(folder: Path, dtype: str, sites: dict, shards: list[dict], tokens: list[dict]) -> None:
    rows = {split: sum(shard["rows"] for shard in shards if shard["split"] == split) for split in ("train", "held_out")}
    manifest = {
        "format_version": 1,
        "model": {"name": "handmade", "revision": None, "fingerprint": "0123456789ab"},
        "dataset": None,
        "context": None,
        "dtype": dtype,
        "seed": 0,
        "held_out": 0.0,
        "sites": sites,
        "counts": {"tokens": sum(rows.values()), "rows": rows, "left_out": {}},
        "labels": [],
        "shards": shards,
        "tokens": tokens,
        "complete": True,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> dict:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    data = path.read_bytes()
    return {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
