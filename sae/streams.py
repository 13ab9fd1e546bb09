"""Standard output and standard error that may disappear: a pipe that `head` has closed, a full disk, a closed terminal."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


class _Outlet(io.FileIO):
    """Drops what cannot be written, and records why, unless the reader has left: `head`, or a terminal that was closed."""

    def __init__(self, number: int):
        super().__init__(number, "w", closefd=False)
        self.lost: OSError | None = None
        self._terminal = self.isatty()

    def write(self, data) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EPIPE and not self._terminal:
                self.lost = self.lost or error
            return memoryview(data).nbytes


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Inside, output that cannot be printed is dropped and stops no work; streams that are closed from the start print nothing.

    At the end, exits with code 2 and a sentence if standard output was not written completely. A reader that has left is not such a case:
    it has read what it wanted.
    """
    for number in range(3):  # a file that took a closed stream's number would be printed into
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    outlet, sys.stdout = _lasting(sys.stdout, 1)
    _, sys.stderr = _lasting(sys.stderr, 2)
    try:
        try:
            yield
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
        sys.stdout.flush()
        if outlet and outlet.lost:
            why = outlet.lost.strerror
            print(f"error: standard output could not be written ({why}), so what was printed is cut short", file=sys.stderr)
            sys.exit(2)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def _lasting(stream: TextIO | None, number: int) -> tuple[_Outlet | None, TextIO]:
    if stream is None:
        return None, open(os.devnull, "w", encoding="utf-8")
    if stream not in (sys.__stdout__, sys.__stderr__) or not isinstance(stream, io.TextIOWrapper) or (os.name == "nt" and stream.isatty()):
        return None, stream  # not the system's own, as in a notebook or a test; or a window of Windows, which is not a file
    with suppress(OSError):
        stream.flush()
    outlet = _Outlet(number)
    return outlet, io.TextIOWrapper(
        io.BufferedWriter(outlet),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
