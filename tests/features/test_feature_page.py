"""Pages open from a file without a network, and no text of a corpus becomes markup."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from sae.errors import InputError
from sae.features.page import document, feature_html, visible, write_pages
from sae.features.text import Vocabulary

TAGS = {*"html head meta title style body nav a h1 h2 p div section dl dt dd svg rect line text ol li code span b i u".split()}  # noqa: SIM905
TABLE_TAGS = TAGS | {"input", "table", "thead", "tbody", "tr", "th", "td", "button", "script"}


class Reader(HTMLParser):
    """Collects what a browser would act on, and the text of every element of a class."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.rows, self._open = set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        classes = dict(attributes).get("class") or ""
        if classes == "row":
            self.rows.append("")
        if tag not in ("meta", "input"):
            self._open.append(classes)

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, data):
        if "l" in self._open or "r" in self._open:
            self.rows[-1] += data


@pytest.fixture(scope="module")
def pages(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    write_pages(world.index, [4, 3, 17, 0], folder, "Features <that> fire")
    return folder


def test_no_text_becomes_markup_and_nothing_is_loaded(pages):
    assert sorted(path.name for path in pages.iterdir()) == ["0.html", "17.html", "3.html", "4.html", "index.html"]
    for path in pages.iterdir():
        text = path.read_text(encoding="utf-8")
        page = Reader(text)
        assert page.tags <= (TABLE_TAGS if path.name == "index.html" else TAGS)
        assert len(text.encode()) < 100_000
        assert "http://" not in text
        assert "https://" not in text
        assert "url(" not in text
        for name, value in page.attributes:
            assert name not in ("src", "srcset", "onerror", "onclick", "action")
            if name == "href":
                assert (pages / value).exists()
        if path.name != "3.html":
            assert "&lt;" in text  # the markup of the corpus is on it, as text


def test_rows_hold_the_exact_text_of_their_windows(world, pages):
    rows = Reader((pages / "4.html").read_text(encoding="utf-8")).rows
    contexts = world.index.top_contexts(4, 20) + world.index.random_contexts(4, 20)
    texts = ["".join(context.texts) for context in contexts]
    assert rows == texts
    everything = "".join(texts)
    assert "\n\t" in everything
    assert "🦓" in everything
    assert "привет" in everything


def test_the_firing_token_begins_the_right_half_and_is_marked(world):
    html = feature_html(world.index, 17)
    for row, context in zip(re.findall(r'<div class="row".*?</div>', html, re.DOTALL), world.index.top_contexts(17, 20)):
        right = row.split('<span class="r">')[1]
        assert re.match(rf'<b class="a\d c" title="{context.value:#.3g}">', right)
        assert row.count(' c"') == 1
    assert re.search(r'<b class="a9 c"', html)  # the strongest has the full shade


def test_pages_lead_to_one_another(pages):
    links = {path.name: re.findall(r'rel="(prev|next)" href="(.*?)"', path.read_text()) for path in pages.iterdir()}
    assert links["4.html"] == [("next", "3.html")]
    assert links["3.html"] == [("prev", "4.html"), ("next", "17.html")]
    assert links["0.html"] == [("prev", "17.html")]


def test_a_feature_that_never_fires_has_a_page(pages):
    assert (pages / "3.html").read_text().count("It never fires.") == 3


def test_the_histogram_shows_every_bin(world, pages):
    _, counts = world.index.histogram(17)
    bars = re.findall(r"<rect .*?<title>.*?: ([\d,]+)</title>", (pages / "17.html").read_text())
    assert [int(bar.replace(",", "")) for bar in bars] == counts.tolist()


def test_a_page_stays_small_when_every_token_is_long_and_fires(world, monkeypatch):
    long = Vocabulary(["🦓🪰&<'\"".encode()] * 420, np.zeros(420, bool))
    monkeypatch.setattr(world.index, "vocabulary", long)
    assert len(document("x", feature_html(world.index, 4)).encode()) < 200_000


def test_a_missing_feature_is_refused_before_anything_is_written(world, tmp_path):
    with pytest.raises(InputError, match="feature 40 does not exist"):
        write_pages(world.index, [0, 40], tmp_path / "pages")
    assert not (tmp_path / "pages").exists()


def test_characters_that_cannot_be_seen_are_marked():
    assert visible("a\nb") == 'a<i class="n">\n</i>b'
    assert "\x1b" not in visible("\x1b[31m")
    assert "\u202e" not in visible("\u202eabc")
    assert visible("<&>\"'") == "&lt;&amp;&gt;&quot;&#x27;"


def test_a_browser_shows_the_page_and_sorts_the_table(pages, tmp_path):
    """Chromium, with its own view of the document: nothing in the corpus ran, and the table's script did."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    command = [browser, *flags.split(), "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"]
    table = (pages / "index.html").read_text(encoding="utf-8")
    click = "<script>document.querySelectorAll('th button')[0].click();document.title='sorted'</script></body>"
    (tmp_path / "index.html").write_text(table.replace("</body>", click), encoding="utf-8")
    shown = {}
    for name, path in (("page", pages / "4.html"), ("table", tmp_path / "index.html")):
        result = subprocess.run([*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
        shown[name] = result.stdout
    page = Reader(shown["page"])
    assert "<script>alert(1)</script>" in "".join(page.rows)
    assert page.tags <= TAGS
    assert "<title>sorted</title>" in shown["table"]
    assert re.findall(r'<a href="(\d+)\.html"', shown["table"]) == ["17", "4", "3", "0"]
