"""Activations that other programs stored: a SAELens folder, .npy files, safetensors files, all read by ranges of rows.

n rows · d width · s sequences · p positions
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.activations.text.datasets_errors import told_plainly
from sae.disk.reading import layout, one_sentence, require_within
from sae.errors import InputError

RUN = 1024
"""Rows of a plain array that stay in one split: neighbours may belong to one text."""
FLOATS = ("float16", "bfloat16", "float32", "float64")


class ForeignRows(NamedTuple):
    what: str
    """kind of source, for the manifest"""
    rows: int
    d_in: int
    run: int
    """consecutive rows that belong together: a sequence"""
    read: Callable[[int, int], Tensor]
    """rows `start` to `stop`, [n, d] of any float dtype"""
    ids: np.ndarray | None
    """token ids int32 [n], if known"""
    hook_name: str | None = None


class Array(NamedTuple):
    """One file with a tensor [n, d]."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int, int], Tensor]


def open_source(paths: tuple[Path, ...], column: str | None, token_ids: Path | None) -> ForeignRows:
    """Opens a folder that SAELens' CacheActivationsRunner wrote, or files with an array [n, d] each, joined in order.

    `column` names the hook of a folder, or the tensor of safetensors files, if there are several. Raises `InputError` for anything else.
    """
    if len(paths) == 1 and paths[0].is_dir():
        if token_ids is not None:
            raise InputError("--token-ids belongs to plain arrays, but a SAELens folder has its own token_ids; leave it out")
        return _open_saelens(paths[0], column)
    if not paths:
        raise InputError("expected a SAELens folder, or .npy or .safetensors files, got no source; name one with --source")
    return _open_arrays(paths, column, token_ids)


def _open_saelens(folder: Path, column: str | None) -> ForeignRows:
    """Columns: the hook's name, Array2D [p, d] per row, and usually token_ids [p]; a row is a sequence."""
    import datasets

    expected = f"a folder written by SAELens' CacheActivationsRunner at {folder}"
    with told_plainly(expected):
        dataset = datasets.load_from_disk(str(folder))
    if not isinstance(dataset, datasets.Dataset):
        raise InputError(f"expected one dataset in {folder}, but it holds the splits {', '.join(dataset)}; name the folder of one of them")
    hooks = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Array2D)]
    hook = _choose(hooks, column, f"hook in {folder}")
    positions, d_in = dataset.features[hook].shape
    if dataset.features[hook].dtype not in FLOATS or len(dataset) == 0:
        raise InputError(
            f"expected rows of floats in the column {hook!r} of {folder}, but it has {len(dataset)} of {dataset.features[hook].dtype}"
        )
    of_hook = dataset.select_columns([hook]).with_format("numpy")

    def read(start: int, stop: int) -> Tensor:
        first, last = start // positions, -(-stop // positions)
        with told_plainly(expected):
            acts_nd = np.asarray(of_hook[first:last][hook]).reshape((last - first) * positions, d_in)
        return torch.from_numpy(acts_nd[start - first * positions : stop - first * positions])

    ids = None
    if "token_ids" in dataset.column_names:
        batches = dataset.select_columns(["token_ids"]).with_format("numpy").iter(1 << 12)
        with told_plainly(expected):
            ids = np.concatenate([_token_ids(np.asarray(batch["token_ids"])).reshape(-1) for batch in batches])
        if len(ids) != len(dataset) * positions:
            raise InputError(f"expected {positions} token_ids beside each sequence in {folder}, got {len(ids)} in all; make it again")
    return ForeignRows("saelens", len(dataset) * positions, d_in, positions, read, ids, hook)


def _open_arrays(paths: tuple[Path, ...], column: str | None, token_ids: Path | None) -> ForeignRows:
    arrays = [_open_array(path, column, dimensions=2) for path in paths]
    d_in = arrays[0].shape[1]
    for path, array in zip(paths, arrays):
        if array.dtype not in FLOATS:
            raise InputError(f"expected floats ({', '.join(FLOATS)}) in {path}, but it holds {array.dtype}; convert it")
        if array.shape[1] != d_in:
            raise InputError(f"expected rows of width {d_in}, as in {paths[0]}, but {path} has {array.shape[1]}; import it by itself")
    ends = np.cumsum([array.shape[0] for array in arrays])
    if ends[-1] == 0 or d_in == 0:
        raise InputError(f"expected rows in {paths[0]}, but it is empty; name another file")

    def read(start: int, stop: int) -> Tensor:
        parts = []
        while start < stop:
            number = int(np.searchsorted(ends, start, side="right"))
            begin = int(ends[number]) - arrays[number].shape[0]
            last = min(stop, int(ends[number]))
            parts.append(arrays[number].read(start - begin, last - begin))
            start = last
        return torch.cat(parts)

    return ForeignRows("arrays", int(ends[-1]), d_in, RUN, read, _read_ids(token_ids, int(ends[-1])) if token_ids else None)


def _read_ids(path: Path, rows: int) -> np.ndarray:
    array = _open_array(path, None, dimensions=1)
    if array.dtype.removeprefix("u") not in ("int8", "int16", "int32", "int64") or array.shape != (rows,):
        raise InputError(f"expected {rows} integer token ids in {path}, but it holds {array.dtype} {list(array.shape)}; give one per row")
    return _token_ids(array.read(0, rows).numpy())


def _token_ids(ids: np.ndarray) -> np.ndarray:
    """As int32; raises `InputError` for numbers that are not token ids."""
    if ids.dtype.kind not in "iu":
        raise InputError(f"expected token ids as integers, but they are {ids.dtype}; convert them")
    require_within(ids, 0, 1 << 31, "token ids", "the source")
    return ids.astype(np.int32)


def _open_array(path: Path, column: str | None, dimensions: int) -> Array:
    if path.suffix == ".npy" and path.is_file():
        opened = _open_npy(path)
    elif path.suffix == ".safetensors" and path.is_file():
        opened = _open_safetensors(path, column, dimensions)
    else:
        raise InputError(f"expected a .npy or .safetensors file at {path}, which is none or does not exist; check the path")
    if len(opened.shape) != dimensions:
        raise InputError(f"expected an array of {dimensions} dimensions in {path}, but its shape is {list(opened.shape)}; reshape it")
    return opened


def _open_npy(path: Path) -> Array:
    with one_sentence(f"a .npy array of numbers at {path}"):
        values = np.lib.format.open_memmap(path, mode="r")
    if values.dtype.kind not in "fiu":
        raise InputError(f"expected a .npy array of numbers at {path}, but it holds {values.dtype.name}; convert it")
    native = values.dtype.newbyteorder("=")
    return Array(values.shape, native.name, lambda start, stop: torch.from_numpy(np.array(values[start:stop], native)))


def _open_safetensors(path: Path, column: str | None, dimensions: int) -> Array:
    from safetensors import safe_open

    places, _ = layout(path, "a safetensors file", "save it again")
    name = _choose([n for n, p in places.items() if len(p.shape) == dimensions], column, f"tensor of {dimensions} dimensions in {path}")
    with one_sentence(f"a safetensors file at {path}"):
        file: Any = safe_open(path, framework="pt")
        piece = file.get_slice(name)
        dtype = str(piece[:0].dtype).removeprefix("torch.")
    return Array(places[name].shape, dtype, lambda start, stop: piece[start:stop])


def _choose(names: list[str], wanted: str | None, what: str) -> str:
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted not in names:
        found = "none was named" if wanted is None else f"{wanted!r} was asked for"
        raise InputError(f"expected one {what}, which has {', '.join(names) or 'none'}, but {found}; choose with --column")
    return wanted
