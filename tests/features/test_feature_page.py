"""Pages open from a file without a network, no text of a corpus becomes markup, and what is copied is the text."""

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from feature_world import VOCABULARY, save_dictionary
from hypothesis import given
from hypothesis import strategies as st

from sae.errors import InputError
from sae.features.index.build import IndexConfig, build_index
from sae.features.index.reader import Context, FeatureIndex
from sae.features.notes import Note
from sae.features.pages.assets import STYLE
from sae.features.pages.contexts import row_html
from sae.features.pages.feature import POLICY, FeatureView, feature_html, write_pages
from sae.html import document, visible
from sae.model.vocabulary import Vocabulary

TAGS = {
    *"html head meta title style body nav a h1 h2 h3 p div section dl dt dd svg rect path line text ol li code span b i u br".split()  # noqa: SIM905
}
TABLE_TAGS = TAGS | {"input", "table", "thead", "tbody", "tr", "th", "td", "button", "script"}


class Reader(HTMLParser):
    """Collects what a browser would act on, and the text of every row."""

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
        if tag not in ("meta", "input", "br"):
            self._open.append(classes)

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, data):
        if "w" in self._open:
            self.rows[-1] += data


@pytest.fixture(scope="module")
def pages(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    write_pages(world.index, [4, 3, 17, 0], folder, "Features <that> fire")
    return folder


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """What a browser made of a page: its document after the scripts have run."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    profile = tmp_path_factory.mktemp("profile")
    command = [browser, *flags.split(), "--disable-sync", f"--user-data-dir={profile}", "--virtual-time-budget=2000", "--dump-dom"]
    return lambda path: subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout


def shown_contexts(index, j):
    buckets = [context for bucket in index.bucket_contexts(j, 4, 16, 12) for context in bucket.contexts]
    return index.top_contexts(j, 20) + index.random_contexts(j, 20) + buckets


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


def test_a_feature_that_fires_on_every_token_still_has_a_page_under_100_kb(world, tmp_path):
    W_enc_fd = torch.zeros(1, VOCABULARY)
    W_enc_fd[0] = 2.0 ** (torch.arange(VOCABULARY) % 12)  # activations in all twelve intervals
    save_dictionary(tmp_path / "dictionary", W_enc_fd, torch.full((1,), 0.25), world.cache)
    build_index(IndexConfig(cache=world.cache, dictionary=tmp_path / "dictionary", out=tmp_path / "index", device="cpu"))
    index = FeatureIndex.open(tmp_path / "index")
    assert index.columns["density"][0] == 1
    page = document("Feature 0", feature_html(index, 0, notes={0: Note("l" * 200, "&" * 5_000, True)}), STYLE, POLICY)
    intervals = page[page.index("By interval") :].split("<h3>")[1:]
    assert len(page.encode()) < 100_000
    assert [part.count('<div class="row"') for part in intervals] == [2] * 12  # 4, as of other features, would not fit


def test_rows_hold_the_exact_text_of_their_windows(world, pages):
    rows = Reader((pages / "4.html").read_text(encoding="utf-8")).rows
    texts = ["".join(context.texts) for context in shown_contexts(world.index, 4)]
    assert rows == texts
    everything = "".join(texts)
    assert "\n\t" in everything
    assert "🦓" in everything
    assert "привет" in everything


letters = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="\u061c\u200e\u200f"), max_size=12)


@given(letters, st.data())
def test_a_row_is_the_text_wherever_its_bytes_are_cut(text, data):
    """A window over any cut of the text's bytes into tokens, with any of them firing, reads as the text."""
    text = "".join(c for c in text if not (0x202A <= ord(c) <= 0x202E or 0x2066 <= ord(c) <= 0x2069))
    raw = text.encode() or b"x"
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=8)))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)]) if a < b]
    n = len(pieces)
    values = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=n, max_size=n)), np.float32)
    scanned = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    texts = Vocabulary(pieces, np.zeros(n, bool)).texts(range(n))
    html = row_html(Context(0, data.draw(st.integers(0, n - 1)), np.arange(n), values, scanned, texts, 0, None), 2.0)
    assert Reader(html).rows == [raw.decode()]
    assert html.count(' c"') == 1


def test_the_firing_token_begins_the_right_half_and_is_marked(world):
    html = feature_html(world.index, 17)
    for row, context in zip(re.findall(r'<div class="row".*?</div>', html, re.DOTALL), world.index.top_contexts(17, 20)):
        right = re.search(r"</span></span>(<b .*)</span></div>", row, re.DOTALL)[1]
        assert re.match(rf'<b class="a\d c" title={context.value:#.3g}>', right)
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


def test_buckets_and_neighbours_are_those_of_the_index(world):
    text = feature_html(world.index, 17)
    counts = [int(n.replace(",", "")) for n in re.findall(r"<h3>.*?<span class='soft'>([\d,]+) activations", text)]
    assert counts == [bucket.count for bucket in world.index.bucket_contexts(17)]
    assert sum(counts) == world.index.columns["count"][17]
    near = re.search(r"alike in direction</p><ol>(.*?)</ol>.*?<ol>(.*?)</ol>", text, re.DOTALL)
    assert re.findall(r'href="(\d+)\.html"', near[1]) == [str(k) for k, _ in world.index.cosine_neighbours(17, 8)]
    assert re.findall(r'href="(\d+)\.html"', near[2]) == [str(c.feature) for c in world.index.coactive(17, 8)]


def test_notes_and_explanations_are_shown_as_text(world):
    notes = {17: SimpleNamespace(label="<i>insects</i>", note="a\n<script>", starred=True)}
    why = SimpleNamespace(
        method="token", text='fires on "<b>"', scores={"f1": 0.5, "interval": [0.25, 0.75]}, baselines={"always": {"f1": 0.125}}
    )
    html = feature_html(world.index, 17, notes=notes, explanations=[why])
    assert '<span class="label">&lt;i&gt;insects&lt;/i&gt;</span>' in html
    assert "a\n&lt;script&gt;" in html
    assert "fires on &quot;&lt;b&gt;&quot;" in html
    assert "f1 0.50 · interval [0.25, 0.75] — baselines: always (f1 0.12)" in html
    assert "★" in html
    assert "★" not in feature_html(world.index, 4, notes=notes)


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(world):
    html = FeatureView(world.index, 17)._repr_html_()
    frame = re.fullmatch(r"<iframe sandbox='' style='[^']*' srcdoc='([^']*)'></iframe>", html)
    inside = unescape(frame[1])
    assert inside.startswith("<!doctype html>")
    assert "<h1>Feature 17" in inside
    assert "<a " not in inside
    assert len(html) < 1.05 * len(inside)
    with pytest.raises(InputError, match="feature 40 does not exist"):
        FeatureView(world.index, 40)


def test_a_page_stays_small_when_every_token_is_long_and_fires(world, monkeypatch):
    long = Vocabulary(["🦓🪰&<'\"".encode()] * 420, np.zeros(420, bool))
    monkeypatch.setattr(world.index, "vocabulary", long)
    assert len(document("x", feature_html(world.index, 4), STYLE, POLICY).encode()) < 100_000


def test_a_missing_feature_is_refused_before_anything_is_written(world, tmp_path):
    with pytest.raises(InputError, match="feature 40 does not exist"):
        write_pages(world.index, [0, 40], tmp_path / "pages")
    assert not (tmp_path / "pages").exists()


def test_characters_that_cannot_be_seen_are_marked():
    assert visible("a\nb") == 'a<i class="n">\n</i>b'
    assert "\x1b" not in visible("\x1b[31m")
    assert "\u202e" not in visible("\u202eabc")
    assert visible("<&>\"'") == "&lt;&amp;&gt;&quot;&#x27;"


def test_a_browser_shows_the_page_and_sorts_the_table(pages, tmp_path, chromium):
    """Chromium, with its own view of the document: nothing in the corpus ran, and the table's script did."""
    table = (pages / "index.html").read_text(encoding="utf-8")
    click = "<script>document.querySelectorAll('th button')[0].click();document.title='sorted'</script></body>"
    (tmp_path / "index.html").write_text(table.replace("</body>", click), encoding="utf-8")
    page = Reader(chromium(pages / "4.html"))
    assert "<script>alert(1)</script>" in "".join(page.rows)
    assert page.tags <= TAGS
    shown = chromium(tmp_path / "index.html")
    assert "<title>sorted</title>" in shown
    assert re.findall(r'<a href="(\d+)\.html"', shown) == ["17", "4", "3", "0"]


def test_a_selected_row_copies_as_its_exact_text(world, pages, tmp_path, chromium):
    """Folded and unfolded, every row of a feature that fires on everything: emoji, Cyrillic, CJK, tabs and line breaks."""
    script = """<pre id="found"></pre><script>
      const rows = [...document.querySelectorAll(".row")], copied = [];
      for (const focus of [false, true]) for (const row of rows) {
        if (focus) row.focus();
        getSelection().selectAllChildren(row);
        copied.push(getSelection().toString());
      }
      document.getElementById("found").textContent = JSON.stringify(copied);</script></body>"""
    text = (pages / "4.html").read_text(encoding="utf-8").replace("</body>", script)
    (tmp_path / "copy.html").write_text(text, encoding="utf-8")
    shown = chromium(tmp_path / "copy.html")
    copied = json.loads(unescape(re.search(r'<pre id="found">(.*?)</pre>', shown, re.DOTALL)[1]))
    texts = ["".join(context.texts) for context in shown_contexts(world.index, 4)]
    assert copied == texts * 2


def test_a_transcoders_page_names_the_site_it_writes(world):
    index = FeatureIndex.open(world.index.folder)
    assert "resid_pre.0 of " in feature_html(index, 0)
    index.info["site_out"] = "mlp_out.0"
    assert "resid_pre.0 to mlp_out.0 of " in feature_html(index, 0)
