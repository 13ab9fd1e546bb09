"""Dictionary quality side by side: every kind by our trainer, SAELens' and dictionary_learning's, on the same cached activations.

Same batches in the same order, same steps, width, dead-feature window and values of sparsity (k, target L0, or the L1 coefficient for
activations of mean squared norm d_in); each tool keeps its own initialisation, normalisation, schedules and auxiliary losses. Every
trainer, ours too, is tried with every learning rate at the middle sparsity and the first seed, the others also with their own default,
and continues with the rate of the lowest FVU · √L0, which hardly changes along a curve. All dictionaries are opened from their files by our
readers and measured on held-out rows and, with --sequences, spliced into the model. A point that is already in --out is not run again.
The others run in the environment that `make bench-peers` creates, and are left out, with a word, where it is absent.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from quality_measure import Measure, train_ours
from quality_report import TRAINERS, plot, report, score

from sae.activations.cache import ActivationCache
from sae.command_line import run
from sae.disk.reading import read_json
from sae.disk.writing import write_json
from sae.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
L1_KINDS = "relu", "p-annealing", "gated"


@dataclass
class QualityConfig:
    cache: Path
    """Activation cache: its train split to train on, its held-out split to measure on."""
    site: str | None = None
    """One of the cache's sites, when it has several."""
    kinds: tuple[str, ...] = tuple(TRAINERS)
    """Kinds of dictionaries."""
    tools: tuple[str, ...] = ("ours", "saelens", "dictionary_learning")
    """Whose trainers."""
    l1: tuple[float, ...] = (1.0, 2.0, 4.0)
    """L1 coefficients of ReLU, p-annealing and gated, for activations of mean squared norm d_in; the middle one is tried first."""
    k: tuple[int, ...] = (8, 16, 32)
    """k of the TopK kinds and target L0 of JumpReLU."""
    d_sae: int = 4096
    """Features."""
    steps: int = 4000
    """Optimiser steps."""
    batch_size: int = 4096
    """Activations per step."""
    dead_steps: int = 1000
    """Steps without firing after which a feature counts as dead, for all tools."""
    lr: tuple[float, ...] = (1e-3, 3e-3)
    """Learning rates to try."""
    own_lr: bool = True
    """Also try the others' own default learning rate."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of weights and batch order."""
    rows: int = 500_000
    """Held-out activations, at most."""
    sequences: int = 100
    """Held-out sequences for loss recovered; 0 leaves it out."""
    work: Path = Path("runs/quality")
    """Folder for the dictionaries."""
    out: Path = Path("benchmarks/results/quality.json")
    """File for the numbers; a plot of the same name goes beside it."""

    def settings(self) -> dict[str, Any]:
        """What all points of one file share."""
        names = ("site", "d_sae", "steps", "batch_size", "dead_steps", "rows", "sequences")
        return {"cache": str(self.cache), **{name: getattr(self, name) for name in names}}


class Run(NamedTuple):
    """One dictionary to train; the first fields name its point."""

    tool: str
    kind: str
    sparsity: float
    lr: float | None
    """None: the tool's own default"""
    seed: int

    def folder(self, config: QualityConfig) -> Path:
        size = f"{config.cache.name}-d_sae_{config.d_sae}-steps_{config.steps}-batch_{config.batch_size}-dead_{config.dead_steps}"
        lr = "own" if self.lr is None else f"{self.lr:g}"
        return (config.work / size / f"{self.tool}-{self.kind}-{self.sparsity:g}-lr_{lr}-seed_{self.seed}").resolve()


def waves(config: QualityConfig, points: list[dict[str, Any]]) -> list[Run]:
    """The runs to do next, given the points there are; none when all is done. Learning rates first, then curves, then further seeds."""
    trainers = [(tool, kind) for kind in config.kinds for tool in config.tools if tool in TRAINERS[kind]]
    done = {key(p) for p in points}
    first = config.seeds[0]
    wanted: list[Run] = []
    for tool, kind in trainers:
        own = (None,) if config.own_lr and tool != "ours" else ()
        wanted += [Run(tool, kind, middle(config, kind), lr, first) for lr in (*config.lr, *own)]
    if all(one in done for one in wanted):
        for seed in config.seeds:
            for tool, kind in trainers:
                lr = best_rate(points, Run(tool, kind, middle(config, kind), None, first))
                wanted += [Run(tool, kind, value, lr, seed) for value in sparsities(config, kind)]
            if not all(one in done for one in wanted):
                break
    return [one for one in wanted if one not in done]


def key(point: dict[str, Any]) -> Run:
    return Run(*(point[name] for name in Run._fields))


def sparsities(config: QualityConfig, kind: str) -> tuple[float, ...]:
    return config.l1 if kind in L1_KINDS else config.k


def middle(config: QualityConfig, kind: str) -> float:
    values = sparsities(config, kind)
    return values[len(values) // 2]


def best_rate(points: list[dict[str, Any]], one: Run) -> float | None:
    """Of all learning rates that were tried for a run, that of the lowest score."""
    tried = [p for p in points if key(p)._replace(lr=None) == one._replace(lr=None)]
    return min(tried, key=score)["lr"]


def quality(config: QualityConfig) -> None:
    cache = ActivationCache.open(config.cache, config.site)
    record: dict[str, Any] = {"settings": config.settings(), "points": []}
    if config.out.exists():
        record = read_json(config.out, "a quality.json of this benchmark")
        if record["settings"] != config.settings():
            raise InputError(f"{config.out} holds points of other settings, {record['settings']}; give another --out or remove it")
    if not (ROOT / ".peers" / "bin" / "python").exists():
        print("no .peers environment: the others are left out (make bench-peers creates it)")
        config.tools = tuple(tool for tool in config.tools if tool == "ours")
    measure = Measure(cache, config.rows, config.sequences)
    while runs := waves(config, record["points"]):
        for one in runs:
            folder = one.folder(config)
            if not (folder / "seconds.json").exists():
                print(f"{' '.join(map(str, one))}", flush=True)
                options = {name: getattr(config, name) for name in ("d_sae", "steps", "batch_size", "dead_steps")}
                wanted = one._asdict() | options | {"folder": str(folder)}
                if one.tool == "ours":
                    train_ours(config.cache, cache.site, wanted)
                else:  # in one process, which imports the tool once
                    same = [other for other in runs if other.tool == one.tool]
                    others = [other._asdict() | options | {"folder": str(other.folder(config))} for other in same]
                    train_peer(config.cache, cache.site, one.tool, others)
            record["points"].append(
                one._asdict() | read_json(folder / "seconds.json", "a training time") | {"lr": one.lr} | measure(folder)
            )
            write_json(config.out, record)
    print(report(record["points"], config.d_sae))
    plot(record["points"], config.out.with_suffix(".png"))


def train_peer(cache: Path, site: str, tool: str, points: list[dict[str, Any]]) -> None:
    """Raises `InputError` with the end of the tool's own message when it fails."""
    settings = json.dumps({"cache": str(cache.resolve()), "site": site, "points": points})
    command = [str(ROOT / ".peers/bin/python"), str(ROOT / "benchmarks/peers/train_peer.py"), settings]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    result = subprocess.run(command, env=environment, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise InputError(f"{tool} failed: {result.stderr[-1500:]}")


if __name__ == "__main__":
    run(quality, QualityConfig, __doc__ or "")
