"""The record of a harvest's finished pools: JSON lines, each written after the files it names are safely on disk.

In a folder they are an append-only file. Behind a URL, where nothing can be appended, every entry is a separate file.
"""

import json
import os
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from sae.disk.checksum import crc32
from sae.disk.places import writing
from sae.disk.reading import Count, Number, parse_json, read_json
from sae.disk.remote import Place, RemotePath
from sae.disk.writing import atomic, remove_leftovers, sync, write_json
from sae.errors import InputError

FORMAT_VERSION = 1


class FileEntry(TypedDict):
    bytes: Count
    crc32: str


class ShardEntry(TypedDict):
    name: Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]{1,64}$")]  # of a file
    split: Literal["train", "held_out"]
    rows: Count
    files: dict[str, FileEntry]


class PoolShard(ShardEntry):
    squared_norm: dict[str, Number]


class TokenEntry(FileEntry):
    file: Annotated[str, Field(pattern=r"^tokens/[0-9A-Za-z_-]{1,64}\.safetensors$")]


class TokensNote(TokenEntry):
    kind: Literal["tokens"]


class CountsNote(TypedDict):
    kind: Literal["counts"]
    label_names: list[str]
    documents: Count
    empty_documents: Count
    sequences: Count
    tokens: Count


class Massive(TypedDict):
    """`massive.PoolRows`"""

    split: str
    rows: Count
    squared_norm: dict[str, Number]
    all_squared_norm: dict[str, Number]
    positions: list[Annotated[list[Count], Field(min_length=2, max_length=2)]]


class PoolNote(TypedDict):
    kind: Literal["pool"]
    split: Literal["train", "held_out"]
    number: Count
    massive: Massive
    shards: list[PoolShard]


Note = Annotated[TokensNote | CountsNote | PoolNote, Field(discriminator="kind")]


class Ledger:
    """`progress.jsonl` of an unfinished cache; if there are several writers, each except the first has its own `progress.N.jsonl`."""

    def __init__(self, folder: Path, writer: int = 0):
        self.folder = folder
        self.path = folder / (f"progress.{writer}.jsonl" if writer else "progress.jsonl")
        self.entries: list[dict[str, Any]] = []
        if self.path.exists():
            self.entries, size = _read(self.path.read_bytes(), self.path)
            os.truncate(self.path, size)

    @staticmethod
    def of_place(folder: Place, writer: int = 0) -> "Ledger | RemoteLedger":
        return RemoteLedger(folder, writer) if isinstance(folder, RemotePath) else Ledger(folder, writer)

    def append(self, *entries: dict[str, Any]) -> None:
        with writing(self.path):
            with open(self.path, "ab") as file:
                file.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
                file.flush()
                os.fsync(file.fileno())
            sync(self.folder)
        self.entries += entries

    def take_over(self) -> None:
        """Adds the entries of other writers, also those of an earlier run; none of them may still be running."""
        for path in sorted(self.folder.glob("progress.*.jsonl")):
            self.append(*_read(path.read_bytes(), path)[0])
            path.unlink()

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)
        self.entries = []

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if entry["kind"] == kind]


class RemoteLedger(Ledger):
    """`progress.WRITER.NUMBER.jsonl` behind a URL."""

    def __init__(self, folder: RemotePath, writer: int = 0):
        self.remote, self.writer = folder, writer
        self.entries: list[dict[str, Any]] = []
        self._known: set[str] = set()
        mine = [int(name.split(".")[2]) for name in self._names() if name.split(".")[1] == str(writer)]
        self._next = max(mine, default=-1) + 1  # what a killed run noted stays

    def append(self, *entries: dict[str, Any]) -> None:
        name = f"progress.{self.writer}.{self._next:06d}.jsonl"
        with atomic(self.remote / name) as temporary:
            temporary.write_bytes(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
        self._next += 1
        self._known.add(name)
        self.entries += entries

    def take_over(self) -> None:
        """Reads the entries of others and of an earlier run."""
        names = [name for name in self._names() if name not in self._known]
        for name, text in zip(names, self.remote.read_many(names)):
            self.entries += _read(text, self.remote / name)[0]
        self._known |= set(names)

    def clear(self) -> None:
        for name in self._names():
            (self.remote / name).unlink()
        self.entries, self._known, self._next = [], set(), 0

    def _names(self) -> list[str]:
        return [name for name in self.remote.names() if re.fullmatch(r"progress\.[0-9]+\.[0-9]+\.jsonl", name)]


def _read(text: bytes, path: Place) -> tuple[list[dict[str, Any]], int]:
    """Entries up to an incomplete line, as a kill or a full disk leaves it, and the number of bytes that they take.

    Work recorded in a damaged line, or after it, is done again.
    """
    entries, size = [], 0
    for line in text.splitlines(keepends=True):
        try:
            if not line.endswith(b"\n"):
                break
            entries.append(parse_json(line, f"a line of {path}", Note))
        except InputError:
            break
        size += len(line)
    return entries, size


def describe_file(path: Place) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "crc32": crc32(path)}


def has_size(path: Place, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def require_little_endian() -> None:
    """Raises `InputError` on a big-endian machine, because the files' bytes are always little-endian."""
    if sys.byteorder != "little":
        raise InputError(f"expected a little-endian machine, because a cache's numbers are, but this one is {sys.byteorder}-endian")


def claim(folder: Place, **decides: dict[str, Any]) -> None:
    """Makes `folder` the place of a harvest with these settings and models, or checks that it already is; removes files that a kill left
    incomplete.

    Only for the process that has locked the folder.

    Raises `InputError` for a folder with other files, or one started with other settings or another model.
    """
    require_little_endian()
    if isinstance(folder, Path):
        for leftover in folder.glob(".harvest.json.*.tmp"):
            leftover.unlink()
    names = folder.names() if isinstance(folder, RemotePath) else sorted(path.name for path in folder.iterdir())
    if "harvest.json" not in names:
        if names:
            raise InputError(
                f"expected an empty folder or an unfinished cache at {folder}, but it holds {names[0]!r}; choose another --out"
            )
        write_json(folder / "harvest.json", {"format_version": FORMAT_VERSION, **decides})
        if isinstance(folder, Path):
            sync(folder.parent)
        return
    if isinstance(folder, Path):
        remove_leftovers(folder)
    require_same(folder, **decides)


def abandon(folder: Place, ledger: Ledger, is_new: bool) -> None:
    """Undoes a `claim` whose text cannot be used; with `is_new`, removes the folder too."""
    ledger.clear()
    if isinstance(folder, RemotePath):
        for name in (folder / "tokens").names():
            (folder / "tokens" / name).unlink()
        return (folder / "harvest.json").unlink()
    shutil.rmtree(folder / "tokens", ignore_errors=True)
    (folder / "harvest.json").unlink(missing_ok=True)
    if is_new:
        with suppress(OSError):  # something else is in it
            folder.rmdir()


class Begun(TypedDict):
    settings: dict[str, Any]
    model: dict[str, Any]
    models: NotRequired[dict[str, Any]]


def require_same(folder: Place, **mine_of: dict[str, Any]) -> None:
    """Raises `InputError` if the harvest in `folder` was started with other models or settings than these."""
    path = folder / "harvest.json"
    stored = read_json(path, "a harvest's settings", Begun)
    version = stored.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"expected a harvest in format version {FORMAT_VERSION} at {folder}, but it was begun in {version!r}; "
            "finish it with the release of this software that began it, or choose another --out"
        )
    for what, mine in mine_of.items():
        theirs = stored.get(what, {})
        for key in sorted({*mine, *theirs}):
            if mine.get(key) != theirs.get(key):
                raise InputError(
                    f"{folder} was started with {what} {key} = {theirs.get(key)!r}, but now it is {mine.get(key)!r}; "
                    "run the same command to resume, or choose another --out"
                )
