"""Rows a second of shuffled batches: a cache in a folder beside the same one on an S3 server of this machine, first and second epoch.

    python benchmarks/remote.py --out runs/remote

The server, moto, is written in Python and runs in its own process on the same processor; "server alone" is how fast it gives the same
ranges to sixteen threads that do nothing with them. "30 ms away" is a first epoch from memory that answers after so long, as a
store in the same region does. Rounds are interleaved, and every number is from all of them.
"""

import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from disk import repeated_tokens, write_cache
from fsspec.implementations.memory import MemoryFileSystem

from sae.activations.cache import ActivationCache
from sae.activations.cached import REMOTE_READERS, CachedSource
from sae.command_line import run
from sae.disk.blocks import blocks
from sae.disk.remote import RemotePath
from sae.disk.writing import write_json

BUCKET = "activations"
AWAY = 0.03
"""seconds"""


class Distant(MemoryFileSystem):
    """Memory at distant:// that takes its time for every read."""

    protocol = "distant"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("distant://", "memory://", 1))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        time.sleep(AWAY)
        return super().cat_file(path, start, end, **options)


fsspec.register_implementation("distant", Distant)


@dataclass(kw_only=True)
class RemoteConfig:
    out: Path
    """Folder for the numbers and the caches, which are removed."""
    rows: int = 1 << 17
    """Rows of the cache."""
    width: int = 768
    """Numbers in a row, float16."""
    shard_rows: int = 1 << 14
    """Rows in a file."""
    batch_size: int = 4096
    """Rows in a batch."""
    rounds: int = 5
    """How often everything is measured, in turn."""


def measure(config: RemoteConfig) -> dict[str, Any]:
    folder = config.out / "cache"
    tokens = repeated_tokens([np.arange(1, 257)], config.rows, context=128, bos_id=None)
    list(write_cache(folder, tokens, config.width, bos_id=None, pool_tokens=4 * config.shard_rows, shard_tokens=config.shard_rows))
    os.environ["SAE_BLOCK_CACHE"] = str(config.out / "local")
    rates: dict[str, list[float]] = {
        name: [] for name in ("folder", "first epoch", "second epoch", "second run", "server alone", "30 ms away")
    }
    with s3_server():
        url = RemotePath(f"s3://{BUCKET}/cache")
        url._fs.mkdir(BUCKET)
        url._fs.put(str(folder), f"{BUCKET}/cache", recursive=True)
        distant = RemotePath("distant://cache")
        distant._fs.put(str(folder), "/cache", recursive=True)
        for number in range(config.rounds):
            shutil.rmtree(config.out / "local", ignore_errors=True)
            blocks.cache_clear()
            rates["folder"].append(epochs(config, folder, 1)[0])
            first, second = epochs(config, url, 2)
            rates["first epoch"].append(first)
            rates["second epoch"].append(second)
            blocks.cache_clear()
            rates["second run"].append(epochs(config, url, 1)[0])
            rates["server alone"].append(server_alone(config, url))
            rates["30 ms away"].append(epochs(config, distant, 1)[0])
            print(f"round {number + 1}: " + ", ".join(f"{name} {found[-1]:,.0f} rows/s" for name, found in rates.items()), flush=True)
    shutil.rmtree(folder)
    shutil.rmtree(config.out / "local")
    medians = {name: {"rows_per_second": statistics.median(found), "all": found} for name, found in rates.items()}
    settings = {name: value for name, value in asdict(config).items() if name != "out"}
    write_json(config.out / "remote.json", {"settings": settings, "threads": torch.get_num_threads(), **medians})
    for name, found in rates.items():
        print(f"{name}: {statistics.median(found):,.0f} rows/s, {min(found):,.0f} to {max(found):,.0f}")
    return medians


def epochs(config: RemoteConfig, place: Path | RemotePath, count: int) -> list[float]:
    """Rows a second of each epoch; the cache is opened before the clock starts."""
    cache = ActivationCache.open(place)
    reader = CachedSource(cache).batches(config.batch_size)
    batches, found = cache.rows("train") // config.batch_size, []
    for _ in range(count):
        start = time.perf_counter()
        for _ in range(batches):
            next(reader)
        found.append(batches * config.batch_size / (time.perf_counter() - start))
    return found


def server_alone(config: RemoteConfig, url: RemotePath) -> float:
    """Rows a second of requests of a training block's size, 2 MiB, that nobody keeps."""
    cache = ActivationCache.open(url)
    size, paths = 1 << 21, [shard.path for shard in cache.shards("train")]
    ranges = [(path, at, min(at + size, path.stat().st_size)) for path in paths for at in range(0, path.stat().st_size, size)]
    start = time.perf_counter()
    with ThreadPoolExecutor(REMOTE_READERS) as readers:
        list(readers.map(lambda one: one[0].fetch(*one[1:]), ranges))
    return cache.rows("train") / (time.perf_counter() - start)


@contextmanager
def s3_server() -> Iterator[None]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = f"import logging; logging.disable(); from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            while server.poll() is None:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    time.sleep(0.1)
            os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
            yield
        finally:
            server.kill()


if __name__ == "__main__":
    run(measure, RemoteConfig, __doc__ or "")
