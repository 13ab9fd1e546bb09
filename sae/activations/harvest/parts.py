"""Rows of unfinished pools: every few seconds a file with the rows since the last one, in visiting order.

A pool takes minutes with a slow model; with these files a kill costs only seconds. A pool's files are removed when its shards are written
and recorded.
"""

import re
import shutil
import time
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from sae.activations.harvest.plan import Pool
from sae.disk.reading import read_tensors
from sae.disk.remote import Place, RemotePath
from sae.disk.writing import write_tensors
from sae.errors import InputError

FOLDER = "unfinished"
EVERY = 10.0
"""seconds after which recorded rows are kept"""
SHARE = 20
"""multiple of the time of the last write that must also have passed: writing takes at most a twentieth of the time"""


class Part(NamedTuple):
    """Tokens `start` to `stop` of a pool, counted in visiting order without padding."""

    start: int
    stop: int
    path: Place


class Parts:
    """The files of a cache's unfinished pools; a pool's are read and written by the process that records it."""

    def __init__(self, out: Place):
        self.folder = out / FOLDER
        self._parts: dict[tuple[str, int], list[Part]] = {}
        self._taken = 0.0
        for name in self.folder.names() if isinstance(self.folder, RemotePath) else [path.name for path in self.folder.glob("*")]:
            if found := re.fullmatch(r"(\w+)-(\d+)\.(\d+)-(\d+)\.safetensors", name):
                split, number, start, stop = found[1], *map(int, found.groups()[1:])
                self._parts.setdefault((split, number), []).append(Part(start, stop, self.folder / name))
        for parts in self._parts.values():
            parts.sort()
        self.restart()

    def tokens(self, pool: Pool) -> int:
        """Number of the pool's tokens that are kept."""
        return max((part.stop for part in self._of(pool)), default=0)

    def read(self, pool: Pool) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """The pool's arrays part by part, each with the number of tokens up to its end; a damaged part and those after it are removed."""
        done = 0
        for number, part in enumerate(list(self._of(pool))):
            try:
                arrays = read_tensors(part.path, "a part of a pool")[0] if part.start == done else None
            except InputError:
                arrays = None
            if arrays is None:
                return self._remove(pool, number)
            done = part.stop
            yield done, arrays

    def restart(self) -> None:
        """Starts a pool."""
        self._kept = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self._kept >= max(EVERY, SHARE * self._taken)

    def write(self, pool: Pool, start: int, stop: int, arrays: dict[str, Tensor]) -> None:
        """Raises `InputError` for a full disk."""
        began = time.monotonic()
        part = Part(start, stop, self.folder / f"{pool.split}-{pool.number:05d}.{start:09d}-{stop:09d}.safetensors")
        write_tensors(part.path, arrays)
        self._of(pool).append(part)
        self._kept = time.monotonic()
        self._taken = self._kept - began

    def remove(self, pool: Pool) -> None:
        self._remove(pool, 0)

    def clear(self) -> None:
        """Removes all, also those of other processes; none of them may still be running."""
        if isinstance(self.folder, RemotePath):
            for name in self.folder.names():
                (self.folder / name).unlink()
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._parts = {}

    def _of(self, pool: Pool) -> list[Part]:
        return self._parts.setdefault((pool.split, pool.number), [])

    def _remove(self, pool: Pool, first: int) -> None:
        for part in self._of(pool)[first:]:
            part.path.unlink(missing_ok=True)
        del self._of(pool)[first:]
