"""Shared code of the formats: the tensors of a file checked against their shapes, and facts from a path's names."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.disk.foreign import read_npz, read_torch
from sae.disk.mapped import DTYPES, Place, is_mapped, map_tensors
from sae.disk.reading import fits, layout, read_tensors
from sae.errors import InputError

Device = str | torch.device
WHAT = "a dictionary's weights"
AGAIN = "copy or download the dictionary again"
FLOATS = "F64 F32 F16 BF16"
"""for schemas of safetensors files"""
NUMPY_NAMES = {"<f8": "F64", "<f4": "F32", "<f2": "F16"}
WIDE = 2 << 30
"""bytes of a file (2 GiB) from which its matrices stay on the disk, if a CPU computes"""


def has(*files: str) -> Callable[[Path], bool]:
    """For `Format.recognises`: a folder with a file for each of these patterns."""
    return lambda path: path.is_dir() and all(any(path.glob(pattern)) for pattern in files)


def file_at(path: Path, name: str) -> Path | None:
    """The file `name`, if `path` is its folder or the file itself; None if it is neither."""
    file = path if path.name == name else path / name
    return file if file.is_file() else None


def read_weights(path: Path, device: Device = "cpu", then: str = AGAIN) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .npz, .pt or .pth file, flat; on a CPU mapped from the disk where the file's layout allows it.

    The checksum of a .safetensors is compared, where it has one, unless it is `WIDE`. What else a .pt holds beside tensors is left out; see
    `read_torch`. Raises `InputError` for a file that is damaged or holds no tensors; `then` says what to do.
    """
    if wide := wide_weights(path, device, then):
        return wide
    if path.suffix == ".safetensors":
        return read_tensors(path, WHAT, device=device, then=then)[0]
    if path.suffix == ".npz":
        return {name: torch.from_numpy(array).to(device) for name, array in read_npz(path, WHAT).items()}
    state = read_torch(path, WHAT)
    if not isinstance(state, Mapping):
        raise InputError(f"expected named tensors in {path}, found {type(state).__name__}; {then}")
    return {str(name): tensor.to(device) for name, tensor in state.items() if isinstance(tensor, Tensor)}


def wide_weights(path: Path, device: Device, then: str = AGAIN) -> dict[str, Tensor] | None:
    """The tensors of a file of at least `WIDE` bytes, left on the disk; None for others, and for tensors that cannot stay there.

    Prints a line, because neither the file's checksum nor all weights are checked when it is opened.
    """
    if torch.device(device).type != "cpu" or path.suffix not in (".safetensors", ".npz") or not path.is_file():
        return None
    if path.stat().st_size < WIDE:
        return None
    places: dict[str, Place] = {}
    if path.suffix == ".npz":
        arrays = read_npz(path, WHAT, "r")
        for name, array in arrays.items():
            if isinstance(array, np.memmap) and array.flags.c_contiguous and array.dtype.str in NUMPY_NAMES:
                places[name] = Place(DTYPES[NUMPY_NAMES[array.dtype.str]], array.shape, array.offset)
        total = len(arrays)
    else:
        entries = layout(path, WHAT, then)[0]
        places = {name: Place(DTYPES[one.dtype], one.shape, one.offset) for name, one in entries.items() if one.dtype in DTYPES}
        total = len(entries)
    if not places or len(places) < total:
        return None
    print(
        f"{path} ({path.stat().st_size / 1e9:.1f} GB) stays on the disk: rows are checked for NaN and infinity when they are used, "
        "and no checksum of the file is compared",
        file=sys.stderr,
    )
    try:
        return map_tensors(path, places)
    except OSError as error:
        raise InputError(f"expected {WHAT} at {path}, which cannot be mapped into memory ({error.strerror}); {then}") from None


def require_finite(where: Path, name: str, tensor: Tensor, then: str = AGAIN) -> None:
    """Raises `InputError` for NaN or infinity. Matrices that stay on the disk are checked when they are used (rows.py)."""
    if is_mapped(tensor) and tensor.ndim > 1:
        return
    if tensor.numel() and not all(bool(end.isfinite()) for end in tensor.aminmax()):  # host sync; NaN is both ends
        raise InputError(f"{name} in {where} holds NaN or infinity; {then}")


def names_in(path: Path) -> frozenset[str]:
    """Names of the tensors (of a .pt, of everything at the top) in a file, without reading their values. Raises like `read_weights`."""
    if path.suffix == ".safetensors":
        return frozenset(layout(path, WHAT, AGAIN)[0])
    value = read_npz(path, WHAT) if path.suffix == ".npz" else read_torch(path, WHAT)
    return frozenset(map(str, value)) if isinstance(value, Mapping) else frozenset()


def checked(
    where: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, str], optional: Mapping[str, str] | None = None, **sizes: int
) -> dict[str, Tensor]:
    """Just the tensors of `shapes`, and those of `optional` that are there, all of one floating dtype.

    A shape is "d f" with names or numbers; sizes of one name are equal, and those given in `sizes` are known: {"W_enc": "d f",
    "b_enc": "f"}. Of several dtypes the widest is taken, which changes no value, but matrices that stay on the disk keep theirs. Raises
    `InputError`, which names the tensor, for one that is missing, unknown here, of another shape, not of floating point, or with NaN or
    infinity in it.
    """
    missing = [name for name in shapes if name not in tensors]
    known = {**shapes, **(optional or {})}
    if missing:
        raise InputError(f"expected the tensors {', '.join(shapes)} in {where}, which lacks {', '.join(missing)}; {AGAIN}")
    if unknown := sorted(set(tensors) - set(known)):
        raise InputError(f"{where} holds {', '.join(unknown)} beside {', '.join(known)}, which may change what the dictionary computes")
    found = {name: tensors[name] for name in known if name in tensors}
    for name, tensor in found.items():
        if not fits(tuple(tensor.shape), known[name], sizes):
            given = ", ".join(f"{size} = {sizes[size]}" for size in known[name].split() if size in sizes)
            raise InputError(
                f"expected {name} in {where} of shape [{known[name].replace(' ', ', ')}]{' with ' if given else ''}{given}, "
                f"found {list(tensor.shape)}; {AGAIN}"
            )
        if not tensor.is_floating_point():
            raise InputError(f"expected {name} in {where} to be of floating point, found {tensor.dtype}; {AGAIN}")
        require_finite(where, name, tensor)
    widest = found[next(iter(found))].dtype
    for tensor in found.values():
        widest = torch.promote_types(widest, tensor.dtype)
    return {name: tensor if is_mapped(tensor) and tensor.ndim > 1 else tensor.to(widest) for name, tensor in found.items()}


def require_value(where: Path, key: str, value: object, known: Sequence[object]) -> None:
    """Raises `InputError` unless the setting has one of the values that are understood."""
    if not any(value == one and isinstance(value, type(one)) for one in known):
        expected = " or ".join("nothing" if one is None else repr(one) for one in known)
        raise InputError(f"{where} has {key} {value!r}, which is not understood; expected {expected}")


def name_of(path: Path) -> str:
    """The path for recognising names: "google/gemma-scope-2b-pt-res/layer_12/…" inside a hub's cache, else the absolute path, with "/"."""
    text = path.absolute().as_posix()
    found = re.search(r".*/models--([^/]+?)--([^/]+)/snapshots/[^/]+/?(.*)", text)
    return "/".join(part for part in found.groups() if part) if found else text


def require_understood(where: Path, said: dict[str, Any], known: Mapping[str, Sequence[object]], facts: Set[str]) -> None:
    """Sets each missing setting of `known` to its default, the first of the values that are understood.

    Raises `InputError` for another value, and for a key that is neither known nor a fact on which the function does not depend.
    """
    for key, values in known.items():
        require_value(where, key, said.setdefault(key, values[0]), values)
    if unknown := sorted(set(said) - set(known) - facts):
        raise InputError(f"{where} has {', '.join(unknown)}, which may change what the dictionary computes and is not supported here")


def require_k(where: object, key: str, k: object, d_sae: int) -> int:
    """How many features are kept. Raises `InputError` for anything but a whole number from 1 to `d_sae`."""
    if type(k) is not int or not 1 <= k <= d_sae:
        raise InputError(f"{where} has {key} {k!r}, where a whole number from 1 to {d_sae} is expected")
    return k


def row_norms(W_dec_fo: Tensor) -> Tensor:
    """Lengths of the rows, [f], in float32 at least; 1 for rows of zeros, so that one may divide by them."""
    norm_f = torch.linalg.vector_norm(W_dec_fo, dim=-1, dtype=torch.promote_types(W_dec_fo.dtype, torch.float32))
    return torch.where(norm_f > 0, norm_f, torch.ones_like(norm_f))


def unit_rows(W_enc_fd: Tensor, b_enc_f: Tensor, W_dec_fo: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With decoder rows of length 1; pre-activations are multiplied by the old lengths. Dtypes stay."""
    norm_f = row_norms(W_dec_fo)
    scaled = W_enc_fd * norm_f[:, None], b_enc_f * norm_f, W_dec_fo / norm_f[:, None]
    return scaled[0].to(W_enc_fd), scaled[1].to(b_enc_f), scaled[2].to(W_dec_fo)
