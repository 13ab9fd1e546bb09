"""A folder of blocks of remote files on the local disk: of bounded size, shared by all processes of the machine.

A block is a separate file, complete or absent, with its CRC-32 at the end, so that a kill or a power cut leaves no wrong data.
(fsspec's caches on disk are unbounded, and record their content in a file that a second process overwrites.)

If there is no more room, blocks that nobody has read since this process started are removed, the oldest first; its own stay, and later
blocks are not kept. An epoch reads every block once: removing the least recently read would remove each just before it is needed.
"""

import os
import shutil
import sys
import threading
import time
import zlib
from collections import deque
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Literal

from sae.errors import InputError

BLOCK_BYTES = 1 << 20
FOLDER, LIMIT = "SAE_BLOCK_CACHE", "SAE_BLOCK_CACHE_GB"
"""environment variables"""
USUAL_LIMIT = 100.0
KEPT_FREE = 1 << 30
"""bytes of the disk that always stay free"""
CRC_BYTES = 4


class Blocks:
    def __init__(self, folder: Path, limit: int):
        """`limit` is in bytes. Blocks are at folder/FILE/NUMBER, where FILE identifies one version of a remote file."""
        self.folder, self.limit = folder, limit
        self._began = time.time()
        self._lock = threading.Lock()
        self._room = self._until_scan = 0
        self._old: deque[tuple[float, Path]] = deque()
        self._full = False

    def get(self, file: str, number: int, size: int) -> memoryview | None:
        """The block's `size` bytes; None if it does not exist or is damaged."""
        path = self.folder / file / str(number)
        try:
            with open(path, "rb") as handle:
                data = memoryview(handle.read())
                if os.fstat(handle.fileno()).st_mtime < self._began:
                    os.utime(path)
        except OSError:  # another process may have removed it
            return None
        block, crc = data[:-CRC_BYTES], data[-CRC_BYTES:]
        if len(block) == size and zlib.crc32(block) == int.from_bytes(crc, "little"):
            return block
        with suppress(OSError):
            path.unlink()
        return None

    def put(self, file: str, number: int, block: memoryview) -> None:
        """Keeps the block if there is room; prints a line the first time that there is none."""
        path = self.folder / file / str(number)
        temporary = path.with_name(f".{number}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            if not self.has_room(len(block)):
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as handle:
                handle.write(block)
                handle.write(zlib.crc32(block).to_bytes(CRC_BYTES, "little"))
            temporary.replace(path)
        except OSError as error:  # a full disk, a folder that others protect: the block is read from its source again
            with self._lock:
                self._say_full(error.strerror or str(error))
        else:
            with self._lock:
                self._room -= len(block) + CRC_BYTES
                self._until_scan -= len(block) + CRC_BYTES
        finally:
            with suppress(OSError):
                temporary.unlink()

    def has_room(self, size: int) -> bool:
        """Whether a block of `size` bytes would be kept; makes room if possible."""
        with self._lock:
            if self._full:
                return False
            if self._until_scan < size:  # other processes add blocks too
                try:
                    self._scan()
                except OSError as error:
                    return self._say_full(error.strerror or str(error))
            while self._room < size + CRC_BYTES and self._old:
                self._remove(*self._old.popleft())
            if self._room >= size + CRC_BYTES:
                return True
            return self._say_full(f"it may have {self.limit / 1e9:g} GB, and {KEPT_FREE / 1e9:.1f} GB of the disk stay free")

    def _scan(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        found, used = [], 0
        for path in self.folder.glob("*/*"):
            with suppress(OSError):
                state = path.stat()
                used += state.st_size
                if state.st_mtime < self._began:
                    found.append((state.st_mtime, path))
        self._old = deque(sorted(found))
        self._room = min(self.limit - used, shutil.disk_usage(self.folder).free - KEPT_FREE)
        self._until_scan = max(self.limit // 64, BLOCK_BYTES)

    def _remove(self, read: float, path: Path) -> None:
        with suppress(OSError):
            state = path.stat()
            if state.st_mtime == read:  # else another process has read it since
                path.unlink()
                self._room += state.st_size
                path.parent.rmdir()  # refused unless it is empty

    def _say_full(self, why: str) -> Literal[False]:
        if not self._full and self.limit:
            print(
                f"{self.folder} takes no more blocks ({why}): others are read from their URL each time; {LIMIT} and {FOLDER} give it room",
                file=sys.stderr,
            )
        self._full = True
        return False


def local_folder() -> Path:
    """The local folder of blocks and of files that are being uploaded."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sae"
    return Path(os.environ.get(FOLDER) or usual)


@lru_cache
def blocks() -> Blocks:
    """The blocks of this process. Raises `InputError` for a limit that is not a number."""
    given = os.environ.get(LIMIT, str(USUAL_LIMIT))
    try:
        limit = int(float(given) * 1e9)
    except (ValueError, OverflowError):
        limit = -1
    if limit < 0:
        raise InputError(f"expected a number of GB, 0 or more, in {LIMIT}, got {given!r}; {USUAL_LIMIT:g} is usual")
    return Blocks(local_folder() / "blocks", limit)
