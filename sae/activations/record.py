"""One pool of a harvest: the forward passes, the shuffle in memory, the shards.

s sequences · p positions · d width of a site · n rows
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.activations.ledger import describe_file
from sae.activations.plan import Pool, kept, plan_batches
from sae.activations.tokens import Tokens
from sae.errors import InputError
from sae.files import write_tensors

if TYPE_CHECKING:
    from sae.language_model import LanguageModel


class Batch(NamedTuple):
    ids_sp: Tensor
    """int64, padded on the right with zeros"""
    mask_sp: Tensor
    """int64, 1 for tokens, 0 for padding"""
    positions_sp: np.ndarray
    """int64, global token positions; meaningless at padding"""


class Recorder(NamedTuple):
    """What stays the same from pool to pool."""

    lm: "LanguageModel"
    tokens: Tokens
    widths: dict[str, int]
    """site -> d"""
    dtype: torch.dtype
    """on disk"""
    left_out_id: int | None
    """token whose activations are not stored"""
    batch_tokens: int
    seed: int

    def write(self, pool: Pool, path_of: Callable[[str, str], Path], advance: Callable[[int], None]) -> dict[str, Any]:
        """Records a pool and writes its shards to `path_of(site, shard name)`; returns the ledger's entry for it.

        Memory: pool.rows activations per site in the format on disk, one shard more, and the model's own.
        """
        acts, positions_n = self._record(pool, advance)
        order_n = torch.from_numpy(pool.permutation(self.seed))
        shards = []
        for name, start, stop in pool.shards:
            chosen_n = order_n[start:stop]
            shard: dict[str, Any] = {"name": name, "split": pool.split, "rows": stop - start, "files": {}, "squared_norm": {}}
            for site in self.widths:
                acts_nd = acts[site][chosen_n]
                write_tensors(path_of(site, name), {"activations": acts_nd, "rows": positions_n[chosen_n]})
                shard["files"][site] = describe_file(path_of(site, name))
                shard["squared_norm"][site] = sum_of_squares(acts_nd)
            shards.append(shard)
        return {"kind": "pool", "split": pool.split, "number": pool.number, "shards": shards}

    def _record(self, pool: Pool, advance: Callable[[int], None]) -> tuple[dict[str, Tensor], Tensor]:
        """Activations of the pool's kept tokens, site -> [n, d], and their global positions, int64 [n], in visiting order."""
        acts = {site: torch.empty(pool.rows, width, dtype=self.dtype) for site, width in self.widths.items()}
        positions_n = torch.empty(pool.rows, dtype=torch.int64)
        filled = 0
        for batch in self._batches(pool):
            keep_sp = batch.mask_sp.bool() & torch.from_numpy(kept(batch.ids_sp.numpy(), self.left_out_id))
            kept_positions = torch.from_numpy(batch.positions_sp)[keep_sp]
            stop = filled + len(kept_positions)
            mask_sp = None if batch.mask_sp.all() else batch.mask_sp  # without a mask attention is faster
            recorded = self.lm.record(batch.ids_sp, list(self.widths), mask_sp)
            for site, acts_spd in recorded.items():
                acts_nd = acts_spd[keep_sp.to(acts_spd.device)]
                stored_nd = acts_nd.to(self.dtype)
                self._require_finite(site, acts_nd, stored_nd, kept_positions)
                acts[site][filled:stop] = stored_nd.cpu()  # host sync
            positions_n[filled:stop] = kept_positions
            filled = stop
            advance(int(batch.mask_sp.sum()))
        return acts, positions_n

    def _batches(self, pool: Pool) -> Iterator[Batch]:
        starts, lengths = self.tokens.sequence_starts, np.diff(self.tokens.sequence_starts)
        for sequences in plan_batches(pool.sequences, lengths[pool.sequences], self.batch_tokens):
            offsets_p = np.arange(lengths[sequences].max())
            inside_sp = offsets_p < lengths[sequences][:, None]
            positions_sp = starts[sequences][:, None] + np.where(inside_sp, offsets_p, 0)
            ids_sp = np.where(inside_sp, self.tokens.ids[positions_sp], 0).astype(np.int64)
            yield Batch(torch.from_numpy(ids_sp), torch.from_numpy(inside_sp.astype(np.int64)), positions_sp)

    def _require_finite(self, site: str, acts_nd: Tensor, stored_nd: Tensor, positions_n: Tensor) -> None:
        bad_n = ~stored_nd.isfinite().all(-1)
        if not bad_n.any():  # host sync
            return
        first = int(bad_n.nonzero()[0])  # host sync
        document = int(self.tokens.sequence_document[self.tokens.sequence_of(positions_n[first].numpy())])
        where = f"{site}, document {document}, token {int(positions_n[first])}"
        if acts_nd[first].isfinite().all():
            largest = float(acts_nd[first].abs().max())
            raise InputError(
                f"expected activations that fit {self.dtype}, but at {where} one is {largest:.4g}; use --dtype bfloat16 or float32"
            )
        raise InputError(
            f"expected finite activations, but the model gives NaN or infinity at {where}; "
            "try --model-dtype float32, or leave that document out"
        )


def sum_of_squares(acts_nd: Tensor) -> float:
    """Σ‖x‖² in float64, in blocks so that no float64 copy of all rows is made."""
    return sum(float(block.double().square().sum()) for block in acts_nd.split(1 << 12))
