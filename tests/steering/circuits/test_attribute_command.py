"""`sae attribute` and `sae intervene` on the bundled model, with a set that scripts/quick_transcoders.py fits in a few seconds."""

import json
import re
import sys
from pathlib import Path

import pytest

from sae.dictionaries.bundle import load
from sae.errors import InputError
from steering.circuits.attribution.command import AttributeConfig, InterveneConfig, attribute, intervene
from steering.circuits.attribution.files import open_graph
from steering.circuits.attribution.page import graph_html

ROOT = Path(__file__).resolve().parents[3]
MODEL = str(ROOT / "checkpoints" / "demo-lm")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    sys.path.insert(0, str(ROOT / "scripts"))
    from quick_transcoders import QuickConfig, make_transcoders

    folder = tmp_path_factory.mktemp("graph")
    settings = {"features": 96, "l0": 8, "tokens": 384, "context": 32}
    make_transcoders(QuickConfig(model=MODEL, text=ROOT / "docs" / "circuits.md", out=folder / "set", **settings))
    content = attribute(
        AttributeConfig(
            model=MODEL,
            transcoders=str(folder / "set"),
            prompt="And then the boys",
            out=folder / "graph.json",
            circuit_tracer=folder / "viewer.json",
            max_features=60,
            interventions=1,
        )
    )
    return folder, content


def test_the_file_the_page_and_the_viewers_file_hold_the_graph(made):
    folder, content = made
    found = open_graph(folder / "graph.json")
    assert found["nodes"] == content["nodes"]
    assert found["tokens"][1:] == ["And", " then", " the", " boys"]
    kinds = [node["kind"] for node in found["nodes"]]
    assert kinds.count("token") == 5
    assert 3 < kinds.count("feature") <= found["n_features"] == 60
    assert all(node["position"] >= 1 for node in found["nodes"] if node["kind"] == "feature")  # the first counts as error
    for edge in found["edges"]:
        assert found["nodes"][edge.source]["layer"] < found["nodes"][edge.target]["layer"]
    for row in (row for one in found["interventions"] for row in one["changes"]):
        assert row["direct"] == pytest.approx(row["edge"], abs=2e-3) or row["edge"] == 0  # 0: an edge that was pruned

    page = (folder / "graph.html").read_text(encoding="utf-8")
    assert page.count('class="node ') == len(found["nodes"])
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org/2000/svg)", page)
    assert page == graph_html(found, str(folder / "graph.json"))

    viewer = json.loads((folder / "viewer.json").read_text())
    names = {node["node_id"] for node in viewer["nodes"]}
    assert len(names) == len(viewer["nodes"]) == len(found["nodes"])
    assert len(viewer["links"]) == len(found["edges"])
    assert {link[end] for link in viewer["links"] for end in ("source", "target")} <= names
    first = next(node for node in found["nodes"] if node["kind"] == "feature")
    assert f"{first['layer']}_{first['feature']}_{first['position']}" in names
    assert {node["feature_type"] for node in viewer["nodes"]} >= {"cross layer transcoder", "embedding", "logit"}


def test_texts_that_are_markup_stay_text(made):
    _, content = made
    bad = "</script><img src=x onerror=alert(1)>\u202e"
    nodes = [node | {"text": bad} if node["kind"] in ("token", "logit") else node for node in content["nodes"]]
    page = graph_html(content | {"nodes": nodes, "tokens": [bad] * 5, "prompt": bad, "model": bad}, bad)
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert "\u202e" not in page


def test_a_node_is_set_to_multiples_of_its_value(made, capsys):
    folder, content = made
    name = content["interventions"][0]["node"]
    found = intervene(InterveneConfig(graph=folder / "graph.json", node=name, factor=(0.0,)))
    assert "set to 0 times its value" in capsys.readouterr().out
    for one, other in zip(found[0]["changes"], content["interventions"][0]["changes"], strict=True):
        assert one["node"] == other["node"]
        assert one["model"] == pytest.approx(other["model"], abs=1e-4)


def test_what_does_not_belong_together_is_refused(made):
    folder, content = made
    other = folder / "other.json"
    other.write_text(json.dumps(content | {"fingerprint": "0" * 12}))
    with pytest.raises(InputError, match="expected the model of the graph"):
        intervene(InterveneConfig(graph=other, node="token.1"))
    other.write_text(json.dumps(content | {"format": "attribution-graph-0"}))
    with pytest.raises(InputError, match="expected a graph of the format attribution-graph-1"):
        open_graph(other)
    other.write_text(json.dumps(content | {"edges": [[0, 10_000, 1.0, 1.0]]}))
    with pytest.raises(InputError, match="got one to another"):
        open_graph(other)
    with pytest.raises(InputError, match="an autoencoder or a cross-layer transcoder"):
        attribute(AttributeConfig(model=MODEL, transcoders=str(ROOT / "checkpoints" / "demo-sae"), prompt="a", out=folder / "none.json"))
    with pytest.raises(InputError, match="expected at least one feature"):
        attribute(AttributeConfig(model=MODEL, transcoders="none", prompt="a", out=folder / "none.json", max_features=0))
    with pytest.raises(InputError, match=r"end it in \.json"):
        attribute(AttributeConfig(model=MODEL, transcoders="none", prompt="a", out=folder / "none.html"))
    assert len(load(str(folder / "set"))) == 4
