"""Training on a cache of two models: a crosscoder of both, a dictionary of the second alone, and what they are opened with later."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from sae.activations.harvest.command import HarvestConfig, harvest
from sae.dictionaries.dictionary import Dictionary
from sae.disk.reading import read_json
from sae.errors import InputError
from sae.evaluation import EvaluationConfig, evaluate
from sae.features.model_diff.command import DiffConfig, diff_models
from sae.kinds import ReLU
from sae.training import TrainingConfig, train

SITES = ("resid_post.0", "tuned/resid_post.1")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("two")
    for seed, name in enumerate(("lm", "tuned")):
        torch.manual_seed(seed)
        size = dict(vocab_size=40, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.4)).save_pretrained(home / name)
    ids = torch.randint(1, 40, (1260,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    save_file({"ids": ids, "document_starts": torch.arange(0, 1261, 21)}, home / "ids.safetensors")
    two = dict(model=str(home / "lm"), second_model=str(home / "tuned"), sites=(*SITES, "resid_post.1"))
    settings = dict(text=(str(home / "ids.safetensors"),), context=12, tokens=1200, dtype="float32", held_out=0.3)
    return harvest(HarvestConfig(out=home / "cache", device="cpu", **two, **settings))


def config(cache: Path, out: Path, reads: tuple[str, ...], **more) -> TrainingConfig:
    run = dict(d_sae=24, steps=30, batch_size=64, lr=3e-3, device="cpu", kind=ReLU(l1=(0.5,), resample_every=0))
    return TrainingConfig(cache=cache, out=out, reads=reads, **run | more)


def test_a_crosscoder_is_trained_evaluated_and_reported(cache, tmp_path):
    (folder,) = train(config(cache, tmp_path / "d", SITES))
    manifest = read_json(cache / "manifest.json", "a manifest")
    found = Dictionary.load(folder)
    assert [port.site for port in found.reads] == list(SITES)
    assert found.metadata["model_fingerprint"] == manifest["model"]["fingerprint"]
    assert found.metadata["models"]["tuned"]["fingerprint"] == manifest["models"]["tuned"]["fingerprint"]
    result = evaluate(EvaluationConfig(str(folder), cache, device="cpu"))
    report = diff_models(DiffConfig(dictionary=str(folder), cache=cache, out=tmp_path / "report.json", device="cpu"))
    for site in SITES:
        assert report["reconstruction"]["fvu_by_site"][site] == pytest.approx(result["sites"][site]["fvu"])
        assert result["sites"][site]["fvu"] < 1

    longer = train(config(cache, tmp_path / "longer", SITES, init=folder, decoder_norm=None))
    assert longer == [tmp_path / "longer"]
    found.metadata["models"]["tuned"]["fingerprint"] = "0" * 12
    found.save(tmp_path / "other")
    with pytest.raises(InputError, match=r"the dictionary was made with .*tuned \(fingerprint 0"):
        train(config(cache, tmp_path / "refused", SITES, init=tmp_path / "other"))


@pytest.mark.parametrize("second", [True, False])
def test_a_dictionary_of_one_of_the_models_names_that_model_and_its_own_site(cache, tmp_path, second):
    site = SITES[1] if second else "resid_post.1"
    (folder,) = train(config(cache, tmp_path / "d", (site,)))
    manifest = read_json(cache / "manifest.json", "a manifest")
    made = manifest["models"]["tuned"] if second else manifest["model"]
    found = Dictionary.load(folder)
    assert found.site == "resid_post.1"
    assert "models" not in found.metadata
    assert (found.metadata["model_name"], found.metadata["model_fingerprint"]) == (made["name"], made["fingerprint"])
    result = evaluate(EvaluationConfig(str(folder), cache, device="cpu"))
    assert result["model"] == made
    assert result["reconstruction"]["fvu"] < 0.9  # on the rows of the other model it would be above 1
    assert result["language_model"]["loss_recovered"] > 0
    train(config(cache, tmp_path / "longer", (site,), init=folder))
    with pytest.raises(InputError, match="the dictionary was made with"):
        train(config(cache, tmp_path / "refused", ("resid_post.1" if second else SITES[1],), init=folder))


def test_two_sites_of_the_first_model_are_of_it_alone(cache, tmp_path):
    (folder,) = train(config(cache, tmp_path / "d", ("resid_post.0", "resid_post.1")))
    found = Dictionary.load(folder)
    assert [port.site for port in found.reads] == ["resid_post.0", "resid_post.1"]
    assert "models" not in found.metadata
    assert set(evaluate(EvaluationConfig(str(folder), cache, device="cpu"))["sites"]) == {"resid_post.0", "resid_post.1"}
