"""A safetensors file written tensor by tensor, each in parts that are made when needed: it may be larger than memory."""

import json
import math
import zlib
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from sae.disk.checksum import BLANK, MARK
from sae.disk.writing import atomic

DTYPES = {torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""as safetensors names and orders them, the widest first"""


class Streamed(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Iterable[Tensor]
    """its rows one after another, contiguous and on the CPU"""


def in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names in the order in which safetensors writes: the widest first, so that each starts at a multiple of its width."""
    return sorted(tensors, key=lambda name: (list(DTYPES).index(tensors[name].dtype), name))


def write_streamed(path: Path, tensors: Mapping[str, Streamed], metadata: dict[str, str], leads: bool = True) -> None:
    """Writes the tensors in the given order, with a checksum (see checksum.py), atomically.

    If several processes make the parts together, all call it, and only the one that `leads` writes.
    """
    if not leads:
        for tensor in tensors.values():
            deque(tensor.parts, maxlen=0)  # sends them
        return
    header: dict[str, object] = {"__metadata__": metadata | {"crc32": BLANK}}
    end = 0
    for name, (dtype, shape, _) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    with atomic(path) as temporary, open(temporary, "wb") as file:
        crc32 = written(file, head, 0)
        for tensor in tensors.values():
            for part in tensor.parts:
                crc32 = written(file, part.reshape(-1).view(torch.uint8).numpy().data, crc32)
        assert file.tell() == len(head) + end
        file.seek(head.index(MARK) + len(MARK))
        file.write(f"{crc32:08x}".encode())


def written(file: IO[bytes], part: bytes | memoryview, crc32: int) -> int:
    """Writes some bytes, and returns the checksum of all bytes so far."""
    file.write(part)
    return zlib.crc32(part, crc32)
