"""Work in a child process that is killed with SIGKILL at one of its changes to files, or whose files may not grow."""

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae.errors import InputError

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


def changes(work: Callable[[], Any], within: Path) -> int:
    """How many changes it makes to what is `within`: files opened to write, flushed, renamed, removed, folders made."""
    return _in_child(work, 0, within)[1]


def killed(work: Callable[[], Any], change: int, within: Path) -> bool:
    """Whether it was killed before its n-th change, counted from 1."""
    return _in_child(work, change, within)[0]


def _in_child(work: Callable[[], Any], fatal: int, within: Path) -> tuple[bool, int]:
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            if done == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

        def hear(event: str, arguments: tuple) -> None:
            opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (event in CHANGES or opened) and str(arguments[0]).startswith(str(within)):
                count()

        fsync = os.fsync
        os.fsync = lambda handle: (count(), fsync(handle))[1]  # of which Python tells nobody
        sys.addaudithook(hear)
        try:
            work()
            os.write(writer, str(done).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        done = pipe.read()
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status) and status:
        raise AssertionError("the work failed before it was killed")
    return os.WIFSIGNALED(status), int(done or 0)


def limited(work: Callable[[], Any], limit: int) -> int:
    """The exit code in a child whose files may not grow beyond so many bytes: 2 when that was said, 0 when it did not matter."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (those of the tests are files too)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            work()
            code = 0
        except InputError as error:
            code = 2 if "ulimit -f" in str(error) else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder, hidden ones too; None for a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}
