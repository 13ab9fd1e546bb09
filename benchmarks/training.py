"""Rows a second of whole training runs of every kind, from a cache to the saved dictionary, ours beside SAELens' and dictionary_learning's.

Interleaved rounds, one run after the other, on the same rows with the same number of threads. Ours is everything that the command does
after its imports: clipping, reading, metrics, checkpoint, thresholds, saving. Its share of the bare step is the time inside the objective
(with Adam and clipping) over the time of the run. The others' times are those of their training loops alone.
"""

import shutil
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from objective import BenchmarkConfig, machine, spread
from quality import L1_KINDS, train_peer
from quality_measure import train_ours
from quality_report import LABELS, TRAINERS, label
from report import spread_text
from rounds import PEERS_PYTHON

import sae.training.sweep
from sae.activations.cache import ActivationCache
from sae.command_line import run
from sae.disk.reading import read_json
from sae.disk.writing import write_json


@dataclass
class TrainingSpeedConfig:
    cache: Path
    """Activation cache to train on."""
    site: str | None = None
    """One of the cache's sites, when it has several."""
    kinds: tuple[str, ...] = tuple(TRAINERS)
    """Kinds of dictionaries."""
    d_sae: int = 4096
    """Features."""
    k: int = 32
    """k, and target L0 of JumpReLU."""
    l1: float = 2.0
    """L1 coefficient of the other kinds."""
    steps: int = 200
    """Steps of a run."""
    batch_size: int = 1024
    """Rows of a step."""
    rounds: int = 3
    """Interleaved rounds."""
    threads: int = 1
    """Threads of every run."""
    out: Path = Path("benchmarks/results/training.json")
    """File for the numbers; a kind that is in it is not measured again."""


def training_speed(config: TrainingSpeedConfig) -> None:
    torch.set_num_threads(config.threads)
    cache = ActivationCache.open(config.cache, config.site)
    sizes = {name: getattr(config, name) for name in ("d_sae", "k", "l1", "steps", "batch_size")} | {"cache": str(config.cache)}
    about = machine(BenchmarkConfig(), config.threads)
    record: dict[str, Any] = {"date": date.today().isoformat(), "machine": about, "sizes": sizes, "kinds": {}}
    if config.out.exists():
        record["kinds"] = read_json(config.out, "a training.json of this benchmark")["kinds"]
    for kind in config.kinds:
        if kind not in record["kinds"]:
            print(kind, flush=True)
            record["kinds"][kind] = measure(config, cache.site, kind)
            write_json(config.out, record)
    print(markdown(record))


def measure(config: TrainingSpeedConfig, site: str, kind: str) -> dict[str, Any]:
    tools = [tool for tool in TRAINERS[kind] if tool == "ours" or PEERS_PYTHON.exists()]
    seconds: dict[str, list[float]] = {tool: [] for tool in tools}
    shares: list[float] = []
    sparsity = config.l1 if kind in L1_KINDS else config.k
    with tempfile.TemporaryDirectory() as folder:
        for number in range(config.rounds):
            for tool in tools:
                out = Path(folder) / f"{tool}-{number}"
                point = {"tool": tool, "kind": kind, "sparsity": sparsity, "lr": 1e-3, "seed": 0, "dead_steps": 1000, "folder": str(out)}
                point |= {name: getattr(config, name) for name in ("d_sae", "steps", "batch_size")}
                if tool == "ours":
                    took, inside = timed_ours(config.cache, site, point)
                    shares.append(inside / took)
                else:
                    train_peer(config.cache, site, tool, [point])
                    took = read_json(out / "seconds.json", "a training time")["seconds"]
                seconds[tool].append(took)
                shutil.rmtree(out)
    rows = config.steps * config.batch_size
    return {
        "rows_per_second": {tool: spread([rows / s for s in own]) for tool, own in seconds.items()},
        "ours_over": {tool: spread([s / o for s, o in zip(own, seconds["ours"])]) for tool, own in seconds.items() if tool != "ours"},
        "share_of_bare_step": spread(shares),
    }


def timed_ours(cache: Path, site: str, point: dict[str, Any]) -> tuple[float, float]:
    """Seconds of the whole run, and of those inside the objective."""
    inside, bare = 0.0, sae.training.sweep.objective

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        start = time.perf_counter()
        result = bare(*args, **kwargs)
        inside += time.perf_counter() - start
        return result

    start = time.perf_counter()
    with patch("sae.training.sweep.objective", timed):
        train_ours(cache, site, point)
    return time.perf_counter() - start, inside


def markdown(record: dict[str, Any]) -> str:
    lines = ["| kind | trainer | rows/s | ours / this | share of the bare step |", "|---|---|---|---|---|"]
    for kind, found in record["kinds"].items():
        for tool in LABELS:
            if tool in found["rows_per_second"]:
                times = spread_text(found["ours_over"][tool], 2) if tool != "ours" else ""
                share = spread_text(found["share_of_bare_step"], 3) if tool == "ours" else ""
                cells = [kind, label(tool, kind), spread_text(found["rows_per_second"][tool], 0), times, share]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(training_speed, TrainingSpeedConfig, __doc__ or "")
