"""Several processes that do one job, as torchrun starts them: who leads, who takes which piece, and that they stop together.

They share a folder, and a few words through torchrun's key-value store. No tensor goes between them here.
"""

import io
import itertools
import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from typing import Any, TextIO, TypeVar

from sae.errors import InputError

BEAT = 1.0
"""seconds between two signs of life"""
SILENCE = 300.0
"""seconds without one after which a process is taken for dead; where a launcher stops the others sooner, this is not needed"""
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
        self._failed_first: bool | None = None
        self._total, self._pending, self._looked, self._stage = 0, 0, time.monotonic(), 0
        self._watched = {other: (0, time.monotonic()) for other in (range(1, world) if rank == 0 else [0])}
        self._listened = time.monotonic()

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
        life = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)  # torchrun's restarts may have one store
        return cls(dist.PrefixStore(f"life{life}job{next(_jobs)}", store), rank, world, *local, hosts)

    @contextmanager
    def together(self) -> Iterator[None]:
        """When one process fails inside, so do all, soon, with exit code 2; the sentence is that of the first."""
        import torch.distributed as dist

        ended = threading.Event()
        if self.world > 1:
            self.store.add(f"beats{self.rank}", 1)  # one that is killed before its next sign of life must be missed too
            threading.Thread(target=self._live, args=(ended,), daemon=True).start()
        try:
            yield
        except dist.DistError:
            raise InputError("the process that led this run is gone; give the same command again, and it goes on") from None
        except BaseException as error:
            if self.fail() or not isinstance(error, InputError):
                raise
            sys.exit(2)
        finally:
            ended.set()
            with suppress(dist.DistError):
                self._part()

    def _live(self, ended: threading.Event) -> None:
        """Gives signs of life."""
        import torch.distributed as dist

        with suppress(dist.DistError):
            while not ended.wait(BEAT):
                self.store.add(f"beats{self.rank}", 1)

    def fail(self) -> bool:
        """Notes that this process has failed, and tells whether it was the first."""
        import torch.distributed as dist

        if self._failed_first is None:
            self._failed_first = True
            with suppress(dist.DistError):
                self._failed_first = self.store.add("failed", 1) == 1
        return self._failed_first

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

    @contextmanager
    def numbered(self) -> Iterator[None]:
        """While it lasts, every line that another process than the leader prints begins with its number."""
        with nullcontext() if self.leads else redirect_stdout(_Numbered(sys.stdout, f"process {self.rank}: ")):  # type: ignore[type-var]
            yield

    def tell(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def hear(self, key: str) -> Any:
        """Waits for the message under `key` and gives it."""
        while not self.store.check([key]):
            self._look()
            time.sleep(0.05)
        return json.loads(self.store.get(key))

    def heard(self, key: str) -> Any:
        """The message under `key`, or None if there is none yet."""
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def require_same(self, **facts: Any) -> None:
        """Raises `InputError` in a process whose facts, or whose code, are not the leader's. Nobody goes on before all have agreed."""
        facts = json.loads(json.dumps({"code": code_crc32(), **facts}))
        if self.leads:
            self.tell("facts", facts)
        theirs = self.hear("facts")
        for name in facts | theirs:
            if facts.get(name) != theirs.get(name):
                here, there = _differing(facts.get(name), theirs.get(name))
                raise InputError(
                    f"expected the same {name.replace('_', ' ')} in every process, but process {self.rank} has {here} and process 0 "
                    f"{there}; give all of them the same"
                )
        self.store.add("agreed", 1)
        while self.store.add("agreed", 0) < self.world:
            self._look()
            time.sleep(0.05)

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
        while self.leads and self.store.add(key, 0) < self.world:
            time.sleep(0.05)
            self._look()
            yield self._total

    def _look(self) -> None:
        self._total, self._pending = self.store.add(f"units{self._stage}", self._pending), 0
        self._looked = time.monotonic()
        if self.store.add("failed", 0):
            sys.exit(2)  # silently: the sentence is on the terminal already
        if self._looked - self._listened > BEAT:
            self._listen()

    def _listen(self) -> None:
        """Raises `InputError` when a process that this one depends on has died: the leader listens to all, the others to the leader."""
        self._listened = time.monotonic()
        for other, (beats, at) in self._watched.items():
            now = self.store.add(f"beats{other}", 0)
            if now != beats:
                self._watched[other] = now, self._listened
            elif now and self._listened - at > SILENCE and not self.store.check([f"gone{other}"]):
                raise InputError(f"process {other} of this run has died; give the same command again, and it goes on")

    def _part(self) -> None:
        """The process in whose memory the store lies stays until the others have read the last word."""
        self.store.set(f"gone{self.rank}", "")
        gone, until = self.store.add("gone", 1), time.monotonic() + FAREWELL
        while self._hosts_store and gone < self.world and time.monotonic() < until:
            time.sleep(0.05)
            gone = self.store.add("gone", 0)


def _differing(here: Any, there: Any) -> tuple[Any, Any]:
    """Of two tables, what differs."""
    if not isinstance(here, dict) or not isinstance(there, dict):
        return here, there
    names = [name for name in here | there if here.get(name) != there.get(name)]
    return {name: here.get(name) for name in names}, {name: there.get(name) for name in names}


class _Numbered(io.TextIOBase):
    def __init__(self, stream: TextIO, prefix: str):
        self.stream, self.prefix, self._begins = stream, prefix, True

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            self.stream.write((self.prefix if self._begins else "") + line)
            self._begins = line.endswith("\n")
        self.stream.flush()
        return len(text)


@cache
def code_crc32() -> str:
    """Of the package's sources, by which processes on several machines know whether they run the same."""
    found = 0
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        found = zlib.crc32(path.read_bytes(), found)
    return f"{found:08x}"
