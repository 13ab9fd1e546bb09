"""Tables and plots of quality.py: curves of L0 against held-out FVU and loss recovered, and differences at equal L0."""

from pathlib import Path
from typing import Any

import numpy as np

TRAINERS = {
    "relu": {"ours": "ours", "saelens": "StandardTrainingSAE", "dictionary_learning": "StandardTrainerAprilUpdate"},
    "p-annealing": {"ours": "ours", "dictionary_learning": "PAnnealTrainer"},
    "gated": {"ours": "ours", "saelens": "GatedTrainingSAE", "dictionary_learning": "GatedSAETrainer"},
    "topk": {"ours": "ours", "saelens": "TopKTrainingSAE", "dictionary_learning": "TopKTrainer"},
    "abstopk": {"ours": "ours", "saelens": "AbsTopKTrainingSAE"},
    "batchtopk": {"ours": "ours", "saelens": "BatchTopKTrainingSAE", "dictionary_learning": "BatchTopKTrainer"},
    "matryoshka": {"ours": "ours", "saelens": "MatryoshkaBatchTopKTrainingSAE", "dictionary_learning": "MatryoshkaBatchTopKTrainer"},
    "jumprelu": {"ours": "ours", "saelens": "JumpReLUTrainingSAE, quadratic", "dictionary_learning": "JumpReluTrainer"},
}
"""kind -> tool -> the name of its trainer"""
LABELS = {"ours": "ours", "saelens": "SAELens", "dictionary_learning": "dictionary_learning"}
MEANS = "l0", "fvu", "dead", "loss_recovered", "median_density"

Points = list[dict[str, Any]]


def score(point: dict[str, Any]) -> float:
    """FVU · √L0, which hardly changes along a curve; infinite for a dictionary that never fires."""
    return point["fvu"] * point["l0"] ** 0.5 if point["l0"] > 0 else float("inf")


def over_seeds(points: Points) -> Points:
    """One point for each tool, kind, sparsity and learning rate: means over its seeds, and half the range of each."""
    groups: dict[tuple, Points] = {}
    for p in points:
        groups.setdefault((p["tool"], p["kind"], p["sparsity"], p["lr"]), []).append(p)
    found = []
    for group in groups.values():
        own = [name for name in MEANS if name in group[0]]
        numbers = {name: float(np.mean([p[name] for p in group])) for name in own}
        spread = {f"{name}_spread": float(np.ptp([p[name] for p in group])) / 2 for name in own}
        found.append(group[0] | numbers | spread | {"seeds": len(group)})
    return found


def curve(points: Points, tool: str, kind: str) -> Points:
    """Of a trainer's points those with most seeds at each sparsity, then of the best learning rate, by rising L0."""
    best: dict[float, dict[str, Any]] = {}
    for p in over_seeds(points):
        if (p["tool"], p["kind"]) == (tool, kind):
            other = best.get(p["sparsity"])
            if other is None or (-p["seeds"], score(p)) < (-other["seeds"], score(other)):
                best[p["sparsity"]] = p
    return sorted((p for p in best.values() if p["l0"] > 0), key=lambda p: p["l0"])


def at(points: Points, l0: float, name: str = "fvu") -> float:
    """A curve's value at an L0, linear in log L0 between its points; NaN outside them."""
    if not points:
        return float("nan")
    return float(np.interp(np.log(l0), np.log([p["l0"] for p in points]), [p[name] for p in points], left=np.nan, right=np.nan))


def differences(points: Points, kind: str, peer: str, name: str = "fvu") -> dict[float, float]:
    """Our value minus the peer's at equal L0, at the points of either curve where both exist."""
    ours, theirs = curve(points, "ours", kind), curve(points, peer, kind)
    l0s = sorted(p["l0"] for p in ours + theirs)
    found = {l0: at(ours, l0, name) - at(theirs, l0, name) for l0 in l0s}
    return {l0: d for l0, d in found.items() if d == d}


def report(points: Points, d_sae: int) -> str:
    """Two markdown tables: the curves, and our FVU and loss recovered against each peer's at equal L0."""
    names = {"fvu": "FVU"} | ({"loss_recovered": "loss recovered"} if all("loss_recovered" in p for p in points) else {})
    head = ["kind", "trainer", "k, target L0 or L1", "learning rate", "seeds", "L0", *names.values(), "FVU · √L0", "dead", "median density"]
    lines = [row(head), row(["---"] * len(head))]
    for kind, trainers in TRAINERS.items():
        for tool in trainers:
            for p in curve(points, tool, kind):
                lr = f"{p['lr']:g}" if p["lr"] is not None else "its default"
                cells = [kind, label(tool, kind), f"{p['sparsity']:g}", lr, str(p["seeds"]), number(p, "l0", 1)]
                last = f"{score(p):.3f}", f"{p['dead'] / d_sae:.1%}", f"{p['median_density']:.2%}"
                lines.append(row([*cells, *(number(p, name, 4) for name in names), *last]))
    lines += ["", row(["kind", "against", *(f"our {text} minus theirs at equal L0" for text in names.values())])]
    lines.append(row(["---"] * (2 + len(names))))
    for kind, trainers in TRAINERS.items():
        for peer in [tool for tool in trainers if tool != "ours"]:
            found = [differences(points, kind, peer, name) for name in names]
            if any(found):
                texts = [", ".join(f"{d:+.4f} at {l0:.0f}" for l0, d in one.items()) for one in found]
                lines.append(row([kind, label(peer, kind), *texts]))
    return "\n".join(lines)


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def label(tool: str, kind: str) -> str:
    return "ours" if tool == "ours" else f"{LABELS[tool]} {TRAINERS[kind][tool]}"


def number(p: dict[str, Any], name: str, digits: int) -> str:
    """With half the range over seeds, or with one seed the interval over sequences if there is one."""
    text = f"{p[name]:.{digits}f}"
    if p["seeds"] > 1:
        return f"{text} ± {p[f'{name}_spread']:.{digits}f}"
    interval = p.get(f"{name}_interval")
    return text if interval is None else f"{text} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def plot(points: Points, path: Path) -> None:
    """A panel a kind: FVU above, loss recovered below where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    kinds = [kind for kind in TRAINERS if any(p["kind"] == kind for p in points)]
    names = ["fvu", *(["loss_recovered"] if all("loss_recovered" in p for p in points) else [])]
    size = (2.4 * len(kinds), 2.4 * len(names) + 0.5)
    figure, axes = plt.subplots(len(names), len(kinds), figsize=size, layout="constrained", squeeze=False, sharex=True, sharey="row")
    for column, kind in enumerate(kinds):
        for line, name in enumerate(names):
            panel = axes[line][column]
            for number_of, (tool, text) in enumerate(LABELS.items()):
                found = curve(points, tool, kind)
                style = dict(marker="osv"[number_of], color=f"C{number_of}", label=text, markersize=4, linewidth=1.2)
                panel.plot([p["l0"] for p in found], [p[name] for p in found], **style)
            panel.set(xscale="log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())  # the labels of all minor ticks run into one another
            panel.grid(alpha=0.3)
        axes[0][column].set_title(kind, fontsize=10)
        axes[-1][column].set_xlabel("L0")
    for line, name in enumerate(names):
        axes[line][0].set_ylabel({"fvu": "held-out FVU", "loss_recovered": "loss recovered"}[name])
    axes[0][0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
