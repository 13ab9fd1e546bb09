"""Tensors that stay in their file: parts of one read-only map of it; only pages that are used are in memory.

Unlike torch's own maps, for which the system reserves the full memory, they may be larger than memory, and pages can be released.
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
"""by the names that safetensors uses"""


class Map(mmap.mmap):
    address = 0


_maps: "WeakValueDictionary[int, Map]" = WeakValueDictionary()
"""by the memory address at which a tensor starts"""


class Place(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """bytes from the beginning of the file"""


def map_tensors(path: Path, places: Mapping[str, Place]) -> dict[str, Tensor]:
    """Read-only tensors of a file. The places must be inside it. Raises `OSError`."""
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
    """Whether the tensor, or the tensor of which it is a view, is one of `map_tensors`."""
    return _map_of(tensor) is not None


def read_ahead(tensor: Tensor, yes: bool) -> None:
    """Whether the system should read further ahead in the tensor's file: good for reading in order, wasteful for single rows."""
    _advise(tensor, "MADV_NORMAL" if yes else "MADV_RANDOM")


def fetch(tensor: Tensor, starts: list[int], length: int) -> None:
    """Asks the system to load `length` numbers from each of these places of the tensor's storage, all together instead of one after
    another."""
    mapped = _map_of(tensor)
    if mapped is None or not hasattr(mmap, "MADV_WILLNEED"):
        return
    origin, size = tensor.untyped_storage().data_ptr() - mapped.address, tensor.element_size()
    for start in starts:
        begin = origin + start * size
        page = begin // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, page, begin + length * size - page)


def let_go(tensor: Tensor) -> None:
    """Releases the file's pages from this process's memory; the system may keep them as cache."""
    _advise(tensor, "MADV_DONTNEED")


def _advise(tensor: Tensor, how: str) -> None:
    mapped = _map_of(tensor)
    if mapped is not None and hasattr(mmap, how):  # Windows has none of it
        mapped.madvise(getattr(mmap, how))


def free_memory() -> int | None:
    """Bytes that can be allocated without killing anything; None if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), None)


def require_room(needed: int, what: str) -> None:
    """Raises `InputError` if the machine does not have this much free memory, instead of being killed halfway."""
    free = free_memory()
    if free is not None and needed > free:
        raise InputError(
            f"expected {needed / 1e9:.1f} GB of free memory for {what}, got {free / 1e9:.1f} GB; use a machine with more, or a narrower one"
        )
