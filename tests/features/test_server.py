"""The server's answers: pages, changes, JSON, streams, and all that it must refuse."""

import json
import re
import threading
from html.parser import HTMLParser

import pytest

from sae.errors import InputError
from sae.features.browser.app import create_app
from sae.features.notes import Note, Notes
from sae.model.language_model import LanguageModel

HOST = "http://127.0.0.1:8765"
OWN = {"origin": HOST}
SOURCE = "0-res-pre-40"  # layer, site and width of the small world's dictionary
PAGES = ["/", "/f/4", "/prompt", "/prompt?text=The+low+<script>alert(1)</script>", "/steer?feature=4&strength=1", "/lists"]


@pytest.fixture(scope="module")
def lm(world):
    return LanguageModel.load(str(world.model), device="cpu")


@pytest.fixture
def site(world, lm, tmp_path):
    """(client, notes, gate): steering writes one piece, waits for the gate, and writes the next."""
    from starlette.testclient import TestClient

    gate = threading.Event()
    gate.set()

    def steering(prompt, features, sampling):
        if 3 in dict(features):
            raise InputError("feature 3 never fires")

        def pieces():
            yield {"side": "steered", "text": f"{prompt} {dict(features)} {sampling.seed}"}
            gate.wait(20)
            if prompt == "break":
                raise RuntimeError("broken in the middle")
            yield {"side": "steered", "failure": "No text: too strong."}

        return pieces()

    notes = Notes.open(tmp_path / "notes.sqlite", world.index)
    app = create_app(world.index, notes, model=lm, dictionary=world.dictionary, steering=steering)
    yield TestClient(app, base_url=HOST, follow_redirects=False), notes, gate
    notes.close()


class Reader(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


@pytest.mark.parametrize("path", PAGES)
def test_pages_are_whole_escaped_and_name_no_other_machine(site, path):
    client, notes, _ = site
    hostile = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    notes.set(4, label=hostile, note=f"</textarea>{hostile}")
    notes.add_to_list(hostile, 4)
    reply = client.get(path)
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/html")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    tags = Reader(reply.text).tags
    assert [attrs for tag, attrs in tags if tag == "script"] == [{"src": "/app.js", "defer": None}]
    assert not [tag for tag, _ in tags if tag in ("img", "iframe", "object", "embed", "base")]
    assert not [name for _, attrs in tags for name in attrs if name.startswith("on")]
    addresses = [attrs[name] for _, attrs in tags for name in ("src", "href", "action") if name in attrs]
    assert all(re.match(r"[/#?]", address) and not address.startswith("//") for address in addresses)
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_a_list_is_walked_page_by_page_and_feature_by_feature(site, world, monkeypatch):
    client, _, _ = site
    monkeypatch.setattr("sae.features.browser.screens.PAGE", 15)
    shown: list[int] = []
    address = "/?sort=mean&dead=1"
    while address:
        text = client.get(address).text
        shown += [int(j) for j in re.findall(r'class="open" href="/f/(\d+)', text)]
        link = re.search(r'href="(/\?[^"]*page=\d+)">next', text)
        address = link[1].replace("&amp;", "&") if link else ""
    assert sorted(shown) == list(range(40))
    means = [world.index.columns["mean"][j] for j in shown]
    assert means == sorted(means, reverse=True)
    walked, address = [], f"/f/{shown[0]}?sort=mean&dead=1"
    while address:
        walked.append(int(re.search(r"/f/(\d+)", address)[1]))
        link = re.search(r'data-key="j" href="([^"]+)"', client.get(address).text)
        address = link[1].replace("&amp;", "&") if link else ""
    assert walked == shown


def test_a_feature_out_of_the_list_and_a_wrong_place_are_told(site, world):
    client, notes, _ = site
    notes.add_to_list("one", 7)
    assert "not in this list" in client.get("/f/4?list=one").text
    assert "1 of 1" in client.get("/f/7?list=one&at=55").text
    number = client.get("/?q=%237")
    assert (number.status_code, number.headers["location"]) == (303, "/f/7")
    drawn = {re.search(r"/f/(\d+)", client.get("/random?list=one").headers["location"])[1] for _ in range(3)}
    assert drawn == {"7"}


def test_forms_change_notes_and_lead_back(site):
    client, notes, _ = site
    for data in ({"label": "mine", "note": "two\nlines"}, {"starred": "1"}, {"list": "good ones"}):
        reply = client.post("/f/6?sort=mean&at=3", data=data, headers=OWN)
        assert (reply.status_code, reply.headers["location"]) == (303, "/f/6?sort=mean&at=3")
    assert notes.get(6) == Note("mine", "two\nlines", True)
    assert notes.lists() == {"good ones": [6]}
    page = client.get("/f/6").text
    assert "mine" in page
    assert "★ starred" in page
    assert "good ones" in client.get("/lists").text
    assert [row["feature"] for row in client.get("/api/features?label=mine").json()["features"]] == [6]
    client.post("/f/6", data={"starred": "0"}, headers=OWN)
    client.post("/f/6", data={"remove": "good ones"}, headers=OWN)
    assert not notes.get(6).starred
    assert notes.lists() == {}
    notes.add_to_list("last", 6)
    reply = client.post("/f/6?list=last&sort=mean&at=0", data={"remove": "last"}, headers=OWN)  # the list goes with its last member
    assert reply.headers["location"] == "/f/6?sort=mean&at=0"
    assert client.get(reply.headers["location"]).status_code == 200
    notes.add_to_list("gone", 1)
    client.post("/lists", data={"remove": "gone"}, headers=OWN)
    assert notes.lists() == {}


def test_notes_leave_and_come_back_as_lines_of_json(site):
    client, notes, _ = site
    notes.set(6, label="naïve 🦓", starred=True)
    exported = client.get("/notes.jsonl")
    assert "attachment" in exported.headers["content-disposition"]
    notes.set(6, label="", starred=False)
    reply = client.post("/notes/import", content=exported.content, headers=OWN)
    assert reply.json() == {"entries": 1}
    assert notes.get(6) == Note("naïve 🦓", "", True)
    for content in (b"no json", b"\xff\xfe"):
        refused = client.post("/notes/import", content=content, headers=OWN)
        assert refused.status_code == 400
        assert refused.json()["error"].startswith("expected notes")


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8765", "127.0.0.1.evil.example", "", "127.0.0.1@evil.example", "[::1]x", "localhost.", "127.1"),
        *("127.0.0.1/evil.example", "localhost:8765/x", "me@127.0.0.1", "me:word@localhost:8765", "127.0.0.1?x", "127.0.0.1#x"),
        *("127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:99999", "127.0.0.1:8765x", "127.0.0.1:-1", "localhost:8765:80"),
    ],
)
def test_a_foreign_host_is_refused(site, host):
    reply = site[0].get("/", headers={"host": host})
    assert reply.status_code == 403
    assert "expected a request to 127.0.0.1" in reply.json()["error"]


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "https://127.0.0.1:8765", "http://127.0.0.1:9999", "http://localhost:8765"]
)
@pytest.mark.parametrize("path", ["/f/6", "/lists", "/notes/import", "/api/steer"])
def test_a_change_from_elsewhere_is_refused(site, path, origin):
    client, notes, _ = site
    reply = client.post(path, content=b"label=theirs", headers={"origin": origin} if origin else {})
    assert reply.status_code == 403
    assert notes.all() == {}
    assert client.get(path).status_code in (200, 404, 405)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"site": "none", "mode": "navigate", "dest": "document"}, 200),  # typed, or a bookmark
        ({"site": "same-origin", "mode": "cors", "dest": "empty"}, 200),
        ({"site": "cross-site", "mode": "navigate", "dest": "document"}, 200),  # a link
        ({"site": "same-site", "mode": "navigate", "dest": "document"}, 200),  # a link on another port of this machine
        *(
            ({"site": site, "mode": "navigate", "dest": dest}, 403)
            for site in ("cross-site", "same-site")
            for dest in ("iframe", "frame", "fencedframe", "object", "embed", "empty", "")
        ),
        ({"site": "cross-site", "mode": "navigate"}, 403),
        ({"site": "cross-site", "mode": "no-cors", "dest": "image"}, 403),
        ({"site": "cross-site", "mode": "no-cors", "dest": "document"}, 403),
        ({"site": "same-site", "mode": "cors", "dest": "empty"}, 403),
        ({"site": "cross-site", "mode": "websocket", "dest": "empty"}, 403),
        ({"site": "cross-site", "mode": "navigate", "dest": "document", "purpose": "prefetch"}, 403),
        ({"site": "unheard-of", "mode": "cors", "dest": "empty"}, 403),
    ],
)
def test_other_pages_may_link_here_but_not_load_from_here(site, headers, status):
    sent = {("sec-purpose" if name == "purpose" else f"sec-fetch-{name}"): value for name, value in headers.items()}
    reply = site[0].get("/prompt?text=x", headers=sent)
    assert reply.status_code == status
    if status == 403:
        assert "may link to this server, but not load from it" in reply.json()["error"]
    assert reply.headers["cross-origin-resource-policy"] == "same-origin"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["x-frame-options"] == "DENY"
    assert "frame-ancestors 'none'" in reply.headers["content-security-policy"]


@pytest.mark.parametrize("origin", ["null", "http://evil.example", "http://127.0.0.1:9999", ""])
def test_a_read_that_names_another_origin_is_refused(site, origin):
    assert site[0].get("/notes.jsonl", headers={"origin": origin}).status_code == 403
    assert site[0].get("/notes.jsonl", headers=OWN).status_code == 200


@pytest.mark.parametrize("name", ["origin", "sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest"])
def test_of_two_headers_none_is_trusted(site, name):
    client, notes, _ = site
    mine = {"origin": HOST, "sec-fetch-site": "same-origin", "sec-fetch-mode": "cors", "sec-fetch-dest": "empty"}
    for values in ((mine[name], "http://evil.example"), ("cross-site", mine[name]), (mine[name], mine[name])):
        headers = [*((other, value) for other, value in mine.items() if other != name), *((name, value) for value in values)]
        reply = client.post("/f/6", data={"label": "theirs"}, headers=headers)
        assert reply.status_code == 400
        assert f"expected one header {name}, got 2" in reply.json()["error"]
    assert notes.all() == {}


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/app.js/../../server.py", "/web/server.css", "/docs", "/openapi.json"]
)
def test_no_path_leads_to_a_file(site, path):
    reply = site[0].get(path)
    assert reply.status_code == 404
    assert "root:" not in reply.text
    assert "def " not in reply.text


def test_the_scripts_address_has_no_parameters(site):
    plain = site[0].get("/app.js")
    assert plain.headers["content-type"].startswith("text/javascript")
    assert site[0].get("/app.js?text=alert(1)&kind=text/html&path=x").content == plain.content


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/f/40", 404, "features 0 to 39"),
        ("/f/-1", 404, "features 0 to 39"),
        ("/f/x", 404, "whole number"),
        ("/?sort=colour", 400, "expected sort to be one of"),
        ("/?page=x", 400, "whole number as page"),
        ("/?density_max=x", 400, "a number as density_max"),
        ("/?list=none", 400, "no list &#x27;none&#x27;"),
        ("/?q=quokka&how=fires", 400, "does not occur"),
        ("/random?label=zzzz", 400, "the list is empty"),
        ("/prompt?text=x&order=beauty", 400, "order"),
        ("/prompt?text=" + "x+" * 600, 400, "at most 32 tokens"),
        ("/prompt?text=" + "x" * 2001, 400, "at most 2,000 characters"),
        ("/prompt?text=x&t=a", 400, "whole number as t"),
        ("/steer?feature=40&strength=1", 404, "features 0 to 39"),
        ("/steer?feature=4&strength=inf", 400, "finite"),
        ("/steer?seed=-1", 400, "seed"),
        ("/f/1?at=²", 200, "Feature 1"),
        ("/f/1?at=" + "1" * 5000, 200, "Feature 1"),
        ("/steer?feature=5", 200, 'name="strength" type="number" step="any" value="1"'),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(site, path, status, message):
    reply = site[0].get(path)
    assert reply.status_code == status
    assert message in reply.text
    assert "Traceback" not in reply.text


@pytest.mark.parametrize(
    ("path", "status", "kept"),
    [
        ("/prompt?order=effect&text=" + "x+" * 600, 400, 'aria-label="text">\nx x x x'),
        ("/steer?feature=4&strength=0.5&add=99&prompt=The", 404, 'value="0.5" aria-label="strength of 4 as a number"'),
        ("/steer?feature=4&strength=0.5&seed=-1&prompt=The", 400, ">\nThe</textarea>"),
        ("/?q=*&density_max=0.5", 400, 'name="density_max" value="0.5"'),
        ("/?q=quokka&how=fires", 400, 'value="quokka"'),
    ],
)
def test_a_refusal_keeps_the_form_that_led_to_it(site, path, status, kept):
    reply = site[0].get(path)
    assert (reply.status_code, 'role="alert" class="refusal"' in reply.text) == (status, True)
    assert kept in reply.text


def test_a_star_does_not_cost_the_label_beside_it(site):
    client, notes, _ = site
    client.post("/f/6", data={"starred": "1", "label": "begun", "note": "too", "list": ""}, headers=OWN)
    client.post("/f/6", data={"label": "begun", "note": "too", "list": "new"}, headers=OWN)
    assert (notes.get(6), notes.lists()) == (Note("begun", "too", True), {"new": [6]})


def test_a_list_of_a_search_says_how_well_each_feature_fits(site, world):
    client, _, _ = site
    hits = world.index.search("zebrafly", 40)
    shown = re.findall(
        r'class="open" href="[^"]*">(\d+)</a>.*<td class="num">([\d.-]+)</td></tr>', client.get("/?q=zebrafly&how=fires").text
    )
    assert shown == [(str(hit.feature), f"{hit.score:.2f}") for hit in hits]
    assert "features that fire on it" in client.get("/?q=nowhere").text


def test_sizes_are_bounded(site):
    client, notes, _ = site
    assert client.get("/prompt?text=" + "x" * 50_000).status_code == 414
    assert client.post("/f/6", content=b"note=" + b"x" * 140_000, headers=OWN).status_code == 413

    def endless():
        for _ in range(200):
            yield b"x" * 1000

    reply = client.post("/f/6", content=endless(), headers=OWN)  # no length announced
    assert reply.status_code == 413
    assert "at most 131,072 bytes" in reply.text
    too_many = client.post("/f/6", content="&".join(f"a{i}=1" for i in range(100)).encode(), headers=OWN)
    assert too_many.status_code == 400
    assert client.post("/f/6", data={"label": "x" * 201}, headers=OWN).status_code == 400
    assert notes.all() == {}
    longest = "🦓" * 10_000  # of characters that take most bytes in a form
    assert client.post("/f/6", data={"note": longest}, headers=OWN).status_code == 303
    assert notes.get(6).note == longest
    notes.set(6, note="")


def test_the_prompt_as_json_is_the_page(site, world, lm):
    client, _, _ = site
    reply = client.get("/api/prompt?text=The+low+zebra&n=3&t=2").json()
    assert "".join(reply["texts"][1:]) == "The low zebra"
    assert [len(found) for found in reply["firings"]] == [3 if p == 2 else 0 for p in range(len(reply["texts"]))]
    ids = lm.encode(["The low zebra"])[0][0]
    acts = (world.dictionary.W_enc_fd[:, ids[2]] + world.dictionary.b_enc_f).relu()
    assert [f["feature"] for f in reply["firings"][2]] == acts.argsort(descending=True, stable=True)[:3].tolist()
    page = client.get("/prompt?text=The+low+zebra&t=2").text
    assert all(f'href="/f/{f["feature"]}"' in page for f in reply["firings"][2])


def events(reply) -> list[dict]:
    return [json.loads(line.removeprefix("data: ")) for line in reply.text.split("\n\n") if line]


def test_steered_text_is_streamed_to_its_end(site):
    client, _, _ = site
    reply = client.post("/api/steer", json={"prompt": "I", "features": {"4": 1.5, "6": "-2"}, "seed": 7}, headers=OWN)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert events(reply) == [
        {"side": "steered", "text": "I {4: 1.5, 6: -2.0} 7"},
        {"side": "steered", "failure": "No text: too strong."},
        {"done": True},
    ]
    broken = client.post("/api/steer", json={"prompt": "break", "features": {}}, headers=OWN)
    assert events(broken)[-1] == {"error": "broken in the middle"}
    assert events(client.post("/api/steer", json={"prompt": "I", "features": {}}, headers=OWN))[-1] == {
        "done": True
    }  # the model is free again


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[]", "object of JSON"),
        (b"[" * 30_000, "object of JSON"),
        (b'{"prompt": "I", "features": [1]}', "features as an object"),
        (rb'{"prompt": "\ud800 x", "features": {}}', "half of a surrogate pair"),
        (b'{"prompt": "I", "features": {"x": 1}}', "whole number as feature"),
        (b'{"prompt": "I", "features": {"4": NaN}}', "finite number as strength"),
        (b'{"prompt": "I", "features": {"3": 1}}', "never fires"),
        (b'{"prompt": "I", "features": {}, "temperature": 11}', "temperature"),
        (b'{"prompt": "I", "features": {}, "max_new_tokens": 1e9}', "whole number as max_new_tokens"),
    ],
)
def test_a_text_that_cannot_be_steered_is_refused(site, body, message):
    reply = site[0].post("/api/steer", content=body, headers=OWN)
    assert reply.status_code == 400
    assert message in reply.json()["error"]


def test_a_change_that_fails_keeps_what_was_typed(site, monkeypatch):
    client, notes, _ = site
    typed = {"label": 'mine "<b>', "note": "two\nlines </textarea>", "list": "good ones", "starred": "1"}
    notes._connection.execute("PRAGMA max_page_count = 1")  # as a full disk answers
    reply = client.post("/f/6?sort=mean&at=3", data=typed | {"note": "x" * 10_000 + typed["note"][-20:]}, headers=OWN)
    assert reply.status_code == 400  # too long
    assert "x" * 10_000 in reply.text
    reply = client.post("/f/6?sort=mean&at=3", data=typed | {"note": "x" * 9_000 + typed["note"]}, headers=OWN)
    assert (reply.status_code, "the disk is full" in reply.text) == (503, True)
    assert notes.all() == {}
    tags = Reader(reply.text).tags
    assert ("form", {"method": "post", "action": "/f/6?sort=mean&at=3", "class": "editor", "data-begun": None}) in tags
    values = {attrs.get("name"): attrs.get("value") for tag, attrs in tags if tag == "input"}
    assert (values["label"], values["list"], values["starred"]) == (typed["label"], "good ones", "1")
    assert "two\nlines &lt;/textarea&gt;</textarea>" in reply.text


def test_every_page_says_it_when_the_notes_fail(site, monkeypatch):
    """Another program holds the file, and then damages it."""
    import sqlite3

    client, notes, _ = site
    notes.set(6, label="kept")
    notes._connection.execute("PRAGMA busy_timeout = 20")
    other = sqlite3.connect(notes.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    pages = ["/", "/f/4", "/random", "/lists", "/notes.jsonl", "/api/features", "/?q=the", "/?q=the&how=fires", "/?starred=1"]
    for path in pages:
        reply = client.get(path)
        assert (reply.status_code, "another program or a long change holds them" in reply.text) == (503, True), path
    for path, data in (("/f/4", {"label": "mine"}), ("/lists", {"remove": "x"})):
        reply = client.post(path, data=data, headers=OWN)
        assert (reply.status_code, "another program or a long change holds them" in reply.text) == (503, True)
    assert client.post("/notes/import", content=b"", headers=OWN).status_code == 503
    other.execute("ROLLBACK")
    other.close()
    assert client.get("/f/6").status_code == 200
    with open(notes.path, "r+b") as file:  # all but the first page, so that the file still opens
        file.seek(4096)
        file.write(b"\xff" * (notes.path.stat().st_size - 4096))
    notes._connection.execute("PRAGMA shrink_memory")
    damaged = [client.get(path) for path in pages if path != "/random"]  # which may go by a list that is remembered
    assert {reply.status_code for reply in damaged} == {503}
    assert all("the file is damaged" in reply.text for reply in damaged)
    before = notes.path.read_bytes()
    reply = client.post("/f/4", data={"label": "typed by hand"}, headers=OWN)
    assert (reply.status_code, "typed by hand" in reply.text) == (503, True)
    assert notes.path.read_bytes() == before


def test_without_a_model_the_rest_works(world, tmp_path):
    from starlette.testclient import TestClient

    notes = Notes.open(tmp_path / "notes.sqlite", world.index)
    client = TestClient(create_app(world.index, notes), base_url=HOST)
    assert client.get("/f/4").status_code == 200
    assert "without a model" in client.get("/prompt").text
    assert "without a model" in client.get("/steer").text
    notes.close()


def test_a_failure_inside_is_said_and_logged_not_shown(site, monkeypatch):
    from starlette.testclient import TestClient

    def fail(*_):
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr("sae.features.browser.screens.lists", fail)
    client = TestClient(site[0].app, base_url=HOST, raise_server_exceptions=False)
    reply = client.get("/lists")
    assert reply.status_code == 500
    assert "its terminal says what" in reply.text
    assert "secret" not in reply.text
    assert "content-security-policy" in reply.headers


def test_a_feature_as_neuronpedia_answers(site, world):
    client, _, _ = site
    reply = client.get(f"/api/feature/{world.model.name}/{SOURCE}/4")
    assert reply.status_code == 200
    row = reply.json()
    assert (row["modelId"], row["layer"], row["index"]) == (world.model.name, SOURCE, "4")
    assert row["maxActApprox"] == pytest.approx(float(world.index.columns["max"][4]))
    assert {"pos_str", "neg_str", "frac_nonzero", "freq_hist_data_bar_heights", "activations", "explanations"} <= set(row)
    first = row["activations"][0]
    assert {"tokens", "values", "maxValue", "maxValueTokenIndex"} <= set(first)
    for path, message in ((f"/api/feature/gpt2/{SOURCE}/4", SOURCE), (f"/api/feature/{world.model.name}/{SOURCE}/40", "0 to 39")):
        refused = client.get(path)
        assert refused.status_code == 404
        assert message in refused.json()["error"]
