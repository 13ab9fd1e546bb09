"""How faithful circuits of features are, compared with circuits of other directions of the same sites, on held-out pairs.

All of them are ranked by the scores of one method on the same pairs, and cut in the same way: nodes outside have their value of the corrupt
prompt, or their mean. Other bases have no error, so features appear twice: with the errors in every circuit, and without.

n nodes of a site · f features · b rounds of the bootstrap, the data themselves first
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.errors import InputError
from sae.progress import Progress
from sae.statistics import Estimate, data_and_resamples, mean_estimate
from steering.circuits.features.controls import matched_nodes
from steering.circuits.features.passes import NodePatching, Nodes
from steering.circuits.features.sites import FeatureSite
from steering.circuits.finding.metrics import Bounds, jaccard

COUNTS = (1, 3, 10, 30, 100, 300)
"""numbers of nodes of the circuits"""
DRAWS = 10
"""number of draws of random features"""


def top_nodes(sites: Sequence[FeatureSite], score_n: Nodes, count: int, *, errors: bool) -> Nodes:
    """The `count` nodes of the largest absolute score that are no errors, bool [n] of each site; with `errors`, all errors besides."""
    ranked = torch.cat([one_n.abs() * candidates(site) for site, one_n in zip(sites, score_n)])
    inside = torch.zeros(len(ranked), dtype=torch.bool)
    inside[ranked.argsort(descending=True, stable=True)[: min(count, int((ranked > 0).sum()))]] = True
    return with_errors(sites, list(inside.split([site.n_nodes for site in sites])), errors)


def with_errors(sites: Sequence[FeatureSite], inside: Nodes, errors: bool) -> Nodes:
    """The same nodes, with all errors or none. The error of a complete basis is rounding, and always in."""
    found = []
    for site, one_n in zip(sites, inside):
        one_n = one_n.clone()
        one_n[site.error] = errors or not site.has_error
        found.append(one_n)
    return found


def candidates(site: FeatureSite) -> Tensor:
    """Nodes that a circuit chooses from: all that exist but the error, bool [n]."""
    found_n = site.exists_n.clone()
    found_n[site.error] = False
    return found_n


def everything(sites: Sequence[FeatureSite], inside: bool) -> Nodes:
    return [torch.full((site.n_nodes,), inside) for site in sites]


def node_bounds(patching: NodePatching, seed: int) -> Bounds:
    """The metric with every node inside and with none. Raises `InputError` if the two are equal."""
    full_n, empty_n = (np.asarray(patching(everything(patching.sites, inside)), dtype=np.float64) for inside in (True, False))
    if not np.isfinite(full_n.mean() - empty_n.mean()) or full_n.mean() == empty_n.mean():
        raise InputError(
            f"expected the metric to change when no node is inside, got {full_n.mean():.4g} before and {empty_n.mean():.4g} "
            "after; give dictionaries of sites that the task passes through"
        )
    return Bounds(full_n, empty_n, data_and_resamples(len(full_n), np.random.default_rng(seed)))


class Curve:
    """Circuits of one set of sites, run on the held-out pairs."""

    def __init__(self, patching: NodePatching, score_n: Nodes, bar: Progress):
        self.sites, self.score_n, self.bar, self.patching = patching.sites, score_n, bar, patching

    @property
    def ranked(self) -> int:
        """Nodes that a circuit can choose from: those with a score other than 0."""
        return sum(int((one_n * candidates(site) != 0).sum()) for site, one_n in zip(self.sites, self.score_n))

    def top(self, count: int, *, errors: bool) -> Nodes:
        return top_nodes(self.sites, self.score_n, count, errors=errors)

    def faithfulness(self, ends: Bounds, inside: Nodes) -> Estimate:
        self.bar.advance(1)
        return ends.faithfulness_estimate(self.patching(inside))


def evaluate_features(curve: Curve, others: dict[str, Curve], frequency: Sequence[Tensor], circuit: Nodes, seed: int = 0) -> dict[str, Any]:
    """The table of curves and the circuit among random features, as it goes into JSON; f is MIB's (see finding/metrics.py).

    A row is a number of nodes. "errors_in" and "errors_out" are circuits of features with all errors and with none of them; "matched" are
    `DRAWS` draws of random features of the same frequencies with the errors in, None where too few features are left.
    """
    ends = node_bounds(curve.patching, seed)
    rng, rows = np.random.default_rng(seed), []
    for count in (0, *(n for n in COUNTS if n < curve.ranked), curve.ranked):
        row: dict[str, Any] = {"nodes": count}
        for name, errors in (("errors_in", True), ("errors_out", False)):
            row[name] = curve.faithfulness(ends, curve.top(count, errors=errors))
        row["matched"] = draws(curve, ends, curve.top(count, errors=True), frequency, rng) if count else None
        for name, other in others.items():
            row[name] = other.faithfulness(ends, other.top(count, errors=True)) if count <= other.ranked else None
        rows.append(row)
    full, empty = mean_estimate(ends.full_n, seed), mean_estimate(ends.empty_n, seed)
    return {
        "n_pairs": len(ends.full_n),
        "full": full,
        "empty": empty,
        "curve": rows,
        "circuit": _of_circuit(curve, ends, frequency, circuit, rng),
    }


def _of_circuit(curve: Curve, ends: Bounds, frequency: Sequence[Tensor], circuit: Nodes, rng: np.random.Generator) -> dict[str, Any]:
    found: dict[str, Any] = {"nodes": sum(int((one_n & candidates(site)).sum()) for site, one_n in zip(curve.sites, circuit))}
    for name, errors in (("errors_in", True), ("errors_out", False)):
        found[name] = curve.faithfulness(ends, with_errors(curve.sites, circuit, errors))
    rest = [~one_n for one_n in with_errors(curve.sites, circuit, False)]
    found["without"] = curve.faithfulness(ends, rest)
    found["matched"] = draws(curve, ends, with_errors(curve.sites, circuit, True), frequency, rng)
    return found


def draws(curve: Curve, ends: Bounds, inside: Nodes, frequency: Sequence[Tensor], rng: np.random.Generator) -> dict[str, Any] | None:
    """Faithfulness of random features that fire as often as those inside."""
    found = []
    for _ in range(DRAWS):
        drawn = matched_nodes(curve.sites, inside, frequency, rng)
        if drawn is None:
            return None
        found.append(float(ends.faithfulness(curve.patching(drawn))[0]))
        curve.bar.advance(1)
    return {"f": found, "mean": float(np.mean(found)), "highest": max(found)}


def stability(sites: Sequence[FeatureSite], score_sn: Nodes, counts: Sequence[int], rounds: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    """How far the nodes depend on the pairs: Jaccard of the nodes of resampled pairs, as it goes into JSON."""
    rng, n_pairs = np.random.default_rng(seed), len(score_sn[0])
    drawn = [torch.from_numpy(rng.integers(0, n_pairs, n_pairs)) for _ in range(rounds)]
    rows = []
    for count in counts:
        circuits = [torch.cat(top_nodes(sites, [one_sn[pairs].mean(0) for one_sn in score_sn], count, errors=False)) for pairs in drawn]
        values = [jaccard(a, b) for a, b in combinations(circuits, 2)]
        rows.append({"nodes": count, "mean": float(np.mean(values)), "lowest": min(values), "rounds": rounds})
    return rows
