"""The metrics log: `metrics.jsonl` always, Weights & Biases on request."""

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import TypedDict

from sae.disk.places import writing
from sae.disk.reading import parse_json, read_bytes
from sae.disk.writing import atomic
from sae.errors import InputError
from sae.objective import Step
from sae.progress import counted
from sae.training.sweep import Sweep

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends one line for each log interval of each dictionary."""

    def __init__(self, folder: Path, name: str, batch_size: int, first_step: int, wandb_run: Any = None):
        self.path, self.batch_size, self.wandb, self.prefix = folder / FILE, batch_size, wandb_run, name
        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            keep_until(self.path, first_step)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (held for the whole run)
        self._since, self._step = time.monotonic(), first_step

    def write(self, line: dict[str, Any], sweep: Sweep, k: int) -> dict[str, Any]:
        """Adds the rate since the last line, writes the line and returns it; the k-th dictionary's densities go to Weights & Biases."""
        seconds, steps = time.monotonic() - self._since, line["step"] - self._step
        line = line | {"tokens_per_second": round(steps * self.batch_size / max(seconds, 1e-9))}
        with writing(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self.wandb is not None:
            self.wandb.log(self._named(line) | self._named({"log10_density": density_histogram(sweep, k)}), step=line["step"])
        self._since, self._step = time.monotonic(), line["step"]
        return line

    def _named(self, line: dict[str, Any]) -> dict[str, Any]:
        return {f"{self.prefix}/{k}" if self.prefix else k: v for k, v in line.items()}

    def close(self) -> None:
        with suppress(OSError):  # what could not be written was said by `write`
            self._file.close()


def lines_of(sweep: Sweep, result: Step, y_bo: Tensor, step: int) -> list[dict[str, Any]]:
    """One line for each dictionary after `step` steps: `result` is that of the last step, counts are since the last lines."""
    power = float((y_bo - y_bo.mean(0)).square().sum(-1).mean())  # host sync, as are the next ones
    lines = []
    for k in range(len(sweep.values)):
        mine = result.of(k)
        share = float(sweep.sparse_rows_k[k] / sweep.rows_counted)
        line = {
            "step": step,
            "tokens": step * len(y_bo),
            "loss": float(mine.loss),
            "squared_error": float(mine.squared_error),
            "fvu": float(mine.squared_error) / power,
            "l0": float(mine.l0),
            "l1": float(mine.sparsity),
            **sweep.kind.line(sweep.values[k], sweep.now(k, step - 1)),
            "lr": sweep.recipe.learning_rate(step - 1),
            "dead_fraction": sweep.dead_share(k),
            "resampled": int(sweep.resampled_k[k]),
            "path": path_name(sweep, share),
            "sparse_path_share": share,
        }
        lines.append(line)
    return lines


def path_name(sweep: Sweep, share: float) -> str:
    """How the objective was computed since the last line; `share` of the rows used the sparse path."""
    if sweep.backend != "auto":
        return sweep.backend
    sparse = "triton" if sweep.workspace.plan[1] else "sparse"
    return "dense" if share == 0 else sparse if share == 1 else f"dense and {sparse}"


def density_histogram(sweep: Sweep, k: int) -> Any:
    """log10 of the share of rows on which each feature fired since the last line; features that did not fire are left out.

    With several processes, only the leader's features.
    """
    import wandb

    fired_f = sweep.fired_kf[k]
    return wandb.Histogram(torch.log10(fired_f[fired_f > 0].double() / sweep.rows_counted).tolist())  # host sync


class Line(TypedDict):
    step: int


def keep_until(path: Path, step: int) -> None:
    """Drops the lines after a step, and an incomplete last one, so that a resumed log equals an uninterrupted one.

    A damaged line is dropped too, with a message unless it is the last.
    """
    if not path.exists():
        return
    kept, damaged = [], []
    lines = read_bytes(path, "a run's log").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            if parse_json(line, f"a line of {path}", Line)["step"] <= step:
                kept.append(line.rstrip() + b"\n")
        except InputError:
            damaged += [number] if number < len(lines) else []
    if damaged:
        print(f"{path}: {counted(len(damaged), 'damaged line')} left out, the first being line {damaged[0]}", file=sys.stderr)
    with atomic(path) as temporary:
        temporary.write_bytes(b"".join(kept))


def start_wandb(mode: Literal["off", "offline", "online"], project: str, folder: Path, settings: dict[str, Any]) -> Any:
    """The Weights & Biases run, or None if not requested."""
    if mode == "off":
        return None
    import wandb

    return wandb.init(project=project, mode=mode, config=settings, dir=str(folder))
