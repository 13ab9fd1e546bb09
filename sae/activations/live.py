"""Training activations without a disk: a pool of text goes through the model when its rows are wanted, and is dealt out shuffled.

b rows of a batch · n rows of a pool · d width of the site
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.activations.massive import PoolRows, sentence, summary
from sae.activations.plan import Pool, plan_pools
from sae.activations.pools import Recorder, sum_of_squares
from sae.activations.settings import (
    RecordingConfig,
    check_recording,
    cut_text,
    facts,
    load_model,
    make_masks,
    make_recorder,
    require_tokens,
)
from sae.activations.tokens import Tokens
from sae.errors import InputError
from sae.progress import progress


class LiveActivations:
    """What the trainer asks of an `ActivationCache`, for activations that are computed instead of read.

    The rows are those that a harvest with the same settings stores for training, in its number format. In the place of a massive row,
    which is found only when its pool is computed, stands another row of the pool, so that an epoch has as many rows as planned. Memory:
    the model, the tokens (4 bytes each) and one pool of rows. Raises `InputError` for unusable options or text.
    """

    def __init__(self, config: RecordingConfig):
        check_recording(config)
        if len(config.sites) != 1:
            raise InputError(f"expected one site to train on, but {' '.join(config.sites)} came; give one, or make a cache of all of them")
        self.config, self.site = config, config.sites[0]
        self.recorder, pools = _prepare(config)
        self.pools = [pool for pool in pools if pool.split == "train" and pool.rows]
        if not self.pools:
            raise InputError("expected text to train on, but every token of it is left out; give more text, or keep more")
        self.d_in = self.recorder.widths[self.site]
        self._held: tuple[int, Tensor, PoolRows] | None = None

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The facts on model and text that a cache's manifest has too."""
        return facts(self.config, self.recorder.lm)

    @cached_property
    def mean_squared_norm(self) -> float:
        """Mean of ‖x‖², in the model's own units, over the first pool; a cache has it over all of its training rows."""
        return sum_of_squares(self.first_rows()) / self.pools[0].rows

    def rows(self, split: str) -> int:
        """Number of activations of an epoch; there are none but in "train"."""
        return sum(pool.rows for pool in self.pools if pool.split == split)

    def first_rows(self) -> Tensor:
        """[n, d_in], a fair sample of the training rows: the first pool's."""
        return self.pool_rows(0)

    def about_massive(self) -> str | None:
        """What a person should know of massive rows, from the first pool."""
        return sentence(summary(self.config.max_norm_ratio, [self._pool(0)[1]]))

    def pool_rows(self, number: int) -> Tensor:
        """Activations [n, d_in] of a pool in visiting order; the last one asked for is kept."""
        return self._pool(number)[0]

    def _pool(self, number: int) -> tuple[Tensor, PoolRows]:
        if self._held is None or self._held[0] != number:
            self._held = None  # so that there are never two
            acts, massive = self.recorder.record(self.pools[number], lambda _: None)
            rows_nd = acts[self.site]
            left_out = self.pools[number].rows - len(rows_nd)  # fewer than half, since the median is not above itself
            self._held = (number, torch.cat([rows_nd, rows_nd[:left_out]]) if left_out else rows_nd, massive)
        return self._held[1:]

    def batches(self, batch_size: int, *, seed: int, device: str | torch.device) -> "LiveBatches":
        return LiveBatches(self, batch_size, seed=seed, device=device)


class LiveBatches:
    """Endless batches [batch_size, d_in], like `ActivationBatches`: every row once in an epoch, and the same ones from any position on.

    The first epoch visits the pools in their own order, which the harvest's plan made random; later ones shuffle them anew. Rows are
    shuffled within a pool, anew in every epoch.
    """

    def __init__(self, live: LiveActivations, batch_size: int, *, seed: int = 0, device: str | torch.device = "cpu"):
        if batch_size < 1 or seed < 0:
            raise InputError(f"expected a batch size of at least 1 and a seed of at least 0, but {batch_size} and {seed} came")
        self.live, self.batch_size, self.seed, self.device = live, batch_size, seed, device
        self.rows = live.rows("train")
        self.position = 0
        """batches drawn so far"""
        self._shuffled: tuple[int, int] | None = None  # epoch, pool
        self._order_n = torch.empty(0, dtype=torch.int64)

    @property
    def batches_per_epoch(self) -> float:
        return self.rows / self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        parts = []
        row, left = self.position * self.batch_size, self.batch_size  # rows are counted over all epochs
        while left:
            parts.append(self._rows_from(row, left).to(self.device, torch.float32))
            row += len(parts[-1])
            left -= len(parts[-1])
        self.position += 1
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def seek(self, position: int) -> None:
        """Makes the next batch the one that an uninterrupted run gets after `position` batches; only its pool is computed, when drawn."""
        if position < 0:
            raise InputError(f"expected a position of at least 0, but {position} came; give the number of batches drawn")
        self.position = position

    def _rows_from(self, row: int, most: int) -> Tensor:
        """At most `most` rows from the `row`-th of all epochs on, and no further than its pool."""
        epoch, within = divmod(row, self.rows)
        pools = np.arange(len(self.live.pools))
        if epoch:
            pools = np.random.default_rng([self.seed, epoch]).permutation(pools)
        ends = np.cumsum([self.live.pools[pool].rows for pool in pools])
        place = int(np.searchsorted(ends, within, side="right"))
        pool = int(pools[place])
        acts_nd = self.live.pool_rows(pool)
        if self._shuffled != (epoch, pool):
            rng = np.random.default_rng([self.seed, epoch, pool + 1])  # + 1: numpy takes [s, e, 0] for [s, e]
            self._order_n, self._shuffled = torch.from_numpy(rng.permutation(len(acts_nd))), (epoch, pool)
        offset = within - int(ends[place]) + len(acts_nd)
        return acts_nd[self._order_n[offset : offset + most]]


def _prepare(config: RecordingConfig) -> tuple[Recorder, list[Pool]]:
    """The model, and the text as tokens with their plan, the same as a harvest's."""
    lm = load_model(config)
    cutter, cut = cut_text(config, lm)
    parts = []
    with progress("tokens", config.tokens, "tokens") as bar:
        for part in cut:
            parts.append(part)
            bar.advance(len(part.ids))
    require_tokens(config, cutter)
    tokens = Tokens.join(parts, cutter.label_names)
    size = config.pool_tokens
    pools = plan_pools(tokens, seed=config.seed, pool_tokens=size, shard_tokens=size, masks=make_masks(config, lm))
    return make_recorder(config, lm, tokens), pools
