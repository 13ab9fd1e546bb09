"""Searches that run circuits, against one run for each edge with plain loops; and the wired induction circuit, found edge by edge."""

import numpy as np
import pytest
import torch

from sae.errors import InputError
from steering.circuits.finding.metrics import random_circuits, top_edges
from steering.circuits.finding.searches import Patching, acdc, eliminate, exact_scores
from steering.circuits.model_graph.engine import Engine
from steering.circuits.tasks.generators import Pair
from steering.circuits.tasks.prompts import own_prompts

ROWS = [("abcd", "abxd"), ("hello", "jelly"), ("aaaa", "bbbb"), ("longer text", "linger tent"), ("zz", "yz")]


@pytest.fixture(scope="module")
def world(byte_lm):
    prompts = own_prompts(byte_lm, [Pair((clean,), (corrupt,), ("k", "l"), ("m",)) for clean, corrupt in ROWS])
    engine = Engine(byte_lm)
    return byte_lm, engine, prompts, Patching(engine, prompts, batch=7)


def alone(lm, engine, row, circuit_rw):
    """The last logits of one pair by itself, without padding."""
    clean, corrupt = (torch.tensor([lm.token_ids(text)]) for text in row)
    cut_rw = (engine.graph.exists_rw & ~circuit_rw).float()
    with torch.no_grad(), engine.patched(engine.writers(corrupt), cut_rw):
        return lm.logits(clean)[0, -1].double()


def metric(lm, logits_v):
    first, second, wrong = (lm.token_ids(letter)[-1] for letter in "klm")
    return float((logits_v[first] + logits_v[second]) / 2 - logits_v[wrong])


def kl(lm, engine, circuit_rw):
    total = 0.0
    for row in ROWS:
        p, q = (alone(lm, engine, row, one).log_softmax(-1) for one in (engine.graph.exists_rw, circuit_rw))
        total += float((p.exp() * (p - q)).sum())
    return total / len(ROWS)


def test_patching_is_each_pair_alone(world):
    lm, engine, _, patching = world
    circuits = [*random_circuits(engine.graph, 30, 2), engine.graph.exists_rw, torch.zeros_like(engine.graph.exists_rw)]
    expected = [[metric(lm, alone(lm, engine, row, one)) for row in ROWS] for one in circuits]
    assert patching.metrics(circuits) == pytest.approx(np.array(expected), rel=1e-4, abs=1e-4)
    assert patching(circuits[0]) == pytest.approx(np.array(expected[0]), rel=1e-4, abs=1e-4)
    assert patching.kls(circuits) == pytest.approx([kl(lm, engine, one) for one in circuits], rel=1e-3, abs=1e-5)


def test_exact_scores_cut_one_edge_each(world):
    lm, engine, _, patching = world
    edges = engine.graph.exists_rw.nonzero().tolist()[::17]
    found = exact_scores(patching, [tuple(edge) for edge in edges[::-1]])[::-1]
    for edge, values in zip(edges, found):
        one_rw = engine.graph.exists_rw.clone()
        one_rw[tuple(edge)] = False
        expected = [metric(lm, alone(lm, engine, row, one_rw)) - metric(lm, alone(lm, engine, row, engine.graph.exists_rw)) for row in ROWS]
        assert values == pytest.approx(expected, abs=1e-4)


def by_loops(patching, circuit_rw, order, tau):
    """One run for each edge, in order."""
    circuit_rw, (now,) = circuit_rw.clone(), patching.kls([circuit_rw])
    for r, w in order:
        tried_rw = circuit_rw.clone()
        tried_rw[r, w] = False
        (new,) = patching.kls([tried_rw])
        if new - now < tau:
            circuit_rw, now = tried_rw, new
    return patching.graph.prune(circuit_rw)


@pytest.mark.parametrize("tau", [0.0005, 0.003])
def test_elimination_is_one_edge_after_the_other(world, tau):
    lm, engine, _, patching = world
    score_rw = torch.randn(engine.graph.exists_rw.shape, generator=torch.Generator().manual_seed(3))
    start_rw = top_edges(engine.graph, score_rw, 200, absolute=True)
    order = sorted(start_rw.nonzero().tolist(), key=lambda edge: abs(float(score_rw[tuple(edge)])))
    found = eliminate(patching, score_rw, 200, tau)
    assert torch.equal(found.circuit_rw, by_loops(patching, start_rw, order, tau))
    assert 0 < found.circuit_rw.sum() < start_rw.sum()
    assert found.kl == pytest.approx(kl(lm, engine, found.circuit_rw), rel=1e-3, abs=1e-5)


def test_acdc_goes_from_the_logits_backwards(world):
    _, engine, prompts, _ = world
    patching = Patching(engine, prompts, batch=20)
    found = acdc(patching, 0.05)
    order = engine.graph.exists_rw.nonzero().tolist()[::-1]
    assert torch.equal(found.circuit_rw, by_loops(patching, engine.graph.exists_rw, order, 0.05))
    assert found.runs < 3 * engine.graph.n_edges


def test_bad_requests(world, byte_lm):
    _, engine, _, patching = world
    with pytest.raises(InputError, match="tau above 0"):
        acdc(patching, 0.0)
    pieces = own_prompts(byte_lm, [Pair(("a", "bc"), ("a", "b"), ("k",), ("m",))])
    with pytest.raises(InputError, match="pairs of one length"):
        Patching(engine, pieces)
