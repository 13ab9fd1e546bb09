"""What a harvest has finished so far: an append-only file of JSON lines, each written after the files it names are safely on disk."""

import json
import os
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
from sae.disk.writing import remove_leftovers, sync, write_json
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
    """`progress.jsonl` of a cache that is being made; of several writers, each but the first has a `progress.N.jsonl` of its own."""

    def __init__(self, folder: Path, writer: int = 0):
        self.folder = folder
        self.path = folder / (f"progress.{writer}.jsonl" if writer else "progress.jsonl")
        self.entries: list[dict[str, Any]] = []
        if self.path.exists():
            self.entries, size = _read(self.path)
            os.truncate(self.path, size)

    def append(self, *entries: dict[str, Any]) -> None:
        with writing(self.path):
            with open(self.path, "ab") as file:
                file.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
                file.flush()
                os.fsync(file.fileno())
            sync(self.folder)
        self.entries += entries

    def take_over(self) -> None:
        """Moves in what other writers noted, those of an earlier run too; none of them may be at work any more."""
        for path in sorted(self.folder.glob("progress.*.jsonl")):
            self.append(*_read(path)[0])
            path.unlink()

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)
        self.entries = []

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if entry["kind"] == kind]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Entries up to a line that is not whole, as a kill or a full disk leaves it, and the bytes that they take.

    What a damaged line and those after it noted is done again.
    """
    entries, size = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if not line.endswith(b"\n"):
                break
            entries.append(parse_json(line, f"a line of {path}", Note))
        except InputError:
            break
        size += len(line)
    return entries, size


def describe_file(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "crc32": crc32(path)}


def has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def require_little_endian() -> None:
    """Raises `InputError` on a machine that would read the files' bytes, which are little-endian wherever they were written, in reverse."""
    if sys.byteorder != "little":
        raise InputError(f"expected a little-endian machine, because a cache's numbers are, but this one is {sys.byteorder}-endian")


def claim(folder: Path, **decides: dict[str, Any]) -> None:
    """Makes `folder` the place of a harvest with these settings and models, or checks that it already is; removes what a kill left
    half-written.

    Only for the one process that holds the folder alone.

    Raises `InputError` for a folder with other things in it, or one that was begun with other settings or another model.
    """
    require_little_endian()
    path = folder / "harvest.json"
    begun = path.exists()
    if begun:
        remove_leftovers(folder)
    for leftover in folder.glob(".harvest.json.*.tmp"):
        leftover.unlink()
    if not begun:
        other = next(iter(sorted(p.name for p in folder.iterdir())), None)
        if other is not None:
            raise InputError(f"expected an empty folder or an unfinished cache at {folder}, but it holds {other!r}; choose another --out")
        write_json(path, {"format_version": FORMAT_VERSION, **decides})
        sync(folder.parent)
        return
    require_same(folder, **decides)


def abandon(folder: Path, ledger: Ledger, is_new: bool) -> None:
    """Takes back a `claim` whose text cannot be used; with `is_new`, the folder too."""
    ledger.clear()
    shutil.rmtree(folder / "tokens", ignore_errors=True)
    (folder / "harvest.json").unlink(missing_ok=True)
    if is_new:
        with suppress(OSError):  # something else is in it
            folder.rmdir()


class Begun(TypedDict):
    settings: dict[str, Any]
    model: dict[str, Any]
    models: NotRequired[dict[str, Any]]


def require_same(folder: Path, **mine_of: dict[str, Any]) -> None:
    """Raises `InputError` if the harvest in `folder` was begun with other models, or other settings, than these."""
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
                    f"{folder} was begun with {what} {key} = {theirs.get(key)!r}, but now it is {mine.get(key)!r}; "
                    "give the same command to resume, or choose another --out"
                )
