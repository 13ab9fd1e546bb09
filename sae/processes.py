"""Several processes that do one job, as torchrun starts them: who leads, who takes which piece, and that they stop together.

They share a folder, and a few words through torchrun's key-value store. No tensor goes between them here.
"""

import itertools
import json
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from sae.errors import InputError

PATIENCE = 600.0
"""seconds without progress from anyone after which the leader gives up waiting for the others"""
FAREWELL = 5.0
"""seconds that the process in whose memory the store lies stays for the others to read the last word"""
ASIDE = 1.0
"""seconds between two looks at what the others say, while computing"""

Item = TypeVar("Item")
_jobs = itertools.count()


class Processes:
    """This process among those of one job; alone without torchrun. The leader is number 0.

    A job may have several stages, in each of which `deal` and then `wait_for_all` are called, by every process.
    """

    def __init__(self, store: Any, rank: int, world: int, local_rank: int, local_world: int, hosts_store: bool = False):
        self.store, self.rank, self.world, self.local_rank, self.local_world = store, rank, world, local_rank, local_world
        self._hosts_store = hosts_store
        self._total, self._pending, self._looked, self._stage = 0, 0, time.monotonic(), 0

    @classmethod
    def from_environment(cls) -> "Processes":
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
        return cls(dist.PrefixStore(f"job{next(_jobs)}", store), rank, world, *local, hosts)

    @contextmanager
    def together(self) -> Iterator[None]:
        """When one process fails inside, so do all, soon, with exit code 2; the sentence is that of the first."""
        import torch.distributed as dist

        try:
            yield
        except dist.DistError:
            raise InputError("the process that led this run is gone; give the same command again, and it goes on") from None
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

    def device(self, name: str) -> str:
        """Where this process computes: "auto" becomes a GPU of its own when several processes run on one machine with GPUs.

        Raises `InputError` for more processes than GPUs.
        """
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self.local_world == 1 or name != "auto" or not gpus:
            return name
        if self.local_world > gpus:
            raise InputError(f"expected a GPU for each of the {self.local_world} processes, but there are {gpus} GPUs; start fewer")
        return f"cuda:{self.local_rank}"

    def tell(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def hear(self, key: str) -> Any:
        """Waits for the message under `key` and gives it."""
        while not self.store.check([key]):
            self._look()
            time.sleep(0.05)
        return json.loads(self.store.get(key))

    def require_same(self, **facts: Any) -> None:
        """Raises `InputError` in a process whose facts, or whose code, are not the leader's. Every process calls it."""
        facts = json.loads(json.dumps({"code": code_crc32(), **facts}))
        if self.leads:
            self.tell("facts", facts)
            return
        theirs = self.hear("facts")
        for name in facts | theirs:
            if facts.get(name) != theirs.get(name):
                raise InputError(
                    f"expected the same {name.replace('_', ' ')} in every process, but process {self.rank} has "
                    f"{facts.get(name)} and process 0 {theirs.get(name)}; give all of them the same"
                )

    def deal(self, items: Sequence[Item]) -> Iterator[Item]:
        """The items that fall to this process: the next free one whenever it is ready for another. The same sequence for everyone."""
        self._stage, self._total, self._pending = self._stage + 1, 0, 0
        while (number := self.store.add(f"dealt{self._stage}", 1) - 1) < len(items):
            self._look()
            yield items[number]

    def count(self, units: int) -> int:
        """Notes units as done, and gives those that all have done in this stage, as far as known.

        Now and then, looks whether another process failed.
        """
        self._pending += units
        if time.monotonic() - self._looked > ASIDE:
            self._look()
        return self._total + self._pending

    def wait_for_all(self) -> Iterator[int]:
        """Ends when every process is here; gives what `count` gives in the meantime. Only the leader waits."""
        self._look()
        key = f"done{self._stage}"
        self.store.add(key, 1)
        seen, since = self._total, time.monotonic()
        while self.leads and self.store.add(key, 0) < self.world:
            time.sleep(0.05)
            self._look()
            if self._total > seen:
                seen, since = self._total, time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                raise InputError("the other processes of this run have gone silent; stop them and give the same command again")
            yield seen

    def _look(self) -> None:
        self._total, self._pending = self.store.add(f"units{self._stage}", self._pending), 0
        self._looked = time.monotonic()
        if self.store.add("failed", 0):
            sys.exit(2)  # silently: the sentence is on the terminal already

    def _part(self) -> None:
        """The process in whose memory the store lies stays until the others have read the last word."""
        gone, until = self.store.add("gone", 1), time.monotonic() + FAREWELL
        while self._hosts_store and gone < self.world and time.monotonic() < until:
            time.sleep(0.05)
            gone = self.store.add("gone", 0)


@cache
def code_crc32() -> str:
    """Of the package's sources, by which processes on several machines know whether they run the same."""
    found = 0
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        found = zlib.crc32(path.read_bytes(), found)
    return f"{found:08x}"
