"""Files that are complete or absent: temporary name, fsync, rename."""

import glob
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sae.disk.checksum import BLANK, seal
from sae.disk.places import writing
from sae.disk.remote import Place, RemotePath
from sae.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def atomic(path: Place) -> Iterator[Path]:
    """Yields a temporary path beside `path`; at a clean exit it is flushed to disk and takes the name, otherwise it is removed.
    A remote file is written on the local disk and then uploaded whole.

    Incomplete files of an earlier process for `path` are removed too. Raises `InputError` if the place cannot be written, or no further,
    as on a full disk; the old file at `path` then still exists.
    """
    if isinstance(path, RemotePath):
        here = path.written_here
        try:
            with atomic(here) as temporary:
                yield temporary
            path.upload(here)
        finally:
            here.unlink(missing_ok=True)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left, pid in _half_written(path.parent, path.name):
            if not running(pid):
                _remove(left)
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink()


def sync(path: Path) -> None:
    """Makes a file's bytes, or the renames inside a folder, survive a power cut."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folder
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def jsonable(value: Any) -> Any:
    """A value as JSON can hold it: numbers that are not finite become null, paths text, tuples lists."""
    if isinstance(value, dict):
        return {key: jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def write_json(path: Place, value: Any) -> None:
    """`jsonable` of the value, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(jsonable(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_tensors(path: Place, tensors: dict, metadata: dict[str, str] | None = None) -> None:
    """`tensors` of torch, as safetensors with a checksum (see checksum.py), atomically; tensors that share memory are each written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        own = {k: v.contiguous() for k, v in tensors.items()}
        first = {v.untyped_storage().data_ptr(): k for k, v in reversed(own.items())}  # others of one memory are refused by safetensors
        own = {k: v if first[v.untyped_storage().data_ptr()] == k else v.clone() for k, v in own.items()}
        box = temporary.with_suffix(".box")  # safetensors writes through a private file beside its own, without our name
        box.mkdir(exist_ok=True)
        try:
            save_file(own, box / "tensors", (metadata or {}) | {"crc32": BLANK})
            seal(box / "tensors")
            (box / "tensors").replace(temporary)
        except SafetensorError as error:  # carries the operating system's error only in its text
            if found := re.search(r"os error ([0-9]+)", str(error)):
                raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
            raise
        finally:
            shutil.rmtree(box, ignore_errors=True)
        temporary.chmod(mode)  # its private file is not for others to read


@contextmanager
def only_writer(folder: Place, *, shared: bool = False) -> Iterator[Callable[[], None]]:
    """Locks the folder against a second run into it; the operating system releases the lock even after kill -9.

    With `shared`, together with others that share it. The yielded function lets such others in from then on. Raises `InputError` while
    another process has locked the folder, and if it cannot be made or opened. A folder that cannot be locked is named on stderr.
    """
    if isinstance(folder, RemotePath):
        if not shared:
            _say_unlocked(folder, "it is behind a URL")
        yield lambda: None
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = None if fcntl is None else os.open(folder, os.O_RDONLY)

    def hold(how: int) -> None:
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is writing into {folder}; wait for it or choose another --out") from None
        except OSError as error:  # some network file systems
            _say_unlocked(folder, error.strerror)

    if handle is None:
        _say_unlocked(folder, "this system has no flock")
        yield lambda: None
        return
    try:
        hold(fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield lambda: hold(fcntl.LOCK_SH)
    finally:
        os.close(handle)


def _say_unlocked(folder: Place, why: str | None) -> None:
    print(f"{folder} cannot be locked ({why}): see to it that no other run writes into it", file=sys.stderr)


def running(pid: int) -> bool:
    """Whether a process with this number runs on this machine; True if that cannot be checked safely."""
    if os.name == "nt":  # there os.kill ends the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        pass
    return pid != os.getpid()  # in a container every run may have the same number


def remove_leftovers(folder: Path) -> None:
    """Removes incomplete files of killed writers in `folder` and its subfolders. Only for the process that has locked the folder."""
    with writing(folder):
        for inside in (folder, *(path for path in folder.iterdir() if path.is_dir())):
            for path, _ in _half_written(inside):
                _remove(path)


def _half_written(folder: Path, name: str | None = None) -> Iterator[tuple[Path, int]]:
    """Temporary files of `atomic` in the folder and the processes that wrote them; only those of the file `name`, if it is given."""
    for path in folder.glob(".*" if name is None else f".{glob.escape(name)}.*"):
        parts = re.fullmatch(r"\.(.+)\.([0-9]+)\.(tmp|box)", path.name)
        if parts and name in (None, parts[1]) and path.is_dir() == (parts[3] == "box"):
            yield path, int(parts[2])


def _remove(path: Path) -> None:
    with suppress(OSError):  # it may be another user's
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def require_free_space(folder: Place, needed: int, what: str) -> None:
    """Raises `InputError` if the disk of `folder` has fewer than `needed` bytes left; of a server this is not known."""
    if isinstance(folder, RemotePath):
        return
    existing = next(p for p in [folder, *folder.resolve().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"{what} needs about {needed / 1e9:.2f} GB but {folder} has {free / 1e9:.2f} GB free; "
            "free some space, choose another folder or ask for fewer tokens"
        )
