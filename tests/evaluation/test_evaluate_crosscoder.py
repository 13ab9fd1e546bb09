"""A crosscoder of two models: saved, opened again, measured on a cache of both, and refused where a command needs one site."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from sae.activations.cache import ActivationCache
from sae.activations.harvest.command import HarvestConfig, harvest
from sae.activations.joined import JoinedCache
from sae.dictionaries.dictionary import Dictionary
from sae.disk.reading import read_json
from sae.errors import InputError
from sae.evaluation import EvaluationConfig, evaluate

D, F = 8, 20
SITES = ["resid_post.0", "chat/resid_post.1"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("crosscoder")
    for seed, name in enumerate(("lm", "chat")):
        torch.manual_seed(seed)
        size = dict(vocab_size=40, n_positions=16, n_embd=D, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.4)).save_pretrained(home / name)
    ids = torch.randint(1, 40, (1260,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    save_file({"ids": ids, "document_starts": torch.arange(0, 1261, 21)}, home / "ids.safetensors")
    two = dict(model=str(home / "lm"), second_model=str(home / "chat"), sites=tuple(SITES))
    settings = dict(text=(str(home / "ids.safetensors"),), context=12, tokens=1200, dtype="float32", held_out=0.3, shard_tokens=100)
    return harvest(HarvestConfig(out=home / "cache", device="cpu", **two, **settings))


@pytest.fixture
def crosscoder(cache) -> Dictionary:
    manifest = read_json(cache / "manifest.json", "a manifest")
    g = torch.Generator().manual_seed(2)
    W_enc, W_dec = (torch.randn(F, 2 * D, generator=g) / 4 for _ in range(2))
    b_enc, b_dec = (torch.randn(n, generator=g) / 4 for n in (F, 2 * D))
    known = {"model_name": manifest["model"]["name"], "model_fingerprint": manifest["model"]["fingerprint"], "models": manifest["models"]}
    return Dictionary(W_enc, b_enc, W_dec, b_dec, metadata={"site": SITES} | known).requires_grad_(False)


def held_out(cache: Path) -> list[torch.Tensor]:
    """[n, d] at each site in the order of the shards, read from the files by safetensors itself."""
    names = [shard["name"] for shard in read_json(cache / "manifest.json", "a manifest")["shards"] if shard["split"] == "held_out"]
    return [torch.cat([load_file(cache / site / f"{name}.safetensors")["activations"] for name in names]).double() for site in SITES]


def test_each_site_and_all_together_are_as_the_formulas_say(cache, crosscoder, tmp_path, capsys):
    crosscoder.save(tmp_path)
    result = evaluate(EvaluationConfig(str(tmp_path), cache, device="cpu"))
    assert json.loads((tmp_path / "evaluation.json").read_text()) == json.loads(json.dumps(result))
    said = capsys.readouterr()
    assert "FVU at chat/resid_post.1" in said.out
    assert "cannot be spliced into one pass" in said.err
    xs = held_out(cache)
    W_enc, b_enc, W_dec, b_dec = (
        tensor.double() for tensor in (crosscoder.W_enc_fd, crosscoder.b_enc_f, crosscoder.W_dec_fo, crosscoder.b_dec_o)
    )
    acts = (torch.cat(xs, 1) @ W_enc.T + b_enc).relu()
    y = acts @ W_dec + b_dec
    errors, variances = [], []
    for x, y_here, site in zip(xs, y.split(D, 1), SITES):
        errors.append((x - y_here).square().sum())
        variances.append((x - x.mean(0)).square().sum())
        assert result["sites"][site]["fvu"] == pytest.approx(float(errors[-1] / variances[-1]), rel=1e-5)
    assert result["reconstruction"]["fvu"] == pytest.approx(float(sum(errors) / sum(variances)), rel=1e-5)
    assert result["reconstruction"]["l0"] == float((acts > 0).sum(1).double().mean())
    assert result["site"] == SITES
    assert result["models"].keys() == {"chat"}
    assert result["language_model"] is None


def test_it_is_opened_with_its_sites_and_models(crosscoder, tmp_path):
    crosscoder.save(tmp_path)
    found = Dictionary.load(tmp_path)
    assert [tuple(port) for port in found.reads] == [(site, D) for site in SITES]
    assert found.metadata["models"] == crosscoder.metadata["models"]
    x = torch.randn(5, 2 * D)
    assert torch.equal(found(x), crosscoder(x))
    assert torch.equal(found.joined({SITES[0]: x[:, :D], SITES[1]: x[:, D:]}), x)


def test_other_models_and_sites_are_refused(cache, crosscoder, tmp_path):
    known = crosscoder.metadata
    for metadata, message in (
        ({"model_fingerprint": "0" * 12}, r"the dictionary was made with .*lm \(fingerprint 0"),
        ({"models": {"chat": {"name": "other", "fingerprint": "0" * 12}}}, r"the dictionary was made with other \(fingerprint 0"),
        ({"models": {"chat": {"name": "other"}}}, "made with other, and without the fingerprints of both"),
        ({"site": ["resid_post.0", "base/resid_post.1"]}, "expected one of the sites in .* but 'base/resid_post.1' was asked for"),
        ({"site": ["resid_post.0", "resid_post.0"]}, "names its sites, each once, got resid_post.0, resid_post.0"),
        ({"site": [None, None]}, "names its sites, each once, got None, None"),
    ):
        crosscoder.metadata = known | metadata
        crosscoder.save(tmp_path)
        with pytest.raises(InputError, match=message):
            evaluate(EvaluationConfig(str(tmp_path), cache, device="cpu"))


def test_other_widths_are_refused(cache, crosscoder, tmp_path):
    narrow = Dictionary(torch.ones(F, 12), torch.zeros(F), torch.ones(F, 12), torch.zeros(12), metadata=crosscoder.metadata)
    narrow.save(tmp_path)
    with pytest.raises(InputError, match=r"expected activations of width 6 at resid_post.0, but .* has 8"):
        evaluate(EvaluationConfig(str(tmp_path), cache, device="cpu"))


def test_sites_whose_rows_are_of_other_tokens_are_refused(cache, crosscoder, tmp_path):
    caches = [ActivationCache.open(cache, site) for site in SITES]
    shard = caches[0].shards("train")[0]
    path = cache / SITES[1] / f"{shard.name}.safetensors"
    whole = path.read_bytes()
    stored = load_file(path)
    save_file(stored | {"rows": stored["rows"].flip(0)}, path)
    try:
        with pytest.raises(InputError, match=r"expected rows of the same tokens at every site, but .* has others at chat/resid_post.1"):
            JoinedCache(caches).read(shard)
    finally:
        path.write_bytes(whole)
    x_nd, positions_n = JoinedCache(caches).read(shard)
    assert torch.equal(positions_n, stored["rows"])
    assert x_nd.shape == (shard.rows, 2 * D)
