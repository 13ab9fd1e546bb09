"""The exported folder opens from file:// in a real browser, shows the one renderer's pages and asks for nothing else."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import zlib
from html import unescape
from types import SimpleNamespace

import numpy as np
import pytest

from sae.errors import InputError
from sae.features.exports.command import ExportConfig, export_features
from sae.features.exports.static import export_static
from sae.features.notes import Notes
from sae.features.pages.feature import feature_html


def calls(path):
    """The values that a data file hands to app.js."""
    name, values = re.fullmatch(r"SAE\.(\w+)\((.*)\)\n", path.read_text(encoding="utf-8"), re.DOTALL).groups()
    return name, json.loads(f"[{values}]")


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "out"
    why = {17: [SimpleNamespace(method="token", text="<img src=x onerror=alert(1)>", scores={}, baselines={})]}
    notes = {17: SimpleNamespace(label="<b>zebras</b> \u2028", note="seen", starred=True)}
    export_static(world.index, out, range(40), notes=notes, explanations=why)
    return out


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """Opens index.html with an address and some script, and returns the document, the requests it made and what its console said."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    work = tmp_path_factory.mktemp("chromium")

    def opened(folder, address, log=work / "net.json"):
        command = [browser, *flags.split(), "--disable-sync", f"--user-data-dir={work / 'profile'}", f"--log-net-log={log}"]
        command += ["--enable-logging=stderr", "--virtual-time-budget=4000", "--dump-dom", f"{(folder / 'index.html').as_uri()}{address}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        requests = re.findall(r'"url":"((?:https?|wss?|ftp)://[^"]*)"', log.read_text())
        requests = [url for url in requests if not re.match(r"https?://[\w.-]*google(apis)?\.com/", url)]  # the browser's own errands
        return done.stdout, requests, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return opened


def test_pages_are_those_of_the_one_renderer(world, folder):
    for j in (3, 4, 17):
        name, (number, pages) = calls(folder / "d" / "0000.js")
        assert (name, number) == ("pages", 0)
        html = zlib.decompress(base64.b64decode(pages[str(j)])).decode()
        if j != 17:  # it has a note and an explanation
            assert html == feature_html(world.index, j, link=lambda k: f"#/f/{k}")
        assert len(html.encode()) < 100_000


def test_the_tables_columns_are_the_indexs(world, folder):
    _, (stats,) = calls(folder / "stats.js")
    assert stats["features"] == list(range(40))
    assert stats["columns"]["count"] == world.index.columns["count"].tolist()
    np.testing.assert_allclose(stats["columns"]["max"], world.index.columns["max"], rtol=1e-3)
    assert stats["labels"] == {"17": "<b>zebras</b> \u2028"}
    assert stats["stars"] == [17]
    spelling = world.index.vocabulary.spelling
    assert stats["fires"][17] == [spelling(token) for token, _ in world.index.top_tokens(17, 3)]


def test_a_tokens_features_are_the_indexs(world, folder):
    _, (spellings, size) = calls(folder / "tokens.js")
    files = {path.name: calls(path)[1][1] for path in (folder / "t").iterdir()}
    assert {token for postings in files.values() for token in postings} == set(spellings)
    for token in range(len(world.index.vocabulary.pieces)):
        expected = world.index.token_features(token, 50)
        found = files.get(f"{token // size:04d}.js", {}).get(str(token), [])
        assert [j for j, _ in found] == [j for j, _ in expected]
        if expected:
            assert spellings[str(token)] == world.index.vocabulary.spelling(token)


def test_the_tokens_of_a_few_features_are_found_behind_all_others(world, tmp_path, monkeypatch):
    from sae.features.exports import static

    monkeypatch.setattr(static, "LIKERS", 1)
    export_static(world.index, tmp_path / "out", [3, 20])
    tokens = {token for token, _ in world.index.top_tokens(20, 10)}
    assert any(world.index.token_features(token, 1)[0][0] != 20 for token in tokens)
    postings = {int(t): found for path in (tmp_path / "out" / "t").iterdir() for t, found in calls(path)[1][1].items()}
    assert set(postings) == tokens
    assert all([j for j, _ in found] == [20] for found in postings.values())


def test_a_renderer_that_is_killed_ends_the_export_with_a_sentence(world, tmp_path, monkeypatch):
    from sae.features.exports import static

    monkeypatch.setattr(static, "SHARD", 5)
    monkeypatch.setattr(static, "_render_here", _killed)
    with pytest.raises(InputError, match="was killed"):
        export_static(world.index, tmp_path / "out", range(40), processes=2)
    assert list(tmp_path.iterdir()) == []


def _killed(_shard):
    os.kill(os.getpid(), signal.SIGKILL)


def test_two_processes_write_what_one_does(world, folder, tmp_path, monkeypatch):
    from sae.features.exports import static

    monkeypatch.setattr(static, "SHARD", 15)
    for processes in (1, 2):
        export_static(world.index, tmp_path / str(processes), range(40), processes=processes)
    names = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*.*"))
    assert len([name for name in names if name.parent.name == "d"]) == 3
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_only_an_older_export_is_replaced(world, folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="something else"):
        export_static(world.index, tmp_path / "mine", [1])
    export_static(world.index, tmp_path / "out", [1, 2])
    export_static(world.index, tmp_path / "out", [2])
    assert calls(tmp_path / "out" / "stats.js")[1][0]["features"] == [2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_the_command_takes_notes_along(world, tmp_path):
    notes = Notes.open(tmp_path / "notes.sqlite", world.index)
    notes.set(4, label="everything", starred=True)
    notes.close()
    config = ExportConfig(index=world.index.folder, out=tmp_path / "out", features=(4, 17), notes=tmp_path / "notes.sqlite", processes=1)
    export_features(config)
    stats = calls(tmp_path / "out" / "stats.js")[1][0]
    assert (stats["labels"], stats["stars"]) == ({"4": "everything"}, [4])


@pytest.mark.parametrize(
    "flags", [{"features": (40,)}, {"features": (1, 1)}, {"creator": "x"}, {"format": "circuit-tracer", "features": (1,)}]
)
def test_unusable_flags_are_refused(world, tmp_path, flags):
    with pytest.raises(InputError):
        export_features(ExportConfig(index=world.index.folder, out=tmp_path / "out", **flags))
    assert not (tmp_path / "out").exists()


def test_a_browser_shows_table_page_and_tokens_without_a_request(world, folder, chromium):
    table, requests, console = chromium(folder, "#/?q=zebra&sort=-max")
    found = [int(j) for j in re.findall(r'<a href="#/f/(\d+)\?q=zebra&amp;sort=-max">', table)]
    assert 17 in found
    maxima = world.index.columns["max"][found]
    assert (np.diff(maxima) <= 0).all()
    assert "&lt;b&gt;zebras&lt;/b&gt;" in table
    page, more, said = chromium(folder, "#/f/17")
    assert "<title>Feature 17</title>" in page
    rows = re.findall(r'<span class="w">(.*?)</span></div>', page, re.DOTALL)
    texts = [unescape(re.sub("<.*?>", "", row)) for row in rows]
    assert texts[:20] == ["".join(context.texts) for context in world.index.top_contexts(17, 20)]
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "<img" not in page
    tokens, others, words = chromium(folder, "#/t?token=zebra")
    assert re.search(r"Tokens found: \d+\.|The 12 nearest of", tokens)
    assert re.search(r'<a href="#/f/\d+">', tokens)
    assert requests + more + others == []
    assert console + said + words == []


def test_a_missing_data_file_is_said_in_a_sentence(folder, tmp_path, chromium):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "d" / "0000.js").unlink()
    page, _, _ = chromium(tmp_path / "copy", "#/f/17")
    assert "d/0000.js cannot be read: copy the whole folder again" in page
    page, _, _ = chromium(folder, "#/f/99")
    assert "feature 99 is not in this folder" in page


def test_keys_walk_through_the_list(folder, tmp_path, chromium):
    """Real key events in the page: j, k, ], r, /, ? and a search typed into the field."""
    shutil.copytree(folder, tmp_path / "copy")
    app = tmp_path / "copy" / "app.js"
    script = """
      const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
      const wait = ms => new Promise(done => setTimeout(done, ms)), seen = [];
      addEventListener("load", async () => {
        await wait(200);
        for (const key of ["j", "k", "]", "[", "u"]) { press(key); await wait(150); seen.push(location.hash); }
        press("?"); seen.push(one("#keys").open); one("#keys").close();
        press("/"); seen.push(document.activeElement.id);
        const field = one("#search"); field.value = "zebra"; field.dispatchEvent(new Event("input", {bubbles: true})); await wait(300);
        seen.push(location.hash, document.querySelectorAll("tbody tr").length < 40); field.blur();
        press("r"); await wait(200); seen.push(/^#\\/f\\/\\d+\\?sort=feature&q=zebra$/.test(location.hash));
        document.title = JSON.stringify(seen);
      });"""
    app.write_text(app.read_text(encoding="utf-8") + script, encoding="utf-8")
    page, _, console = chromium(tmp_path / "copy", "#/f/4?sort=feature")
    seen = json.loads(unescape(re.search("<title>(.*?)</title>", page)[1]))
    features = [f"#/f/{j}?sort=feature" for j in (5, 4, 5, 4)]
    assert seen == [*features, "#/?sort=feature", True, "search", "#/?sort=feature&q=zebra", True, True]
    assert console == []
