"""Arrays on disk as safetensors, memory-mapped both ways: larger than memory, written piece by piece, read in part."""

import errno
import glob
import json
import mmap
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Literal

import numpy as np

from sae.activations.mapped import layout
from sae.errors import InputError
from sae.files import only_writer, sync

EXPLANATIONS, ANSWERS = "explanations.jsonl", "answers.*.jsonl"  # that others put into an index's folder
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U32": "<u4", "U8": "u1", "BOOL": "?"}


def create(path: Path, shapes: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """A new safetensors file of zeros as writable maps; `shapes` gives (dtype as safetensors names it, shape), widest dtype first.

    Raises `OSError` when the disk has no room for it: a map of a file with holes would kill the process where the room ends.
    """
    header, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + int(np.prod(shape, dtype=np.int64)) * np.dtype(DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that every array starts aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)
    return open_arrays(path, "r+")


def open_arrays(path: Path, mode: Literal["r", "r+"] = "r", *, in_order: bool = True) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file as memory maps; `InputError` when the file is missing, damaged or cut short.

    `in_order=False`: here and there will be read, so that the system fetches only what is asked for (it may fetch megabytes else).
    """
    places, _ = layout(path, "a feature index's arrays")
    if not places:
        return {}
    whole = np.memmap(path, np.uint8, mode)
    if not in_order:
        whole._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    arrays: dict[str, np.ndarray] = {}
    for name, place in places.items():
        dtype = np.dtype(DTYPES[place.dtype])
        size = int(np.prod(place.shape, dtype=np.int64)) * dtype.itemsize
        # plain arrays, which are several times as fast to cut as numpy's maps; the map lives as long as one of them
        arrays[name] = np.asarray(whole)[place.offset : place.offset + size].view(dtype).reshape(place.shape)
    return arrays


def fetch(array: np.ndarray, starts: Iterable[int], length: int) -> None:
    """Asks the system to read the rows from each of `starts` on, `length` of them, all at once rather than one after another."""
    base = _map_of(array)
    if base is None:
        return
    mapped: mmap.mmap = base._mmap  # type: ignore[attr-defined]
    origin = array.ctypes.data - base.ctypes.data
    step = array.strides[0]
    pages = {(origin + start * step) // mmap.PAGESIZE for start in starts}
    pages |= {(origin + (start + length) * step - 1) // mmap.PAGESIZE for start in starts}
    for page in sorted(pages):
        if 0 <= page * mmap.PAGESIZE < len(mapped):
            mapped.madvise(mmap.MADV_WILLNEED, page * mmap.PAGESIZE, 1)


@contextmanager
def front_to_back(array: np.ndarray) -> Iterator[None]:
    """While it lasts, the system reads ahead in the file of a map that was opened with `in_order=False`."""
    mapped = _map_of(array)
    if mapped is None:
        yield
        return
    mapped._mmap.madvise(mmap.MADV_NORMAL)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        mapped._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]


def _map_of(array: np.ndarray) -> np.memmap | None:
    """The map of the whole file that the array is a part of."""
    base = array
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base  # type: ignore[assignment]
    return base if isinstance(base, np.memmap) else None


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Arrays as a safetensors file; with the permissions of any new file, unlike safetensors' own writer, so that others may read it."""
    names = {np.dtype(code): name for name, code in DTYPES.items()}
    widest_first = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)
    for name, target in create(path, {name: (names[arrays[name].dtype], arrays[name].shape) for name in widest_first}).items():
        target[...] = arrays[name]


@contextmanager
def fresh_folder(out: Path, marker: str = "index.json", what: str = "index") -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name at a clean exit, in place of an older one, known by its file `marker`.

    What a build that was killed left behind is cleared away first. A model's answers (judge.py) are taken along: somebody paid for them.
    """
    clear_leftovers(out)
    if out.exists() and not (out / marker).exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"expected a new folder or an older {what} to replace, but {out} holds something else; choose another --out")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"expected a place to write at {out}, but {out.parent} is none ({error.strerror}); choose another --out") from None
    old = out.with_name(f".{out.name}.{os.getpid()}.old.tmp")
    try:
        # both are held: from `clear_leftovers` of others, and from explain_features.py, whose scores are of the older index's text
        with only_writer(temporary), only_writer(out) if out.exists() else nullcontext():
            yield temporary
            for path in out.glob(ANSWERS):
                shutil.copy2(path, temporary)
            for path in temporary.rglob("*"):
                sync(path)
            if out.exists():
                out.rename(old)
            temporary.rename(out)  # a kill between the two leaves the older index beside, as .NAME.PID.old.tmp
            sync(out.parent)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(f"the disk ran full while building {out}; free some space and run the same command again") from error
        raise
    finally:
        if old.exists() and not out.exists():  # interrupted between the two renames
            old.rename(out)
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)


def clear_leftovers(out: Path) -> None:
    """Removes temporary folders in which nobody works any more; an older index that lost its name to a kill gets it back."""
    for path in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        found = re.fullmatch(r"([0-9]+)(\.old)?\.tmp", path.name[len(out.name) + 2 :])
        if found is None:
            continue
        if int(found[1]) != os.getpid() and Path(f"/proc/{found[1]}").exists():  # in a container every run may have the same number
            continue
        with suppress(InputError), only_writer(path):  # a process of another machine may be at work in it
            if found[2] and not out.exists():
                path.rename(out)
            else:
                shutil.rmtree(path, ignore_errors=True)
