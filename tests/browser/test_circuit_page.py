"""The page of a circuit in a real browser, from file://: filters decide what is drawn, keys reach it, nothing is fetched."""

import pytest
from browser_world import HOSTILE
from circuit_pages_world import made_circuit

from steering.circuits.pages.drawing import edges_of
from steering.circuits.pages.page import write_page

DRAWN = "#graph path.e:not(.off)"
ROWS = "#edges tbody tr:not([hidden])"


@pytest.fixture
def page(tab, tmp_path):
    write_page(made_circuit(), tmp_path / "circuit.html")
    tab.goto((tmp_path / "circuit.html").as_uri())
    return tab


def names(page, selector: str) -> set[str]:
    return {text.split("  ")[0] for text in page.locator(f"{selector} title").all_text_contents()}


def rows(page) -> list[str]:
    return page.locator(f"{ROWS} code").all_text_contents()


def test_filters_change_the_drawing_and_the_table(page):
    circuit = made_circuit()
    graph, score_rw = circuit.graph, circuit.score_rw
    everything = {graph.edge_name(r, w): (r, abs(float(score_rw[r, w]))) for r, w in graph.exists_rw.nonzero().tolist()}
    inside = set(graph.edges(circuit.edges_rw))
    assert names(page, DRAWN) == set(rows(page)) == inside
    page.get_by_label("strongest of all").check()
    assert names(page, DRAWN) == set(everything)
    page.get_by_label("into keys").uncheck()
    assert names(page, DRAWN) == {name for name in everything if "->k." not in name}
    page.get_by_label("into keys").check()
    page.get_by_label("in layers").fill("1")
    page.get_by_label("to", exact=True).fill("2")
    behind = {name for name in everything if name.split("->")[1].split(".")[1:2] in (["1"], ["2"])}
    assert names(page, DRAWN) == set(rows(page)) == behind
    page.locator("[name=most]").fill("50")
    strongest = sorted(behind, key=lambda name: -everything[name][1])[: round(len(behind) ** 0.5)]
    assert rows(page) == strongest
    assert page.locator("output[name=count]").inner_text() == str(len(strongest))
    ends = {end for name in strongest for end in name.split("->")}
    parts = {"head." + end.split(".", 1)[1] if end[0] in "qkv" else end.replace("mlp_in", "mlp") for end in ends}
    assert set(page.locator("#graph .node:not(.idle)").evaluate_all("all => all.map(one => one.dataset.name)")) == parts


def test_pointing_at_an_edge_and_walking_with_keys(page):
    status = page.locator("#status")
    assert status.inner_text() == "12 edges drawn"
    edge = page.locator(DRAWN).last
    title = edge.locator("title").text_content()
    edge.scroll_into_view_if_needed()
    x, y = edge.evaluate(
        "path => { const p = path.getPointAtLength(path.getTotalLength() / 2).matrixTransform(path.getScreenCTM()); return [p.x, p.y] }"
    )
    page.mouse.move(x, y)
    assert status.inner_text().split() == title.split()
    assert page.locator("#graph path.hot").count() == 1
    page.mouse.move(2, 2)
    assert page.locator("#graph path.hot").count() == 0
    page.locator("[name=high]").focus()
    page.keyboard.press("Tab")  # the drawing has one stop, the table another
    first = page.evaluate("document.activeElement.dataset.name")
    assert status.inner_text().startswith(f"{first}: ")
    page.keyboard.press("ArrowRight")
    second = page.evaluate("document.activeElement.dataset.name")
    assert second not in (None, first)
    assert status.inner_text().startswith(f"{second}: ")
    page.locator(ROWS).first.focus()
    page.keyboard.press("ArrowDown")
    assert status.inner_text().startswith(rows(page)[1])
    assert page.locator("#graph path.hot title").text_content().startswith(rows(page)[1])


def test_nothing_is_fetched_and_texts_stay_texts(tab, tmp_path):
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    path = tmp_path / "circuit.html"
    write_page(made_circuit(HOSTILE), path)
    tab.goto(path.as_uri())
    tab.locator("#status").get_by_text("edges drawn").wait_for()
    assert asked == [path.as_uri()]
    assert tab.title() != "owned"
    assert HOSTILE in tab.title()
    assert tab.locator("img").count() == 0
    assert tab.locator("h1").text_content() == f"Circuit of {HOSTILE} in {HOSTILE}"
    assert tab.locator(".pairs dd").first.text_content() == HOSTILE


def test_without_scripts_the_circuit_is_drawn(chromium, tmp_path):
    circuit = made_circuit()
    write_page(circuit, tmp_path / "circuit.html")
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((tmp_path / "circuit.html").as_uri())
    inside = set(circuit.graph.edges(circuit.edges_rw))
    assert page.locator("#graph path.e:visible").count() == page.locator("#edges tbody tr:visible").count() == len(inside)
    assert set(page.locator("#edges tbody tr:visible code").all_text_contents()) == inside
    assert not page.locator("#filters").is_visible()
    context.close()


def test_a_large_graph_fits_the_window(tab, tmp_path):
    from steering.circuits.model_graph.graph import Graph

    circuit = made_circuit(edges=100, graph=Graph(30, 9))
    assert len(edges_of(circuit)) == 2100
    write_page(circuit, tmp_path / "circuit.html")
    for width in (1280, 400):
        tab.set_viewport_size({"width": width, "height": 900})
        tab.goto((tmp_path / "circuit.html").as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") == width
