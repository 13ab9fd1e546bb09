"""The metrics log: `metrics.jsonl` always, Weights & Biases when asked."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.objective import Step
from sae.training.config import TrainingConfig, l1_now, learning_rate
from sae.training.run import Run


class MetricsLog:
    """Appends one line for each log interval of each dictionary."""

    def __init__(self, folder: Path, name: str, config: TrainingConfig, first_step: int, wandb_run: Any = None):
        self.path, self.config, self.wandb, self.prefix = folder / "metrics.jsonl", config, wandb_run, name
        folder.mkdir(parents=True, exist_ok=True)
        keep_until(self.path, first_step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (held for the whole run)
        self._since, self._step = time.monotonic(), first_step

    def write(self, run: Run, result: Step, x_bd: Tensor, step: int) -> dict[str, float]:
        """`step` steps are done; `result` is the last one's. Returns the line."""
        seconds, steps = time.monotonic() - self._since, step - self._step
        line = {
            "step": step,
            "tokens": step * self.config.batch_size,
            "loss": float(result.loss),  # host sync, as are the next ones
            "squared_error": float(result.squared_error),
            "fvu": float(result.squared_error / (x_bd - x_bd.mean(0)).square().sum(-1).mean()),
            "l0": float(result.l0),
            "l1": float(result.sparsity),
            "l1_coefficient": l1_now(step - 1, run.l1, self.config),
            "lr": learning_rate(step - 1, self.config),
            "dead_fraction": float(run.dead_f().float().mean()),
            "resampled": int(run.resampled),
            "sparse_path_share": float(run.sparse_rows / run.rows_counted),
            "tokens_per_second": round(steps * self.config.batch_size / max(seconds, 1e-9)),
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self.wandb is not None:
            self.wandb.log(self._named(line) | self._named({"log10_density": density_histogram(run)}), step=step)
        for count in run.counts().values():
            count.zero_()
        self._since, self._step = time.monotonic(), step
        return line

    def _named(self, line: dict[str, Any]) -> dict[str, Any]:
        return {f"{self.prefix}/{k}" if self.prefix else k: v for k, v in line.items()}

    def close(self) -> None:
        self._file.close()


def density_histogram(run: Run) -> Any:
    """log10 of the share of rows each feature fired on since the last line; features that did not fire are left out."""
    import wandb

    density_f = run.fired_f[run.fired_f > 0].double() / run.rows_counted
    return wandb.Histogram(torch.log10(density_f).tolist())  # host sync


def keep_until(path: Path, step: int) -> None:
    """Drops the lines after a step, and a half-written last one, so that a resumed log equals an uninterrupted one."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(text)["step"] > step:
                break
        except ValueError:
            break
        kept.append(text + "\n")
    path.write_text("".join(kept), encoding="utf-8")


def start_wandb(config: TrainingConfig) -> Any:
    """The Weights & Biases run, or None when not asked for."""
    if config.wandb == "off":
        return None
    import wandb

    return wandb.init(project=config.wandb_project, mode=config.wandb, config=config.settings(), dir=str(config.out))
