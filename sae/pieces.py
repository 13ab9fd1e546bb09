"""Work split into pieces that several processes share. Each finished piece is a file, so that interrupted work continues from there."""

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.disk.reading import read_json, read_tensors
from sae.disk.writing import only_writer, remove_leftovers, write_json, write_tensors
from sae.errors import InputError
from sae.processes import Processes
from sae.progress import Progress, progress

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "settings.json"
CHOICE = "choice.json"
"""what one process chose for all, in which no work is"""
MOST = 32
"""maximum number of pieces, for work that can be cut anywhere: enough to share evenly, few enough for sums that are as long as the
features"""


class Pieces:
    """The files of the pieces, in the folder `.NAME.pieces` beside the output, while the work lasts."""

    def __init__(self, processes: Processes, folder: Path):
        self.processes, self.folder = processes, folder
        self._stage, self._before = 0, 0
        self._bar: Progress | None = None

    def make(self, sizes: dict[str, int], compute: Callable[[int, Path], Callable[[], Any]], what: str = "", unit: str = "") -> list[Path]:
        """Returns the files of these names when all exist. Every process calls it, with the same names; sizes are in `unit`s.

        Missing files are distributed. `compute(number, path)` returns a function that writes the file, atomically; it runs while the next
        piece is computed. The leader shows the progress of all, if the work has a name, `what`.
        """
        paths, stage = [self.folder / name for name in sizes], self._stage
        self._stage += 1
        if self.processes.leads:
            self.processes.tell(f"missing{stage}", [number for number, path in enumerate(paths) if not path.exists()])
        missing, total = self.processes.hear(f"missing{stage}"), sum(sizes.values())
        self._before = total - sum(list(sizes.values())[number] for number in missing)
        showing = progress(what, total, unit, self._before) if what and self.processes.leads else nullcontext()
        with showing as self._bar, ThreadPoolExecutor(1) as background:
            writing: Future[Any] | None = None
            for number in self.processes.deal(missing):
                write = compute(number, paths[number])
                if writing:
                    writing.result()
                writing = background.submit(write)
            if writing:
                writing.result()
            for _ in self.processes.wait_for_all():
                self.advance(0)
        if self.processes.leads:
            self.processes.tell(f"made{stage}", True)
        self.processes.hear(f"made{stage}")
        return paths

    def advance(self, units: int, **fields: str) -> None:
        """Counts units of a piece as done; now and then, checks whether another process failed."""
        done = self._before + self.processes.count(units)
        if self._bar:
            self._bar.advance(done - self._bar.done, **fields)


def results(
    made: Pieces | None, what: str, unit: str, sizes: Sequence[int], compute: Callable[[int, Callable[[int], None]], "dict[str, Tensor]"]
) -> "Iterator[dict[str, Tensor]]":
    """Yields the results of `compute(number, advance)` in order, computed here alone, or shared with the processes of `made`.

    `sizes` are in `unit`s; `compute` calls `advance` with the number of units done.
    """
    if made is None:
        with progress(what, sum(sizes), unit) as bar:
            yield from (compute(number, bar.advance) for number in range(len(sizes)))
        return
    shared, named = made, what.replace(" ", "_")
    paths = shared.make(
        {f"{named}-{number:03d}.safetensors": size for number, size in enumerate(sizes)},
        lambda number, path: partial(write_tensors, path, compute(number, shared.advance)),
        what,
        unit,
    )
    for path in paths:
        yield read_tensors(path, "a piece of this work")[0]


def stretches(count: int) -> list[range]:
    """Splits the numbers up to `count` into at most `MOST` ranges of nearly equal length."""
    many = min(count, MOST)
    return [range(count * i // many, count * (i + 1) // many) for i in range(many)]


@contextmanager
def pieces(processes: Processes, out: Path, settings: dict[str, Any]) -> Iterator[Pieces]:
    """The pieces of the work that writes `out`; `settings` are everything that decides them. At a clean exit they are removed.

    Pieces of other settings are removed at the start. Raises `InputError` in a process whose settings differ from the leader's, and if
    another run makes pieces for the same output. Inside, only the leader prints, because the others would print the same.
    """
    processes.require_same(**settings)
    place = out.absolute()
    folder = place.parent / f".{place.name}.pieces"
    with holding(processes, folder, lambda: _claim(folder, json.loads(json.dumps(settings)))), one_voice(processes):
        try:
            yield Pieces(processes, folder)
        except BaseException:
            if processes.leads and all(path.name in (RECORD, CHOICE) for path in folder.iterdir()):  # no work
                shutil.rmtree(folder, ignore_errors=True)
            raise
        deque(processes.deal(()), maxlen=0)
        deque(processes.wait_for_all(), maxlen=0)  # the others may still read pieces
        if processes.leads:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def holding(processes: Processes, folder: Path, prepare: Callable[[], None]) -> Iterator[None]:
    """All processes of this run lock the folder together against other runs. The leader prepares it first; the others leave before the
    leader ends.

    Raises `InputError` if another run has locked it.
    """
    if processes.leads:
        with only_writer(folder) as let_others_in:
            remove_leftovers(folder)
            prepare()
            let_others_in()
            processes.tell("prepared", True)
            yield
        processes.tell("finished", True)
    else:
        processes.hear("prepared")
        with only_writer(folder, shared=True):
            yield
        processes.hear("finished")


@contextmanager
def one_voice(processes: Processes) -> Iterator[None]:
    """Inside, only the leader prints, because the others would print the same."""
    if processes.leads:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Keeps the pieces in the folder if they have these settings, otherwise empties it and records the settings."""
    record = folder / RECORD
    if record.exists():
        try:
            if read_json(record, "settings of pieces", dict[str, Any]) == settings:
                return
        except InputError:  # damaged
            pass
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(record, settings)
