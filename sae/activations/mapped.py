"""Safetensors files looked into without loading them: where each tensor lies, and memory maps of it."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sae.errors import InputError

ITEM_BYTES = {
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
NUMPY_DTYPES = {"U8": "u1", "U16": "<u2", "I32": "<i4", "U32": "<u4", "I64": "<i8"}


class Place(NamedTuple):
    dtype: str
    """as safetensors writes it, for example "F16" """
    shape: tuple[int, ...]
    offset: int
    """bytes from the beginning of the file"""


def layout(path: Path, what: str) -> tuple[dict[str, Place], dict[str, str]]:
    """Where the tensors of a safetensors file lie, and its metadata. `what` names the kind of file in the error sentence.

    Raises `InputError` if the file is missing, is no safetensors file, or does not end where its header says.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        places, end = {}, 8 + length
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            places[name] = Place(entry["dtype"], tuple(entry["shape"]), 8 + length + start)
            if stop - start != math.prod(entry["shape"]) * ITEM_BYTES[entry["dtype"]]:
                raise ValueError(f"the size of {name!r} in its header is wrong")
            end = max(end, 8 + length + stop)
        if end != size:
            raise ValueError(f"it has {size} bytes where its header says {end}")
    except FileNotFoundError:
        raise InputError(f"expected {what} at {path}, which does not exist; check the path or make it again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # all that random bytes can do to a header
        raise InputError(f"expected {what} at {path}, but it is damaged or no safetensors file ({error}); make it again") from None
    return places, metadata


def map_tensors(path: Path, what: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The integer tensors of a safetensors file as read-only memory maps, and its metadata; raises like `layout`."""
    places, metadata = layout(path, what)
    tensors: dict[str, np.ndarray] = {}
    for name, (dtype, shape, offset) in places.items():
        if dtype in NUMPY_DTYPES:
            empty = math.prod(shape) == 0  # a map of no bytes is an error
            kind = np.dtype(NUMPY_DTYPES[dtype])
            tensors[name] = np.empty(shape, kind) if empty else np.memmap(path, kind, mode="r", offset=offset, shape=shape)
    return tensors, metadata
