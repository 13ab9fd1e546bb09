"""Live activations in several processes: the first ones train, the others run the model and send them pool after pool.

The processes that train need the same pools in the same order. Their leader requests them by number, some ahead. The n-th requested
pool is made by producer n modulo their number. A finished pool waits at its producer until it is needed, and the producer waits too, so
that there are never more than one pool in each producer and two in each trainer, for any speed of the two sides. Messages go through
torchrun's store, pools through gloo. Rows and their order are those of one process.
"""

import json
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.activations.harvest.massive import PoolRows
from sae.activations.live import LiveSource, PoolSource
from sae.activations.source import Ended
from sae.errors import InputError
from sae.mesh import Axis, Gone, speaking
from sae.processes import Processes


def produce(source: LiveSource, processes: Processes, trainers: int) -> None:
    """Makes pools until none is requested any more. Raises `InputError` if the model or text differ from the first producer's."""
    import torch.distributed as dist

    facts = {"manifest": source.manifest, "widths": source.widths, "sizes": source.sizes, "max_norm_ratio": source.max_norm_ratio}
    if processes.rank == trainers:
        processes.tell("live", facts)
    elif processes.hear("live") != json.loads(json.dumps(facts)):
        raise InputError(
            f"expected the same model and text in every process, but process {processes.rank} has others than process {trainers}; "
            "give all of them the same"
        )
    number = processes.rank - trainers
    while (pool := processes.hear(f"ask{number}")) is not None:
        acts, massive = source.make(pool)
        dtypes = {site: str(rows_nd.dtype).removeprefix("torch.") for site, rows_nd in acts.items()}
        processes.tell(f"made{number}", {"dtypes": dtypes, "massive": massive._asdict()})
        if processes.hear(f"take{number}"):
            with speaking():
                for rows_nd in acts.values():
                    bytes_nd = rows_nd.contiguous().view(torch.uint8)
                    for sent in dist.batch_isend_irecv([dist.P2POp(dist.isend, bytes_nd, trainer) for trainer in range(trainers)]):
                        sent.wait()
        number += processes.world - trainers


class Asked(NamedTuple):
    number: int
    """of the request, from 0"""
    pool: int


class FedSource(PoolSource):
    """A `PoolSource` in a process that trains: other processes make its pools. Memory: two pools.

    All that train, the processes of `every`, call the same methods in the same order. If one of them does not get a pool, `pool` raises
    `Ended` in all.
    """

    def __init__(self, processes: Processes, every: Axis):
        facts = processes.hear("live")
        super().__init__(facts["manifest"], facts["widths"], facts["sizes"], facts["max_norm_ratio"])
        self.processes, self.every, self.producers = processes, every, processes.world - every.size
        self._requests = 0
        self._asked: deque[Asked] = deque()
        self._coming: Future[tuple[dict[str, Tensor], PoolRows]] | None = None  # the first of them
        self._thread = ThreadPoolExecutor(1)

    def pool(self, number: int, after: Iterable[int] = ()) -> tuple[dict[str, Tensor], PoolRows]:
        """A pool made by a producer's `make`; as many of `after` as there are producers are requested ahead."""
        if self._held is None or self._held[0] != number:
            self._held = None
            while self._asked and self._asked[0].pool != number:
                self._drop()
            if not self._asked:
                self._ask(number)
            self._held = (number, *self._received())
            self._asked.popleft()
            self._coming = None
        ahead = list(islice(after, self.producers))
        while [one.pool for one in self._asked] != ahead[: len(self._asked)]:
            self._drop()
        for pool in ahead[len(self._asked) :]:
            self._ask(pool)
        if self._asked:
            self._first()  # comes while this one is used
        return self._held[1:]

    def close(self) -> None:
        """Ends the producers."""
        while self._asked:
            self._drop()
        for number in range(self._requests, self._requests + self.producers):
            self._tell(f"ask{number}", None)

    def _tell(self, key: str, value: Any) -> None:
        """Sends a message once for all that train."""
        if self.processes.leads:
            self.processes.tell(key, value)

    def _ask(self, pool: int) -> None:
        self._tell(f"ask{self._requests}", pool)
        self._asked.append(Asked(self._requests, pool))
        self._requests += 1

    def _first(self) -> Future[tuple[dict[str, Tensor], PoolRows]]:
        """The first requested pool, as it arrives."""
        if self._coming is None:
            self._coming = self._thread.submit(self._receive, self._asked[0])
        return self._coming

    def _received(self) -> tuple[dict[str, Tensor], PoolRows]:
        """The first requested pool, when all that train have it."""
        found, error = None, None
        try:
            found = self._first().result()
        except (Gone, InputError, SystemExit) as caught:
            error = caught
            self.processes.fail()  # ends the others' waiting too
        if self.every.any(error is not None):
            raise Ended(error or Gone("it got no rows"))
        assert found is not None
        return found

    def _drop(self) -> None:
        """The first requested pool is not needed any more, as after a `seek`."""
        if self._coming is not None:
            self._coming.result()
            self._coming = None
        else:
            self._tell(f"take{self._asked[0].number}", False)
        self._asked.popleft()

    def _receive(self, asked: Asked) -> tuple[dict[str, Tensor], PoolRows]:
        import torch.distributed as dist

        made: dict[str, Any] = self.processes.hear(f"made{asked.number}")
        self._tell(f"take{asked.number}", True)
        rows = self.sizes[asked.pool]
        acts = {site: torch.empty(rows, self.widths[site], dtype=getattr(torch, dtype)) for site, dtype in made["dtypes"].items()}
        with speaking():
            for rows_nd in acts.values():
                dist.recv(rows_nd.view(torch.uint8), self.every.size + asked.number % self.producers)
        return acts, PoolRows(**made["massive"])
