"""The exported folder in a real browser, from file://: nothing is fetched, everything works."""

import re
from urllib.parse import urlencode

from browser_world import FEATURE, HOSTILE

from sae.features.explanations.explanation import read_explanations
from sae.features.exports.static import export_static
from sae.features.notes import Note


def test_the_folder_opens_without_any_request_but_for_its_own_files(demo, tab, tmp_path):
    features = [FEATURE, *range(60, 200)]
    path = export_static(demo.index, tmp_path / "export", features, processes=1)
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(path.as_uri())
    tab.get_by_text(str(FEATURE)).first.wait_for()
    tab.goto(path.as_uri() + f"#/f/{FEATURE}")
    tab.get_by_text(f"Feature {FEATURE}").first.wait_for()
    assert tab.locator(".row").count() > 10
    tab.goto(path.as_uri() + "#/f/100")
    tab.locator("h1").get_by_text("Feature 100").wait_for()
    for key, feature in (("]", 101), ("]", 102), ("[", 101)):
        tab.keyboard.press(key)
        tab.locator("h1").get_by_text(f"Feature {feature}").wait_for()
    tab.reload()
    tab.locator("h1").get_by_text("Feature 101").wait_for()
    assert all(url.startswith((tmp_path / "export").as_uri()) for url in asked)
    assert any(re.search(r"/d/\d+\.js", url) for url in asked)


def test_markup_in_the_corpus_stays_text_in_the_export(hostile, tab, tmp_path):
    notes = hostile.notes.all()
    path = export_static(
        hostile.index, tmp_path / "export", list(range(12)), notes=notes, explanations=read_explanations(hostile.index.folder), processes=1
    )
    tab.goto(path.as_uri())
    title = tab.title()
    tab.goto(path.as_uri() + "#/f/3")
    tab.get_by_text("Feature 3").first.wait_for()
    assert tab.locator("h1 .label").inner_text() == HOSTILE
    assert tab.locator("img").count() == 0
    assert "owned" not in tab.title() + title


def test_spellings_of_a_word_find_each_other_in_the_export(demo, tab, tmp_path):
    notes = {70: Note("we don’t know"), 71: Note("caf\u00e9"), 72: Note("Cafe\u0301 again"), 73: Note("I DON'T")}
    path = export_static(demo.index, tmp_path / "export", range(60, 80), notes=notes, processes=1)
    for query, expected in (("don't", [70, 73]), ("don’t", [70, 73]), ("caf\u00e9", [71, 72]), ("cafe\u0301", [71, 72])):
        tab.goto(f"{path.as_uri()}#/?{urlencode({'q': query, 'sort': 'feature'})}")
        tab.get_by_text("Features", exact=True).first.wait_for()
        tab.wait_for_function(f"document.querySelectorAll('tbody tr').length === {len(expected)}")
        assert [int(text) for text in tab.locator("tbody tr td:first-child").all_inner_texts()] == expected
