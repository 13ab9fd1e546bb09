"""The page of an attribution graph in a real browser, from file://: what is chosen, what is filtered, and texts that try to be markup."""

from browser_world import HOSTILE

from steering.circuits.attribution.files import Edge
from steering.circuits.attribution.page import graph_html

NODES = [
    {"id": "token.0", "kind": "token", "layer": -1, "position": 0, "influence": 0.5, "token": 3, "text": HOSTILE},
    {"id": "feature.0.1.7", "kind": "feature", "layer": 0, "position": 1, "influence": 0.4, "feature": 7, "activation": 2.0},
    {"id": "error.1.1", "kind": "error", "layer": 1, "position": 1, "influence": 0.1},
    {"id": "logit.5", "kind": "logit", "layer": 2, "position": 1, "influence": 0.6, "token": 5, "text": HOSTILE},
]
READ = {"reads": 2.0, "bias": -0.5}


def content() -> dict:
    changes = [{"node": "logit.5", "edge": -1.5, "direct": -1.5, "through": -1.5, "replacement": -1.4, "model": -1.2}]
    return {
        "format": "attribution-graph-1",
        "model": HOSTILE,
        "fingerprint": "0",
        "transcoders": HOSTILE,
        "prompt": HOSTILE,
        "ids": [3, 4],
        "tokens": [HOSTILE, "\u202e\n"],
        "n_layers": 2,
        "skip_positions": 0,
        "n_active": 1,
        "n_features": 1,
        "scores": {"completeness": 0.9, "replacement": 0.8, "left_out": 0.0},
        "settings": {"command": HOSTILE},
        "nodes": [node | READ if node["kind"] in ("feature", "logit") else node for node in NODES],
        "edges": [Edge(0, 1, 2.5, 0.5), Edge(1, 3, 1.5, 0.4), Edge(2, 3, -0.25, 0.1)],
        "interventions": [{"node": "feature.0.1.7", "factor": 0.0, "changes": changes}],
    }


def test_nodes_are_chosen_and_filtered(tab, tmp_path):
    path = tmp_path / "graph.html"
    path.write_text(graph_html(content(), "runs/graph.json"), encoding="utf-8")
    tab.goto(path.as_uri())
    assert tab.locator(".node").count() == 4
    assert tab.locator(".link").count() == 3
    assert tab.locator(".link.minus").count() == 1
    tab.locator(".node.feature").click()
    assert tab.locator("#detail h2").inner_text().startswith("feature 7 of layer 0 at 1")
    assert "--node feature.0.1.7" in tab.locator("#detail code").nth(1).inner_text()
    assert tab.locator("#detail h3").all_inner_texts() == ["reads from (1)", "read by (1)"]
    assert tab.locator("#detail td.n").all_inner_texts() == ["+2.50", "+1.50"]
    assert tab.locator(".link").count() == 2
    tab.locator("#detail button.to").last.click()
    assert tab.locator("#detail h2").inner_text().startswith("logit of")
    assert tab.locator("#detail td.n").all_inner_texts() == ["+1.50", "−0.250"]
    tab.keyboard.press("Escape")
    tab.locator("#errors").uncheck()
    assert tab.locator(".node.error").is_hidden()
    assert tab.locator(".link").count() == 2
    tab.locator("#nodes").evaluate("one => { one.value = 1; one.dispatchEvent(new Event('input')); }")
    assert tab.locator(".node.feature").is_hidden()
    assert tab.locator("section").last.locator("tbody tr").count() == 1
    assert "\u202e" not in path.read_text(encoding="utf-8")
