"""The first half of an index: encodes a cache and writes its active entries as sorted runs, one piece for each of the cache's shards.

b rows of a chunk · d model width · n tokens of the cache
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.dictionaries.dictionary import Dictionary
from sae.disk.reading import read_tensors
from sae.disk.writing import require_free_space, sync, write_tensors
from sae.encoding import Encoder, Method
from sae.encoding.choice import agreed
from sae.entries import Buffers
from sae.errors import InputError
from sae.features.index.contribution import MAX_ROWS, ErrorSums, carried
from sae.features.index.csc import Spool, run_path
from sae.features.index.parallel import WORKERS, in_order
from sae.pieces import Pieces

if TYPE_CHECKING:
    from sae.activations.cache import ActivationCache, Shard

CHUNK_BYTES = 1 << 26  # of one [b, f] block of activations, the only dense one there ever is


class Spooled(NamedTuple):
    """The result after all rows have been encoded."""

    runs: list[Path]
    scanned: np.ndarray
    """tokens of which there were rows, bool [n]"""
    sums: dict[str, np.ndarray]
    """of `ErrorSums`"""
    encoder: str
    entries: int
    clipped: int


def spool_activations(
    made: Pieces,
    dictionary: Dictionary,
    cache: "ActivationCache",
    wanted: np.ndarray,
    splits: tuple[str, ...],
    encoder: Method | Literal["auto"],
) -> Spooled:
    """Encodes the rows of the `wanted` tokens, bool [n], and spools their non-zeros, together with the other processes."""
    from sae.activations.joined import targets_of

    caches = [cache] if not dictionary.is_transcoder else [cache, targets_of(cache, dictionary)]
    shards = shards_of(caches, splits)
    size = min(MAX_ROWS, max(1, CHUNK_BYTES // (dictionary.features_at_once * 4)))
    total = min(sum(cache.rows(split) for split in splits), int(wanted.sum()))
    prepared: list[Encoder | None] = []
    choosing = threading.Lock()

    def prepare(x_bd: Tensor, method: Method | Literal["auto"]) -> Encoder | None:
        with choosing:  # from the first chunk, for all
            if not prepared:
                prepared.append(dictionary.encoder(x_bd, method, total))
            return prepared[0]

    def find() -> Method:
        first = next((rows for shard in shards for (rows, *_), _ in chunks(caches, shard, wanted, size)), None)
        found = None if first is None else prepare(first.to(dictionary.W_enc_fd.device, dictionary.dtype), encoder)
        return found.method if found else "product"

    method = agreed(made, find)
    local = threading.local()
    checked: list[bool] = []

    @torch.no_grad()
    def entries_of(sums: ErrorSums, chunk: tuple[list[Tensor], np.ndarray]) -> tuple[np.ndarray, ...]:
        local.buffers = buffers = getattr(local, "buffers", None) or Buffers()
        x_bd, *y_bo = (rows.to(dictionary.W_enc_fd.device, dictionary.dtype) for rows in chunk[0])
        entries = dictionary.entries(x_bd, buffers, prepare(x_bd, method))
        values = entries.value_n.float().cpu().numpy()  # host sync
        if not np.isfinite(values).all():
            raise InputError(f"activations of tokens near {chunk[1][0]} in {cache.folder} are NaN or infinite; harvest the cache again")
        sums.add(x_bd, entries, *y_bo)
        return chunk[1], entries.row_n.cpu().numpy(), entries.feature_n.cpu().numpy(), values  # host sync

    def compute(number: int, path: Path) -> Callable[[], None]:
        spool, sums, rows = Spool(made.folder, dictionary.d_sae, name=path.stem), ErrorSums(dictionary), 0
        workers = 1 if dictionary.W_enc_fd.is_cuda else WORKERS
        for positions, *entries in in_order(partial(entries_of, sums), chunks(caches, shards[number], wanted, size), workers):
            spool.add(positions, *entries)
            rows += len(positions)
            made.advance(len(positions))
        made.advance(shards[number][0].rows - rows)  # those that are not wanted
        if not checked and rows:  # once it is known how sparse the code is: runs, merged file and its transpose
            require_free_space(made.folder, int(16 * spool.entries * (total / rows)), "the index")
            checked.append(True)
        return partial(_finish, spool, path, sums.sums)

    paths = made.make({f"{number:06d}.safetensors": one[0].rows for number, one in enumerate(shards)}, compute, "index", "rows")
    if made.processes.leads and method != "product":
        print(f"encoded by {method}; name it with --encoder to repeat this index bit for bit")
    scanned = np.zeros(len(wanted), bool)
    for shard in shards:
        positions = caches[0].positions(shard[0])
        scanned[positions[wanted[positions]]] = True
    if not scanned.any():
        raise InputError(
            f"expected activations in the splits {', '.join(splits)} of {cache.folder}, but there are none; name other --splits"
        )
    return gathered(paths, scanned, method)


def _finish(spool: Spool, path: Path, sums: dict[str, np.ndarray]) -> None:
    """Writes the remaining entries in memory and, last, the piece's own file, which marks its runs as complete."""
    spool.flush()
    for run in spool.paths:
        sync(run)
    numbers = {"runs": len(spool.paths), "entries": spool.entries, "clipped": spool.clipped}
    write_tensors(
        path, {name: torch.from_numpy(value) for name, value in sums.items()}, {name: str(value) for name, value in numbers.items()}
    )


def gathered(paths: list[Path], scanned: np.ndarray, encoder: str) -> Spooled:
    """All pieces together: their sums are integers, so the order does not matter."""
    runs, entries, clipped = [], 0, 0
    sums: dict[str, np.ndarray] = {}
    for path in paths:
        own, numbers = read_tensors(path, "a piece of an index")
        runs += [run_path(path.parent, path.stem, number) for number in range(int(numbers["runs"]))]
        entries, clipped = entries + int(numbers["entries"]), clipped + int(numbers["clipped"])
        sums = {name: carried(value.numpy() + sums.get(name, 0)) for name, value in own.items()}
    return Spooled(runs, scanned, sums, encoder, entries, clipped)


def shards_of(caches: Sequence["ActivationCache"], splits: tuple[str, ...]) -> list[tuple["Shard", ...]]:
    """The same shard of each of several caches of the same tokens, one after another."""
    return [shards for split in splits for shards in zip(*(cache.shards(split) for cache in caches), strict=True)]


def chunks(
    caches: Sequence["ActivationCache"], shards: tuple["Shard", ...], wanted: np.ndarray, size: int
) -> Iterator[tuple[list[Tensor], np.ndarray]]:
    """The wanted rows of one shard of each cache, in their order: activations [b, d] of each, and their tokens [b]; at most `size`."""
    x_nd, (rows, *_) = zip(*(cache.read(shard) for cache, shard in zip(caches, shards)))
    positions = np.asarray(rows)
    kept = np.flatnonzero(wanted[positions])
    for low in range(0, len(kept), size):
        part = kept[low : low + size]
        whole = len(part) == part[-1] - part[0] + 1  # a slice of the map, not a gather
        rows_of = slice(part[0], part[-1] + 1) if whole else torch.from_numpy(part)
        yield [x[rows_of] for x in x_nd], positions[part]
