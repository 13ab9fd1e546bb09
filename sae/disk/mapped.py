"""Tensors that stay in their file: parts of one map of it that only reads, of which the system holds the pages that are used.

Unlike torch's own maps, whose memory the system promises in full, they may be larger than memory, and pages can be let go.
"""

import math
import mmap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from sae.errors import InputError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""by the names of safetensors"""


class Map(mmap.mmap):
    address = 0


_maps: "WeakValueDictionary[int, Map]" = WeakValueDictionary()
"""by the address where a tensor begins"""


class Place(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """bytes from the beginning of the file"""


def map_tensors(path: Path, places: Mapping[str, Place]) -> dict[str, Tensor]:
    """Tensors of a file that may not be written to. The places must lie inside it. Raises `OSError`."""
    with open(path, "rb") as file:
        mapped = Map(file.fileno(), 0, access=mmap.ACCESS_READ)
    tensors = {}
    for name, (dtype, shape, offset) in places.items():
        if 0 in shape:
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            flat = torch.frombuffer(mapped, dtype=dtype, count=math.prod(shape), offset=offset)
        mapped.address = flat.untyped_storage().data_ptr() - offset
        _maps[flat.untyped_storage().data_ptr()] = mapped
        tensors[name] = flat.view(shape)
    return tensors


def _map_of(tensor: Tensor) -> Map | None:
    return _maps.get(tensor.untyped_storage().data_ptr()) if tensor.device.type == "cpu" else None


def is_mapped(tensor: Tensor) -> bool:
    """Whether the tensor, or what it is a view of, is one of `map_tensors`."""
    return _map_of(tensor) is not None


def read_ahead(tensor: Tensor, yes: bool) -> None:
    """Whether the system should read more of the tensor's file than is asked for: good from front to back, a waste for single rows."""
    _advise(tensor, "MADV_NORMAL" if yes else "MADV_RANDOM")


def fetch(tensor: Tensor, starts: list[int], length: int) -> None:
    """Asks the system to read `length` numbers from each place of the tensor's storage on, all at once rather than one after another."""
    mapped = _map_of(tensor)
    if mapped is None or not hasattr(mmap, "MADV_WILLNEED"):
        return
    origin, size = tensor.untyped_storage().data_ptr() - mapped.address, tensor.element_size()
    for start in starts:
        begin = origin + start * size
        page = begin // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, page, begin + length * size - page)


def let_go(tensor: Tensor) -> None:
    """Takes the file's pages out of this process's memory; the system may keep them as its cache."""
    _advise(tensor, "MADV_DONTNEED")


def _advise(tensor: Tensor, how: str) -> None:
    mapped = _map_of(tensor)
    if mapped is not None and hasattr(mmap, how):  # Windows has none of it
        mapped.madvise(getattr(mmap, how))


def free_memory() -> int | None:
    """Bytes that can be had without killing anything; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), None)


def require_room(needed: int, what: str) -> None:
    """Raises `InputError` where the machine has not that much memory free, instead of being killed halfway."""
    free = free_memory()
    if free is not None and needed > free:
        raise InputError(
            f"expected {needed / 1e9:.1f} GB of free memory for {what}, got {free / 1e9:.1f} GB; use a machine with more, or a narrower one"
        )
