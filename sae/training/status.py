"""The progress of every run of a plan, in all processes: a table now and then, and always in status.json."""

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from sae.disk.writing import write_json
from sae.processes import Processes

FILE = "status.json"
EVERY = 60.0
"""seconds between two tables"""
AT_MOST_EVERY = 1.0
"""minimum seconds between two reads of all reports"""


class Row(NamedTuple):
    rank: int | None
    """None: all processes share it, or it was finished before this start"""
    step: int
    state: str
    """waiting, training or done"""
    loss: float | None = None
    l0: float | None = None
    rows_per_second: float | None = None


class Status:
    """Every process reports its runs; the leader writes and prints those of all."""

    def __init__(self, processes: Processes, folder: Path, steps: int, rows: dict[str, Row]):
        """`rows`: the initial row of every run, by its name."""
        self.processes, self.path, self.steps, self.rows = processes, folder / FILE, steps, rows
        self._printed = self._written = time.monotonic()
        self.show(print_now=True)

    def advance(self) -> None:
        """Counts one more step of this process's runs. Now and then, checks whether another process failed."""
        self.processes.count(1)

    def report(self, name: str, row: Row) -> None:
        self.rows[name] = row
        self.processes.tell(f"run {name}", row)

    def show(self, print_now: bool = False) -> None:
        """Shows the reports of all processes. Only the leader does something."""
        now = time.monotonic()
        if not self.processes.leads or (now - self._written < AT_MOST_EVERY and not print_now):
            return
        for name in self.rows:
            if (row := self.processes.heard(f"run {name}")) is not None:
                self.rows[name] = Row(*row)
        write_json(self.path, [{"run": name, "steps": self.steps, **row._asdict()} for name, row in self.rows.items()])
        self._written = now
        if print_now or now - self._printed > EVERY:
            self._printed = now
            print_table(self.steps, self.rows)


def print_table(steps: int, rows: dict[str, Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "process", "step", "loss", "L0", "rows/s", "state")
    for name, row in rows.items():
        table.add_row(name, shown(row.rank), f"{row.step:,} of {steps:,}", *map(shown, (row.loss, row.l0, row.rows_per_second)), row.state)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def shown(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
