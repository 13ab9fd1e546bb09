"""Progress of long work: a bar in a terminal, a line every ten seconds in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Progress:
    """Counts `unit`s towards `total` and shows rate, time left and the latest fields."""

    def __init__(self, what: str, total: int, unit: str, done: int = 0):
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.fields: dict[str, str] = {}
        self._start, self._first, self._printed = time.monotonic(), done, time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            try:
                import rich.progress as bars
            except ImportError:  # machines with a GPU are often bare
                print("rich is not installed: progress is printed as plain lines", file=sys.stderr)
            else:
                columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.TextColumn("{task.fields[text]}"))
                from rich.console import Console

                above = sys.stdout is not None and sys.stdout.isatty()  # lines go above the bar, but those for a file into it
                console = Console(stderr=True)
                self._bar = bars.Progress(*columns, bars.TimeRemainingColumn(), console=console, redirect_stdout=above)
                self._task = self._bar.add_task(what, total=total, completed=done, text="")
                self._bar.start()

    def advance(self, n: int, **fields: str) -> None:
        """`n` more units are done; `fields` are shown after them, for example `loss="0.31"`."""
        self.done += n
        self.fields.update(fields)
        if self._bar:
            self._bar.update(self._task, completed=self.done, text=self.line())
        elif self.done < self.total and time.monotonic() - self._printed > 10:  # the last line is that of `close`
            self._printed = time.monotonic()
            self._print(self._left())

    def _print(self, end: str = "") -> None:
        with suppress(OSError):  # the work continues even if its progress cannot be printed
            print(f"{self.what}: {self.line()}{end}", file=sys.stderr, flush=True)

    def line(self) -> str:
        """The progress, the mean rate since the start (nothing before the first unit), and the latest fields."""
        parts = [f"{self.done:,} of {self.total:,} {self.unit}"]
        if (done := self.done - self._first) > 0:
            seconds = max(time.monotonic() - self._start, 1e-9)
            slow = seconds > done  # less than one a second
            parts.append(f"{_short(seconds / done)} s each" if slow else f"{_short(done / seconds)} {self.unit}/s")
        return ", ".join(parts + [f"{k} {v}" for k, v in self.fields.items()])

    def _left(self) -> str:
        done, left = self.done - self._first, self.total - self.done
        return f", about {duration(left * (time.monotonic() - self._start) / done)} left" if done > 0 and left > 0 else ""

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
        else:
            self._print()


def _short(number: float) -> str:
    return f"{number:,.1f}" if number < 10 else f"{number:,.0f}"


def counted(number: int, noun: str) -> str:
    """ "1 document", "2,000 documents"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """In the two largest units: "40 s", "3 min 20 s", "2 h 5 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, rest_minutes = divmod(minutes, 60)
    return f"{hours:,} h {rest_minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


@contextmanager
def progress(what: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """`with progress("harvest", 10**6, "tokens") as bar: bar.advance(4096, written="2 MB")`"""
    bar = Progress(what, total, unit, done)
    try:
        yield bar
    finally:
        bar.close()
