"""The graph of a model's parts against its definition, written here edge by edge, and pruning against a search for every path.

r readers · w writers
"""

import pytest
import torch
from test_language_model import tiny

from sae.errors import InputError
from steering.circuits.model_graph.graph import Graph


def sees(reader: str, writer: str, *, parallel: bool) -> bool:
    kind, *numbers = writer.split(".")
    wanted, *place = reader.split(".")
    if kind == "embed" or wanted == "logits":
        return True
    layer, own = int(numbers[0]), int(place[0])
    same_block = wanted == "mlp_in" and kind == "head" and not parallel and layer == own
    return layer < own or same_block


@pytest.mark.parametrize("parallel", [False, True])
def test_every_edge_is_there_that_the_definition_names(parallel):
    graph = Graph(3, 2, parallel)
    expected_rw = [[sees(reader, writer, parallel=parallel) for writer in graph.writers] for reader in graph.readers]
    assert graph.exists_rw.tolist() == expected_rw
    assert graph.n_edges == sum(map(sum, expected_rw))


def test_gpt2_small_has_the_edges_that_mib_counts():
    assert Graph(12, 12).n_edges == 32_491


def test_names_and_numbers_go_both_ways():
    graph = Graph(2, 3, parallel=True)
    assert [graph.writer(name) for name in graph.writers] == list(range(len(graph.writers)))
    assert [graph.reader(name) for name in graph.readers] == list(range(len(graph.readers)))
    assert graph.writers[graph.heads(1)] == ("head.1.0", "head.1.1", "head.1.2")
    assert graph.writers[graph.mlp(1)] == "mlp.1"
    assert graph.readers[graph.head_inputs("k", 1)] == ("k.1.0", "k.1.1", "k.1.2")
    assert graph.readers[graph.mlp_in(0)] == "mlp_in.0"
    names = ["embed->k.0.1", "head.0.2->v.1.0", "mlp.1->logits"]
    assert graph.edges(graph.circuit(names)) == names
    fed = [graph.writers[w] if w >= 0 else "" for w in graph.fed_r]
    assert fed == [
        "" if reader == "logits" else reader.replace("mlp_in", "mlp") if "mlp" in reader else f"head{reader[1:]}"
        for reader in graph.readers
    ]


def paths(graph: Graph, circuit_rw: torch.Tensor, writer: int) -> list[list[tuple[int, int]]]:
    """Every path from the writer to the logits."""
    found = []
    for r in circuit_rw[:, writer].nonzero().flatten().tolist():
        fed = int(graph.fed_r[r])
        found += [[(r, writer), *rest] for rest in (paths(graph, circuit_rw, fed) if fed >= 0 else [[]])]
    return found


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.4])
def test_pruning_keeps_just_the_edges_on_a_path(share):
    for seed in range(20):
        graph = Graph(2, 2, parallel=bool(seed % 2))
        drawn_rw = torch.rand(graph.exists_rw.shape, generator=torch.Generator().manual_seed(seed))
        circuit_rw = graph.exists_rw & (drawn_rw < share)
        on_paths = {edge for path in paths(graph, circuit_rw, 0) for edge in path}
        assert {tuple(edge) for edge in graph.prune(circuit_rw).nonzero().tolist()} == on_paths


def test_graphs_of_models():
    assert Graph.of(tiny("llama")) == Graph(3, 4)
    assert Graph.of(tiny("gpt_neox")) == Graph(3, 4, parallel=True)
    assert Graph.of(tiny("gpt_neox sequential")) == Graph(3, 4)
    assert Graph.of(tiny("phi")) == Graph(3, 4, parallel=True)


@pytest.mark.parametrize(
    ("edge", "message"),
    [
        ("embed", 'expected an edge such as "embed->logits", got'),
        ("embed->q.0.7", "expected a reader: q.0.0 to q.1.1, k and v likewise, mlp_in.0 to mlp_in.1 or logits, got 'q.0.7'"),
        ("attn.0->logits", "expected a writer: embed, head.0.0 to head.1.1 or mlp.0 to mlp.1, got 'attn.0'"),
        ("mlp.1->q.0.0", "mlp.1 writes behind q.0.0"),
    ],
)
def test_edges_that_are_not_there_are_refused(edge, message):
    with pytest.raises(InputError, match=message):
        Graph(2, 2).circuit([edge])


def test_circuits_of_another_graph_are_refused():
    with pytest.raises(InputError, match="expected a circuit as bool of shape"):
        Graph(2, 2).prune(torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="which does not exist"):
        Graph(2, 2).prune(torch.ones_like(Graph(2, 2).exists_rw))
