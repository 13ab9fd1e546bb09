"""Arrays on disk as safetensors, memory-mapped both ways: larger than memory, written piece by piece, read in part."""

import json
from pathlib import Path
from typing import Literal

import numpy as np

from sae.activations.mapped import layout

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U32": "<u4", "U8": "u1", "BOOL": "?"}


def create(path: Path, shapes: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """A new safetensors file of zeros as writable maps; `shapes` gives (dtype as safetensors names it, shape), widest dtype first."""
    header, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + int(np.prod(shape, dtype=np.int64)) * np.dtype(DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that every array starts aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return open_arrays(path, "r+")


def open_arrays(path: Path, mode: Literal["r", "r+"] = "r") -> dict[str, np.ndarray]:
    """The arrays of a safetensors file as memory maps; `InputError` when the file is missing, damaged or cut short."""
    places, _ = layout(path, "a feature index's arrays")
    arrays: dict[str, np.ndarray] = {}
    for name, place in places.items():
        empty = 0 in place.shape  # a map of no bytes is an error
        dtype = np.dtype(DTYPES[place.dtype])
        arrays[name] = np.zeros(place.shape, dtype) if empty else np.memmap(path, dtype, mode, place.offset, place.shape)
    return arrays


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Arrays as a safetensors file; with the permissions of any new file, unlike safetensors' own writer, so that others may read it."""
    names = {np.dtype(code): name for name, code in DTYPES.items()}
    widest_first = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)
    for name, target in create(path, {name: (names[arrays[name].dtype], arrays[name].shape) for name in widest_first}).items():
        target[...] = arrays[name]
