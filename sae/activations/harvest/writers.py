"""Several processes that harvest one cache, as torchrun starts them: who leads, who takes which pool, and that they stop together.

They share the cache's folder, and a few words through torchrun's key-value store. No tensor goes between them, so there is no collective,
and no difference between CPU and GPU.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from sae.errors import InputError

PATIENCE = 600.0
"""seconds without a token from anyone after which the leader gives up waiting for the last pools"""
FAREWELL = 5.0
"""seconds that the process in whose memory the store lies stays for the others to read the last word"""
ASIDE = 1.0
"""seconds between two looks at what the others say, while computing"""

Item = TypeVar("Item")
_harvests = itertools.count()


class Writers:
    """This process among those of one harvest; alone without torchrun. The leader is number 0."""

    def __init__(self, store: Any, rank: int, world: int, local_rank: int, local_world: int, hosts_store: bool = False):
        self.store, self.rank, self.world, self.local_rank, self.local_world = store, rank, world, local_rank, local_world
        self._hosts_store = hosts_store
        self._total, self._pending, self._looked = 0, 0, time.monotonic()

    @classmethod
    def from_environment(cls) -> "Writers":
        """Reads what torchrun sets: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT."""
        import torch.distributed as dist

        world = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
        if world == 1:
            return cls(dist.HashStore(), 0, 1, 0, 1)
        try:
            store, rank, _ = next(dist.rendezvous("env://"))
        except (ValueError, dist.DistError) as error:
            raise InputError(
                f"expected the environment that torchrun sets for its processes, but {error}; start them with torchrun"
            ) from None
        local = (int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        return cls(dist.PrefixStore(f"harvest{next(_harvests)}", store), rank, world, *local, hosts)

    @contextmanager
    def together(self) -> Iterator[None]:
        """When one process fails inside, so do all, soon, with exit code 2; the sentence is that of the first."""
        import torch.distributed as dist

        try:
            yield
        except dist.DistError:
            raise InputError("the process that led this harvest is gone; give the same command again, and it goes on") from None
        except BaseException as error:
            first = True
            with suppress(dist.DistError):
                first = self.store.add("failed", 1) == 1
            if first or not isinstance(error, InputError):
                raise
            sys.exit(2)
        finally:
            with suppress(dist.DistError):
                self._part()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def tell(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def hear(self, key: str) -> Any:
        """Waits for the message under `key` and gives it."""
        while not self.store.check([key]):
            self._look()
            time.sleep(0.05)
        return json.loads(self.store.get(key))

    def deal(self, items: Sequence[Item]) -> Iterator[Item]:
        """The items that fall to this process: the next free one whenever it is ready for another. The same sequence for everyone."""
        while (number := self.store.add("dealt", 1) - 1) < len(items):
            self._look()
            yield items[number]

    def count(self, tokens: int) -> int:
        """Notes tokens as done, and gives those that all have done, as far as known. Now and then, looks whether another process failed."""
        self._pending += tokens
        if time.monotonic() - self._looked > ASIDE:
            self._look()
        return self._total + self._pending

    def wait_for_all(self) -> Iterator[int]:
        """Ends when every process has come here; gives what `count` gives in the meantime. Only the leader waits."""
        self._look()
        self.store.add("done", 1)
        seen, since = self._total, time.monotonic()
        while self.leads and self.store.add("done", 0) < self.world:
            time.sleep(0.05)
            self._look()
            if self._total > seen:
                seen, since = self._total, time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                raise InputError("the other processes of this harvest have gone silent; stop them and give the same command again")
            yield seen

    def _look(self) -> None:
        self._total, self._pending = self.store.add("tokens", self._pending), 0
        self._looked = time.monotonic()
        if self.store.add("failed", 0):
            sys.exit(2)  # silently: the sentence is on the terminal already

    def _part(self) -> None:
        """The process in whose memory the store lies stays until the others have read the last word."""
        gone, until = self.store.add("gone", 1), time.monotonic() + FAREWELL
        while self._hosts_store and gone < self.world and time.monotonic() < until:
            time.sleep(0.05)
            gone = self.store.add("gone", 0)
