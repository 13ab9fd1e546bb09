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
from sae.features.exports.command import ExportConfig, export_features
from sae.features.index.build import IndexConfig, build_index
from sae.features.index.reader import FeatureIndex
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
    Dictionary(W_enc, -torch.ones(F), W_dec, torch.zeros(2 * D), metadata={"site": SITES} | known).save(home / "dictionary")
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
    assert seen == index.info["tokens_scanned"]
    assert index.info["site"] == SITES
    assert index.info["logit_lens"] == "none: the dictionary writes at several sites"


def test_its_features_have_pages(home, tmp_path):
    index = FeatureIndex.open(home / "index")
    assert index.place == "resid_post.0 and tuned/resid_post.1"
    write_pages(index, [0, 1], tmp_path)
    assert index.place in (tmp_path / "0.html").read_text(encoding="utf-8")


def test_what_needs_one_site_refuses_it(home, tmp_path):
    with pytest.raises(InputError, match=r"expected a dictionary of one site, but this one reads 2 of them .* sae diff-models"):
        FeatureIndex.open(home / "index").dictionary()
    with pytest.raises(InputError, match=r"expected an index of a dictionary of one site, got one of resid_post.0 and tuned/resid_post.1"):
        export_features(ExportConfig(index=home / "index", out=tmp_path / "out", format="neuronpedia"))
