"""An attribution graph's page, served with its model, in a real browser: an edge is run, and says what the model says."""

import json
import threading
from contextlib import contextmanager

import httpx
import pytest
import torch
from attribution_world import linear_model, neurons, relu_gpt2

from sae.features.browser.serve import HOST, listening, server_of
from steering.circuits.attribution.files import FORMAT, pruned_nodes
from steering.circuits.attribution.graph import find_graph, prune, scores
from steering.circuits.attribution.interventions import Intervening
from steering.circuits.attribution.serve import create_app

IDS = [5, 11, 2, 30]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    lm = relu_gpt2()
    linear = linear_model(lm, neurons(lm), torch.tensor([IDS]))
    graph = find_graph(linear, 100)
    nodes, edges = pruned_nodes(graph, prune(graph, 0.9, 0.99), IDS, [f"t{token}" for token in IDS], str)
    content = {
        "format": FORMAT, "model": "relu", "fingerprint": "0", "transcoders": "neurons", "prompt": "text", "ids": IDS,
        "tokens": [f"t{token}" for token in IDS], "n_layers": lm.n_layers, "skip_positions": 0, "n_active": graph.n_active,
        "n_features": graph.n_features, "scores": scores(graph)._asdict(), "settings": {}, "nodes": nodes, "edges": edges,
        "interventions": [],
    }  # fmt: skip
    intervening = Intervening(linear, content)
    with served(create_app(content, intervening, tmp_path_factory.mktemp("graph") / "graph.json")) as url:
        yield url, content, intervening


@contextmanager
def served(app):
    with listening(0) as listener:
        server = server_of(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield f"http://{HOST}:{listener.getsockname()[1]}/"
        server.should_exit = True
        thread.join(10)


def a_feature_edge(content) -> tuple[int, int]:
    kinds = [node["kind"] for node in content["nodes"]]
    return next((edge.source, edge.target) for edge in content["edges"] if kinds[edge.source] == kinds[edge.target] == "feature")


def test_an_edge_is_checked_from_the_page(tab, world):
    url, content, intervening = world
    source, target = a_feature_edge(content)
    names = [content["nodes"][n]["id"] for n in (source, target)]
    tab.goto(url)
    tab.locator(f'.node[data-n="{source}"]').dispatch_event("click")
    tab.locator("#detail input.factor").fill("2")
    row = tab.locator("#detail tr", has=tab.locator("button.to", has_text=f"feature {content['nodes'][target]['feature']} of layer")).first
    row.get_by_role("button", name="run").click()
    outcome = tab.locator("#outcome .outcome")
    outcome.wait_for()
    assert "at 2 times its value" in outcome.locator("h3").inner_text()
    changes = {row["node"]: row for row in intervening.set(names[0], 2.0, [names[1]])["changes"]}
    first = outcome.locator("table").first
    shown = [float(text.replace("−", "-")) for text in first.locator("td.n").all_inner_texts()]
    expected = changes[names[1]]
    assert shown == pytest.approx([expected[key] for key in ("edge", "direct", "through", "replacement", "model")], rel=6e-3, abs=1e-9)
    assert shown[0] == pytest.approx(shown[1], rel=6e-3)


def test_what_is_no_question_is_refused_in_a_sentence(world):
    url, content, _ = world
    own = {"origin": url.rstrip("/"), "content-type": "application/json"}
    logit = next(node["id"] for node in content["nodes"] if node["kind"] == "logit")
    with httpx.Client(base_url=url, headers=own) as client:
        for body, sentence in (
            (b"{", "expected JSON"),
            (json.dumps({"node": "token.0", "factor": "2"}).encode(), "expected JSON"),
            (json.dumps({"node": "token.0", "factor": 2.0, "more": 1}).encode(), "expected JSON"),
            (json.dumps({"node": "feature.0.0.9999", "factor": 2.0}).encode(), "node of the graph"),
            (json.dumps({"node": logit, "factor": 2.0}).encode(), "logit"),
        ):
            answer = client.post("/intervene", content=body)
            assert answer.status_code == 400
            assert sentence in answer.json()["error"]
        assert client.get("/other").status_code == 404
        assert client.post("/intervene", content=b"{}", headers={"origin": "http://elsewhere"}).status_code == 403
        page = client.get("/", headers={"origin": url.rstrip("/")})
        assert page.headers["content-security-policy"].count("connect-src 'self'") == 1
