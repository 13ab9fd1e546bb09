"""The command: its numbers against runs made here, the gate, what it refuses, and that a dry run writes nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.circuits.files import open_circuit
from steering.circuits.finding.command import CircuitConfig, find_circuit
from steering.circuits.model_graph.engine import Engine
from steering.circuits.pages.page import circuit_html
from steering.circuits.tasks.prompts import make_prompts

DEMO = str(Path(__file__).resolve().parents[3] / "checkpoints" / "demo-lm")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("circuit")
    config = CircuitConfig(
        model=DEMO, task="agreement", examples=16, edges=60, minimality=True, seed=3, out=folder / "c.json", mib=folder / "mib.json"
    )
    return config, find_circuit(config)


@pytest.fixture(scope="module")
def lm():
    return LanguageModel.load(DEMO, device="cpu")


def test_the_file_holds_the_circuit(found, lm):
    config, circuit = found
    opened = open_circuit(config.out, lm)
    assert torch.equal(opened.edges_rw, circuit.edges_rw)
    assert opened.evaluation == json.loads(json.dumps(circuit.evaluation))
    assert opened.task["name"] == "agreement"
    assert (opened.task["found_on"], opened.task["held_out"]) == (8, 8)
    assert opened.method["settings"]["seed"] == 3
    mib = json.loads(config.mib.read_text())
    assert len(mib["edges"]) == circuit.graph.n_edges
    assert config.out.with_suffix(".html").read_text() == circuit_html(opened)
    assert sum(edge["in_graph"] for edge in mib["edges"].values()) == int(circuit.edges_rw.sum())


def test_faithfulness_is_of_the_held_out_pairs(found, lm):
    """One pair after the other, without the code that batches and measures."""
    _, circuit = found
    engine, (_, held_out) = Engine(lm), make_prompts(lm, "agreement", 16, 3).halves(3)
    ends = []
    for circuit_rw in (circuit.edges_rw, circuit.graph.exists_rw, torch.zeros_like(circuit.edges_rw)):
        cut_rw, values = (circuit.graph.exists_rw & ~circuit_rw).float(), []
        for pair in held_out.pairs:
            clean, corrupt = (torch.tensor([lm.token_ids("".join(side))]) for side in pair[:2])
            with torch.no_grad(), engine.patched(engine.writers(corrupt), cut_rw):
                last_v = lm.logits(clean)[0, -1].double()
            right, wrong = ([lm.token_ids("x" + text)[-1] for text in side] for side in pair[2:])
            values.append(float(last_v[right].mean() - last_v[wrong].mean()))
        ends.append(np.mean(values))
    expected = (ends[0] - ends[2]) / (ends[1] - ends[2])
    assert circuit.evaluation["circuit"]["f"]["value"] == pytest.approx(expected, rel=1e-3)
    assert circuit.evaluation["full"]["value"] == pytest.approx(ends[1], rel=1e-4)


def test_the_circuit_does_more_than_random_ones_and_scores_add_up(found):
    _, circuit = found
    one = circuit.evaluation["circuit"]
    assert one["f"]["value"] > 0.5 > one["random"]["highest"]
    assert len(one["random_heads"]["f"]) == len(one["random"]["f"]) == 20
    assert one["random_heads"]["mean"] < one["f"]["value"]
    assert all(0.9 < share < 1.1 for share in circuit.evaluation["completeness"].values())
    assert len(circuit.evaluation["minimality"]) == one["n_edges"] == int(circuit.edges_rw.sum())
    strongest = circuit.graph.edge_name(*divmod(int(circuit.score_rw.argmax()), circuit.score_rw.shape[1]))
    worth = {row["edge"]: row["value"] for row in circuit.evaluation["minimality"]}
    assert worth[strongest] > 0  # a score is what cutting takes away


def test_elimination_keeps_what_it_needs(tmp_path, capsys):
    config = CircuitConfig(model=DEMO, task="agreement", examples=8, method="eap", search="eliminate", tau=0.05, out=tmp_path / "c.json")
    circuit = find_circuit(config)
    said = capsys.readouterr()
    assert "the circuit (eliminate)" in said.out
    assert circuit.method["kl"] < 3
    assert 0 < int(circuit.edges_rw.sum()) < 304
    assert circuit.method["runs"] >= 300


def test_masks_take_the_edges_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("steering.circuits.finding.command.MASK_STEPS", 10)
    config = CircuitConfig(model=DEMO, task="agreement", examples=8, method="eap", search="masks", edges=30, out=tmp_path / "c.json")
    circuit = find_circuit(config)
    assert "the circuit (masks)" in capsys.readouterr().out
    assert 0 < int(circuit.edges_rw.sum()) <= 30
    assert circuit.method["mask_steps"] == 10
    assert circuit.method["kl"] > 0
    assert torch.equal(open_circuit(config.out).edges_rw, circuit.edges_rw)


def test_own_pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    nouns = [("boy", "boys"), ("girl", "girls"), ("dog", "dogs"), ("king", "kings"), ("car", "cars"), ("book", "books")]
    rows = [{"clean": f"The {b}", "corrupt": f"The {a}", "right": " are", "wrong": " is"} for a, b in nouns]
    rows += [{"clean": f"The {a}", "corrupt": f"The {b}", "right": " is", "wrong": " are"} for a, b in nouns]
    path.write_text("\n".join(map(json.dumps, rows)))
    circuit = find_circuit(CircuitConfig(model=DEMO, pairs=path, method="eap", out=tmp_path / "c.json"))
    assert circuit.task["name"] == "own"
    assert circuit.task["pairs"] + sum(circuit.task["left_out"].values()) == len(rows)


def test_scores_by_piece_of_the_prompt(tmp_path, capsys):
    """The first piece is the same on both sides, so that embeddings carry nothing there."""
    path, rows = tmp_path / "pairs.jsonl", []
    for before in ("The", "And then the"):
        for one, many in (("boy", "boys"), ("girl", "girls")):
            sides = {"clean": [before, f" {many}"], "corrupt": [before, f" {one}"]}
            rows.append({**sides, "right": " are", "wrong": " is"})
            rows.append({"clean": sides["corrupt"], "corrupt": sides["clean"], "right": " is", "wrong": " are"})
    path.write_text("\n".join(map(json.dumps, rows)))
    circuit = find_circuit(CircuitConfig(model=DEMO, pairs=path, method="eap", edges=40, out=tmp_path / "c.json"))
    pieces = circuit.evaluation["pieces"]
    assert pieces["example"][0] in ("The", "And then the")
    assert set(pieces["scores"]) == set(circuit.graph.edges(circuit.edges_rw))
    for name, (first, last) in pieces["scores"].items():
        assert first == pytest.approx(0, abs=1e-6)  # causal: nothing differs before the noun
        assert last == pytest.approx(float(circuit.score_rw[circuit.graph.edge(name)]), rel=1e-3, abs=1e-5)
    assert repr(pieces["example"][0]) in capsys.readouterr().out


def test_too_few_own_pairs_are_the_files_fault(tmp_path):
    path, row = tmp_path / "pairs.jsonl", {"clean": "The boy", "corrupt": "The boys", "right": " is", "wrong": " are"}
    rows = [row, row | {"clean": "The girl", "corrupt": "The girls"}, row | {"clean": "The", "corrupt": "The old boys"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        InputError, match=r"at least 4 pairs in .*pairs\.jsonl .*got 2 pairs .*left out: 1 of different lengths.*; add pairs"
    ):
        find_circuit(CircuitConfig(model=DEMO, pairs=path, out=tmp_path / "c.json"))


def test_a_task_that_is_not_there_stops_with_its_numbers(tmp_path):
    with pytest.raises(InputError, match=r"to do the task ioi.*% of 16 right.*clean minus corrupt") as caught:
        find_circuit(CircuitConfig(model=DEMO, task="ioi", examples=16, out=tmp_path / "c.json"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    config = CircuitConfig(model=DEMO, task="agreement", examples=16, search="acdc", out=tmp_path / "c.json", dry_run=True)
    assert find_circuit(config) is None
    said = capsys.readouterr().err
    assert "% of 16 right" in said
    assert "1,519 runs to find the circuit" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "either --task or --pairs, got both or neither"),
        ({"task": "ioi", "pairs": Path("p.jsonl")}, "either --task or --pairs"),
        ({"pairs": Path("p.jsonl"), "corruption": "abc"}, "--corruption is for"),
        ({"task": "ioi", "examples": 3}, "at least 4 examples"),
        ({"task": "ioi", "tau": 0.0}, "tau above 0"),
        ({"task": "ioi", "edges": 0}, "at least one edge"),
        ({"task": "ioi", "out": Path("c.html")}, "which is the page's; end it in .json"),
        ({"pairs": Path("absent.jsonl")}, "at absent.jsonl, which does not exist; check its path"),
        ({"task": "iou"}, "one of ioi, greater-than"),
        ({"task": "ioi", "corruption": "flip"}, "one of swap, third, abc"),
        ({"task": "agreement", "examples": 8, "edges": 5000}, "at most 1,519 edges"),
    ],
)
def test_bad_requests(tmp_path, flags, said):
    with pytest.raises(InputError, match=said):
        find_circuit(CircuitConfig(**{"model": DEMO, "out": tmp_path / "c.json"} | flags))
