"""Training rows without a disk: a pool of text goes through the model when its rows are wanted, and is dealt out shuffled.

n rows of a pool · d width of a site
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.activations.files.number_formats import FORMATS
from sae.activations.harvest.massive import PoolRows, sentence, summary
from sae.activations.harvest.plan import Pool, plan_pools
from sae.activations.harvest.pools import Recorder, sum_of_squares
from sae.activations.harvest.settings import (
    RecordingConfig,
    check_recording,
    cut_text,
    facts,
    load_models,
    make_masks,
    make_recorder,
    require_tokens,
)
from sae.activations.source import Batches, Group
from sae.activations.text.tokens import Tokens
from sae.errors import InputError
from sae.progress import progress


class PoolSource(ABC):
    """A `Source` whose rows come pool after pool, from anywhere. Memory: one pool of rows, the last that was asked for."""

    def __init__(self, manifest: dict[str, Any], widths: dict[str, int], sizes: Sequence[int], max_norm_ratio: float | None):
        """`manifest`: the facts on model and text that a cache's manifest has too. `sizes`: rows of each pool."""
        self.manifest, self.widths, self.sizes, self.max_norm_ratio = manifest, widths, sizes, max_norm_ratio
        self.rows = sum(sizes)
        self._held: tuple[int, dict[str, Tensor], PoolRows] | None = None

    def mean_squared_norm(self, site: str) -> float:
        """Mean of ‖x‖², in the model's own units, over the first pool; a cache has it over all of its training rows."""
        return sum_of_squares(self.first_rows(site)) / self.sizes[0]

    def first_rows(self, site: str) -> Tensor:
        """[n, d], a fair sample of the training rows: the first pool's."""
        return self.pool_rows(0)[site]

    def rows_for_measuring(self, sites: Sequence[str]) -> tuple[bool, dict[str, Tensor]]:
        """False, and the first pool's rows: what is held out from training is not computed."""
        return False, {site: self.first_rows(site).float() for site in sites}

    def about_massive(self, site: str) -> str | None:
        """From the first pool."""
        return sentence(summary(self.max_norm_ratio, [self.pool(0)[1]]), site)

    def pool_rows(self, number: int, after: Iterable[int] = ()) -> dict[str, Tensor]:
        """site -> activations [n, d] of a pool in visiting order; the last pool asked for is kept. `after`: pools that come after it."""
        return self.pool(number, after)[0]

    @abstractmethod
    def pool(self, number: int, after: Iterable[int] = ()) -> tuple[dict[str, Tensor], PoolRows]:
        """`pool_rows`, and what was massive among them."""

    def batches(self, batch_size: int, *, seed: int = 0, device: str | torch.device = "cpu") -> Batches:
        """Endless shuffled batches; raises `InputError` for a batch size or seed that cannot be meant."""
        return Batches(PoolEpochs(self, seed), batch_size, device=device)


class Production(NamedTuple):
    """What a process that makes rows takes, and how fast it is."""

    memory: dict[str, int]
    """bytes, by purpose"""
    pool_rows: int
    pool_bytes: int
    rows_per_second: float


class LiveSource(PoolSource):
    """Computes its rows.

    The rows are those that a harvest with the same settings stores for training, in its number format. In the place of a massive row,
    which is found only when its pool is computed, stands another row of the pool, so that an epoch has as many rows as planned. Memory:
    the model, the tokens (4 bytes each) and one pool of rows. Raises `InputError` for unusable options or text.
    """

    def __init__(self, config: RecordingConfig):
        check_recording(config)
        self.recorder, pools = _prepare(config)
        self.pools = [pool for pool in pools if pool.split == "train" and pool.rows]
        if not self.pools:
            raise InputError("expected text to train on, but every token of it is left out; give more text, or keep more")
        sizes = [pool.rows for pool in self.pools]
        super().__init__(facts(config, self.recorder.models), self.recorder.widths, sizes, config.max_norm_ratio)

    def production(self) -> Production:
        """Runs the model on one batch to measure its speed."""
        recorder, pool = self.recorder, max(self.pools, key=lambda pool: pool.rows)
        lengths = np.diff(recorder.tokens.sequence_starts)
        weights = sum(tensor.nbytes for lm in recorder.models.all.values() for tensor in lm.model.parameters())
        pool_bytes = pool.rows * sum(self.widths.values()) * FORMATS[recorder.dtype].read.itemsize
        memory = {"model": weights, "tokens": 4 * int(lengths.sum()), "a pool of rows": pool_bytes}
        share = pool.rows / float(lengths[pool.sequences].sum())  # of the tokens
        return Production(memory, pool.rows, pool_bytes, share * recorder.tokens_per_second(pool))

    def pool(self, number: int, after: Iterable[int] = ()) -> tuple[dict[str, Tensor], PoolRows]:
        """The result of `make`."""
        if self._held is None or self._held[0] != number:
            self._held = None  # so that there are never two
            self._held = (number, *self.make(number))
        return self._held[1:]

    def make(self, number: int) -> tuple[dict[str, Tensor], PoolRows]:
        """The rows of a pool, site -> [n, d] in visiting order, and what was massive among them."""
        acts, massive = self.recorder.record(self.pools[number], lambda _: None)
        kept, planned = len(next(iter(acts.values()))), self.sizes[number]
        if kept == 0:
            raise InputError("expected rows to train on, but every row of a pool is massive at one of the sites; give fewer sites")
        if kept < planned:
            stand_in_n = torch.arange(planned) % kept
            acts = {site: rows_nd[stand_in_n] for site, rows_nd in acts.items()}
        return acts, massive


class PoolEpochs:
    """The `Epochs` of a `PoolSource`: each pool is a group.

    The first epoch visits the pools in their own order, which the harvest's plan made random; later ones shuffle them again. Rows are
    shuffled within a pool, differently in every epoch.
    """

    def __init__(self, source: PoolSource, seed: int):
        if seed < 0:
            raise InputError(f"expected a seed of at least 0, got {seed}; give another")
        self.source, self.seed, self.rows_per_epoch = source, seed, source.rows
        self._order_of = lru_cache(maxsize=1)(self._make_order)

    def place(self, row: int) -> tuple[int, int]:
        return divmod(row, self.source.rows)

    def starts(self, epoch: int) -> np.ndarray:
        return np.cumsum([0, *(self.source.sizes[pool] for pool in self._visits(epoch))])

    def group(self, epoch: int, number: int) -> Group:
        pool = int(self._visits(epoch)[number])
        return Group(self.source.pool_rows(pool, self._after(epoch, number)), self._order_of(epoch, pool))

    def _after(self, epoch: int, number: int) -> Iterator[int]:
        """Pools that are visited after a group, without end."""
        for later in count(epoch):
            visits = self._visits(later)
            yield from (visits[number + 1 :] if later == epoch else visits).tolist()

    def _visits(self, epoch: int) -> np.ndarray:
        pools = np.arange(len(self.source.sizes))
        return np.random.default_rng([self.seed, epoch]).permutation(pools) if epoch else pools

    def _make_order(self, epoch: int, pool: int) -> Tensor:
        rng = np.random.default_rng([self.seed, epoch, pool + 1])  # + 1: numpy takes [s, e, 0] for [s, e]
        return torch.from_numpy(rng.permutation(self.source.sizes[pool]))


def _prepare(config: RecordingConfig) -> tuple[Recorder, list[Pool]]:
    """The models, and the text as tokens with their plan, the same as a harvest's."""
    models = load_models(config)
    cutter, cut = cut_text(config, models)
    parts = []
    with progress("tokens", config.tokens, "tokens") as bar:
        for part in cut:
            parts.append(part)
            bar.advance(len(part.ids))
    require_tokens(config, cutter)
    tokens = Tokens.join(parts, cutter.label_names)
    size = config.pool_tokens
    pools = plan_pools(tokens, seed=config.seed, pool_tokens=size, shard_tokens=size, masks=make_masks(config, models))
    return make_recorder(config, models, tokens), pools
