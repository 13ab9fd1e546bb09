"""How good a circuit is: MIB's curve with CPR and CMD, bounded measures, completeness, minimality, stability, controls.

`run` always returns the metric of every pair when only a circuit's edges carry the clean run and all others the corrupt one.

r readers · w writers · n pairs · k sizes of circuits · b rounds of the bootstrap, the data themselves first
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.errors import InputError
from sae.progress import Progress
from sae.statistics import Estimate, data_and_resamples, estimate, mean_estimate, ratio
from steering.circuits.model_graph.graph import HEAD_INPUTS, Graph

Run = Callable[[Tensor], np.ndarray]
"""from a circuit, bool [r, w], to the metric of every pair, [n]"""

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""of the graph's edges, as in MIB"""
COUNTS = (10, 30, 100)
"""numbers of edges of circuits small enough to read"""


TRIES = 50
"""draws of a random path before a random circuit is started again"""


class Bounds(NamedTuple):
    """The two runs with which every circuit is compared."""

    full_n: np.ndarray
    """the whole model"""
    empty_n: np.ndarray
    """every edge cut"""
    weight_bn: np.ndarray
    """how often each pair is drawn; equal for all circuits, so that differences between them are paired"""

    def faithfulness(self, metric_n: np.ndarray) -> np.ndarray:
        """(m(C) - m(∅)) / (m(N) - m(∅)) of mean metrics, [b]: 1 as the whole model, 0 as none of it, without limits."""
        mean_b, full_b, empty_b = (self.weight_bn @ value_n for value_n in (metric_n, self.full_n, self.empty_n))
        return ratio(mean_b - empty_b, full_b - empty_b)

    def faithfulness_estimate(self, metric_n: np.ndarray) -> Estimate:
        return estimate(self.faithfulness(metric_n))


class Size(NamedTuple):
    asked: int
    """number of edges chosen by score"""
    kept: int
    """number of these on a path from "embed" to "logits": the others are pruned"""
    metric_n: np.ndarray


def bounds(run: Run, graph: Graph, seed: int = 0) -> Bounds:
    """Raises `InputError` if cutting every edge does not change the mean metric: shares of it are then undefined."""
    full_n, empty_n = (np.asarray(run(circuit), dtype=np.float64) for circuit in (graph.exists_rw, torch.zeros_like(graph.exists_rw)))
    if not math.isfinite(full_n.mean() - empty_n.mean()) or full_n.mean() == empty_n.mean():
        raise InputError(
            f"expected cutting every edge to change the metric, got {full_n.mean():.4g} before and {empty_n.mean():.4g} after; give pairs "
            "whose sides the model tells apart"
        )
    return Bounds(full_n, empty_n, data_and_resamples(len(full_n), np.random.default_rng(seed)))


def top_edges(graph: Graph, score_rw: Tensor, n: int, *, absolute: bool) -> Tensor:
    """The `n` edges of the highest score, or of the largest absolute one, without those on no path; bool [r, w].

    Raises `InputError` for more edges than the graph has, and for scores of another shape.
    """
    if tuple(score_rw.shape) != tuple(graph.exists_rw.shape):
        raise InputError(f"expected scores of shape {tuple(graph.exists_rw.shape)}, got {tuple(score_rw.shape)}; give those of this graph")
    if not 0 <= n <= graph.n_edges:
        raise InputError(f"expected at most {graph.n_edges:,} edges, all of the graph, got {n:,}")
    value_rw = (score_rw.abs() if absolute else score_rw).cpu().masked_fill(~graph.exists_rw, -math.inf)
    circuit_rw = torch.zeros_like(graph.exists_rw)
    circuit_rw.view(-1)[value_rw.reshape(-1).argsort(descending=True, stable=True)[:n]] = True
    return graph.prune(circuit_rw)


def sizes_of(graph: Graph, score_rw: Tensor, asked: Sequence[int], run: Run, *, absolute: bool) -> list[Size]:
    """Runs a circuit of each size."""
    found = []
    for n in asked:
        circuit_rw = top_edges(graph, score_rw, n, absolute=absolute)
        found.append(Size(n, int(circuit_rw.sum()), np.asarray(run(circuit_rw), dtype=np.float64)))
    return found


def fraction_counts(graph: Graph) -> list[int]:
    """Edges at each of `FRACTIONS`, rounded down as MIB's evaluation does."""
    return [int(fraction * graph.n_edges) for fraction in FRACTIONS]


def cpr(f_kb: np.ndarray) -> np.ndarray:
    """MIB's CPR, [b]: the area under f over the fraction of edges by trapezoids. Unbounded, since f is."""
    return np.trapezoid(f_kb, FRACTIONS, axis=0)


def cmd(f_kb: np.ndarray) -> np.ndarray:
    """MIB's CMD, [b]: the area between f and 1; 0 is best. Half of it is due to the sizes above 50 %."""
    return np.trapezoid(np.abs(1 - f_kb), FRACTIONS, axis=0)


def cmd_log(f_kb: np.ndarray) -> np.ndarray:
    """The mean distance of f from 1 over the logarithm of the fraction, [b], where each factor of ten counts alike."""
    return np.trapezoid(np.abs(1 - f_kb), np.log(FRACTIONS), axis=0) / math.log(FRACTIONS[-1] / FRACTIONS[0])


def ndf(f: np.ndarray) -> np.ndarray:
    """1 - min(|1 - f|, 1): from 0 to 1, too much counting as too little (arXiv 2509.24808, there of one pair, here of mean metrics)."""
    return 1 - np.minimum(np.abs(1 - f), 1)


def evaluation_runs() -> int:
    """How many circuits `evaluate_scores` runs."""
    return 2 + 2 * len(FRACTIONS) + len(COUNTS)


def evaluate_scores(run: Run, graph: Graph, score_rw: Tensor, seed: int = 0, bar: Progress | None = None) -> dict[str, Any]:
    """The curve of circuits made of edge scores, with 95 % intervals over pairs, as it goes into JSON.

    CPR ranks by signed score, all else by absolute score, as MIB's leaderboard does. Raises `InputError` as `bounds` and `top_edges` do.
    """

    def counted(circuit_rw: Tensor) -> np.ndarray:
        metric_n = run(circuit_rw)
        if bar is not None:
            bar.advance(1)
        return metric_n

    ends, asked = bounds(counted, graph, seed), fraction_counts(graph)
    signed, absolute = (sizes_of(graph, score_rw, asked, counted, absolute=kind) for kind in (False, True))
    small = sizes_of(graph, score_rw, [n for n in COUNTS if n <= graph.n_edges], counted, absolute=True)
    signed_kb, absolute_kb = (np.stack([ends.faithfulness(size.metric_n) for size in curve]) for curve in (signed, absolute))
    return {
        "n_edges": graph.n_edges,
        "n_pairs": len(ends.full_n),
        "full": mean_estimate(ends.full_n, seed),
        "empty": mean_estimate(ends.empty_n, seed),
        "cpr": estimate(cpr(signed_kb)),
        "cmd": estimate(cmd(absolute_kb)),
        "cmd_log": estimate(cmd_log(absolute_kb)),
        "ndf_log": estimate(1 - cmd_log(ndf(absolute_kb))),
        "signed": [_row(size, ends, fraction) for size, fraction in zip(signed, FRACTIONS)],
        "absolute": [_row(size, ends, fraction) for size, fraction in zip(absolute, FRACTIONS)],
        "counts": [_row(size, ends) for size in small],
    }


def evaluate_circuit(run: Run, graph: Graph, circuit_rw: Tensor, ends: Bounds, draws: int = 20, seed: int = 0) -> dict[str, Any]:
    """One circuit: its faithfulness, what the model does when it is cut, random circuits of as many edges, and the circuit of random
    heads instead of its own, as it goes into JSON."""
    n_edges = int(graph.checked(circuit_rw).sum())
    drawn = random_circuits(graph, n_edges, draws, seed) if n_edges else []
    f_b = ends.faithfulness(run(circuit_rw))
    return {
        "n_edges": n_edges,
        "f": estimate(f_b),
        "ndf": estimate(ndf(f_b)),
        "without": completeness(run, graph, circuit_rw, ends),
        "random": _control(run, ends, drawn),
        "random_heads": _control(run, ends, of_random_heads(graph, circuit_rw, draws, seed)),
    }


def _control(run: Run, ends: Bounds, circuits: Sequence[Tensor]) -> dict[str, Any]:
    f_d = [float(ends.faithfulness(run(circuit_rw))[0]) for circuit_rw in circuits]
    return {"f": f_d, "mean": float(np.mean(f_d)) if f_d else None, "highest": max(f_d, default=None)}


def completeness(run: Run, graph: Graph, circuit_rw: Tensor, ends: Bounds) -> Estimate:
    """Faithfulness of the model without the circuit's edges: 0 if only the circuit does the task, above 0 if other parts can."""
    return ends.faithfulness_estimate(run(graph.exists_rw & ~graph.checked(circuit_rw).cpu()))


def minimality(run: Run, graph: Graph, circuit_rw: Tensor, ends: Bounds) -> list[tuple[str, Estimate]]:
    """The value of each edge: how much faithfulness falls when only this edge is cut from the circuit; the edges that matter least
    first."""
    whole_b = ends.faithfulness(run(circuit_rw))
    found = []
    for r, w in graph.checked(circuit_rw).nonzero().tolist():
        less_rw = circuit_rw.clone()
        less_rw[r, w] = False
        found.append((graph.edge_name(r, w), estimate(whole_b - ends.faithfulness(run(less_rw)))))
    return sorted(found, key=lambda one: one[1]["value"] or 0.0)


def jaccard(first_rw: Tensor, second_rw: Tensor) -> float:
    """Share of the edges of either circuit that both have; 1 for two without edges."""
    either = int((first_rw | second_rw).sum())
    return int((first_rw & second_rw).sum()) / either if either else 1.0


def stability(
    score: Callable[[Sequence[int]], Tensor], n_pairs: int, graph: Graph, sizes: Sequence[int], rounds: int = 6, seed: int = 0
) -> list[dict[str, Any]]:
    """How far the edges depend on the pairs: for each size, Jaccard of the circuits of resampled pairs, as it goes into JSON.

    `score` returns the scores [r, w] of some pairs, by number, repeats among them; each round draws as many pairs as there are, with
    replacement. Raises `InputError` for fewer than two rounds.
    """
    if rounds < 2:
        raise InputError(f"expected at least two rounds to compare circuits of, got {rounds}")
    rng = np.random.default_rng(seed)
    drawn = [score(rng.integers(0, n_pairs, n_pairs).tolist()) for _ in range(rounds)]
    rows = []
    for size in sizes:
        circuits = [top_edges(graph, score_rw, size, absolute=True) for score_rw in drawn]
        values = [jaccard(a, b) for a, b in combinations(circuits, 2)]
        rows.append({"asked": size, "mean": float(np.mean(values)), "lowest": min(values), "rounds": rounds})
    return rows


def random_circuits(graph: Graph, n_edges: int, draws: int, seed: int = 0) -> list[Tensor]:
    """Circuits of exactly `n_edges` edges, each on a path from "embed" to "logits", bool [r, w].

    Paths are grown backwards, from a random input of a part that is in the circuit to "embed" or another such part; one that would be
    too long is drawn again. Raises `InputError` for no edge and for more edges than the graph has.
    """
    if not 1 <= n_edges <= graph.n_edges:
        raise InputError(f"expected from 1 to {graph.n_edges:,} edges, all of the graph, got {n_edges:,}")
    rng, found = np.random.default_rng(seed), list[Tensor]()
    while len(found) < draws:
        circuit_rw = _random_circuit(graph, n_edges, rng)
        if circuit_rw is not None:
            found.append(circuit_rw)
    return found


def of_random_heads(graph: Graph, circuit_rw: Tensor, draws: int, seed: int = 0) -> list[Tensor]:
    """The circuit with random heads of the same layers instead of its heads, all their edges with them, bool [r, w].

    Each draw permutes the heads of every layer, so it has as many edges and nodes of every kind in every layer; some heads may be the
    circuit's own. None is drawn for a circuit without heads, which would stay as it is.
    """
    rng, found = np.random.default_rng(seed), list[Tensor]()
    heads = [name.startswith("head") for name in graph.writers]
    fed = graph.fed_r[circuit_rw.cpu().any(1)].tolist()
    if not circuit_rw[:, heads].any() and not any(w >= 0 and heads[w] for w in fed):
        return []
    for _ in range(draws):
        order_r, order_w = torch.arange(len(graph.readers)), torch.arange(len(graph.writers))
        for layer in range(graph.n_layers):
            order = torch.from_numpy(rng.permutation(graph.n_heads))
            order_w[graph.heads(layer)] = graph.heads(layer).start + order
            for kind in HEAD_INPUTS:
                order_r[graph.head_inputs(kind, layer)] = graph.head_inputs(kind, layer).start + order
        found.append(circuit_rw.cpu()[order_r][:, order_w])
    return found


def _random_circuit(graph: Graph, n_edges: int, rng: np.random.Generator) -> Tensor | None:
    """None for one that cannot be completed, as where one edge is left to draw and every path needs two."""
    circuit_rw = torch.zeros_like(graph.exists_rw)
    inside_w = torch.zeros(len(graph.writers), dtype=torch.bool)
    inside_w[0] = True
    while (left := n_edges - int(circuit_rw.sum())) > 0:
        read_r = (graph.fed_r < 0) | inside_w[graph.fed_r]
        new_en = (graph.exists_rw & ~circuit_rw & read_r[:, None]).nonzero()
        paths = (_random_path(graph, new_en, inside_w, left, rng) for _ in range(TRIES))
        path = next((path for path in paths if path), None)
        if path is None:
            return None
        for r, w in path:
            circuit_rw[r, w] = inside_w[w] = True
    return circuit_rw


def _random_path(graph: Graph, new_en: Tensor, inside_w: Tensor, longest: int, rng: np.random.Generator) -> list[tuple[int, int]] | None:
    """One of the new edges, and on backwards to a part of the circuit; None for a draw that is too long."""
    path: list[tuple[int, int]] = []
    while len(path) < longest:
        if path:
            r = int(rng.choice((graph.fed_r == path[-1][1]).nonzero()[:, 0].numpy()))
            w = int(rng.integers(int(graph.seen_r[r])))
        else:
            r, w = new_en[int(rng.integers(len(new_en)))].tolist()
        path.append((r, w))
        if inside_w[w]:
            return path
    return None


def _row(size: Size, ends: Bounds, fraction: float | None = None) -> dict[str, Any]:
    f_b = ends.faithfulness(size.metric_n)
    row = {"edges": size.asked, "kept": size.kept, "f": estimate(f_b), "ndf": estimate(ndf(f_b))}
    return row if fraction is None else {"fraction": fraction, **row}
