"""Files behind URLs (s3://, hf://, memory:// and the other protocols of fsspec), read and written like those in folders.

`RemotePath` has the part of pathlib's interface that a cache needs. Reads use blocks on the local disk; a file is written on the
local disk first and uploaded whole.
"""

import errno
import hashlib
import io
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from sae.disk.blocks import BLOCK_BYTES, blocks, local_folder
from sae.disk.server import Server, reason
from sae.errors import InputError

REQUESTS = 16
"""simultaneous requests of one large read"""
REQUEST_BLOCKS = 8
"""maximum number of blocks in one request"""
PROBE = ".writable"
"""a temporary file that tests whether files can be written"""
VERSIONS = ("ETag", "etag", "blob_id", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "modified", "created")
"""attributes of file systems that change with a file's content; the first one that exists is used"""


class Version(NamedTuple):
    """The version of a remote file; it changes when others replace the file."""

    st_size: int
    """bytes"""
    mark: str


class RemotePath:
    """A file or folder behind a URL; its size and version are requested once, at first use."""

    def __init__(self, url: str, server: Server | None = None):
        self.url = url.rstrip("/")
        self._server = server or Server(self.url)

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url}/{name}", self._server)

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemotePath({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RemotePath":
        return self

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self.url.rpartition("/")[0], self._server)

    def resolve(self) -> "RemotePath":
        return self

    def exists(self) -> bool:
        """Whether a file, or a folder with content, exists."""
        try:
            self._info()
        except FileNotFoundError:
            return False
        return True

    def is_file(self) -> bool:
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def stat(self) -> Version:
        """Raises `FileNotFoundError` unless it is a file."""
        return self._version

    def open(self, mode: str = "rb", buffering: int = 0) -> "RemoteFile":
        """Opens it for reading. Raises `FileNotFoundError`."""
        assert mode == "rb"
        return RemoteFile(self)

    def read_bytes(self) -> bytes:
        """All of the file. Raises `FileNotFoundError`."""
        with self.open() as file:
            return file.read()

    def names(self) -> list[str]:
        """The entries of the folder, without those of folders in it; empty if it does not exist. Asks the server each time."""

        def listed() -> list[str]:
            try:
                self._fs.invalidate_cache(self._path)
                paths = [str(path).rstrip("/") for path in self._fs.ls(self._path, detail=False)]
            except FileNotFoundError:
                return []
            return sorted(path.rpartition("/")[2] for path in paths if path != self._path)

        return [name for name in self._server.lasting(listed, self) if name != PROBE]

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """The whole content of small files in the folder, many requests at a time."""
        with ThreadPoolExecutor(REQUESTS) as readers:
            return list(readers.map(lambda name: (self / name).read_bytes(), names))

    @property
    def written_here(self) -> Path:
        """The path on the local disk of the file until it is uploaded."""
        return local_folder() / "uploads" / f"{hashlib.blake2b(self.url.encode(), digest_size=8).hexdigest()}.{self.name}"

    def upload(self, file: Path, shown: "RemotePath | None" = None) -> None:
        """Uploads a local file to this place. Raises `InputError`, which names `shown` or this file, if it does not arrive."""
        shown = shown or self
        size = file.stat().st_size

        def put() -> None:
            try:
                self._fs.put_file(str(file), self._path)
            except FileNotFoundError:
                self._make_folder(self._fs._parent(self._path))
                self._fs.put_file(str(file), self._path)
            self._fs.invalidate_cache(self._path)
            arrived = self._fs.info(self._path)["size"]
            if arrived != size:
                raise ConnectionError(f"{arrived} of {size} bytes arrived")

        try:
            self._server.lasting(put, shown)
        except FileNotFoundError as error:
            raise InputError(f"{shown} cannot be written ({reason(error)}); make its bucket first") from None
        self.__dict__.pop("_version", None)

    def _make_folder(self, path: str) -> None:
        """Creates the folder, except the first part of a path, which may be a bucket that costs money."""
        if "/" not in path.strip("/"):
            raise FileNotFoundError(errno.ENOENT, f"there is no {path.strip('/')}")
        try:
            self._fs.mkdir(path, create_parents=False)
        except FileNotFoundError:
            self._make_folder(self._fs._parent(path))
            self._fs.mkdir(path, create_parents=False)
        except FileExistsError:
            pass

    def unlink(self, missing_ok: bool = False) -> None:
        def remove() -> None:
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._path)
            self._fs.invalidate_cache(self._path)

        self._server.lasting(remove, self)

    def require_writable(self) -> None:
        """Raises `InputError` unless files can be written into this folder. Leaves nothing behind."""
        if self._server.protocol == "hf" and not self.url.startswith("hf://buckets/"):
            raise InputError(
                f"{self} cannot be written file by file, because every file would be a commit of its own; write into a folder and upload "
                "it with: hf upload-large-folder"
            )
        with tempfile.NamedTemporaryFile() as nothing:
            probe = self / PROBE
            probe.upload(Path(nothing.name), shown=self)
            probe.unlink()

    def fetch(self, start: int, stop: int) -> bytes:
        """Bytes from the server. Raises `InputError` if the file has changed since it was opened."""
        version = self.stat()

        def read() -> bytes:
            try:
                if self._server.unchanging:
                    with self._fs.open(self._path, "rb", cache_type="none") as file:
                        file.seek(start)
                        data, details = file.read(stop - start), file.details
                else:  # without a stream, which threads may share
                    data = self._fs.cat_file(self._path, start=start, end=stop)
                    self._fs.invalidate_cache(self._path)
                    details = self._fs.info(self._path)
            except FileNotFoundError:
                raise self._changed("it is gone") from None
            except OSError as error:
                if type(error).__name__ == "FileExpired":  # of s3fs
                    raise self._changed("it is another one now") from None
                raise
            if _version(details) != version:
                raise self._changed("it is another one now")
            if len(data) != stop - start:
                raise ConnectionError(f"{len(data)} of {stop - start} bytes arrived")
            return data

        return self._server.lasting(read, self)

    def _changed(self, how: str) -> InputError:
        return InputError(f"expected {self} as it was when it was opened, but {how}; read a cache that no process is writing")

    @property
    def _fs(self) -> Any:
        return self._server.filesystem

    @cached_property
    def _path(self) -> str:
        return self._server.lasting(lambda: self._server.path(self.url), self)

    def _info(self) -> dict[str, Any]:
        return self._server.lasting(lambda: self._fs.info(self._path), self)

    @cached_property
    def _version(self) -> Version:
        details = self._info()
        if details["type"] == "directory":
            raise FileNotFoundError(f"{self} is a folder")
        return _version(details)

    @cached_property
    def key(self) -> str:
        """Identifies this version of the file among the blocks."""
        return hashlib.blake2b(f"{self.url} {self.stat()}".encode(), digest_size=16).hexdigest()


Place = Path | RemotePath
"""the place of a cache"""


def place(text: str | Path | RemotePath) -> Place:
    """A URL of fsspec or a path on this machine."""
    return RemotePath(text) if isinstance(text, str) and is_url(text) else Path(text) if isinstance(text, str) else text


def is_url(text: str) -> bool:
    return "://" in text


def _version(details: dict[str, Any]) -> Version:
    if details.get("size") is None:
        raise InputError(f"expected a file whose size is known, but the server of {details.get('name')} does not say it")
    return Version(int(details["size"]), next((f"{key} {details[key]}" for key in VERSIONS if details.get(key)), ""))


class RemoteFile(io.RawIOBase):
    """A remote file as a seekable stream of bytes."""

    def __init__(self, path: RemotePath):
        super().__init__()
        self._file, self._size, self._at = path, path.stat().st_size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        data = bytearray(left if size is None or size < 0 else min(size, left))
        self.readinto(data)
        return bytes(data)

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer unless the file ends earlier."""
        out = memoryview(buffer).cast("B")[: max(0, self._size - self._at)]
        start, stop = self._at, self._at + len(out)
        missing = [number for number in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)) if not self._from_disk(number, start, out)]
        requests = _requests(missing)
        if len(requests) == 1:
            self._from_server(requests[0], start, out)
        elif requests:
            with ThreadPoolExecutor(REQUESTS) as readers:
                list(readers.map(lambda request: self._from_server(request, start, out), requests))
        self._at = stop
        return len(out)

    def _from_disk(self, number: int, start: int, out: memoryview) -> bool:
        begin = number * BLOCK_BYTES
        block = blocks().get(self._file.key, number, min(BLOCK_BYTES, self._size - begin))
        if block is not None:
            _copy(block, begin, start, out)
        return block is not None

    def _from_server(self, numbers: range, start: int, out: memoryview) -> None:
        """Whole blocks if they will be kept, otherwise only the requested bytes."""
        begin, end = numbers.start * BLOCK_BYTES, min(numbers.stop * BLOCK_BYTES, self._size)
        kept = blocks().has_room(end - begin)
        if not kept:
            begin, end = max(begin, start), min(end, start + len(out))
        data = memoryview(self._file.fetch(begin, end))
        _copy(data, begin, start, out)
        for number in numbers if kept else ():
            at = number * BLOCK_BYTES - begin
            blocks().put(self._file.key, number, data[at : at + BLOCK_BYTES])


def _copy(data: memoryview, begin: int, start: int, out: memoryview) -> None:
    """Copies the overlap of `data`, which starts at `begin` in the file, into `out`, which starts at `start`."""
    first, last = max(begin, start), min(begin + len(data), start + len(out))
    out[first - start : last - start] = data[first - begin : last - begin]


def _requests(numbers: Sequence[int]) -> list[range]:
    """Joins consecutive blocks into requests."""
    requests: list[range] = []
    for number in numbers:
        if requests and number == requests[-1].stop and len(requests[-1]) < REQUEST_BLOCKS:
            requests[-1] = range(requests[-1].start, number + 1)
        else:
            requests.append(range(number, number + 1))
    return requests
