"""Dictionary quality side by side: the (L0, held-out FVU) curves of our trainer and of two others, on the same cached activations.

Same batches in the same order, same steps, width and L1 coefficients; every tool keeps its own initialisation, normalisation and
schedules, and the others are also given several learning rates, of which each point keeps the one with the lowest held-out objective at the
first seed (all minimise the same one). All are measured by our reconstruction metrics. A point that is already in quality.json is not run
again.
The others run in the environment that `make bench-peers` creates, and are left out, with a word, where it is absent.
"""

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sae.activations.cache import ActivationCache
from sae.command_line import run
from sae.dictionaries.dictionary import Dictionary
from sae.disk.reading import read_json
from sae.disk.writing import write_json
from sae.errors import InputError
from sae.evaluation.evaluate import reconstruct
from sae.training import TrainingConfig, train

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("saelens", "dictionary_learning")
LABELS = {"ours": "ours", "saelens": "SAELens standard", "dictionary_learning": "dictionary_learning StandardAprilUpdate"}


@dataclass
class QualityConfig:
    cache: Path
    """Activation cache: its train split to train on, its held-out split to measure on."""
    site: str | None = None
    """One of the cache's sites, when it has several."""
    l1: tuple[float, ...] = (2.5, 5.0, 10.0, 20.0)
    """L1 coefficients, for activations of mean squared norm d_in."""
    d_sae: int = 4096
    """Features."""
    steps: int = 4000
    """Optimiser steps."""
    batch_size: int = 4096
    """Activations per step."""
    lr: float = 3e-4
    """Our learning rate, also given to the others."""
    peer_lr: tuple[float, ...] = (5e-5, 1e-3)
    """Further learning rates for the others: SAELens' tutorial has 5e-5 and its default is 3e-4; dictionary_learning's default is 1e-3."""
    rows: int = 500_000
    """Held-out activations, at most."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and batch order; further learning rates are tried at the first one only."""
    device: str = "cpu"
    """cpu, cuda, ..."""
    peers: tuple[str, ...] = PEERS
    """Tools to compare with."""
    work: Path = Path("runs/quality")
    """Folder for the dictionaries."""
    out: Path = Path("benchmarks/results/quality.json")
    """File for the numbers; a plot of the same name goes beside it."""

    def settings(self) -> dict[str, Any]:
        """What all points of one file share."""
        names = ("site", "d_sae", "steps", "batch_size", "rows")
        return {"cache": str(self.cache), **{name: getattr(self, name) for name in names}}


def quality(config: QualityConfig) -> None:
    cache = ActivationCache.open(config.cache, config.site)
    record: dict[str, Any] = {"settings": config.settings(), "points": []}
    if config.out.exists():
        record = read_json(config.out, "a quality.json of this benchmark")
        if record["settings"] != config.settings():
            raise InputError(f"{config.out} holds points of other settings, {record['settings']}; give another --out or remove it")
    peers = config.peers if (ROOT / ".peers" / "bin" / "python").exists() else ()
    if len(peers) < len(config.peers):
        print("no .peers environment: the others are left out (make bench-peers creates it)")
    for seed in config.seeds:
        for tool in ("ours", *peers):
            for l1 in config.l1:
                for lr in rates(config, record["points"], tool, l1, seed):
                    if not any((tool, l1, lr, seed) == (p["tool"], p["l1"], p["lr"], p["seed"]) for p in record["points"]):
                        print(f"{tool}, L1 coefficient {l1:g}, learning rate {lr:g}, seed {seed}", flush=True)
                        record["points"].append(point(config, cache, tool, l1, lr, seed))
                        write_json(config.out, record)
    print(report(record["points"]))
    plot(record["points"], config.out.with_suffix(".png"))


def rates(config: QualityConfig, points: list[dict], tool: str, l1: float, seed: int) -> list[float]:
    """Ours has one learning rate; the others all of them at the first seed, then the best of those."""
    if tool == "ours":
        return [config.lr]
    if seed == config.seeds[0]:
        return list(dict.fromkeys((config.lr, *config.peer_lr)))
    tried = [p for p in points if (p["tool"], p["l1"], p["seed"]) == (tool, l1, config.seeds[0])]
    return [min(tried, key=lambda p: p["objective"])["lr"]]


def point(config: QualityConfig, cache: ActivationCache, tool: str, l1: float, lr: float, seed: int) -> dict[str, Any]:
    """Trains one dictionary and measures it on held-out rows."""
    folder = config.work / f"{tool}-l1_{l1:g}-lr_{lr:g}-steps_{config.steps}-d_sae_{config.d_sae}-seed_{seed}"
    start = time.monotonic()
    if tool == "ours":
        size = {"d_sae": config.d_sae, "steps": config.steps, "batch_size": config.batch_size}
        train(TrainingConfig(cache=config.cache, site=cache.site, out=folder, l1=(l1,), lr=lr, seed=seed, device=config.device, **size))
        seconds = time.monotonic() - start
    else:
        train_peer(config, cache.site, tool, l1, lr, seed, folder)
        seconds = read_json(folder / "seconds.json", "a peer's training time")
    dictionary = Dictionary.load(folder, config.device)
    r = reconstruct(dictionary, cache, config.rows)
    scale = (cache.d_in / cache.mean_squared_norm) ** 0.5
    return {
        "tool": tool,
        "l1": l1,
        "lr": lr,
        "seed": seed,
        "l0": r.l0,
        "fvu": r.fvu,
        "objective": scale**2 * r.mse + l1 * scale * r.l1,  # in training units
        "dead": r.dead,
        "dense": r.dense,
        "norm_ratio": r.norm_ratio,
        "seconds": round(seconds, 1),
    }


def train_peer(config: QualityConfig, site: str, tool: str, l1: float, lr: float, seed: int, folder: Path) -> None:
    """Raises `InputError` with the end of the tool's own message when it fails."""
    options = dict(peer=tool, cache=config.cache.resolve(), site=site, out=folder.resolve(), device=config.device, l1=l1, lr=lr)
    options |= {"steps": config.steps, "batch-size": config.batch_size, "d-sae": config.d_sae, "seed": seed}
    command = [str(ROOT / ".peers/bin/python"), str(ROOT / "benchmarks/peers/train_peer.py")]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if result.returncode:
        raise InputError(f"{tool} failed: {result.stderr[-1500:]}")


def over_seeds(points: list[dict]) -> list[dict]:
    """One point for each tool, coefficient and learning rate: means over its seeds, and half the range of FVU and L0."""
    groups: dict[tuple, list[dict]] = {}
    for p in points:
        groups.setdefault((p["tool"], p["l1"], p["lr"]), []).append(p)
    means = []
    for group in groups.values():
        numbers = {name: sum(p[name] for p in group) / len(group) for name in ("l0", "fvu", "objective", "dead", "seconds")}
        spread = {f"{name}_spread": (max(p[name] for p in group) - min(p[name] for p in group)) / 2 for name in ("l0", "fvu")}
        means.append(group[0] | numbers | spread | {"seeds": len(group)})
    return means


def best_by_l1(points: list[dict]) -> list[dict]:
    """Of each tool and coefficient, the learning rate with the lowest held-out objective, over its seeds."""
    best: dict[tuple[str, float], dict] = {}
    for p in over_seeds(points):
        key = p["tool"], p["l1"]
        if key not in best or p["objective"] < best[key]["objective"]:
            best[key] = p
    return sorted(best.values(), key=lambda p: (list(LABELS).index(p["tool"]), p["l1"]))


def frontier(points: list[dict]) -> list[dict]:
    """The points that no other beats in both L0 and FVU, by rising L0."""
    kept: list[dict] = []
    for p in sorted(points, key=lambda p: (p["l0"], p["fvu"])):
        if p["l0"] > 0 and (not kept or p["fvu"] < kept[-1]["fvu"]):
            kept.append(p)
    return kept


def fvu_at(points: list[dict], l0: float) -> float:
    """FVU of a curve at an L0, linear in log L0 between its points; NaN outside them."""
    l0s, fvus = [p["l0"] for p in points], [p["fvu"] for p in points]
    return float(np.interp(np.log(l0), np.log(l0s), fvus, left=np.nan, right=np.nan)) if points else float("nan")


def differences(points: list[dict], peer: str) -> dict[float, float]:
    """Our FVU minus the peer's at equal L0, of means over seeds, at the points of either curve where both exist."""
    ours, theirs = (frontier([p for p in over_seeds(points) if p["tool"] == tool]) for tool in ("ours", peer))
    l0s = sorted(p["l0"] for p in ours + theirs)
    found = {l0: fvu_at(ours, l0) - fvu_at(theirs, l0) for l0 in l0s}
    return {l0: d for l0, d in found.items() if d == d}


def report(points: list[dict]) -> str:
    """Two markdown tables: the curves, and our FVU against each peer's at equal L0."""
    lines = ["| tool | L1 coefficient | learning rate | seeds | L0 | FVU | objective | dead |", "|---|---|---|---|---|---|---|---|"]
    for p in best_by_l1(points):
        l0, fvu = f"{p['l0']:.1f} ± {p['l0_spread']:.1f}", f"{p['fvu']:.4f} ± {p['fvu_spread']:.4f}"
        cells = [LABELS[p["tool"]], f"{p['l1']:g}", f"{p['lr']:g}", str(p["seeds"]), l0, fvu, f"{p['objective']:.2f}", f"{p['dead']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    for peer in PEERS:
        found = differences(points, peer)
        if found:
            worst = max(found.values())
            at = ", ".join(f"{d:+.4f} at {l0:.0f}" for l0, d in found.items())
            verdict = "nowhere worse" if worst <= 0 else f"worse by up to {worst:.4f}"
            label = f"{LABELS[peer]} (best of all its learning rates)"
            lines += ["", f"Our FVU minus that of {label} at equal L0, means over seeds: {at}: {verdict}."]
            seeds = sorted({p["seed"] for p in points})
            alone = {seed: differences([p for p in points if p["seed"] == seed], peer) for seed in seeds}
            lines += ["Largest difference, seed by seed: " + ", ".join(f"{max(d.values()):+.4f}" for d in alone.values() if d) + "."]
    return "\n".join(lines)


def plot(points: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for (tool, label), marker in zip(LABELS.items(), "osv"):
        mine = [p for p in points if p["tool"] == tool and p["l0"] > 0]
        if mine:
            curve = sorted((p for p in best_by_l1(mine)), key=lambda p: p["l0"])
            (line,) = axes.plot([p["l0"] for p in curve], [p["fvu"] for p in curve], marker=marker, label=label)
            axes.plot([p["l0"] for p in mine], [p["fvu"] for p in mine], marker, color=line.get_color(), alpha=0.3)
    axes.set(xscale="log", xlabel="L0 (features per token)", ylabel="held-out FVU")
    axes.set_title("each point at its best learning rate; others pale", fontsize=9)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    run(quality, QualityConfig, __doc__ or "")
