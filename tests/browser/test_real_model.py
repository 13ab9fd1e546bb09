"""The whole way on a real language model: SmolLM2-135M-Instruct, as `make real-model` leaves it. Run with `make test-real`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from browser_world import served

from sae.kinds import ReLU
from sae.model.language_model import LanguageModel

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "runs" / "models" / "smollm2"
SITE = "resid_post.15"
MARY = "When Mary and John went to the store, John gave a drink to"


class Way(NamedTuple):
    """What the whole way leaves behind."""

    folder: Path
    lm: LanguageModel
    texts: list[str]
    evaluation: dict[str, Any]


@pytest.fixture(scope="module")
def way(tmp_path_factory) -> Way:
    """English sentences of the bundled concepts harvested, 200 steps of training, evaluation and index."""
    from sae.activations.harvest.command import HarvestConfig, harvest
    from sae.evaluation import EvaluationConfig, evaluate
    from sae.features.index.build import IndexConfig, build_index
    from sae.training import TrainingConfig, train

    if not MODEL.is_dir():
        pytest.skip("no real model; run make real-model")
    folder = tmp_path_factory.mktemp("real")
    rows = []
    for path in sorted((ROOT / "steering" / "concepts").glob("*.json")):
        concept = json.loads(path.read_text())
        rows += [{"text": text, "concept": path.stem} for text in (*concept["positive"], *concept["negative"])]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    harvest(
        HarvestConfig(
            text=(str(folder / "text.jsonl"),),
            label_field="concept",
            out=folder / "cache",
            model=str(MODEL),
            sites=(SITE,),
            context=64,
            tokens=12_000,
            dtype="float32",
            device="cpu",
        )
    )
    train(
        TrainingConfig(
            cache=folder / "cache", out=folder / "sae", d_sae=1024, kind=ReLU(l1=(2.0,)), steps=200, batch_size=1024, device="cpu"
        )
    )
    evaluation = evaluate(EvaluationConfig(dictionary=folder / "sae", cache=folder / "cache", sequences=40, device="cpu"))
    build_index(IndexConfig(cache=folder / "cache", dictionary=folder / "sae", out=folder / "index", device="cpu"))
    return Way(folder, LanguageModel.load(str(MODEL), device="cpu"), [row["text"] for row in rows], evaluation)


@pytest.fixture(scope="module")
def site(way) -> Iterator[Any]:
    from sae.features.browser.app import create_app
    from sae.features.browser.serve import parts_of
    from sae.features.index.reader import FeatureIndex
    from sae.features.notes import Notes
    from steering.panel import make_steering

    index = FeatureIndex.open(way.folder / "index")
    lm, dictionary = parts_of(index, None, None, "cpu")
    notes = Notes.open(None, index)
    with served(create_app(index, notes, model=lm, dictionary=dictionary, steering=make_steering(lm, dictionary, index))) as url:
        yield url, index
    notes.close()


def test_it_is_the_model_that_completes_these_sentences(way):
    tokenizer = way.lm.tokenizer
    ids_sp = torch.tensor([tokenizer(MARY, add_special_tokens=False)["input_ids"]])
    first, second = way.lm.logits(ids_sp)[0, -1].topk(2).values.tolist()
    assert (first, second) == pytest.approx((11.04, 7.28), abs=0.05)
    ids_sp, mask_sp = way.lm.encode([MARY, "The capital of France is"])
    new_sp = way.lm.generate(ids_sp, mask_sp, max_new_tokens=6, temperature=0)
    assert [tokenizer.decode(row) for row in new_sp[:, ids_sp.shape[1] : ids_sp.shape[1] + 1]] == [" Mary", " Paris"]
    theirs_sp = way.lm.model.generate(ids_sp, attention_mask=mask_sp, max_new_tokens=6, do_sample=False)
    assert torch.equal(new_sp, theirs_sp)


def test_its_gguf_file_is_the_same_model(way):
    lm = LanguageModel.load(str(MODEL.with_suffix(".gguf")), device="cpu")
    assert lm.fingerprint() == way.lm.fingerprint()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(lm.model.parameters(), way.lm.model.parameters()))
    assert torch.equal(lm.encode([MARY])[0], way.lm.encode([MARY])[0])


def test_the_cache_holds_what_hugging_face_calls_hidden_states(way):
    from sae.activations.cache import ActivationCache

    cache = ActivationCache.open(way.folder / "cache")
    ids_sp, _ = way.lm.encode([way.texts[0]])
    hidden_pd = way.lm.model(ids_sp, output_hidden_states=True).hidden_states[16][0, 1:]  # [0] is the embedding
    rows_nd = torch.cat([cache.read(shard)[0] for split in ("train", "held_out") for shard in cache.shards(split)]).double()
    nearest = torch.cdist(hidden_pd.double(), rows_nd).min(1).values / hidden_pd.double().norm(dim=1)
    assert nearest.max() < 1e-4


def test_the_dictionary_explains_held_out_text(way):
    assert way.evaluation["reconstruction"]["fvu"] < 0.7
    assert 0.5 < way.evaluation["language_model"]["loss_recovered"] <= 1.1


def test_every_page_opens_in_a_browser(way, site, tab):
    url, index = site
    tab.set_default_timeout(60_000)
    tab.goto(url)
    assert tab.locator("a.open").count() > 20
    wider = "[...document.querySelectorAll('table.features td')].filter(cell => cell.scrollWidth > cell.clientWidth + 1).length"
    assert tab.evaluate(wider) == 0  # a real vocabulary has tokens of 50 characters
    tab.locator("a.open").first.click()
    tab.locator("text=strongest").first.wait_for()
    assert "Ġ" not in tab.inner_text("body")
    tab.goto(f"{url}/prompt")
    tab.get_by_label("text").fill(MARY + " Mary")
    tab.get_by_role("button", name="Read").click()
    tokens = tab.locator(".token")
    assert "".join(tokens.all_text_contents()[1:]).replace("·", "") == MARY + " Mary"
    tokens.nth(13).click()
    tab.locator("table.ranking").wait_for()
    feature = int(np.argmax(index.columns["density"]))
    tab.goto(f"{url}/steer?prompt=I+think&feature={feature}&strength=2&max_new_tokens=12&seed=1")
    tab.get_by_role("button", name="Write").click()
    tab.locator("#run:enabled").wait_for(timeout=60_000)
    sides = [tab.locator(f"#{side} .written").inner_text() for side in ("unsteered", "steered")]
    assert all(text.startswith("I think") and len(text) > 20 for text in sides)
    assert sides[0] != sides[1]


def test_steering_moves_text_in_proportion_to_its_strength(way, capsys):
    from sae.features.index.reader import FeatureIndex
    from sae.model.sampling import Sampling
    from steering.steer import SteerConfig, steer

    feature = int(FeatureIndex.open(way.folder / "index").search("wine", 1)[0].feature)
    said = {
        strength: steer(
            SteerConfig(
                index=way.folder / "index",
                feature=feature,
                strength=strength,
                prompt="I think",
                sampling=Sampling(max_new_tokens=12),
                device="cpu",
            )
        )
        for strength in (0.0, 1.5)
    }
    capsys.readouterr()
    assert said[0.0]["steered"]["texts"] == said[0.0]["unsteered"]["texts"] == said[1.5]["unsteered"]["texts"]
    assert said[1.5]["steered"]["texts"] != said[1.5]["unsteered"]["texts"]


def test_directions_are_compared_at_equal_kl(way, tab, capsys, monkeypatch):
    from sae.model.sampling import Sampling
    from steering.compare import continuations
    from steering.compare.command import CompareConfig, compare_directions

    monkeypatch.setattr(continuations, "CALIBRATION_SENTENCES", continuations.CALIBRATION_SENTENCES[:4])  # most of the time goes there
    out = way.folder / "comparison"
    prompts = ("I think", "The weather today", "My neighbour said", "In the morning")
    result = compare_directions(
        CompareConfig(
            concept="curse_words",
            model=str(MODEL),
            dictionary=way.folder / "sae",
            out=out,
            budgets=(0.3,),
            prompts=prompts,
            samples=2,
            sampling=Sampling(max_new_tokens=8),
            device="cpu",
        )
    )
    assert "about" in capsys.readouterr().out.split("comparing")[0]
    reached = [level for arm in result["arms"] for level in arm["levels"] if level["budget"] and level["reached"]]
    assert len(reached) >= 5
    assert all(level["kl"] == pytest.approx(0.3, rel=0.05) for level in reached)
    tab.goto(f"file://{out}/report.html")
    assert "curse_words" in tab.inner_text("body")
