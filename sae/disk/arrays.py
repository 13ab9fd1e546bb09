"""Arrays on disk as safetensors, memory-mapped both ways: larger than memory, written piece by piece, read in part."""

import json
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

import numpy as np

from sae.disk.reading import NUMPY_DTYPES, Arrays, map_arrays

EXPLANATIONS, ANSWERS = "explanations.jsonl", "answers.*.jsonl"  # that others put into an index's folder


def create(path: Path, shapes: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """A new safetensors file of zeros as writable maps; `shapes`: (dtype as safetensors names it, shape) by name, widest dtype first.

    Raises `OSError` if the disk has no room for it: with a sparse file, a full disk would kill the process later.
    """
    header, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + int(np.prod(shape, dtype=np.int64)) * np.dtype(NUMPY_DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that every array starts aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        _reserve(file, end)
    return open_arrays(path, "r+")


def _reserve(file: IO[bytes], size: int) -> None:
    """Makes the disk allocate `size` more bytes of zeros to the file now."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), file.tell(), size) if size else None
        return
    for low in range(0, size, 1 << 22):  # macOS, Windows
        file.write(bytes(min(1 << 22, size - low)))


def open_arrays(
    path: Path, mode: Literal["r", "r+"] = "r", schema: Arrays | None = None, *, in_order: bool = True, **sizes: int
) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file as memory maps; `InputError` when the file is missing, damaged or does not fit the schema.

    `in_order=False`: for scattered reads, so that the system loads only the requested pages (otherwise it may load megabytes).
    """
    arrays, _ = map_arrays(path, "a feature index's arrays", schema, mode=mode, then="build the index again", **sizes)
    mapped = _map_of(next(iter(arrays.values()), np.zeros(0)))
    if mapped is not None and not in_order:
        _advise(mapped, "MADV_RANDOM")
    return arrays


def fetch(array: np.ndarray, starts: Iterable[int], length: int) -> None:
    """Asks the system to load `length` rows from each of `starts`, all together instead of one after another."""
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
            _advise(base, "MADV_WILLNEED", page * mmap.PAGESIZE, 1)


@contextmanager
def front_to_back(array: np.ndarray) -> Iterator[None]:
    """Inside, the system reads ahead in the file of a map that was opened with `in_order=False`."""
    mapped = _map_of(array)
    if mapped is None:
        yield
        return
    _advise(mapped, "MADV_NORMAL")
    try:
        yield
    finally:
        _advise(mapped, "MADV_RANDOM")


def _advise(mapped: np.memmap, how: str, *place: int) -> None:
    """Tells the system how the map will be read, if it supports that (Windows does not)."""
    if hasattr(mmap, how):
        mapped._mmap.madvise(getattr(mmap, how), *place)  # type: ignore[attr-defined]


def _map_of(array: np.ndarray) -> np.memmap | None:
    """The map of the whole file that contains the array."""
    base = array
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base  # type: ignore[assignment]
    return base if isinstance(base, np.memmap) else None


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays as a safetensors file, with the permissions of any new file (unlike safetensors' own writer), so that others may read
    it."""
    names = {np.dtype(code): name for name, code in NUMPY_DTYPES.items()}
    widest_first = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)
    for name, target in create(path, {name: (names[arrays[name].dtype], arrays[name].shape) for name in widest_first}).items():
        target[...] = arrays[name]
