"""Circuits as files: what is saved is opened, damage is a sentence, and MIB's names are those of its source."""

import json

import pytest
import torch

from sae.errors import InputError
from steering.circuits.files import Circuit, open_circuit, write_mib
from steering.circuits.model_graph.graph import Graph

GRAPH = Graph(2, 2)


def circuit(**more):
    score_rw = torch.randn(GRAPH.exists_rw.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * GRAPH.exists_rw
    edges_rw = GRAPH.circuit(["embed->v.0.1", "head.0.1->logits"])
    return Circuit("m", "abc", GRAPH, edges_rw, **({"score_rw": score_rw, "task": {"name": "ioi"}, "method": {"name": "eap"}} | more))


def test_what_is_saved_is_opened(tmp_path):
    for one in (circuit(), circuit(score_rw=None, evaluation={"cmd": {"value": 0.5}})):
        one.save(tmp_path / "c.json")
        found = open_circuit(tmp_path / "c.json")
        assert torch.equal(found.edges_rw, one.edges_rw)
        assert (found.score_rw is None) == (one.score_rw is None)
        if one.score_rw is not None:
            assert torch.equal(found.score_rw, one.score_rw)
        names = ("model", "fingerprint", "graph", "task", "method", "evaluation")
        assert all(getattr(found, name) == getattr(one, name) for name in names)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "circuit-2"}, "format circuit-1 at .*got 'circuit-2'"),
        ({"edges": ["embed->q.9.9"]}, "expected a reader"),
        ({"edges": ["mlp.1->q.0.0"]}, "sees its writer"),
        ({"edges": "all"}, "'edges'"),
        ({"scores": {"embed->logits": 1.0}}, "expected 46 scores"),
        ({"scores": {"embed->logits": "high"}}, "'scores"),
        ({"graph": {"n_layers": 2, "n_heads": 2}}, "'graph.parallel' is missing"),
    ],
)
def test_a_damaged_file_is_a_sentence(tmp_path, change, said):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(circuit().content() | change))
    with pytest.raises(InputError, match=said):
        open_circuit(path)


def test_another_model_is_refused(tmp_path, byte_lm):
    path = tmp_path / "c.json"
    circuit().save(path)
    with pytest.raises(InputError, match="'m' with the fingerprint abc, got 'tiny bytes'"):
        open_circuit(path, byte_lm)
    Circuit("m", byte_lm.fingerprint(), GRAPH, torch.zeros_like(GRAPH.exists_rw)).save(path)
    open_circuit(path, byte_lm)


def mib_edges(n_layers, n_heads, parallel):
    """In the order of MIB's Graph.from_model: a residual stream that every block's parts read and then join."""
    stream, edges = ["input"], []
    for layer in range(n_layers):
        heads, mlp = [f"a{layer}.h{head}" for head in range(n_heads)], f"m{layer}"
        edges += [f"{one}->{head}<{kind}>" for one in stream for head in heads for kind in "qkv"]
        if parallel:
            edges += [f"{one}->{mlp}" for one in stream]
        stream += heads
        if not parallel:
            edges += [f"{one}->{mlp}" for one in stream]
        stream += [mlp]
    return edges + [f"{one}->logits" for one in stream]


@pytest.mark.parametrize("graph", [GRAPH, Graph(3, 2, parallel=True), Graph(12, 12)])
def test_mibs_file_has_its_names(tmp_path, graph):
    path, score_rw = tmp_path / "mib.json", torch.arange(graph.exists_rw.numel()).view(graph.exists_rw.shape).double()
    kept = ["embed->k.1.1", "head.1.1->mlp_in.2", "mlp.2->logits"] if graph.n_layers > 2 else ["embed->k.1.1", "head.1.1->logits"]
    write_mib(Circuit("m", "abc", graph, graph.circuit(kept), score_rw), 64, path)
    value = json.loads(path.read_text())
    assert value["cfg"] == {"n_layers": graph.n_layers, "n_heads": graph.n_heads, "parallel_attn_mlp": graph.parallel, "d_model": 64}
    assert sorted(value["edges"]) == sorted(mib_edges(graph.n_layers, graph.n_heads, graph.parallel))
    assert set(value["nodes"]) == {"input", "logits"} | {
        name for layer in range(graph.n_layers) for name in (f"m{layer}", *(f"a{layer}.h{head}" for head in range(graph.n_heads)))
    }
    inside = {name for name, edge in value["edges"].items() if edge["in_graph"]}
    assert inside == ({"input->a1.h1<k>", "a1.h1->m2", "m2->logits"} if graph.n_layers > 2 else {"input->a1.h1<k>", "a1.h1->logits"})
    assert {name for name, node in value["nodes"].items() if node["in_graph"]} == {"input", "logits", "a1.h1"} | (
        {"m2"} if graph.n_layers > 2 else set()
    )
    r, w = graph.edge("embed->k.1.1")
    assert value["edges"]["input->a1.h1<k>"]["score"] == score_rw[r, w]


def test_mibs_file_needs_scores(tmp_path):
    with pytest.raises(InputError, match="without; find it by a method that scores"):
        write_mib(circuit(score_rw=None), 64, tmp_path / "mib.json")
