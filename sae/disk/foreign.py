"""Files of other tools, other than safetensors and JSON, read without running any code in them: torch's .pt, numpy's .npz, yaml."""

import math
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from sae.disk.reading import one_sentence, read_bytes, require
from sae.errors import InputError

if TYPE_CHECKING:
    import torch

LARGEST_YAML = 1 << 20
"""bytes; settings are a few hundred"""
MOST_COMPRESSED = 32
"""maximum ratio of unpacked arrays to the file's size: weights hardly compress, and a file that expands without end is an attack"""
COPY_AGAIN = "copy or download it again"


class Record:
    """Represents an object of a class that is not available: only its attributes."""


def read_torch(path: Path, what: str, classes: Sequence[str] = ()) -> Any:
    """Reads a file of `torch.save`: containers, numbers, texts and tensors, on the CPU, mapped from the file if its layout allows it.

    `what` names the kind of file in the error sentence. An object of one of `classes`, full names, becomes a `Record` whose class has that
    class's name. Raises `InputError` for a file that is missing or damaged, and for one with anything else, because such a file may
    run code when it is read.
    """
    import torch

    if not path.is_file():
        raise InputError(f"expected {what} at {path}, which does not exist; check its name")
    try:
        records = [(type(name.rpartition(".")[2], (Record,), {}), name) for name in classes]
        with torch.serialization.safe_globals(records):  # type: ignore[arg-type]
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many kinds of errors for invalid bytes
        if isinstance(error, UnpicklingError) and (found := re.search(r"(?:Trying to.*)?GLOBAL ([\w.]+)|Can only|Trying to", str(error))):
            raise InputError(
                f"{path} holds more than tensors, numbers and texts{f' ({found[1]})' if found[1] else ''}, and reading that would run code "
                "out of the file; ask its author for the state dict alone, best as safetensors"
            ) from None
        raise InputError(f"expected {what} at {path}, but it is cut off or no file of torch.save ({_first(error)}); {COPY_AGAIN}") from None
    for tensor in _tensors(value):
        # one number stretched over a huge shape would fill the memory with the first copy
        if tensor.layout != torch.strided or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise InputError(f"expected plain tensors in {path}, found one of shape {list(tensor.shape)} that is sparse or stretched")
    return value


def _tensors(value: Any) -> "list[torch.Tensor]":
    """All tensors in nested containers."""
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    value = vars(value) if isinstance(value, Record) else value
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for one in inside for tensor in _tensors(one)]


def _first(error: Exception) -> str:
    """The first sentence of an error, without colour codes."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    return re.split(r"\. (?=[A-Z])", text.replace("Weights only load failed. ", ""))[0][:200] or type(error).__name__


def read_npz(path: Path, what: str, mode: Literal["c", "r"] = "c") -> dict[str, np.ndarray]:
    """The arrays of a file of `np.savez`, mapped if not compressed: mode "c" allows writing, "r" may be larger than memory.

    Raises `InputError` for a file that is missing or damaged, and for arrays of Python objects, which would run code.
    """
    if not path.is_file():
        raise InputError(f"expected {what} at {path}, which does not exist; check its name")
    with one_sentence(f"{what} at {path}", COPY_AGAIN), zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > MOST_COMPRESSED * path.stat().st_size:
            raise InputError(f"{path} would be more than {MOST_COMPRESSED} times its size in memory, which weights never are; {COPY_AGAIN}")
        return {entry.filename.removesuffix(".npy"): _array(path, archive, entry, file, mode) for entry in entries}


def _array(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, file: IO[bytes], mode: Literal["c", "r"]) -> np.ndarray:
    with archive.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape: tuple[int, ...]
        shape, by_columns, dtype = read_header(stream)
        if dtype.hasobject:
            raise InputError(f"{entry.filename} in {path} holds Python objects, and reading those would run code; ask for plain arrays")
        if entry.file_size != stream.tell() + math.prod(map(int, shape)) * dtype.itemsize:
            raise ValueError(f"the size of {entry.filename} is not what its header says")
        if entry.compress_type == zipfile.ZIP_STORED and 0 not in shape:
            file.seek(entry.header_offset + 26)  # the local header's two lengths, which may differ from the directory's
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            offset = entry.header_offset + 30 + name + extra + stream.tell()
            return np.memmap(path, dtype, mode, offset, shape, "F" if by_columns else "C")
        flat = np.frombuffer(bytearray(stream.read()), dtype)
        return flat.reshape(shape, order="F" if by_columns else "C")


def read_yaml(path: Path, what: str, schema: Any = Any) -> Any:
    """The value of a small yaml file, if it fits `schema`, a type that pydantic knows; only plain values, never an object.

    Raises `InputError` for a file that is missing, too large, not yaml, or does not fit.
    """
    import yaml

    text = read_bytes(path, what)
    if len(text) > LARGEST_YAML:
        raise InputError(f"expected {what} at {path}, but it has {len(text):,} bytes, where {LARGEST_YAML:,} are more than enough")
    with one_sentence(f"{what} at {path}", COPY_AGAIN):
        value = yaml.safe_load(text)
    require(value, schema, f"{what} at {path}")
    return value
