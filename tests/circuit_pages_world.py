"""A small circuit with made-up numbers, for the tests of its page."""

import torch

from steering.circuits.files import Circuit
from steering.circuits.model_graph.graph import Graph


def between(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


SMALL = Graph(3, 2)


def made_circuit(name: str = "tiny", edges: int = 12, graph: Graph = SMALL) -> Circuit:
    """The strongest edges of random scores; `name` is the model's and stands wherever a text of the user's could."""
    score_rw = torch.randn(graph.exists_rw.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * graph.exists_rw
    edges_rw = torch.zeros_like(graph.exists_rw)
    edges_rw.view(-1)[score_rw.abs().flatten().topk(edges).indices] = True
    sizes = [{"edges": n, "kept": n, "f": between(n / 30), "ndf": between(n / 30)} for n in (1, 3, 10, 30)]
    return Circuit(
        model=name,
        fingerprint="0123456789ab",
        graph=graph,
        edges_rw=edges_rw,
        score_rw=score_rw,
        task={
            "name": name,
            "corruption": name,
            "metric": "logit_difference",
            "found_on": 8,
            "held_out": 8,
            "left_out": {name: 2},
            "example": {"clean": [name], "corrupt": [name, "second piece"], "right": [name], "wrong": [name]},
            **{key: between(0.9) for key in ("accuracy", "clean", "corrupt", "effect")},
        },
        method={"scores": "ceap", "search": "top", "settings": {"command": name}},
        evaluation={
            "n_pairs": 8,
            "full": between(3.0),
            "empty": between(-3.0),
            **{key: between(0.5) for key in ("cpr", "cmd", "cmd_log")},
            "counts": sizes[2:],
            "absolute": sizes,
            "circuit": {
                "n_edges": edges,
                "f": between(0.6),
                "without": between(0.1),
                "random": {"f": [0.0, 0.1, 0.2], "mean": 0.1, "highest": 0.2},
                "random_heads": {"f": [0.1, 0.2, 0.3], "mean": 0.2, "highest": 0.3},
            },
            "stability": [{"asked": 10, "mean": 0.8, "lowest": 0.7}],
            "completeness": {"resid_pre.0": 1.01},
            "minimality": [{"edge": edge, **between(0.05)} for edge in graph.edges(edges_rw)],
        },
    )
