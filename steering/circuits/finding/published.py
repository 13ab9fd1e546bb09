"""The published circuit of indirect object identification in GPT-2 small: 26 heads in seven classes, and how many of them a circuit has."""

from pathlib import Path
from typing import Any

from torch import Tensor

from sae.disk.reading import read_json
from sae.model.language_model import LanguageModel
from steering.circuits.model_graph.graph import Graph

HEADS = Path(__file__).with_name("data") / "ioi_gpt2_heads.json"


def ioi_heads() -> dict[str, list[str]]:
    """By class, the writers "head.L.H"."""
    classes = read_json(HEADS, "the published heads")["classes"]
    return {name: [f"head.{head}" for head in heads] for name, heads in classes.items()}


def is_gpt2_small(lm: LanguageModel) -> bool:
    """Decided by its configuration: weights of another training are not distinguished."""
    config = lm.model.config
    return config.model_type == "gpt2" and (config.n_layer, config.n_head, config.n_embd) == (12, 12, 768)


def compared_with_ioi(graph: Graph, circuit_rw: Tensor) -> dict[str, Any]:
    """Which of the published heads write along an edge of the circuit, by class, and how many would among as many random heads."""
    sends_w = circuit_rw.any(0).tolist()
    inside = [name for name, sends in zip(graph.writers, sends_w) if sends and name.startswith("head")]
    classes = {name: {"heads": heads, "found": [head for head in heads if head in inside]} for name, heads in ioi_heads().items()}
    total = sum(len(row["heads"]) for row in classes.values())
    return {
        "classes": classes,
        "published": total,
        "found": sum(len(row["found"]) for row in classes.values()),
        "heads_of_circuit": len(inside),
        "by_chance": total * len(inside) / (graph.n_layers * graph.n_heads),
    }
