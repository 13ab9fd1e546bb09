"""An index of a crosscoder of two models: its activations, pages of its features, and what needs one site."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from sae.activations.harvest.command import HarvestConfig, harvest
from sae.dictionaries.dictionary import Dictionary
from sae.disk.reading import read_json
from sae.errors import InputError
from sae.features.browser.app import create_app
from sae.features.browser.serve import BrowseConfig, serve
from sae.features.exports.command import ExportConfig, export_features
from sae.features.index.build import IndexConfig, build_index
from sae.features.index.reader import FeatureIndex
from sae.features.notes import Notes
from sae.features.pages.feature import write_pages

D, F = 32, 12
SITES = ["resid_post.0", "tuned/resid_post.1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory, byte_lm) -> Path:
    home = tmp_path_factory.mktemp("crosscoder")
    for seed, name in enumerate(("lm", "tuned")):
        torch.manual_seed(seed)
        size = dict(vocab_size=257, n_positions=64, n_embd=D, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(home / name)
        byte_lm.tokenizer.save_pretrained(home / name)
    (home / "text.jsonl").write_text("".join(f'{{"text": "number {i} of {i * i} rows"}}\n' for i in range(80)))
    two = dict(model=str(home / "lm"), second_model=str(home / "tuned"), sites=tuple(SITES), text=(str(home / "text.jsonl"),))
    harvest(HarvestConfig(out=home / "cache", device="cpu", dtype="float32", max_norm_ratio=None, **two))
    manifest = read_json(home / "cache" / "manifest.json", "a manifest")
    known = {"model_name": manifest["model"]["name"], "model_fingerprint": manifest["model"]["fingerprint"], "models": manifest["models"]}
    g = torch.Generator().manual_seed(2)
    W_enc, W_dec = (torch.randn(F, 2 * D, generator=g) for _ in range(2))
    Dictionary(W_enc, -0.1 * torch.ones(F), W_dec, torch.zeros(2 * D), metadata={"site": SITES} | known).save(home / "dictionary")
    build_index(IndexConfig(dictionary=str(home / "dictionary"), cache=home / "cache", out=home / "index", device="cpu"))
    return home


def test_every_activation_is_that_of_both_models_together(home):
    index, dictionary = FeatureIndex.open(home / "index"), Dictionary.load(home / "dictionary")
    found = np.zeros((len(index.tokens["ids"]), F), dtype=np.float32)
    for j in range(F):
        feature = index.feature(j)
        found[feature.positions, j] = feature.values
    seen = 0
    for path in sorted((home / "cache" / SITES[0]).iterdir()):
        first, second = load_file(path), load_file(home / "cache" / SITES[1] / path.name)
        x_bd = torch.cat([first["activations"], second["activations"]], dim=1).double()
        acts_bf = (x_bd @ dictionary.W_enc_fd.double().T + dictionary.b_enc_f.double()).relu()
        np.testing.assert_allclose(found[first["rows"].numpy()], acts_bf.numpy(), rtol=2e-3, atol=1e-3)
        seen += len(x_bd)
    assert 0.05 < (found > 0).mean() < 0.95
    assert seen == index.info["tokens_scanned"]
    assert index.info["site"] == SITES
    assert index.info["logit_lens"] == "none: the dictionary writes at several sites"


def test_its_features_have_pages(home, tmp_path):
    index = FeatureIndex.open(home / "index")
    assert index.place == "resid_post.0 and tuned/resid_post.1"
    write_pages(index, [0, 1], tmp_path)
    assert index.place in (tmp_path / "0.html").read_text(encoding="utf-8")


@pytest.fixture
def client(home, tmp_path):
    """What `sae browse --model none` serves."""
    from starlette.testclient import TestClient

    index = FeatureIndex.open(home / "index")
    notes = Notes.open(tmp_path / "notes.sqlite", index)
    yield TestClient(create_app(index, notes), base_url="http://127.0.0.1:8765", follow_redirects=False)
    notes.close()


def test_it_can_be_browsed_without_a_model(home, client):
    index = FeatureIndex.open(home / "index")
    for path in (
        "/",
        "/?sort=fvu_contribution&density_min=0.001",
        "/?q=number",
        "/?q=number|rows&how=fires",
        "/f/0?sort=density",
        "/lists",
    ):
        reply = client.get(path)
        assert reply.status_code == 200, path
    assert index.place in client.get("/").text
    page = client.get("/f/3").text
    assert index.place in page
    assert "logit" not in page.split("<body")[1]
    assert client.get("/random").status_code == 303
    changed = client.post("/f/3", data={"label": "digits"}, headers={"origin": "http://127.0.0.1:8765"})
    assert changed.status_code == 303
    assert "digits" in client.get("/?q=digits").text


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("/prompt?text=number", "started without a model to read a text with"),
        ("/steer?feature=1&strength=1&prompt=a", "started without a model to steer"),
        ("/?q=number&how=promotes", "logit"),
    ],
)
def test_what_a_page_of_it_cannot_show_is_said(client, path, sentence):
    reply = client.get(path)
    assert sentence in reply.text


def test_browsing_it_with_a_model_is_refused_in_a_sentence(home):
    with pytest.raises(InputError, match=r"expected a dictionary of one site, .*sae browse --model none"):
        serve(BrowseConfig(index=home / "index", port=0, open=False))


def test_what_needs_one_site_refuses_it(home, tmp_path):
    with pytest.raises(InputError, match=r"expected a dictionary of one site, but this one reads 2 of them .* sae diff-models"):
        FeatureIndex.open(home / "index").dictionary()
    with pytest.raises(InputError, match=r"expected an index of a dictionary of one site, got one of resid_post.0 and tuned/resid_post.1"):
        export_features(ExportConfig(index=home / "index", out=tmp_path / "out", format="neuronpedia"))
