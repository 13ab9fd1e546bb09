"""Circuits as files: our JSON, and the JSON of MIB's leaderboard.

r readers · w writers
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from sae.disk.reading import Count, Number, read_json
from sae.disk.writing import write_json
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.circuits.model_graph.graph import EMBED, LOGITS, Graph

FORMAT = "circuit-1"
CUTS = 10
"""number of cuts of a deep model whose completeness is listed"""


@dataclass(frozen=True)
class Circuit:
    """Edges of a model's graph that do a task, and the score of every edge."""

    model: str
    fingerprint: str
    graph: Graph
    edges_rw: Tensor
    """bool"""
    score_rw: Tensor | None = None
    """how much the mean metric falls when only this edge is cut, or a method's estimate of that; None if the method has no scores"""
    task: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph.checked(self.edges_rw)

    def require_model(self, lm: LanguageModel) -> None:
        """Raises `InputError` for a model other than the circuit's."""
        if (found := lm.fingerprint()) != self.fingerprint:
            raise InputError(
                f"expected the model of the circuit, {self.model!r} with the fingerprint {self.fingerprint}, got {lm.name!r} with {found}; "
                "give that model, or find a circuit of this one"
            )

    def save(self, path: Path) -> None:
        """Writes the JSON, atomically. Raises `InputError` for a place that cannot be written."""
        write_json(path, self.content())

    def content(self) -> dict[str, Any]:
        """The content of the file."""
        scores = None
        if self.score_rw is not None:
            places = self.graph.exists_rw.nonzero().tolist()
            value_rw = self.score_rw.double().cpu()
            scores = {self.graph.edge_name(r, w): value_rw[r, w].item() for r, w in places}
        return {
            "format": FORMAT,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "graph": {"n_layers": self.graph.n_layers, "n_heads": self.graph.n_heads, "parallel": self.graph.parallel},
            "task": self.task,
            "method": self.method,
            "edges": self.graph.edges(self.edges_rw.cpu()),
            "evaluation": self.evaluation,
            "scores": scores,
        }


class GraphFile(TypedDict):
    n_layers: Count
    n_heads: Count
    parallel: bool


class CircuitFile(TypedDict):
    format: str
    model: str
    fingerprint: str
    graph: GraphFile
    task: dict[str, Any]
    method: dict[str, Any]
    edges: list[str]
    evaluation: dict[str, Any]
    scores: dict[str, Number] | None


def open_circuit(path: Path, lm: LanguageModel | None = None) -> Circuit:
    """A circuit from its JSON.

    Raises `InputError` for a file that is damaged, of another format or version, or has edges or scores that its graph lacks, and for a
    model other than the circuit's, if one is given.
    """
    value: CircuitFile = read_json(path, "a circuit", CircuitFile)
    if value["format"] != FORMAT:
        raise InputError(f"expected a circuit of the format {FORMAT} at {path}, got {value['format']!r}; find it again with this version")
    graph = Graph(**value["graph"])
    score_rw = None
    if value["scores"] is not None:
        score_rw = torch.zeros(graph.exists_rw.shape, dtype=torch.float64)
        for name, score in value["scores"].items():
            score_rw[graph.edge(name)] = score
        if len(value["scores"]) != graph.n_edges:
            raise InputError(f"expected {graph.n_edges:,} scores in {path}, one for each edge, got {len(value['scores']):,}; make it again")
    parts = (value["task"], value["method"], value["evaluation"])
    circuit = Circuit(value["model"], value["fingerprint"], graph, graph.circuit(value["edges"]), score_rw, *parts)
    if lm is not None:
        circuit.require_model(lm)
    return circuit


def some_cuts(completeness: dict[str, float]) -> list[str]:
    """About `CUTS` places, evenly from the embedding to the last layer."""
    return list(completeness)[:: max(1, len(completeness) // CUTS)]


def write_mib(circuit: Circuit, d_model: int, path: Path) -> None:
    """The importance file of MIB's leaderboard, JSON: every node and edge under MIB's names, with its score.

    A score is what cutting the edge takes from the metric, as MIB ranks them. Raises `InputError` for a circuit without scores.
    """
    if circuit.score_rw is None:
        raise InputError("expected scores of all edges for MIB's importance file, got a circuit without; find it by a method that scores")
    graph, edges_rw, score_rw = circuit.graph, circuit.edges_rw.cpu(), circuit.score_rw.double().cpu()
    sends_w = edges_rw.any(0)
    nodes = {mib_writer(name): {"in_graph": bool(sends_w[w]) or name == EMBED} for w, name in enumerate(graph.writers)}
    edges = {
        f"{mib_writer(graph.writers[w])}->{mib_reader(graph.readers[r])}": {
            "score": score_rw[r, w].item(),
            "in_graph": bool(edges_rw[r, w]),
        }
        for r, w in graph.exists_rw.nonzero().tolist()
    }
    cfg = {"n_layers": graph.n_layers, "n_heads": graph.n_heads, "parallel_attn_mlp": graph.parallel, "d_model": d_model}
    write_json(path, {"cfg": cfg, "nodes": nodes | {LOGITS: {"in_graph": True}}, "edges": edges})


def mib_writer(name: str) -> str:
    """ "embed" -> "input", "head.3.1" -> "a3.h1", "mlp.3" -> "m3"."""
    kind, *numbers = name.split(".")
    return {"embed": "input", "head": "a{}.h{}", "mlp": "m{}"}[kind].format(*numbers)


def mib_reader(name: str) -> str:
    """ "q.3.1" -> "a3.h1<q>", "mlp_in.3" -> "m3", "logits" as it is."""
    kind, *numbers = name.split(".")
    return {"logits": "logits", "mlp_in": "m{}"}.get(kind, "a{}.h{}<" + kind + ">").format(*numbers)
