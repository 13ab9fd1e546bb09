"""Several processes that do one job, as torchrun starts them: the leader, the distribution of work, and a common end after a failure.

They share a folder and exchange short messages through torchrun's key-value store. This module sends no tensors.
"""

import io
import itertools
import json
import os
import signal
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
"""seconds between two heartbeats"""
SILENCE = 300.0
"""seconds without a heartbeat after which a process of another machine counts as dead; a launcher usually stops the others sooner"""
FAREWELL = 5.0
"""seconds that the process that hosts the store waits at the end, so that the others can read the last messages"""
ASIDE = 1.0
"""seconds between two checks for messages while computing"""

Item = TypeVar("Item")
_jobs = itertools.count()


class Processes:
    """This process and its job; without torchrun it is alone. The leader is process 0.

    A job may have several stages. In each of them every process calls `deal` and then `wait_for_all`.
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
        """Reads torchrun's environment variables: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT."""
        import torch.distributed as dist

        world = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
        if world == 1:
            return cls(dist.HashStore(), 0, 1, 0, 1)
        try:
            store, rank, _ = next(dist.rendezvous("env://"))
        except (ValueError, dist.DistError) as error:
            if "EADDRINUSE" in str(error):
                port = os.environ.get("MASTER_PORT")
                raise InputError(
                    f"another program uses port {port}, where the processes of this run should meet; set another MASTER_PORT in all of them"
                ) from None
            raise InputError(
                f"expected the environment that torchrun sets for its processes, but {error}; start them with torchrun"
            ) from None
        local = (int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        life = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)  # torchrun's restarts may have one store
        return cls(dist.PrefixStore(f"life{life}job{next(_jobs)}", store), rank, world, *local, hosts)

    @contextmanager
    def together(self) -> Iterator[None]:
        """If one process fails inside, all end soon after, with exit code 2; only the first one prints its error. SIGTERM is a failure."""
        import torch.distributed as dist

        ended = threading.Event()
        if self.world > 1:
            self.tell(f"mark{self.rank}", mark())
            self.store.add(f"beats{self.rank}", 1)  # one that is killed before its next sign of life must be missed too
            threading.Thread(target=self._live, args=(ended,), daemon=True).start()
        try:
            with nullcontext() if self.world == 1 else interruptible():
                yield
        except dist.DistError:
            raise InputError("the process that led this run has ended; run the same command again to continue") from None
        except BaseException as error:
            if self.fail() or not isinstance(error, InputError):
                raise
            sys.exit(2)
        finally:
            ended.set()
            with suppress(dist.DistError):
                self._part()

    def _live(self, ended: threading.Event) -> None:
        """Sends heartbeats."""
        import torch.distributed as dist

        with suppress(dist.DistError):
            while not ended.wait(BEAT):
                self.store.add(f"beats{self.rank}", 1)

    def fail(self) -> bool:
        """Records that this process has failed; returns whether it was the first."""
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
        """The device of this process: "auto" becomes its own GPU if several processes run on one machine with GPUs.

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
        """Inside, every line that this process prints starts with its number, except in the leader."""
        with nullcontext() if self.leads else redirect_stdout(_Numbered(sys.stdout, f"process {self.rank}: ")):  # type: ignore[type-var]
            yield

    def tell(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def hear(self, key: str) -> Any:
        """Waits for the message under `key` and returns it."""
        while not self.store.check([key]):
            self._look()
            time.sleep(0.05)
        return json.loads(self.store.get(key))

    def heard(self, key: str) -> Any:
        """The message under `key`, or None if it does not exist yet."""
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def require_same(self, **facts: Any) -> None:
        """Raises `InputError` in a process whose facts, or whose code, differ from the leader's. No process continues before all have
        agreed."""
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
        """Yields the items of this process: the next free one each time it asks. All processes pass the same sequence."""
        self._stage, self._total, self._pending = self._stage + 1, 0, 0
        while (number := self.store.add(f"dealt{self._stage}", 1) - 1) < len(items):
            self._look()
            yield items[number]

    def count(self, units: int) -> int:
        """Counts units as done; returns how many all processes have done in this stage, as far as known.

        Now and then, checks whether another process failed.
        """
        self._pending += units
        if time.monotonic() - self._looked > ASIDE:
            self._look()
        return self._total + self._pending

    def wait_for_all(self) -> Iterator[int]:
        """Ends when every process has called it; yields the count meanwhile, as `count` does, and at the end that of all. Only the leader
        waits."""
        self._look()
        key = f"done{self._stage}"
        self.store.add(key, 1)
        waiting = self.leads
        while waiting:
            waiting = self.store.add(key, 0) < self.world
            self._look()  # after the check: by then the last process has counted its units
            yield self._total
            if waiting:
                time.sleep(0.05)

    def _look(self) -> None:
        self._total, self._pending = self.store.add(f"units{self._stage}", self._pending), 0
        self._looked = time.monotonic()
        if self.store.add("failed", 0):
            sys.exit(2)  # silently: the sentence is on the terminal already
        if self._looked - self._listened > BEAT:
            self._listen()

    def _listen(self) -> None:
        """Raises `InputError` if a process that this one depends on has died: the leader watches all, the others watch the leader."""
        self._listened = time.monotonic()
        for other, (beats, at) in self._watched.items():
            now = self.store.add(f"beats{other}", 0)
            silent = now > 0 and now == beats and self._listened - at > SILENCE
            if now != beats:
                self._watched[other] = now, self._listened
            if now and (silent or has_ended(self.heard(f"mark{other}"))) and not self.store.check([f"gone{other}"]):
                raise InputError(f"process {other} of this run has died; run the same command again to continue")

    def _part(self) -> None:
        """Leaves the job. The process that hosts the store waits until the others have read the last messages."""
        self.store.set(f"gone{self.rank}", "")
        gone, until = self.store.add("gone", 1), time.monotonic() + FAREWELL
        while self._hosts_store and gone < self.world and time.monotonic() < until:
            time.sleep(0.05)
            gone = self.store.add("gone", 0)


def mark() -> list[str] | None:
    """What `has_ended` recognises this process by: its machine and container, its number, when it started; None where /proc lacks that."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
        return [machine, str(os.getpid()), _state_and_start(os.getpid())[1]]
    except OSError:
        return None


def has_ended(theirs: list[str] | None) -> bool:
    """Whether a process of this machine has ended in any way; False where that cannot be known, as of another machine."""
    here = mark()
    if here is None or theirs is None or here[0] != theirs[0]:
        return False
    try:
        state, start = _state_and_start(int(theirs[1]))
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False
    return state in "ZX" or start != theirs[2]  # not yet waited for by its parent, or another process with its number


def _state_and_start(pid: int) -> tuple[str, str]:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # its name, in parentheses, may have spaces
    return fields[0], fields[19]


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that a process can let the others know before it ends."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends a process that waits inside torch
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _differing(here: Any, there: Any) -> tuple[Any, Any]:
    """Reduces two dictionaries to the entries that differ."""
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
    """Checksum of the package's sources, by which processes on several machines check that they run the same code."""
    found = 0
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        found = zlib.crc32(path.read_bytes(), found)
    return f"{found:08x}"
