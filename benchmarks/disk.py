"""The disk under a cache: `dd` as the measure of its speed, files whose pages are out of memory, and caches made without a model."""

import ctypes
import mmap
import os
import re
import subprocess
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sae.activations.files.ledger import FORMAT_VERSION, describe_file
from sae.activations.files.number_formats import row_bytes
from sae.activations.harvest.plan import Masks, Pool, plan_pools
from sae.activations.harvest.pools import Recorded, Recorder
from sae.activations.text.tokens import Cutter, Part, Tokens
from sae.disk.writing import require_free_space, write_json, write_tensors
from sae.errors import InputError

SITE = "resid_post.0"


class Written(NamedTuple):
    paths: list[Path]
    """shards of one pool"""
    bytes: int
    seconds: float


def dd(source: Path, target: str, *options: str) -> float:
    """Seconds in which `dd` copies a file in blocks of 4 MiB, as it says itself, so without the start of its process."""
    command = ["dd", f"if={source}", f"of={target}", "bs=4M", *options]
    said = subprocess.run(command, env=os.environ | {"LC_ALL": "C"}, capture_output=True, text=True, check=True).stderr
    found = re.search(r"copied, ([\d.e+-]+) s", said)
    if not found:
        raise InputError(f"expected dd to say how long it took, but it said {said!r}; install GNU coreutils")
    return float(found[1])


def forget(paths: list[Path]) -> None:
    """Takes the files out of the page cache; raises `InputError` where they stay, as on a disk that is memory itself."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)  # pages not yet written would stay
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    left = sum(in_memory(path) for path in paths) / len(paths)
    if left > 0.01:
        raise InputError(
            f"expected a disk whose files leave the memory when asked to, but {left:.0%} of {paths[0].parent} stayed; give another --work"
        )


def in_memory(path: Path) -> float:
    """Share of a file's pages that lie in the page cache."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        values = np.frombuffer(mapped, np.uint8)
        resident = np.zeros(-(-len(values) // mmap.PAGESIZE), np.uint8)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(values.ctypes.data), ctypes.c_size_t(len(values)), ctypes.c_void_p(resident.ctypes.data)
        )
        del values  # so that the map can be closed
        if failed:
            raise OSError(ctypes.get_errno(), f"mincore failed on {path}")
    return float((resident & 1).mean())


def repeated_tokens(documents: list[np.ndarray], count: int, *, context: int, bos_id: int | None) -> Tokens:
    """About `count` tokens in sequences as a harvest makes them; the documents are repeated, each time as new ones."""
    cutter = Cutter(context, count, bos_id, seed=0, held_out=0.0)
    parts = list(cutter.parts((ids, None) for ids in cycle(documents)))
    return Tokens.join(parts, [])


def write_cache(
    folder: Path,
    tokens: Tokens,
    width: int,
    *,
    bos_id: int | None,
    pool_tokens: int,
    shard_tokens: int,
    seed: int = 0,
    acts_nd: torch.Tensor | None = None,
) -> Iterator[Written]:
    """A cache in half precision by the harvest's own plan and writer; pool after pool, each with the first rows of `acts_nd` (by default
    random numbers from -1 to 1), whose mean squared norm must be a third of the width."""
    masks = Masks(bos_id)
    pools = plan_pools(tokens, seed=seed, pool_tokens=pool_tokens, shard_tokens=shard_tokens, masks=masks)
    require_free_space(folder, sum(pool.rows for pool in pools) * row_bytes("float16", width), "the synthetic cache")
    recorder = Recorder(
        models=None,  # type: ignore[arg-type]  # no forward passes
        tokens=tokens,
        widths={SITE: width},
        dtype="float16",
        masks=masks,
        max_norm_ratio=None,
        never_massive=None,
        batch_tokens=1,
        seed=seed,
    )
    if acts_nd is None:
        generator = torch.Generator().manual_seed(seed)
        acts_nd = torch.empty(max(pool.rows for pool in pools), width, dtype=torch.float16).uniform_(-1, 1, generator=generator)
    shards = []
    for pool in pools:
        ones = {SITE: torch.ones(pool.rows)}
        recorded = Recorded(pool, {SITE: {"activations": acts_nd[: pool.rows]}}, ones, ones, rows_of(pool, tokens, masks), [])
        start = time.monotonic()
        entry = recorder.write(recorded, lambda site, name: folder / site / f"{name}.safetensors")
        seconds = time.monotonic() - start
        shards += entry["shards"]
        paths = [folder / SITE / f"{shard['name']}.safetensors" for shard in entry["shards"]]
        yield Written(paths, sum(path.stat().st_size for path in paths), seconds)
    write_manifest(folder, tokens, width, shards)


def rows_of(pool: Pool, tokens: Tokens, masks: Masks) -> torch.Tensor:
    """Global token positions of a pool's rows, int64 [n]."""
    starts = tokens.sequence_starts
    kept = []
    for sequence in pool.sequences:
        positions = np.arange(starts[sequence], starts[sequence + 1])
        kept.append(positions[masks.reasons(tokens.ids[positions], positions - starts[sequence]) == 0])
    return torch.from_numpy(np.concatenate(kept))


def write_manifest(folder: Path, tokens: Tokens, width: int, shards: list[dict]) -> None:
    path = folder / "tokens" / "00000.safetensors"
    write_tensors(path, {name: torch.from_numpy(np.asarray(getattr(tokens, name))) for name in Part._fields})
    manifest = {
        "format_version": FORMAT_VERSION,
        "model": {"name": "none", "revision": None, "fingerprint": "none", "dtype": "float32"},
        "dtype": "float16",
        "sites": {SITE: {"d_in": width, "mean_squared_norm": width / 3}},
        "context": int(np.diff(tokens.sequence_starts).max()),
        "dataset": {},
        "seed": 0,
        "held_out": 0.0,
        "counts": {"tokens": len(tokens.ids), "rows": {"train": sum(shard["rows"] for shard in shards), "held_out": 0}, "left_out": {}},
        "labels": [],
        "shards": shards,
        "tokens": [{"file": "tokens/00000.safetensors", **describe_file(path)}],
        "complete": True,
    }
    write_json(folder / "manifest.json", manifest)
