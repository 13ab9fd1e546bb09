"""Measures of circuits: numbers worked by hand on a graph of eight edges, and MIB's evaluation written out with names and loops."""

import math

import numpy as np
import pytest
import torch

from sae.errors import InputError
from steering.circuits.finding.metrics import (
    COUNTS,
    FRACTIONS,
    bounds,
    cmd,
    cmd_log,
    completeness,
    cpr,
    evaluate_circuit,
    evaluate_scores,
    evaluation_runs,
    fraction_counts,
    jaccard,
    minimality,
    ndf,
    of_random_heads,
    random_circuits,
    stability,
    top_edges,
)
from steering.circuits.model_graph.graph import Graph

ONE = Graph(1, 1)  # embed -> q, k, v; embed, head -> mlp; embed, head, mlp -> logits
BIG = Graph(3, 4)


def additive(graph, value_rw, pair_n=(1.0,), base=0.0):
    """A run whose metric is the sum of the kept edges' values, times a factor of each pair."""
    return lambda circuit_rw: base + np.array(pair_n) * float((value_rw * circuit_rw).sum())


def values(graph, seed=0):
    return torch.randn(graph.exists_rw.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * graph.exists_rw


def mib(graph, run, score_rw, absolute):
    """MIB's evaluation as its source has it: top edges by name, nodes without inputs or outputs removed until nothing changes."""
    full, empty = run(graph.exists_rw).mean(), run(torch.zeros_like(graph.exists_rw)).mean()
    names = {graph.edge_name(r, w): float(score_rw[r, w]) for r, w in graph.exists_rw.nonzero().tolist()}
    fractions, curve = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1), []
    for fraction in fractions:
        ranked = sorted(names, key=lambda name: -(abs(names[name]) if absolute else names[name]))
        edges = set(ranked[: int(fraction * len(names))])
        while True:
            ends = [edge.split("->") for edge in edges]
            node = {r: "mlp." + r[7:] if r.startswith("mlp_in") else "head." + r[2:] if r != "logits" else r for _, r in ends}
            sending, fed = {w for w, _ in ends}, {node[r] for _, r in ends} | {"embed"}
            kept = {edge for edge, (w, r) in zip(edges, ends) if w in fed and (r == "logits" or node[r] in sending)}
            if kept == edges:
                break
            edges = kept
        curve.append((run(graph.circuit(edges)).mean() - empty) / (full - empty))
    under = between = 0.0
    for i in range(len(curve) - 1):
        step = fractions[i + 1] - fractions[i]
        under += step * (curve[i] + curve[i + 1]) / 2
        between += step * (abs(1 - curve[i]) + abs(1 - curve[i + 1])) / 2
    return curve, under, between


@pytest.mark.parametrize("seed", range(4))
def test_cpr_and_cmd_are_those_of_mibs_evaluation(seed):
    run = additive(BIG, values(BIG, seed), (1.0, 0.5, -0.25), base=3.0)
    score_rw = values(BIG, seed) + 0.3 * values(BIG, seed + 10)
    found = evaluate_scores(run, BIG, score_rw)
    for kind, absolute in (("signed", False), ("absolute", True)):
        curve, under, between = mib(BIG, run, score_rw, absolute)
        assert [row["f"]["value"] for row in found[kind]] == pytest.approx(curve, rel=1e-9)
        assert found["cmd" if absolute else "cpr"]["value"] == pytest.approx(between if absolute else under, rel=1e-9)
        assert [row["edges"] for row in found[kind]] == [int(fraction * BIG.n_edges) for fraction in FRACTIONS]
        assert all(row["kept"] <= row["edges"] for row in found[kind])
    assert found["signed"][-1]["f"] == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})


def test_areas_by_hand():
    flat = np.full((10, 1), 0.25)
    assert cpr(flat)[0] == pytest.approx(0.25 * 0.999)
    assert cmd(flat)[0] == pytest.approx(0.75 * 0.999)
    assert cmd_log(flat)[0] == pytest.approx(0.75)
    over = np.full((10, 1), 3.0)
    assert (cpr(over)[0], cmd(over)[0]) == pytest.approx((3 * 0.999, 2 * 0.999))
    only_last = np.array([0.0] * 9 + [1.0])[:, None]
    assert cpr(only_last)[0] == pytest.approx(0.25)  # a triangle over .5 to 1
    assert cmd(only_last)[0] == pytest.approx(0.499 + 0.25)
    assert cmd_log(only_last)[0] == pytest.approx((math.log(0.5 / 0.001) + math.log(2) / 2) / math.log(1000))
    assert ndf(np.array([0.0, 0.5, 1.0, 1.5, 2.0, 9.0, -1.0])).tolist() == [0, 0.5, 1, 0.5, 0, 0, 0]


def test_top_edges_are_pruned():
    score_rw = torch.zeros(ONE.exists_rw.shape)
    for number, name in enumerate(["embed->v.0.0", "embed->logits", "head.0.0->mlp_in.0", "mlp.0->logits"]):
        score_rw[ONE.edge(name)] = 4.0 - number
    names = lambda n: set(ONE.edges(top_edges(ONE, score_rw, n, absolute=False)))  # noqa: E731
    assert names(1) == set()
    assert names(2) == names(3) == {"embed->logits"}
    assert names(4) == {"embed->v.0.0", "embed->logits", "head.0.0->mlp_in.0", "mlp.0->logits"}
    score_rw[ONE.edge("embed->logits")] = -9
    assert set(ONE.edges(top_edges(ONE, score_rw, 1, absolute=True))) == {"embed->logits"}
    assert not top_edges(ONE, score_rw, 1, absolute=False).any()
    with pytest.raises(InputError, match="at most 8 edges"):
        top_edges(ONE, score_rw, 9, absolute=True)
    with pytest.raises(InputError, match="of this graph"):
        top_edges(BIG, score_rw, 1, absolute=True)


def test_edges_at_each_fraction_are_rounded_down():
    assert fraction_counts(Graph(12, 12)) == [32, 64, 162, 324, 649, 1624, 3249, 6498, 16245, 32491]


def test_counts_of_edges_and_number_of_runs():
    calls = []
    run = additive(BIG, values(BIG))
    found = evaluate_scores(lambda c: calls.append(1) or run(c), BIG, values(BIG))
    assert len(calls) == evaluation_runs()
    for row, n in zip(found["counts"], COUNTS):
        circuit_rw = top_edges(BIG, values(BIG), n, absolute=True)
        expected = float((values(BIG) * circuit_rw).sum() / values(BIG).sum())
        assert (row["edges"], row["kept"]) == (n, int(circuit_rw.sum()))
        assert row["f"]["value"] == pytest.approx(expected)
        assert row["ndf"]["value"] == pytest.approx(1 - min(abs(1 - expected), 1))


def test_intervals_are_over_pairs():
    """Two pairs of which one needs one edge and one the other: f of one edge is the share of the first pair in each draw."""
    a, b = ONE.edge("embed->logits"), ONE.edge("embed->v.0.0")
    run = lambda circuit_rw: np.array([float(circuit_rw[a])] * 30 + [float(circuit_rw[b])] * 10)  # noqa: E731
    ends = bounds(run, ONE, seed=1)
    found = ends.faithfulness_estimate(run(ONE.circuit(["embed->logits"])))
    assert found["value"] == 0.75
    spread = 1.96 * math.sqrt(0.75 * 0.25 / 40)
    assert found["low"] == pytest.approx(0.75 - spread, abs=0.03)
    assert found["high"] == pytest.approx(0.75 + spread, abs=0.03)


def test_a_metric_that_does_not_move_is_refused():
    with pytest.raises(InputError, match="cutting every edge to change the metric, got 2 before and 2 after"):
        bounds(lambda circuit_rw: np.array([1.0, 3.0]), ONE)


def test_completeness_and_minimality_by_hand():
    """Two edges that can stand in for one another, one that adds, one that harms."""
    a, b, c, d = (ONE.edge(name) for name in ("embed->logits", "mlp.0->logits", "head.0.0->logits", "embed->mlp_in.0"))

    def run(circuit_rw):
        return np.array([2.0 * float(circuit_rw[a] | circuit_rw[b]) + 3.0 * float(circuit_rw[c]) - 1.0 * float(circuit_rw[d])])

    ends = bounds(run, ONE)
    circuit_rw = ONE.circuit(["embed->logits", "head.0.0->logits", "embed->mlp_in.0"])
    assert completeness(run, ONE, circuit_rw, ends)["value"] == 0.5  # mlp.0->logits still does 2 of 4
    worth = {name: found["value"] for name, found in minimality(run, ONE, circuit_rw, ends)}
    assert worth == {"embed->mlp_in.0": -0.25, "embed->logits": 0.5, "head.0.0->logits": 0.75}
    assert list(worth) == ["embed->mlp_in.0", "embed->logits", "head.0.0->logits"]
    found = evaluate_circuit(run, ONE, circuit_rw, ends, draws=3)
    assert (found["n_edges"], found["f"]["value"], found["ndf"]["value"]) == (3, 1.0, 1.0)
    assert len(found["random"]["f"]) == 3
    assert found["random_heads"] == {"f": [1.0] * 3, "mean": 1.0, "highest": 1.0}  # the graph has one head


def test_jaccard_and_stability():
    one, two = ONE.circuit(["embed->logits", "embed->v.0.0"]), ONE.circuit(["embed->logits", "mlp.0->logits", "embed->q.0.0"])
    assert jaccard(one, two) == 0.25
    assert jaccard(one & False, two & False) == 1.0
    drawn = []

    def score(numbers):
        drawn.append(numbers)
        return values(BIG, 0) + len(drawn) * 0.0

    assert stability(score, 5, BIG, (30,), rounds=3) == [{"asked": 30, "mean": 1.0, "lowest": 1.0, "rounds": 3}]
    assert [len(numbers) for numbers in drawn] == [5, 5, 5]
    assert len({tuple(numbers) for numbers in drawn}) == 3
    assert set().union(*drawn) <= set(range(5))
    kept = [top_edges(BIG, values(BIG, seed), 60, absolute=True) for seed in (1, 2)]
    turns = iter((1, 2))
    (row,) = stability(lambda numbers: values(BIG, next(turns)), 5, BIG, (60,), rounds=2)
    assert row["mean"] == jaccard(*kept) < 1
    with pytest.raises(InputError, match="at least two rounds"):
        stability(score, 5, BIG, (30,), rounds=1)


def test_random_heads_take_the_place_of_the_circuits_with_all_their_edges():
    names = [
        "embed->q.0.1",
        "embed->v.0.1",
        "head.0.1->v.1.0",
        "head.0.1->mlp_in.1",
        "head.1.0->logits",
        "mlp.1->k.2.2",
        "head.2.2->logits",
    ]
    seen, alike = {layer: set() for layer in range(3)}, 0
    for circuit_rw in of_random_heads(BIG, BIG.circuit(names), 200, seed=1):
        drawn = BIG.edges(circuit_rw)
        found = {}  # which head stands for which, the same one in all edges
        for edge in drawn:
            for end in edge.split("->"):
                _, layer, *head = end.split(".") if "." in end else (end, "")
                if head:
                    found.setdefault(int(layer), set()).add(int(head[0]))
        assert {layer: len(heads) for layer, heads in found.items()} == {0: 1, 1: 1, 2: 1}
        a, b, c = (next(iter(found[layer])) for layer in range(3))
        by_name = [f"embed->q.0.{a}", f"embed->v.0.{a}", f"head.0.{a}->v.1.{b}", f"head.0.{a}->mlp_in.1", f"head.1.{b}->logits"]
        assert set(drawn) == {*by_name, f"mlp.1->k.2.{c}", f"head.2.{c}->logits"}
        for layer in range(3):
            seen[layer] |= found[layer]
        alike += drawn == names
    assert all(heads == {0, 1, 2, 3} for heads in seen.values())
    assert alike < 20  # of 64 that are equally likely
    assert of_random_heads(BIG, BIG.circuit(["embed->mlp_in.0", "mlp.0->logits"]), 5) == []
    (one,) = of_random_heads(Graph(2, 2, parallel=True), Graph(2, 2, parallel=True).circuit(["embed->q.1.0"]), 1)
    assert int(one.sum()) == 1


@pytest.mark.parametrize("graph", [ONE, BIG, Graph(2, 2, parallel=True)])
def test_random_circuits_have_their_size_and_no_loose_edge(graph):
    for n in (1, 2, 5, graph.n_edges // 2, graph.n_edges):
        for circuit_rw in random_circuits(graph, n, 5, seed=n):
            assert int(circuit_rw.sum()) == n
            assert torch.equal(graph.prune(circuit_rw), circuit_rw)
    drawn = random_circuits(BIG, 20, 6)
    assert len({tuple(BIG.edges(circuit_rw)) for circuit_rw in drawn}) == 6
    assert all(map(torch.equal, drawn, random_circuits(BIG, 20, 6)))
    with pytest.raises(InputError, match="from 1 to"):
        random_circuits(graph, 0, 1)
