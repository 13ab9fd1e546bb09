"""Scores and circuits beside those of TransformerLens and of EAP-IG's authors, whose numbers the scripts in oracles/ wrote."""

import json
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from sae.model.language_model import LanguageModel
from steering.circuits.files import mib_reader, mib_writer
from steering.circuits.finding.metrics import top_edges
from steering.circuits.finding.scores import edge_scores
from steering.circuits.model_graph.engine import Engine
from steering.circuits.model_graph.graph import Graph

DATA = Path(__file__).with_name("data")
ROOT = Path(__file__).parents[3]
PAIRS = json.loads((DATA / "pairs.json").read_text())
EAP_IG = json.loads((DATA / "eap_ig.json").read_text())


@cache
def engine_of(name: str) -> Engine:
    if name == "random-llama":
        return Engine(LanguageModel(LlamaForCausalLM.from_pretrained(DATA / name), name=name))
    engine = Engine(LanguageModel.load(str(ROOT / PAIRS["model"]), device="cpu"))
    assert engine.lm.fingerprint() == PAIRS["fingerprint"], "expected the model that the oracles scored; run the scripts in oracles/ again"
    return engine


def sides(pairs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(pairs["clean"]), torch.tensor(pairs["corrupt"])


def metric(pairs: dict, logits_spv: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(len(logits_spv))
    return logits_spv[rows, -1, pairs["right"]] - logits_spv[rows, -1, pairs["wrong"]]


def test_edges_score_as_transformer_lens_scores_them():
    theirs = json.loads((DATA / "transformer_lens_edges.json").read_text())["scores"]
    engine, (clean, corrupt) = engine_of("demo-lm"), sides(PAIRS)
    # its gradient is the corrupt run's, and it goes from there to the clean one
    score_srw = edge_scores(engine, corrupt, clean, partial(metric, PAIRS), method="eap").score_srw
    ours = {engine.graph.edge_name(r, w): score_srw[:, r, w].tolist() for r, w in engine.graph.exists_rw.nonzero().tolist()}
    assert set(ours) == set(theirs)
    assert max(abs(value) for values in theirs.values() for value in values) > 1
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=0, abs=1e-5), name


@pytest.mark.parametrize("method", ["eap", "eap-ig", "clean-corrupted"])
@pytest.mark.parametrize("name", EAP_IG)
def test_edges_score_as_the_authors_of_eap_ig_score_them(name, method):
    engine, pairs = engine_of(name), PAIRS if name == "demo-lm" else EAP_IG[name]
    theirs = EAP_IG[name]["scores"][method]
    score_rw = edge_scores(engine, *sides(pairs), partial(metric, pairs), method=method, steps=5).score_srw.mean(0)
    ours = {mib_name(engine.graph, r, w): score_rw[r, w].item() for r, w in engine.graph.exists_rw.nonzero().tolist()}
    assert set(ours) == set(theirs)
    assert (largest := max(map(abs, theirs.values()))) > 0.1
    assert ours == pytest.approx(theirs, rel=0, abs=1e-5 * max(1, largest))


@pytest.mark.parametrize("name", EAP_IG)
def test_a_circuit_does_what_their_evaluation_says(name):
    engine, pairs = engine_of(name), PAIRS if name == "demo-lm" else EAP_IG[name]
    graph, (clean, corrupt) = engine.graph, sides(pairs)
    theirs = set(EAP_IG[name]["circuit"])
    circuit_rw = torch.zeros_like(graph.exists_rw)
    for r, w in graph.exists_rw.nonzero().tolist():
        circuit_rw[r, w] = mib_name(graph, r, w) in theirs
    assert int(circuit_rw.sum()) == len(theirs) < graph.n_edges
    score_rw = edge_scores(engine, clean, corrupt, partial(metric, pairs), method="eap-ig", steps=5).score_srw.mean(0)
    assert torch.equal(top_edges(graph, score_rw, 90, absolute=True), circuit_rw)
    with torch.no_grad(), engine.patched(engine.writers(corrupt), (graph.exists_rw & ~circuit_rw).float()):
        found = metric(pairs, engine.lm.logits(clean))
    assert found.tolist() == pytest.approx(EAP_IG[name]["metric"], abs=2e-5)


def mib_name(graph: Graph, r: int, w: int) -> str:
    return f"{mib_writer(graph.writers[w])}->{mib_reader(graph.readers[r])}"
