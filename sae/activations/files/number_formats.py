"""The number formats in which activations are kept: floats to stored tensors and back, and a shard as a file.

int8 has one scale per row: x ≈ scale · q with q from −127 to 127 and scale = max|x| / 127, so no number is off by more than half a scale
(and the rounding to float16 in which it is read back).

n rows · d width of the site
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.disk.remote import Place
from sae.disk.writing import atomic

BLOCK_BYTES = 1 << 22
"""of a shard gathered at a time while it is written"""


class Format(NamedTuple):
    name: str
    """of the stored activations' dtype in safetensors"""
    stored: torch.dtype
    read: torch.dtype
    """of the rows as they are read back"""


FORMATS = {
    "float16": Format("F16", torch.float16, torch.float16),
    "bfloat16": Format("BF16", torch.bfloat16, torch.bfloat16),
    "float32": Format("F32", torch.float32, torch.float32),
    "int8": Format("I8", torch.int8, torch.float16),
}
"""by the manifest's `dtype`"""


def shard_layout(dtype: str, rows: int, width: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors of a shard in the order in which they lie in it: name -> safetensors' dtype, shape."""
    scale = {"scale": ("F32", (rows,))} if dtype == "int8" else {}
    return {"rows": ("I64", (rows,)), **scale, "activations": (FORMATS[dtype].name, (rows, width))}


def row_bytes(dtype: str, width: int) -> int:
    """What one row takes in a shard, its token position included."""
    return 8 + width * FORMATS[dtype].stored.itemsize + (4 if dtype == "int8" else 0)


def empty(dtype: str, rows: int, width: int, *, pinned: bool = False) -> dict[str, Tensor]:
    """Host memory for the result of `encode`."""
    stored = {"activations": torch.empty(rows, width, dtype=FORMATS[dtype].stored, pin_memory=pinned)}
    return stored if dtype != "int8" else {**stored, "scale": torch.empty(rows, pin_memory=pinned)}


def encode(acts_nd: Tensor, dtype: str) -> dict[str, Tensor]:
    """Floats as they are stored, on their device: `activations` [n, d], and for int8 `scale`, float32 [n]."""
    if dtype != "int8":
        return {"activations": acts_nd.to(FORMATS[dtype].stored)}
    scale_n = torch.linalg.vector_norm(acts_nd, torch.inf, dim=-1).float() / 127
    steps_nd = acts_nd.float() / scale_n.clamp(min=torch.finfo(torch.float32).tiny)[:, None]  # a row of zeros has the scale 0
    return {"activations": steps_nd.round_().to(torch.int8), "scale": scale_n}


def decode(stored: Mapping[str, Tensor]) -> Tensor:
    """The rows [n, d] as floats, in the format's `read` dtype; the stored tensor itself where that is one of floats."""
    if "scale" not in stored:
        return stored["activations"]
    return (stored["activations"] * stored["scale"][:, None]).to(FORMATS["int8"].read)


def write_shard(path: Place, dtype: str, stored: Mapping[str, Tensor], positions_n: Tensor, order_n: np.ndarray) -> dict[str, Any]:
    """Writes the rows `order_n` of `stored` and of their global token positions, atomically; returns the file's size and CRC-32.

    Gathered, checksummed and written block by block, so that no copy of a shard is held. Raises `InputError` when the disk is full.
    """
    tensors = {"rows": positions_n, **stored}
    layout = shard_layout(dtype, len(order_n), stored["activations"].shape[1])
    crc = size = 0
    with atomic(path) as temporary, open(temporary, "wb") as file:
        for chunk in _chunks(layout, tensors, order_n):
            file.write(chunk)
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return {"bytes": size, "crc32": f"{crc:08x}"}


def _chunks(layout: Mapping[str, tuple[str, tuple[int, ...]]], tensors: Mapping[str, Tensor], order_n: np.ndarray) -> Iterator[memoryview]:
    """A safetensors file: length of the header, header, tensors end to end (https://github.com/huggingface/safetensors#format)."""
    header, end = {}, 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + prod(shape) * tensors[name].dtype.itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8, as memory maps need
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in layout:
        bytes_nc = tensors[name].reshape(len(tensors[name]), -1).view(torch.uint8).numpy()
        block = max(1, BLOCK_BYTES // bytes_nc.shape[1])
        for start in range(0, len(order_n), block):
            yield np.take(bytes_nc, order_n[start : start + block], axis=0).reshape(-1).data
