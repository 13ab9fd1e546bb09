"""Files that are either whole or absent: temporary name, fsync, rename."""

import fcntl
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae.errors import InputError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; at a clean exit it is flushed to disk and takes the name, otherwise it is removed.

    Raises `InputError` when the disk is full; what stood at `path` before is then still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        if error.errno == 28:  # ENOSPC
            raise InputError(f"the disk ran full while writing {path}; free some space and run the same command again") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Makes a file's bytes, or the renames inside a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path, what: str) -> Any:
    """`what` names the kind of file in the error sentence, for example "a dictionary's cfg.json"."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"expected {what} at {path}, which does not exist; check the folder's name") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"expected {what} at {path}, but it is not valid JSON ({error})") from None


def write_tensors(path: Path, tensors: dict, metadata: dict[str, str] | None = None) -> None:
    """`tensors` of torch, as safetensors, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata)
        except SafetensorError as error:  # carries the operating system's error only in its text
            if "os error 28" in str(error):
                raise OSError(28, "No space left on device") from error
            raise
        temporary.chmod(mode)  # safetensors writes through a private file of its own


@contextmanager
def only_writer(folder: Path, *, shared: bool = False) -> Iterator[Callable[[], None]]:
    """Holds the folder against a second run into it; the operating system lets go of it even after kill -9.

    With `shared`, together with others that share it. What is yielded lets such others in from then on. Raises `InputError` while
    another process holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)

    def hold(how: int) -> None:
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is writing into {folder}; wait for it or choose another --out") from None
        except OSError as error:  # some network file systems
            print(f"{folder} cannot be locked ({error.strerror}): see to it that no other run writes into it", file=sys.stderr)

    try:
        hold(fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield lambda: hold(fcntl.LOCK_SH)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Removes what writers killed in `folder` or its subfolders left half-written: our temporary files, and safetensors' own."""
    for pattern in (".*.tmp", ".tmp*", "*/.*.tmp", "*/.tmp*"):
        for path in folder.glob(pattern):
            path.unlink()


def crc32(path: Path) -> str:
    """Checksum of a file's bytes, eight hexadecimal digits."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def require_free_space(folder: Path, needed: int, what: str) -> None:
    """Raises `InputError` if the disk that holds `folder` has fewer than `needed` bytes left."""
    existing = next(p for p in [folder, *folder.resolve().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"{what} needs about {needed / 1e9:.2f} GB but {folder} has {free / 1e9:.2f} GB free; "
            "free some space, choose another folder or ask for fewer tokens"
        )
