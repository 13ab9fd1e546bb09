"""The commands that make a prompt's attribution graph and that intervene at its nodes."""

import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sae.disk.places import require_file
from sae.disk.writing import atomic, jsonable
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.model.vocabulary import vocabulary
from sae.progress import progress
from steering.circuits.attribution.edges import LinearModel
from steering.circuits.attribution.files import FORMAT, GraphFile, open_graph, pruned_nodes, save_graph, write_circuit_tracer
from steering.circuits.attribution.graph import find_graph, prune, scores
from steering.circuits.attribution.interventions import FACTORS, Intervening, strongest_nodes
from steering.circuits.attribution.page import graph_html
from steering.circuits.attribution.replacement import LocalReplacement
from steering.circuits.attribution.report import print_graph, print_intervention
from steering.circuits.attribution.transcoders import open_transcoders


@dataclass(kw_only=True)
class AttributeConfig:
    model: str
    """Model by hub name, folder or GGUF file."""
    transcoders: str
    """Set of per-layer transcoders by folder or hub name, in any of the formats."""
    prompt: str
    """Text; the graph explains the token after it."""
    out: Path = Path("graph.json")
    """JSON file for the graph; the page is written beside it as .html."""
    max_features: int = 1000
    """Number of features in the graph before pruning: those with the largest influence."""
    node_threshold: float = 0.8
    """Share of the influence on the logits that the kept nodes have together."""
    edge_threshold: float = 0.98
    """The same share for the edges between them."""
    skip_positions: int = 1
    """Tokens at the beginning whose features count as error, as in circuit-tracer, because activations at the first token are unlike all
    others; use 4 for an instruction-tuned Gemma 3."""
    interventions: int = 5
    """Number of features, at the strongest edges, to set to 0, -1 and 2 times their value, to compare prediction and outcome."""
    circuit_tracer: Path | None = None
    """JSON file for the graph in the format of circuit-tracer's viewer. Default: not written."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:1; auto uses a GPU if there is one."""


@dataclass(kw_only=True)
class InterveneConfig:
    graph: Path
    """JSON file that `sae attribute` wrote."""
    node: str
    """Node of the graph: feature.LAYER.POSITION.NUMBER, error.LAYER.POSITION or token.POSITION."""
    factor: tuple[float, ...] = FACTORS
    """Multiples of the node's value to set it to."""
    target: tuple[str, ...] = ()
    """More nodes whose change is shown, in addition to those of the node's strongest edges and the logits."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:1; auto uses a GPU if there is one."""


def attribute(config: AttributeConfig) -> GraphFile:
    """Writes the JSON and the page, prints what was found and returns the JSON's content.

    Raises `InputError` for settings out of range, a set that is not one of per-layer transcoders of this model, and a model whose norms or
    attention cannot be frozen.
    """
    started = time.monotonic()
    for path in (config.circuit_tracer, config.out):
        if path is not None:
            require_file(path)
    page = config.out.with_suffix(".html")
    if page == config.out:
        raise InputError(f"expected a name for the JSON, beside which the page gets the ending .html, got {config.out}; end it in .json")
    require_file(page)
    if config.max_features < 1 or config.interventions < 0 or config.skip_positions < 0:
        raise InputError(
            f"expected at least one feature and no negative numbers, got --max-features {config.max_features}, --interventions "
            f"{config.interventions} and --skip-positions {config.skip_positions}"
        )
    lm = LanguageModel.load(config.model, device=config.device)
    transcoders = open_transcoders(lm, config.transcoders)
    ids = lm.token_ids(config.prompt)
    linear = LinearModel(LocalReplacement(lm, transcoders, torch.tensor([ids], device=lm.device), config.skip_positions))
    graph = find_graph(linear, config.max_features)
    found, pruned = scores(graph), prune(graph, config.node_threshold, config.edge_threshold)
    words = vocabulary(lm.tokenizer)
    texts = [words.spelling(token) for token in ids]
    nodes, edges = pruned_nodes(graph, pruned, ids, texts, words.spelling)
    content: GraphFile = {
        "format": FORMAT,
        "model": config.model,
        "fingerprint": lm.fingerprint(),
        "transcoders": config.transcoders,
        "prompt": config.prompt,
        "ids": ids,
        "tokens": texts,
        "n_layers": lm.n_layers,
        "skip_positions": config.skip_positions,
        "n_active": graph.n_active,
        "n_features": graph.n_features,
        "scores": found._asdict(),
        "settings": {},
        "nodes": nodes,
        "edges": edges,
        "interventions": [],
    }
    chosen = strongest_nodes(content, config.interventions)
    intervening = Intervening(linear, content)
    with progress("interventions", len(chosen) * len(FACTORS), "passes") as bar:
        for name in chosen:
            for factor in FACTORS:
                content["interventions"].append(intervening.set(name, factor))
                bar.advance(1)
    settings = asdict(config) | {"command": f"{sys.argv[0]} {shlex.join(sys.argv[1:])}", "seconds": round(time.monotonic() - started)}
    content["settings"] = jsonable(settings)
    save_graph(content, config.out)
    with atomic(page) as temporary:
        temporary.write_text(graph_html(content, str(config.out)), encoding="utf-8")
    if config.circuit_tracer is not None:
        write_circuit_tracer(content, config.circuit_tracer.stem, config.circuit_tracer)
    print_graph(content)
    print(f"graph: {config.out}, page: {page}" + (f", for circuit-tracer: {config.circuit_tracer}" if config.circuit_tracer else ""))
    return content


def intervene(config: InterveneConfig) -> list[dict[str, Any]]:
    """Prints a table for each factor, and returns what is in them.

    Raises `InputError` for a node that the graph lacks, and where the model or the transcoders are no longer those of the graph.
    """
    content, intervening = opened(config.graph, config.device)
    results = [intervening.set(config.node, factor, config.target) for factor in config.factor]
    for result in results:
        print_intervention(result, content)
    return results


def opened(path: Path, device: str) -> tuple[GraphFile, Intervening]:
    """A graph with its model and transcoders. Raises `InputError` if they are no longer those that it was made with."""
    content = open_graph(path)
    lm = LanguageModel.load(content["model"], device=device)
    if (found := lm.fingerprint()) != content["fingerprint"]:
        raise InputError(
            f"expected the model of the graph, {content['model']!r} with the fingerprint {content['fingerprint']}, got {found}; make the "
            "graph again"
        )
    transcoders = open_transcoders(lm, content["transcoders"])
    ids_sp = torch.tensor([content["ids"]], device=lm.device)
    return content, Intervening(LinearModel(LocalReplacement(lm, transcoders, ids_sp, content["skip_positions"])), content)
