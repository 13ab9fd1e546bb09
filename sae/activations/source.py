"""The input of training: shuffled rows of one or several sites, epoch after epoch, the same for the same seed, from any position.

b rows of a batch · n rows in memory · d width of a site
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sae.errors import InputError


class Ended(Exception):
    """There are no more rows, at the same batch in all processes that train together; `error` is this one's reason."""

    def __init__(self, error: BaseException):
        super().__init__(str(error))
        self.error = error


class Source(Protocol):
    """Training rows of one or several sites of one model, read from a cache or computed when needed.

    Row i of every site belongs to the same token.
    """

    @property
    def manifest(self) -> dict[str, Any]:
        """Facts about model and text: at least `model`, `dataset`, `context` and `prepend_bos`, as in a cache's manifest.json."""

    @property
    def widths(self) -> dict[str, int]:
        """site -> d"""

    @property
    def rows(self) -> int:
        """Rows of each site in an epoch."""

    def mean_squared_norm(self, site: str) -> float:
        """Mean of ‖x‖² over the training rows, in the model's own units."""

    def first_rows(self, site: str) -> Tensor:
        """[n, d], a fair sample of the training rows."""

    def rows_for_measuring(self, sites: Sequence[str]) -> tuple[bool, dict[str, Tensor]]:
        """Whether rows were held out from training, and some of them, site -> [n, d]; otherwise training rows."""

    def about_massive(self, site: str) -> str | None:
        """A sentence about rows with massive norms; None if there are none."""

    def batches(self, batch_size: int, *, seed: int, device: str | torch.device) -> "Batches":
        """Endless shuffled batches, float32 on `device`."""


class Group(NamedTuple):
    """Rows that are in memory together and are returned in random order."""

    acts: dict[str, Tensor]
    """site -> [at least n, d]"""
    order_n: Tensor
    """int64, the order of its rows"""


class Epochs(Protocol):
    """How a source cuts its epochs into groups."""

    @property
    def rows_per_epoch(self) -> float:
        """Average number of this reader's rows in an epoch; readers that share epochs have one row more in some epochs."""

    def place(self, row: int) -> tuple[int, int]:
        """The epoch of this reader's `row`-th row, counted over all epochs, and the number of the reader's rows before it in that epoch."""

    def starts(self, epoch: int) -> np.ndarray:
        """Number of rows before each group of this reader's share of an epoch, and the total, int64 [groups + 1]."""

    def group(self, epoch: int, number: int) -> Group:
        """Reads or computes a group; the result of an earlier call is then no longer valid."""


class Batches:
    """Endless batches, site -> [batch_size, d] of `dtype` on `device`; row i of every site belongs to the same token.

    Every row is returned once in an epoch; the rows of a last short batch are moved to the next epoch.
    """

    def __init__(self, epochs: Epochs, batch_size: int, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        if batch_size < 1:
            raise InputError(f"expected a batch size of at least 1, got {batch_size}; give a larger number")
        self.batch_size, self.device, self.dtype = batch_size, device, dtype
        self.position = 0
        """batches drawn so far"""
        self._epochs = epochs

    @property
    def batches_per_epoch(self) -> float:
        return self._epochs.rows_per_epoch / self.batch_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        parts: list[dict[str, Tensor]] = []
        row = self.position * self.batch_size  # of this reader, counted over all epochs
        left = self.batch_size
        while left:
            epoch, within = self._epochs.place(row)
            starts = self._epochs.starts(epoch)
            number = int(np.searchsorted(starts, within, side="right")) - 1
            group = self._epochs.group(epoch, number)
            offset = within - int(starts[number])
            chosen_n = group.order_n[offset : offset + left]
            # widened where they go: to a GPU half as many bytes travel
            parts.append({site: a_nd.index_select(0, chosen_n).to(self.device).to(self.dtype) for site, a_nd in group.acts.items()})
            row += len(chosen_n)
            left -= len(chosen_n)
        self.position += 1
        return parts[0] if len(parts) == 1 else {site: torch.cat([part[site] for part in parts]) for site in parts[0]}

    def seek(self, position: int) -> None:
        """Makes the next batch the one that follows `position` batches of an uninterrupted run; reads nothing before it is drawn."""
        if position < 0:
            raise InputError(f"expected a position of at least 0, got {position}; give the number of batches drawn")
        self.position = position
