"""Files that others wrote, or that a disk damaged: JSON and arrays, checked against a schema before anything is used."""

import gzip
import json
import math
import reprlib
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
from pydantic import FailFast, Field, TypeAdapter, ValidationError

from sae.disk.checksum import is_intact
from sae.disk.remote import Place, RemotePath
from sae.errors import InputError

if TYPE_CHECKING:
    import torch

# what schemas are made of, beside typing_extensions.TypedDict, whose further keys are let through
Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Item = TypeVar("Item")
LongList = Annotated[list[Item], FailFast()]
"""a long list, of which only the first bad entry is reported"""

SMALL = 1 << 25
"""bytes (32 MB) up to which a file's checksum is compared whenever it is opened"""
LONGEST_HEADER = 100_000_000
"""bytes; the limit of the safetensors library too"""
LARGEST_UNPACKED = 1 << 30
"""maximum size of an unpacked .gz file, in bytes: a small file that unpacks to more than fits into memory is not one of ours"""
MAKE_AGAIN = "make it again"

ITEM_BYTES = {
    **dict.fromkeys(("U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
NUMPY_DTYPES = {
    "U8": "u1",
    "U16": "<u2",
    "U32": "<u4",
    "U64": "<u8",
    "I8": "i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "BOOL": "?",
}

Arrays = Mapping[str, tuple[str, str]]
"""A schema: name -> the accepted dtypes, as safetensors names them, and the shape. A size is a number or a name, and sizes with the same
name are equal: {"W_dec": ("F32 BF16", "f d"), "offsets": ("I64", "f+1")}."""


class TensorLayout(NamedTuple):
    dtype: str
    """as safetensors writes it, for example "F16" """
    shape: tuple[int, ...]
    offset: int
    """bytes from the beginning of the file"""


def read_json(path: Place, what: str, schema: Any = Any, *, unique: bool = False) -> Any:
    """The file's value, unchanged, if it fits `schema`, a type that pydantic knows. `what` names the kind of file in the error sentence.

    Raises `InputError` for a file that is missing, cannot be read, is not JSON or does not fit; with `unique`, which is for files that
    people write, also if a name is there twice in one object.
    """
    return parse_json(read_bytes(path, what), f"{what} at {path}", schema, unique=unique)


def read_bytes(path: Place, what: str) -> bytes:
    """All of a file. Raises `InputError` if it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"expected {what} at {path}, which does not exist; check its path") from None
    except (OSError, ValueError) as error:  # a folder, a loop of links, no permission; a name that no file can have
        raise InputError(f"expected {what} at {path}, which cannot be read ({_reason(error)})") from None


def read_gzip(path: Path, what: str, then: str) -> bytes:
    """The unpacked bytes of a .gz file. Raises `InputError` if it is damaged or larger than `LARGEST_UNPACKED`; `then` says what to do."""
    try:
        with gzip.open(path) as file:
            parts, size = [], 0  # in parts: one read of so many bytes would ask for all that memory at once
            while size <= LARGEST_UNPACKED and (part := file.read(1 << 20)):
                parts.append(part)
                size += len(part)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"expected {what} in {path}, but it cannot be read ({_reason(error)}); {then}") from None
    if size > LARGEST_UNPACKED:
        raise InputError(f"expected {what} in {path}, but it unpacks to more than {LARGEST_UNPACKED >> 20:,} MB; {then}")
    return b"".join(parts)


def parse_json(text: str | bytes, what: str, schema: Any = Any, *, unique: bool = False) -> Any:
    """Like `read_json`, for text; `what` also says where it is from."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"expected each name once in {what}, got {twice[0]!r} twice in one object; remove one")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=once if unique else None)
    except RecursionError:
        raise InputError(f"expected {what}, but it is nested too deeply to be meant") from None
    except ValueError as error:  # the syntax, the encoding, a number of thousands of digits
        raise InputError(f"expected {what}, but it is not valid JSON ({error})") from None
    require(value, schema, what)
    return value


def read_json_lines(path: Path, what: str, schema: Any = Any) -> list[Any]:
    """The rows of a .jsonl or .jsonl.gz file; empty lines are left out. Raises `InputError` for a row that does not fit the schema."""
    then = "fetch it again"
    data = read_gzip(path, what, then) if path.suffix == ".gz" else read_bytes(path, what)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"expected {what} in {path}, but it cannot be read ({error}); {then}") from None
    lines = enumerate(text.split("\n"), 1)
    return [parse_json(line, f"a row in line {number} of {path}", schema) for number, line in lines if line.strip()]


def require(value: Any, schema: Any, what: str) -> None:
    """Raises `InputError`, which names the first place that does not fit, unless a value from JSON fits the schema."""
    try:
        _adapter(schema).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = repr(".".join(map(str, first["loc"]))) if first["loc"] else "content"
        if first["type"] == "missing":
            raise InputError(f"expected {what}, but its {where} is missing") from None
        fault = first["msg"].replace("Input should be", "should be")
        raise InputError(f"expected {what}, but its {where} {fault}, and is {reprlib.repr(first['input'])}") from None


@lru_cache(64)
def _adapter(schema: Any) -> TypeAdapter:
    return TypeAdapter(schema)


def layout(path: Place, what: str, then: str = MAKE_AGAIN) -> tuple[dict[str, TensorLayout], dict[str, str]]:
    """The places of the tensors of a safetensors file, and its metadata; only the header is read.

    `what` names the kind of file in the error sentence, and `then` says what to do. Raises `InputError` if the file is missing, cannot
    be read, is not a safetensors file, or does not end where its header says.
    """
    try:
        return _layout(path)
    except FileNotFoundError:
        raise InputError(f"expected {what} at {path}, which does not exist; check the path or {then}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # all that bytes can do to a header
        reason = _reason(error)
        raise InputError(f"expected {what} at {path}, but it is damaged or no safetensors file ({reason}); {then}") from None


def _layout(path: Place) -> tuple[dict[str, TensorLayout], dict[str, str]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, LONGEST_HEADER):
            raise ValueError("its header is cut off")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata are no texts")
    places, end = {}, 8 + length
    for name, entry in header.items():
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not all(type(number) is int and 0 <= number < 1 << 62 for number in (*shape, start, stop)) or len(shape) > 8:
            raise ValueError(f"the numbers of {name!r} in its header are none")
        if dtype not in ITEM_BYTES:
            raise ValueError(f"{name!r} is of an unknown type {dtype!r}")
        if stop - start != math.prod(shape) * ITEM_BYTES[dtype] or math.prod(max(1, n) for n in shape) >= 1 << 59:
            raise ValueError(f"the size of {name!r} in its header is wrong")
        places[name] = TensorLayout(dtype, tuple(shape), 8 + length + start)
        end = max(end, 8 + length + stop)
    if end != size:
        raise ValueError(f"it has {size} bytes where its header says {end}")
    return places, metadata


def require_arrays(places: Mapping[str, TensorLayout], schema: Arrays, where: str, then: str = MAKE_AGAIN, **sizes: int) -> dict[str, int]:
    """The named sizes, including given ones, if all arrays of the schema exist and fit it; else `InputError`. Other arrays may exist
    too."""
    for name, (dtypes, shape) in schema.items():
        if name not in places:
            raise InputError(f"expected the array {name!r} in {where}, which has {', '.join(places) or 'none'}; {then}")
        place = places[name]
        if place.dtype not in dtypes.split() or not fits(place.shape, shape, sizes):
            known = ", ".join(f"{size} = {sizes[size]}" for size in sorted(sizes) if size in shape.replace("+1", "").split())
            raise InputError(
                f"expected {name!r} in {where} to be {' or '.join(dtypes.split())} [{shape.replace(' ', ', ')}]"
                f"{' with ' if known else ''}{known}, but it is {place.dtype} {list(place.shape)}; {then}"
            )
    return sizes


def fits(shape: tuple[int, ...], pattern: str, sizes: dict[str, int]) -> bool:
    """Whether a shape fits the pattern; records sizes that are named for the first time."""
    words = pattern.split()
    if len(words) != len(shape):
        return False
    for size, word in zip(shape, words):
        name, _, more = word.partition("+")
        size -= int(more or 0)
        if size < 0 or size != (int(name) if name.isdecimal() else sizes.setdefault(name, size)):
            return False
    return True


def map_arrays(
    path: Place, what: str, schema: Arrays | None = None, *, mode: Literal["r", "r+"] = "r", then: str = MAKE_AGAIN, **sizes: int
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a safetensors file as parts of one memory map of it (except bfloat16, which numpy does not have), and its metadata.
    A remote file is read into memory.

    A checksum in a file of at most 32 MB is compared. Raises `InputError` like `layout`, and for arrays that do not fit `schema`.
    """
    places, metadata = layout(path, what, then)
    require_arrays(places, schema or {}, str(path), then, **sizes)
    if mode == "r" and path.stat().st_size <= SMALL:
        require_intact(path, what, then)
    if not places:
        return {}, metadata
    # plain arrays are several times as fast to cut as numpy's maps
    whole = np.frombuffer(path.read_bytes(), np.uint8) if isinstance(path, RemotePath) else np.asarray(np.memmap(path, np.uint8, mode))
    arrays = {}
    for name, (dtype, shape, offset) in places.items():
        if dtype in NUMPY_DTYPES:
            size = math.prod(shape) * ITEM_BYTES[dtype]
            arrays[name] = whole[offset : offset + size].view(NUMPY_DTYPES[dtype]).reshape(shape)
    return arrays, metadata


def read_tensors(
    path: Place, what: str, schema: Arrays | None = None, *, device: "str | torch.device" = "cpu", then: str = MAKE_AGAIN, **sizes: int
) -> "tuple[dict[str, torch.Tensor], dict[str, str]]":
    """All tensors of a safetensors file on `device`, and its metadata; its checksum, if it has one, is compared.

    Raises `InputError` like `layout`, and for arrays that do not fit `schema`.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    places, metadata = layout(path, what, then)
    require_arrays(places, schema or {}, str(path), then, **sizes)
    require_intact(path, what, then)
    try:
        if isinstance(path, RemotePath):
            return {name: tensor.to(device) for name, tensor in load(path.read_bytes()).items()}, metadata
        with safe_open(path, "pt", str(device)) as file:
            return {name: file.get_tensor(name) for name in places}, metadata
    except (OSError, SafetensorError) as error:  # what lies over one another or between two arrays
        raise InputError(f"expected {what} at {path}, but it is damaged or no safetensors file ({error}); {then}") from None


def require_intact(path: Place, what: str, then: str = MAKE_AGAIN) -> None:
    """Raises `InputError` if a safetensors file has a checksum that does not match its bytes."""
    if is_intact(path) is False:
        raise InputError(f"expected {what} at {path}, but its checksum is wrong, so it is damaged; {then}")


def require_starts(starts: np.ndarray, end: int, name: str, where: Place | str) -> None:
    """Raises `InputError` unless the numbers rise from 0 to `end`."""
    if len(starts) < 1 or starts[0] != 0 or starts[-1] != end or (starts[1:] < starts[:-1]).any():
        raise InputError(f"expected {name} in {where} to rise from 0 to {end}, but they do not, so it is damaged; make it again")


def require_within(numbers: np.ndarray, low: int, high: int, name: str, where: Place | str) -> None:
    """Raises `InputError` unless all numbers are at least `low` and below `high`."""
    if not numbers.size:
        return
    least, most = int(numbers.min()), int(numbers.max())
    if not low <= least <= most < high:
        raise InputError(
            f"expected {name} in {where} from {low} to {high - 1}, but they go from {least} to {most}, so it is damaged; make it again"
        )


@contextmanager
def one_sentence(what: str, then: str = MAKE_AGAIN) -> Iterator[None]:
    """For readers of other packages, which raise many kinds of errors on damaged bytes."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(_reason(error).split())
        raise InputError(f"expected {what}, but it cannot be read ({reason[:300]}); {then}") from None


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
