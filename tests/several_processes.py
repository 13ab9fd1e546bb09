"""Several processes of one job in tests: forked with what torchrun sets in the environment, or started by torchrun; killed as asked."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from sae import processes as job
from sae.errors import InputError


def forked(work: Callable[[], Any], processes: int, log: Path, kill: tuple[int, int] | None = None) -> list[int]:
    """Does the work in forked processes; returns their exit codes, -9 if killed."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in fork(work, processes, log, kill)]


def fork(work: Callable[[], Any], processes: int, log: Path, kill: tuple[int, int] | None = None) -> list[int]:
    """Process ids of a job's processes, which start at once; `kill` is a rank and the number of its fsync at which it is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        if (child := os.fork()) == 0:
            try:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                log_of_rank = os.open(log.with_suffix(f".{rank}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log_of_rank, 1)
                os.dup2(log_of_rank, 2)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
                if kill:
                    job.BEAT, job.SILENCE, job.FAREWELL = 0.2, 3.0, 0.2
                    if kill[0] == rank:
                        die_at_fsync(kill[1])
                run(work)
            finally:
                os._exit(1)
        children.append(child)
    return children


def run(work: Callable[[], Any]) -> NoReturn:
    """As `sae.command_line.run` ends."""
    try:
        work()
        os._exit(0)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        os._exit(2)
    except SystemExit as stop:
        os._exit(int(stop.code or 0))


def die_at_fsync(number: int) -> None:
    left, fsync = iter(range(number)), os.fsync

    def fsync_or_die(handle: int) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)

    os.fsync = fsync_or_die


def leaving_work_to(rank: int, work: Callable[[], Any]) -> Callable[[], Any]:
    """The work with every other process slowed: a process that starts late on a busy machine still gets some of what they share."""

    def leaving() -> Any:
        fsync = os.fsync

        def slow(handle: int) -> None:
            time.sleep(0.2)
            fsync(handle)

        os.fsync = fsync if os.environ["RANK"] == str(rank) else slow
        return work()

    return leaving


def said(log: Path) -> list[str]:
    """What each rank said."""
    return [path.read_text() for path in sorted(log.parent.glob(f"{log.name}.*"))]


def flags(config: Any) -> list[str]:
    """The command line that gives these settings."""
    given: list[str] = []
    for field in fields(config):
        value = getattr(config, field.name)
        if field.init and value != field.default:
            given.append("--" + field.name.replace("_", "-"))
            given += [] if value is True else [str(part) for part in (value if isinstance(value, tuple) else [value])]
    return given


def torchrun(*arguments: str, processes: int, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """`python -m sae ARGUMENTS` in processes that torchrun starts; `launcher`: further flags of torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *launcher, "-m", "sae"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCH_DISTRIBUTED_DEBUG": "OFF"}
    return subprocess.Popen([*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def worker(run: subprocess.Popen, rank: int) -> int:
    """Process id of a rank that torchrun started."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    return next(int(pid) for pid in children if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes())
