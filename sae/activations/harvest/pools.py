"""One pool of a harvest: the forward passes, the shuffle in memory, the shards.

s sequences · p positions · d width of a site · n rows
"""

from collections import Counter
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.activations.files.number_formats import FORMATS, decode, empty, encode, write_shard
from sae.activations.harvest.massive import PoolRows, is_massive
from sae.activations.harvest.models import Models
from sae.activations.harvest.parts import Parts
from sae.activations.harvest.plan import Masks, Pool, plan_batches
from sae.activations.text.tokens import Tokens
from sae.disk.remote import Place
from sae.errors import InputError


class Batch(NamedTuple):
    ids_sp: Tensor
    """int64, padded on the right with each sequence's first token, which no token before it sees"""
    kept_n: Tensor
    """int64, the stored positions: indices into the flattened batch"""
    positions_n: Tensor
    """int64, its global token positions"""
    tokens: int
    """without padding"""


class Recorded(NamedTuple):
    """A pool's activations in host memory; on CUDA perhaps still being copied until `ready`."""

    pool: Pool
    acts: dict[str, dict[str, Tensor]]
    """site -> the result of `encode`, in visiting order"""
    largest: dict[str, Tensor]
    """site -> max |x| of each row of the model's output, float32 [n]: NaN or infinite if a number of the row is"""
    norms: dict[str, Tensor]
    """site -> ‖x‖ of each row of the model's output, float32 [n]"""
    positions_n: Tensor
    """int64, global token positions"""
    ready: list[Any]
    """CUDA events, one per device"""


class Recorder(NamedTuple):
    """The part that is the same for all pools."""

    models: Models
    tokens: Tokens
    widths: dict[str, int]
    """site -> d"""
    dtype: str
    """of FORMATS"""
    masks: Masks
    max_norm_ratio: float | None
    never_massive: int | None
    """id of a token whose rows are stored with any norm"""
    batch_tokens: int
    seed: int

    def begin(self, pool: Pool, advance: Callable[[int], None], parts: Parts | None = None) -> Recorded:
        """Runs the forward passes, but for those that `parts` has the rows of; the device is waited for only where parts are kept.

        Memory: pool.rows activations per site in the format on disk, 8 bytes a row more, and the model's own.
        """
        device = self.models.first.device
        pinned = device.type == "cuda"  # so that copies from the device do not wait for it
        acts = {site: empty(self.dtype, pool.rows, width, pinned=pinned) for site, width in self.widths.items()}
        largest, norms = ({site: torch.empty(pool.rows, pin_memory=pinned) for site in self.widths} for _ in range(2))
        positions_n = torch.empty(pool.rows, dtype=torch.int64)
        arrays = {"rows": positions_n} | {f"{name} {site}": value for site, stored in acts.items() for name, value in stored.items()}
        for site in self.widths:
            arrays |= {f"largest {site}": largest[site], f"norms {site}": norms[site]}
        filled, done, kept = 0, 0, 0  # rows, and tokens
        for stop, part in parts.read(pool) if parts else ():
            kept = stop
            for name, value in part.items():
                arrays[name][filled : filled + len(value)].copy_(value)
            filled += len(part["rows"])
        if parts:
            parts.restart()
        before, devices = filled, set()
        for batch in self._batches(pool):
            done += batch.tokens
            if done <= kept:
                continue
            rows = slice(filled, filled + len(batch.kept_n))
            # No mask: what pads on the right comes after all that is stored, and without one attention is faster
            recorded = self.models.record(_to_device(batch.ids_sp, device), self.widths)
            for site, acts_spd in recorded.items():
                acts_nd = acts_spd.flatten(0, 1).index_select(0, _to_device(batch.kept_n, acts_spd.device))
                largest[site][rows].copy_(torch.linalg.vector_norm(acts_nd, torch.inf, dim=-1), non_blocking=pinned)
                precise = torch.promote_types(acts_nd.dtype, torch.float32)
                norms[site][rows].copy_(torch.linalg.vector_norm(acts_nd, dim=-1, dtype=precise), non_blocking=pinned)
                for name, value in encode(acts_nd, self.dtype).items():
                    acts[site][name][rows].copy_(value, non_blocking=pinned)
                devices.add(acts_spd.device)
            positions_n[rows] = batch.positions_n
            filled = rows.stop
            advance(batch.tokens)
            if parts and parts.due():
                for event in _ready(devices):
                    event.synchronize()  # host sync
                parts.write(pool, kept, done, {name: value[before:filled] for name, value in arrays.items()})
                before, kept = filled, done
        return Recorded(pool, acts, largest, norms, positions_n, _ready(devices))

    def tokens_per_second(self, pool: Pool) -> float:
        """The speed of the forward passes, measured on one batch of the pool: on its second pass, unless the first took more than a
        second."""
        lengths_s = np.diff(self.tokens.sequence_starts)[pool.sequences]
        batch_s = next(plan_batches(pool.sequences, lengths_s, self.batch_tokens))
        seconds = 0.0
        for _ in range(2):
            if seconds < 1:
                start = perf_counter()
                for event in self.begin(pool._replace(sequences=batch_s), lambda _: None).ready:
                    event.synchronize()  # host sync
                seconds = perf_counter() - start
        return float(lengths_s[: len(batch_s)].sum()) / seconds

    def record(self, pool: Pool, advance: Callable[[int], None]) -> tuple[dict[str, Tensor], PoolRows]:
        """Activations of the pool, site -> [n, d] floats, in visiting order, and what was massive among them; nothing is written.

        Raises `InputError` for numbers that are not finite in the number format.
        """
        recorded = self.begin(pool, advance)
        kept_n, massive = self.kept(recorded)
        acts = {site: decode(stored) for site, stored in recorded.acts.items()}
        if len(kept_n) == pool.rows:
            return acts, massive
        return {site: acts_nd[kept_n] for site, acts_nd in acts.items()}, massive

    def write(self, recorded: Recorded, path_of: Callable[[str, str], Place]) -> dict[str, Any]:
        """Writes a pool's shards, shuffled, to `path_of(site, shard name)`; returns the ledger's entry for it.

        May run in a thread of its own. Raises `InputError` for numbers that are not finite in the format on disk, and for a full disk.
        """
        pool = recorded.pool
        kept_n, massive = self.kept(recorded)
        order_n = kept_n.numpy()[pool.permutation(self.seed, len(kept_n))]
        shards = []
        for name, start, stop in pool.shards(len(order_n)):
            chosen_n = order_n[start:stop]
            shard: dict[str, Any] = {"name": name, "split": pool.split, "rows": stop - start, "files": {}, "squared_norm": {}}
            for site, stored in recorded.acts.items():
                shard["files"][site] = write_shard(path_of(site, name), self.dtype, stored, recorded.positions_n, chosen_n)
                shard["squared_norm"][site] = sum(map(sum_of_squares, _blocks(stored, torch.from_numpy(chosen_n))))
            shards.append(shard)
        return {"kind": "pool", "split": pool.split, "number": pool.number, "massive": massive._asdict(), "shards": shards}

    def kept(self, recorded: Recorded) -> tuple[Tensor, PoolRows]:
        """Rows of the pool that are stored, int64 [n]: all except massive ones (a token that is massive at one site counts for all sites);
        and the massive rows.

        Raises `InputError` naming the first row whose numbers, or their size in the format on disk, are not finite.
        """
        for event in recorded.ready:
            event.synchronize()  # host sync
        massive_n = torch.zeros(recorded.pool.rows, dtype=torch.bool)
        for site, largest_n in recorded.largest.items():
            self._require(largest_n.isfinite(), recorded, site)
            massive_n |= is_massive(recorded.norms[site], self.max_norm_ratio)
        if self.never_massive is not None:
            massive_n &= torch.from_numpy(np.asarray(self.tokens.ids[recorded.positions_n.numpy()]) != self.never_massive)
        keep_n = ~massive_n if self.max_norm_ratio is not None else torch.ones_like(massive_n)
        limit = torch.finfo(FORMATS[self.dtype].read).max
        for site, largest_n in recorded.largest.items():
            self._require((largest_n <= limit) | ~keep_n, recorded, site)
        return keep_n.nonzero()[:, 0], self._massive(recorded, massive_n)

    def _massive(self, recorded: Recorded, massive_n: Tensor) -> PoolRows:
        at_n = recorded.positions_n[massive_n].numpy()
        offsets = at_n - np.asarray(self.tokens.sequence_starts)[self.tokens.sequence_of(at_n)]
        square = {site: norm_n.double().square() for site, norm_n in recorded.norms.items()}
        of_these, of_all = ({site: float(s_n[rows].sum()) for site, s_n in square.items()} for rows in (massive_n, slice(None)))
        return PoolRows(recorded.pool.split, len(at_n), of_these, of_all, sorted(Counter(offsets.tolist()).items()))

    def _batches(self, pool: Pool) -> Iterator[Batch]:
        starts, lengths = self.tokens.sequence_starts, np.diff(self.tokens.sequence_starts)
        for sequences in plan_batches(pool.sequences, lengths[pool.sequences], self.batch_tokens):
            offsets_p = np.arange(lengths[sequences].max())
            inside_sp = offsets_p < lengths[sequences][:, None]
            positions_sp = starts[sequences][:, None] + np.where(inside_sp, offsets_p, 0)
            ids_sp = np.asarray(self.tokens.ids[positions_sp], dtype=np.int64)
            kept_n = np.flatnonzero(inside_sp & (self.masks.reasons(ids_sp, offsets_p) == 0))
            positions_n = torch.from_numpy(positions_sp.reshape(-1)[kept_n])
            yield Batch(torch.from_numpy(ids_sp), torch.from_numpy(kept_n), positions_n, int(inside_sp.sum()))

    def _require(self, good_n: Tensor, recorded: Recorded, site: str) -> None:
        if good_n.all():
            return
        row = int((~good_n).nonzero()[0])
        position, largest = int(recorded.positions_n[row]), float(recorded.largest[site][row])
        document = int(self.tokens.sequence_document[self.tokens.sequence_of(np.asarray(position))])
        where = f"{site}, document {document}, token {position}"
        if np.isfinite(largest):
            raise InputError(
                f"expected activations that fit {self.dtype}, but at {where} one is {largest:.4g}; use --dtype bfloat16 or float32"
            )
        raise InputError(
            f"expected finite activations, but the model gives NaN or infinity at {where}; "
            "try --model-dtype float32, or leave that document out"
        )


def sum_of_squares(acts_nd: Tensor) -> float:
    """Σ‖x‖² in float64, row by row, so that it is the same for any number of threads; in blocks of 512 KB, which stay in the cache."""
    blocks = acts_nd.split(max(1, (1 << 16) // acts_nd.shape[1]))
    return sum(float(torch.linalg.vector_norm(block.double(), dim=-1).square().sum()) for block in blocks)


def _blocks(stored: dict[str, Tensor], chosen_n: Tensor) -> Iterator[Tensor]:
    """The chosen rows as floats, in blocks so that no copy of all of them is made."""
    for part_n in chosen_n.split(1 << 12):
        yield decode({name: value.index_select(0, part_n) for name, value in stored.items()})  # several times as fast as [part_n]


def _ready(devices: set[torch.device]) -> list[Any]:
    """Events that come when what was queued on the GPUs is done."""
    return [torch.cuda.current_stream(device).record_event() for device in devices if device.type == "cuda"]


def _to_device(value: Tensor, device: torch.device) -> Tensor:
    """From host memory, without waiting for what the device is computing."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)
