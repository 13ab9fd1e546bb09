"""Remote places for tests: a file system that fails as it is asked to, and a server of S3's protocol."""

from collections import Counter, defaultdict, deque
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from sae.disk.remote import RemotePath


class Flaky(MemoryFileSystem):
    """Memory at flaky://; `faults` of "read", "write", "list" or "info" are what the next calls meet: an exception to raise, "short"
    (half of the bytes), a function to call first, or None."""

    protocol = "flaky"
    root_marker = "/"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    faults: ClassVar[dict[str, deque]] = defaultdict(deque)
    calls: ClassVar[Counter[str]] = Counter()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(str(path).replace("flaky://", "memory://", 1))

    def clear(self) -> None:
        self.store.clear()
        self.pseudo_dirs[:] = [""]
        self.faults.clear()
        self.calls.clear()

    def _meet(self, call: str) -> Any:
        self.calls[call] += 1
        fault = self.faults[call].popleft() if self.faults[call] else None
        if isinstance(fault, Exception):
            raise fault
        if callable(fault):
            fault()
        return fault

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        fault = self._meet("read")
        data = super().cat_file(path, start, end, **options)
        return data[: len(data) // 2] if fault == "short" else data

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        fault = self._meet("write")
        data = Path(lpath).read_bytes()
        self.pipe_file(rpath, data[: len(data) // 2] if fault == "short" else data)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self._meet("list")
        return super().ls(path, detail, **options)

    def info(self, path: str, **options: Any) -> Any:
        self._meet("info")
        return super().info(path, **options)


fsspec.register_implementation("flaky", Flaky, clobber=True)
FLAKY = Flaky()


class S3Server:
    bucket = "activations"

    def __init__(self) -> None:
        import logging

        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer("127.0.0.1", 0)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def fs(self) -> Any:
        return fsspec.filesystem("s3")

    def empty(self) -> None:
        """All buckets go, and one without anything comes."""
        import urllib.request

        urllib.request.urlopen(urllib.request.Request(f"{self.environment['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST"))
        self.fs.invalidate_cache()
        self.fs.mkdir(self.bucket)

    def stop(self) -> None:
        self._server.stop()


def upload(folder: Path, url: str) -> RemotePath:
    """A folder's files behind a URL."""
    path = RemotePath(url)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            path._fs.pipe_file(path._fs._strip_protocol(f"{url}/{file.relative_to(folder)}"), file.read_bytes())
    return path


def contents(url: str) -> dict[str, bytes]:
    """Every file behind a URL, by its name from there on."""
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {name.removeprefix(root).lstrip("/"): fs.cat_file(name) for name in sorted(fs.find(root))}
