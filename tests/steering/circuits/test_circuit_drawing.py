"""The page of a circuit as text: which edges it holds, where they are drawn, what it refuses, and the command that draws a file."""

import re
from dataclasses import replace

import pytest
from circuit_pages_world import made_circuit

from sae.errors import InputError
from steering.circuits.files import open_circuit
from steering.circuits.model_graph.graph import Graph
from steering.circuits.pages.command import DrawConfig, draw_circuit
from steering.circuits.pages.drawing import Layout, edges_of, width_of
from steering.circuits.pages.page import circuit_html


def test_the_circuit_and_the_strongest_others_are_held():
    circuit = made_circuit(edges=12)
    weakest = min((abs(float(circuit.score_rw[r, w])), r, w) for r, w in circuit.graph.exists_rw.nonzero().tolist())
    circuit.edges_rw[weakest[1:]] = True  # in the circuit, though far from the strongest
    edges = edges_of(circuit, most=5)
    assert sum(edge.inside for edge in edges) == 13
    sizes = [abs(edge.score) for edge in edges]
    assert sizes == sorted(sizes, reverse=True)
    others = [abs(float(circuit.score_rw[r, w])) for r, w in (circuit.graph.exists_rw & ~circuit.edges_rw).nonzero().tolist()]
    assert sorted(abs(edge.score) for edge in edges if not edge.inside) == sorted(sorted(others)[-5:])
    unscored = edges_of(replace(circuit, score_rw=None))
    assert {(edge.r, edge.w) for edge in unscored} == {tuple(edge) for edge in circuit.edges_rw.nonzero().tolist()}


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (30, 9), (12, 32)])
def test_every_edge_runs_upwards_inside_the_picture(size, parallel):
    graph = Graph(*size, parallel)
    layout = Layout(graph)
    ends = {}
    for r, w in graph.exists_rw.nonzero().tolist()[:: 1 + graph.n_edges // 5000]:
        numbers = list(map(float, re.findall(r"-?[\d.]+", layout.path(r, w))))
        (_, y), (to_x, to_y) = numbers[:2], numbers[-2:]
        assert to_y < y, graph.edge_name(r, w)
        assert all(0 <= number <= layout.width for number in numbers[::2])
        assert all(0 <= number <= layout.height for number in numbers[1::2])
        assert ends.setdefault((to_x, to_y), r) == r  # queries, keys and values of a head have ends of their own
    assert width_of(1.0, 1.0) > width_of(0.1, 1.0) > width_of(0.01, 1.0) > 0


def test_the_page_is_drawn_from_the_file(tmp_path, capsys):
    circuit = made_circuit()
    circuit.save(tmp_path / "c.json")
    path = draw_circuit(DrawConfig(circuit=tmp_path / "c.json"))
    assert path == tmp_path / "c.html"
    assert str(path) in capsys.readouterr().out
    assert path.read_text() == circuit_html(circuit) == circuit_html(open_circuit(tmp_path / "c.json"))
    assert draw_circuit(DrawConfig(circuit=tmp_path / "c.json", out=tmp_path / "other.html")).read_text() == path.read_text()


def test_sections_need_their_numbers():
    bare = replace(made_circuit(), task={}, evaluation={}, method={}, score_rw=None)
    page = circuit_html(bare)
    assert "How good it is" not in page
    assert page.count("<path class=") > 12
    with pytest.raises(InputError, match=r"as find-circuit writes them, got others \(KeyError: 'circuit'\); find it again"):
        circuit_html(replace(bare, evaluation={"counts": []}))
    with pytest.raises(InputError, match="find it again"):
        circuit_html(replace(bare, task={"name": "x", "example": 3}))
