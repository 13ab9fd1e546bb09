"""What a person does with the browser, in a real one: every key, form and stream, without an error in the console or a foreign request."""

import http.client
import http.server
import json
import re
import threading
import time
from functools import partial
from urllib.parse import urlencode

import numpy as np
import pytest
from browser_world import FEATURE, HOSTILE, served

from sae.features.browser.app import create_app


def number_in(tab) -> int:
    """The feature whose page is open."""
    return int(re.search(r"/f/(\d+)", tab.url)[1])


def order(demo, column: str) -> list[int]:
    alive = np.flatnonzero(demo.index.columns["count"])
    return alive[np.argsort(-np.asarray(demo.index.columns[column])[alive].astype(np.float32), kind="stable")].tolist()


def test_the_table_sorts_filters_and_turns_its_pages(demo, tab):
    tab.goto(demo.url)
    assert [int(text) for text in tab.locator("a.open").all_inner_texts()] == order(demo, "max")[:50]
    tab.get_by_role("link", name="density", exact=True).click()
    assert tab.locator("th[aria-sort=descending]").inner_text().startswith("density")
    by_density = order(demo, "density")
    assert [int(text) for text in tab.locator("a.open").all_inner_texts()] == by_density[:50]
    tab.get_by_role("link", name="next ›").first.click()
    assert [int(text) for text in tab.locator("a.open").all_inner_texts()] == by_density[50:100]
    tab.get_by_label("density from").fill("0.01")
    tab.get_by_label("top token has").fill(" the")
    tab.get_by_role("button", name="Show").click()
    shown = [int(text) for text in tab.locator("a.open").all_inner_texts()]
    assert shown
    for j in shown:
        assert demo.index.columns["density"][j] >= 0.01
        assert " the" in demo.index.vocabulary.spelling(int(demo.index.columns["top_token"][j]))
    tab.reload()  # the address is the state
    assert [int(text) for text in tab.locator("a.open").all_inner_texts()] == shown


def test_keys_walk_through_a_list(demo, tab):
    by_mean = order(demo, "mean")
    tab.goto(f"{demo.url}/?sort=mean")
    tab.keyboard.press("j")
    tab.keyboard.press("j")
    tab.keyboard.press("k")
    assert tab.evaluate("document.activeElement.textContent") == str(by_mean[0])
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/f/*")
    for key, expected in (("j", by_mean[1]), ("j", by_mean[2]), ("k", by_mean[1]), ("]", by_mean[1] + 1), ("[", by_mean[1])):
        with tab.expect_navigation():
            tab.keyboard.press(key)
        assert number_in(tab) == expected
    with tab.expect_navigation():
        tab.keyboard.press("r")
    assert number_in(tab) in by_mean
    assert "sort=mean" in tab.url
    tab.keyboard.press("?")
    assert tab.locator("#keys").is_visible()
    tab.keyboard.press("j")  # nothing moves behind the help
    tab.keyboard.press("Escape")
    assert not tab.locator("#keys").is_visible()
    tab.keyboard.press("/")
    tab.keyboard.type("jjk")  # text now, not keys
    assert tab.locator("nav.head input").input_value() == "jjk"
    tab.keyboard.press("Escape")
    with tab.expect_navigation():
        tab.keyboard.press("j")


def test_a_label_a_star_and_a_list_are_kept_and_found(demo, tab):
    tab.goto(f"{demo.url}/f/{FEATURE}")
    tab.keyboard.press("e")
    tab.keyboard.type("curse words")
    with tab.expect_navigation():
        tab.keyboard.press("Enter")
    assert tab.locator("h1 .label").inner_text() == "curse words"
    with tab.expect_navigation():
        tab.keyboard.press("s")
    assert tab.locator("h1 .star").count() == 1
    tab.get_by_label("Note").fill("strongest in film dialogue\n🦓")
    with tab.expect_navigation():
        tab.get_by_role("button", name="Keep").click()
    tab.get_by_label("List").fill("to steer with")
    with tab.expect_navigation():
        tab.get_by_role("button", name="Add", exact=True).click()
    tab.keyboard.press("/")
    tab.keyboard.type("curse")
    with tab.expect_navigation():
        tab.keyboard.press("Enter")
    assert tab.locator("a.open").all_inner_texts() == [f"★ {FEATURE}"]
    tab.get_by_role("link", name="Lists").click()
    tab.get_by_role("link", name="to steer with").click()
    assert tab.locator("a.open").all_inner_texts() == [f"★ {FEATURE}"]
    assert demo.notes.get(FEATURE) == ("curse words", "strongest in film dialogue\n🦓", True)


def test_an_address_beyond_all_bounds_is_answered_with_a_sentence(demo):
    connection = http.client.HTTPConnection(demo.url.removeprefix("http://"))
    connection.request("GET", "/prompt?text=" + "x" * 150_000)
    reply = connection.getresponse()
    assert (reply.status, json.loads(reply.read())) == (414, {"error": "expected a URL of at most 40,000 bytes, got 150,005"})
    connection.close()


def test_a_filter_leaves_empty_fields_out_of_the_address_and_keeps_a_word_that_is_text(demo, tab):
    tab.goto(f"{demo.url}/")
    tab.get_by_label("search for").fill("text")
    tab.get_by_label("density from").fill("0")
    with tab.expect_navigation():
        tab.get_by_role("button", name="Show").click()
    assert tab.url == f"{demo.url}/?q=text&density_min=0"
    tab.go_back()
    assert tab.get_by_label("density from").is_enabled()


def test_what_is_begun_is_not_lost(demo, tab):
    tab.goto(f"{demo.url}/f/9")
    tab.keyboard.press("e")
    tab.keyboard.type("begun")
    tab.keyboard.press("Escape")
    asked = []
    tab.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
    tab.keyboard.press("]")
    tab.wait_for_timeout(300)
    assert asked == ["beforeunload"]
    assert tab.get_by_label("Label").input_value() == "begun"
    with tab.expect_navigation():
        tab.keyboard.press("s")
    assert demo.notes.get(9) == ("begun", "", True)
    with tab.expect_navigation():
        tab.keyboard.press("]")
    assert asked == ["beforeunload"]
    demo.notes.set(9, label="", starred=False)


def test_a_note_that_cannot_be_kept_stays_in_its_form_and_is_kept_later(demo, tab):
    tab.expected_errors += ["503"]
    notes = demo.notes
    pages = notes._connection.execute("PRAGMA page_count").fetchone()[0]
    notes._connection.execute(f"PRAGMA max_page_count = {pages}")  # as a full disk answers
    tab.goto(f"{demo.url}/f/9")
    long = "what I found out\n" + "x" * 9000
    tab.get_by_label("Note").fill(long)
    with tab.expect_navigation():
        tab.get_by_role("button", name="Keep").click()
    assert "the disk is full" in tab.get_by_role("alert").inner_text()
    assert tab.get_by_label("Note").input_value() == long
    asked = []
    tab.once("dialog", lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
    tab.get_by_role("link", name="Feature 9 as it is").click()
    tab.wait_for_timeout(300)
    assert asked == ["beforeunload"]
    notes._connection.execute("PRAGMA max_page_count = 1000000")
    with tab.expect_navigation():
        tab.get_by_role("button", name="Keep").click()
    assert notes.get(9).note == long
    notes.set(9, note="")


def test_notes_go_out_and_come_in(demo, tab, tmp_path):
    demo.notes.set(7, label="seven")
    tab.goto(f"{demo.url}/lists")
    with tab.expect_download() as download:
        tab.get_by_role("link", name="Export").click()
    saved = tmp_path / "notes.jsonl"
    download.value.save_as(saved)
    demo.notes.set(7, label="changed")
    with tab.expect_navigation():
        tab.locator("#import").set_input_files(saved)
    assert demo.notes.get(7).label == "seven"
    assert "entries were read" in tab.get_by_role("status").inner_text()
    (tmp_path / "bad.jsonl").write_text("no json\n")
    tab.expected_errors.append("400")
    tab.locator("#import").set_input_files(tmp_path / "bad.jsonl")
    tab.locator("#failure").get_by_text("line 1 is none").wait_for()


def test_a_feature_is_found_by_the_word_it_fires_on(demo, tab):
    tab.goto(demo.url)
    tab.get_by_label("search for").fill("what|who")
    tab.get_by_label("where").select_option("fires")
    tab.get_by_role("button", name="Show").click()
    found = [int(text.removeprefix("★ ")) for text in tab.locator("a.open").all_inner_texts()]
    assert found == [hit.feature for hit in demo.index.search("what|who", 50)]


def test_a_prompt_shows_its_features_and_every_order_ranks(demo, tab):
    text = "What the fuck is that? 🦓"
    tab.goto(f"{demo.url}/prompt")
    tab.get_by_label("text").fill(text)
    tab.get_by_role("button", name="Read").click()
    tokens = tab.locator(".token")
    assert "".join(tokens.all_text_contents()[1:]).replace("·", "") == text
    place = next(i for i, token in enumerate(tokens.all_text_contents()) if "fuck" in token)
    strongest = {}
    for name, column in (("activation", 3), ("percentile", 4), ("effect", 5)):
        tab.get_by_label("rank by").select_option(name)
        tab.get_by_role("button", name="Read").click()
        tab.locator(".token").nth(place).click()
        tab.locator("table.ranking").wait_for()
        cells = tab.locator(f"table.ranking tbody td:nth-child({column + 1})").all_inner_texts()
        values = [float(text.replace(",", "")) for text in cells if text != "–"]
        assert len(values) > 3
        assert values == sorted(values, reverse=True)
        strongest[name] = tab.locator("table.ranking a.open").first.inner_text()
        tab.locator(".token").nth(place).click()  # again: not chosen any more
        tab.locator("table.tokens").wait_for()
    assert strongest["activation"] == str(FEATURE)


def written(tab, side: str) -> str:
    return tab.locator(f"#{side} .written").inner_text()


def done(tab) -> None:
    tab.locator("#run:enabled").wait_for(timeout=30_000)


def test_two_sides_are_written_and_the_address_brings_them_back(demo, tab):
    tab.goto(f"{demo.url}/f/{FEATURE}")
    tab.get_by_role("link", name="steer with it").click()
    tab.get_by_label("prompt").fill("I think")
    tab.get_by_label("seed").fill("3")
    tab.get_by_label("new tokens").fill("24")
    field = tab.get_by_label(f"strength of {FEATURE} as a number")
    slider = tab.get_by_label(f"strength of {FEATURE}", exact=True)
    assert slider.get_attribute("min") == "-5"  # 0 in the middle
    assert slider.get_attribute("max") == "5"
    slider.fill("1.5")
    assert field.input_value() == "1.5"
    tab.get_by_label("add feature").fill("12")
    with tab.expect_navigation():
        tab.get_by_role("button", name="Add").click()
    tab.get_by_label("strength of 12 as a number").fill("0.5")
    tab.get_by_role("button", name="Write").click()
    done(tab)
    sides = {side: written(tab, side) for side in ("unsteered", "steered")}
    left, right = (tab.locator(f"#{side}").bounding_box() for side in sides)
    assert left["x"] < right["x"]
    assert left["y"] == right["y"]
    assert all(text.startswith("I think") and len(text) > 20 for text in sides.values())
    assert sides["unsteered"] != sides["steered"]
    assert "seed 3" in tab.locator("#steered .facts").inner_text()
    assert "nats per token" in tab.locator("#steered .facts").inner_text()
    tab.goto(tab.url)
    tab.get_by_role("button", name="Write").click()
    done(tab)
    assert {side: written(tab, side) for side in sides} == sides
    for feature in (FEATURE, 12):
        tab.get_by_label(f"strength of {feature} as a number").fill("0")
    tab.get_by_role("button", name="Write").click()
    done(tab)
    assert written(tab, "steered") == written(tab, "unsteered") == sides["unsteered"]


def test_strengths_beyond_a_features_range_are_marked(demo, tab):
    tab.goto(f"{demo.url}/steer?prompt=I+think&feature={FEATURE}&strength=1")
    row = tab.locator(".strength")
    row.locator(".range", has_text="works from about").wait_for(timeout=60_000)
    *_, found = demo.ranges(FEATURE)  # known by now
    sentence, high = found["sentence"], found["up"]["coefficient"]
    assert row.locator(".range").inner_text() == sentence
    assert row.locator(".range").get_attribute("title") == found["details"]
    assert 1 < high < 5
    track = row.locator("[type=range]").evaluate("slider => getComputedStyle(slider).getPropertyValue('--high')")
    share = float(track.split("+")[1].split("*")[0])
    assert share == pytest.approx((high + 5) / 10)
    field = tab.get_by_label(f"strength of {FEATURE} as a number")
    for strength, beyond in ((high + 0.1, True), (high - 0.1, False), (-found["down"]["coefficient"] - 0.1, True), (0, False)):
        field.fill(f"{strength:.3f}")
        assert ("beyond" in row.get_attribute("class").split()) is beyond
        assert row.locator(".range").inner_text() == "beyond its range: " * beyond + sentence
    tab.get_by_label(f"strength of {FEATURE}", exact=True).fill("5")
    assert "beyond" in row.get_attribute("class").split()


def test_writing_does_not_wait_for_a_range_that_is_measured(demo, tab):
    """The range never comes; the text does, and the page was there before."""

    def endless(_):
        while True:
            time.sleep(0.05)
            yield None

    app = create_app(demo.index, demo.notes, model=demo.lm, dictionary=demo.dictionary, steering=demo.steering, ranges=endless)
    with served(app) as url:
        tab.goto(f"{url}/steer?prompt=I+think&feature={FEATURE}&strength=1&max_new_tokens=8")
        assert tab.locator(".range").inner_text() == "measuring how far it works …"
        tab.get_by_role("button", name="Write").click()
        done(tab)
        assert len(written(tab, "steered")) > len("I think")
        assert tab.locator(".range").inner_text() == "measuring how far it works …"
        tab.goto("about:blank")  # who leaves ends it


def test_a_range_that_is_not_known_says_why_and_none_is_asked_for_without_the_function(demo, tab):
    silent = int((demo.index.columns["max"][:] == 0).argmax())
    tab.goto(f"{demo.url}/steer?feature={silent}&strength=1")
    tab.locator(".range", has_text="how far it works is not known: feature").wait_for()
    with served(create_app(demo.index, demo.notes, model=demo.lm, dictionary=demo.dictionary, steering=demo.steering)) as url:
        asked = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(f"{url}/steer?feature={FEATURE}&strength=1")
        assert not tab.locator(".range").is_visible()
        assert not [one for one in asked if "range" in one]
        assert refused(f"{url}/api/range?feature=1") == "expected a model to steer, but the server was started without a model"
    for wanted, sentence in (("x", "expected a whole number as feature"), ("99999", "feature 99999 does not exist")):
        assert sentence in refused(f"{demo.url}/api/range?feature={wanted}")


def refused(url: str) -> str:
    """The sentence of an answer that is an error."""
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host)
    connection.request("GET", f"/{path}")
    reply = connection.getresponse()
    assert reply.status in (400, 404)
    return json.loads(reply.read())["error"]


def test_a_strength_that_breaks_the_model_is_said_and_not_printed(demo, tab):
    tab.goto(f"{demo.url}/steer?prompt=I+think&feature={FEATURE}&strength=1e30&max_new_tokens=8")
    tab.get_by_role("button", name="Write").click()
    done(tab)
    assert "No text" in written(tab, "steered")
    assert "strength is more than" in written(tab, "steered")
    assert written(tab, "unsteered").startswith("I think")


def test_a_text_can_be_stopped_and_a_second_window_is_told_and_comes_next(demo, tab):
    def without_end(prompt, features, sampling):
        for i in range(1000):  # minutes: only Stop ends it in time
            time.sleep(0.05)
            yield {"side": "steered", "text": f" {i}"}

    with served(create_app(demo.index, demo.notes, steering=without_end)) as url:
        other = tab.context.new_page()
        for page in (tab, other):
            page.goto(f"{url}/steer?prompt=I+think&feature={FEATURE}&strength=1")
        tab.get_by_role("button", name="Write").click()
        tab.locator("#steered .written", has_text="I think 0 1 2").wait_for()
        other.get_by_role("button", name="Write").click()
        other.locator("#failure", has_text="the model is at work").wait_for()
        tab.get_by_role("button", name="Stop").click()
        done(tab)
        stopped = written(tab, "steered")
        other.locator("#steered .written", has_text="I think 0 1 2").wait_for()
        assert written(tab, "steered") == stopped
        assert not other.locator("#failure").is_visible()
        other.get_by_role("button", name="Stop").click()
        other.locator("#run:enabled").wait_for()
        assert not other.locator("#failure").is_visible()


def test_without_its_script_a_page_still_searches_and_keeps(demo, chromium):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{demo.url}/f/9")
    page.get_by_label("Label").fill("xylograph")
    page.get_by_role("button", name="Keep").click()
    page.get_by_label("search", exact=True).fill("xylo")
    page.get_by_label("search", exact=True).press("Enter")
    assert page.locator("a.open").all_inner_texts() == ["9"]
    page.goto(f"{demo.url}/prompt?text=Hello+there")
    assert page.locator(".chip").count() > 5
    context.close()


def test_refusals_are_sentences_on_a_page(demo, tab):
    tab.expected_errors += ["404", "400"]
    tab.goto(f"{demo.url}/f/99999")
    assert "features 0 to 4095" in tab.get_by_role("alert").inner_text()
    tab.goto(f"{demo.url}/?q=quokkazz&how=fires")
    assert "does not occur" in tab.get_by_role("alert").inner_text()


def test_pages_read_in_the_dark_and_on_a_narrow_screen(demo, chromium):
    for scheme, width in (("light", 1280), ("dark", 1280), ("light", 390)):
        context = chromium.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
        page = context.new_page()
        for path in ("/", f"/f/{FEATURE}", "/prompt?text=What+the+fuck", f"/steer?feature={FEATURE}&strength=1", "/lists"):
            page.goto(demo.url + path)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (scheme, width, path)
        context.close()


def test_a_corpus_full_of_markup_stays_text(hostile, tab):
    for path in (
        "/",
        "/?sort=label",
        "/f/3",
        "/f/0",
        "/lists",
        "/?q=script",
        "/?token=%3C",
        "/f/3?" + urlencode({"list": next(iter(hostile.notes.lists()))}),
    ):
        tab.goto(hostile.url + path)
        assert tab.title() in ("Features", "Feature 3", "Feature 0", "Lists"), path
        assert tab.locator("script").count() == 1
        assert tab.locator("img").count() == 0
    tab.goto(f"{hostile.url}/f/3")
    assert tab.locator("h1 .label").inner_text() == HOSTILE
    assert tab.get_by_label("Note").input_value() == f"</textarea>{HOSTILE}"
    assert tab.locator(".w").first.inner_text()
    with tab.expect_navigation():
        tab.keyboard.press("s")
    assert not hostile.notes.get(3).starred


def test_a_foreign_page_can_neither_change_nor_read(demo, chromium, tmp_path):
    """A page from a file, from another port and from another name of this machine, as any site on the web would be."""
    answered: dict[str, int] = {}
    app = create_app(demo.index, demo.notes, model=demo.lm, dictionary=demo.dictionary)

    async def watched(scope, receive, send):
        async def see(message):
            if message["type"] == "http.response.start":
                answered[scope["query_string"].decode()] = message["status"]
            await send(message)

        await app(scope, receive, see)

    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    before = demo.notes.all()
    with served(watched) as url, http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
        address = f"{url}/prompt?text="
        (tmp_path / "evil.html").write_text(
            f"""<iframe src="{address}iframe"></iframe><object data="{address}object"></object><embed src="{address}embed">
            <img src="{address}img"><script src="{address}script"></script><link rel=stylesheet href="{address}style">
            <link rel=prefetch href="{address}prefetch"><iframe name=inner></iframe>
            <form id=get target=inner action="{url}/prompt"><input name=text value=form></form>
            <form id=post target=inner method=post action="{url}/f/20?text=post"><input name=label value=stolen></form>
            <form id=away method=post action="{url}/f/20?text=away"><input name=label value=stolen></form>
            <a id=link href="{address}link">a link</a>
            <script>get.submit(); post.submit(); window.tried = Promise.allSettled([
              fetch("{url}/f/21?text=cors", {{method: "POST", body: "label=stolen"}}),
              fetch("{url}/f/22?text=no-cors", {{method: "POST", body: "label=stolen", mode: "no-cors"}}).then(reply => reply.text()),
              fetch("{address}fetch-no-cors", {{mode: "no-cors"}}).then(reply => {{ if (reply.type === "opaque") throw "no text"; }}),
              fetch("{url}/notes.jsonl?text=fetch").then(reply => reply.text())]).then(all => all.map(one => one.status));</script>"""
        )
        port = elsewhere.server_address[1]
        for origin in (f"http://127.0.0.1:{port}", f"http://localhost:{port}", tmp_path.as_uri()):
            answered.clear()
            context = chromium.new_context()
            page = context.new_page()
            page.goto(f"{origin}/evil.html", wait_until="networkidle")
            assert page.evaluate("window.tried")[0::3] == ["rejected"] * 2
            assert page.evaluate("window.tried")[2] == "rejected"
            assert {"iframe", "object", "embed", "img", "script", "style", "post", "no-cors", "fetch-no-cors"} <= {
                query.removeprefix("text=") for query in answered
            }
            assert set(answered.values()) == {403}, answered
            with page.expect_navigation():
                page.evaluate("document.getElementById('away').submit()")
            assert "only this server's own pages" in page.content()
            page.goto(f"{origin}/evil.html")
            with context.expect_page() as opened:
                page.evaluate(f"void window.open('{address}window')")
            opened.value.wait_for_load_state()
            assert opened.value.evaluate("window.opener") is None  # it cannot be steered from there
            page.click("#link")
            page.locator(".chip").first.wait_for()
            assert (answered["text=window"], answered["text=link"]) == (200, 200)
            context.close()
        elsewhere.shutdown()
    assert demo.notes.all() == before
