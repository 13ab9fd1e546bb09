"""Real browsers against a real server: the bundled model with a small index, and a corpus that tries to break out of its pages."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser_world import HOSTILE, Site, served

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "features"))


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium in the path")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        quiet = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", *quiet])
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium) -> Iterator[Any]:
    """A fresh page. Fails if anything was written to its console as an error, or if it asked anything of another machine."""
    context = chromium.new_context()
    page = context.new_page()
    page.set_default_timeout(10_000)
    errors: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.expected_errors = []
    yield page
    context.close()
    assert [text for text in errors if not any(part in text for part in page.expected_errors)] == []
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "file:///"))] == []


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Iterator[Site]:
    """Model, dictionary and text as bundled; 12,000 tokens of it indexed."""
    from sae.activations.harvest.command import HarvestConfig, harvest
    from sae.features.browser.app import create_app
    from sae.features.browser.serve import parts_of
    from sae.features.index.build import IndexConfig, build_index
    from sae.features.index.reader import FeatureIndex
    from sae.features.notes import Notes
    from steering.panel import make_ranges, make_steering

    folder = tmp_path_factory.mktemp("browser")
    model = ROOT / "checkpoints" / "demo-lm"
    harvest(
        HarvestConfig(
            text=(str(model / "tokens.safetensors"),),
            out=folder / "cache",
            model=str(model),
            sites=("resid_post.2",),
            tokens=12_000,
            device="cpu",
        )
    )
    build_index(IndexConfig(cache=folder / "cache", dictionary=ROOT / "checkpoints" / "demo-sae", out=folder / "index", device="cpu"))
    index = FeatureIndex.open(folder / "index")
    lm, dictionary = parts_of(index, None, None, "cpu")
    notes = Notes.open(None, index)
    steering = make_steering(lm, dictionary, index)
    ranges = make_ranges(lm, dictionary, index)
    with served(create_app(index, notes, model=lm, dictionary=dictionary, steering=steering, ranges=ranges)) as url:
        yield Site(url, index, notes, lm, dictionary, steering, ranges)
    notes.close()


@pytest.fixture(scope="session")
def hostile(tmp_path_factory) -> Iterator[Site]:
    """A corpus, tokens, labels, lists and explanations that all try to be markup."""
    from feature_world import VOCABULARY, one_hot_model, save_dictionary, train_tokenizer

    from sae.activations.harvest.command import HarvestConfig, harvest
    from sae.features.browser.app import create_app
    from sae.features.explanations.explanation import Explanation
    from sae.features.index.build import IndexConfig, build_index
    from sae.features.index.reader import FeatureIndex
    from sae.features.notes import Notes

    folder = tmp_path_factory.mktemp("hostile")
    train_tokenizer(folder / "model")
    one_hot_model(folder / "model")
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        file.writelines(
            json.dumps({"text": f"{HOSTILE} &amp; {{{{7*7}}}} \u202e 🦓 漢字\n\t" * 3, "domain": HOSTILE}) + "\n" for _ in range(30)
        )
    harvest(
        HarvestConfig(
            text=(str(folder / "text.jsonl"),),
            label_field="domain",
            out=folder / "cache",
            model=str(folder / "model"),
            sites=("resid_pre.0",),
            tokens=3000,
            context=32,
            dtype="float32",
            device="cpu",
        )
    )
    generator = torch.Generator().manual_seed(0)
    W_enc_fd = torch.randint(-6, 7, (12, VOCABULARY), generator=generator).float() / 4
    save_dictionary(folder / "dictionary", W_enc_fd, torch.full((12,), -0.5), folder / "cache")
    build_index(IndexConfig(cache=folder / "cache", dictionary=folder / "dictionary", out=folder / "index", device="cpu"))
    with open(folder / "index" / "explanations.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(Explanation(j, "pattern", HOSTILE, {"f1": 0.5}, {})._asdict()) + "\n" for j in range(12))
    index = FeatureIndex.open(folder / "index")
    notes = Notes.open(None, index)
    notes.set(3, label=HOSTILE, note=f"</textarea>{HOSTILE}", starred=True)
    notes.add_to_list(HOSTILE[:100], 3)
    with served(create_app(index, notes)) as url:
        yield Site(url, index, notes)
    notes.close()
