"""The command: a real cache of a tiny GPT-2, its held-out tokens only, and refusals."""

import json
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from encoders import each
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from sae.activations.cache import ActivationCache
from sae.activations.harvest.command import HarvestConfig, harvest
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.gates import Threshold
from sae.encoding import METHODS
from sae.errors import InputError
from sae.evaluation import EvaluationConfig, evaluate
from sae.model.language_model import LanguageModel

D, SITE = 16, "resid_post.0"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny language model, lm/, token ids, and their cache/ of float32 activations."""
    home = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    settings = dict(vocab_size=40, n_positions=16, n_embd=D, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(GPT2Config(**settings, initializer_range=0.4))
    model.save_pretrained(home / "lm")
    model.config.eos_token_id = model.generation_config.eos_token_id = 7
    model.save_pretrained(home / "lm_eos")
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 40, (60 * 21,), generator=g, dtype=torch.int32)
    save_file({"ids": ids, "document_starts": torch.arange(0, 60 * 21 + 1, 21)}, home / "ids.safetensors")
    make_cache(home, "cache")
    return home


def make_cache(home, name, **changes):
    settings = dict(text=(str(home / "ids.safetensors"),), model=str(home / "lm"), sites=(SITE,), context=12, tokens=1200)
    harvest(HarvestConfig(out=home / name, **(settings | dict(dtype="float32", held_out=0.3) | changes)))


def identity(home, **metadata) -> Dictionary:
    """relu(x) − relu(−x) = x, exactly; 32 features."""
    both = torch.cat([torch.eye(D), -torch.eye(D)])
    made = json.loads((home / "cache" / "manifest.json").read_text())["model"]
    known = {"site": SITE, "model_name": made["name"], "model_fingerprint": made["fingerprint"]}
    return Dictionary.autoencoder(both, torch.zeros(2 * D), both.clone(), torch.zeros(D), known | metadata)


def test_identity_dictionary_is_perfect_on_every_count(home, tmp_path, capsys):
    identity(home).save(tmp_path)
    result = evaluate(EvaluationConfig(tmp_path, home / "cache", device="cpu"))
    assert json.loads((tmp_path / "evaluation.json").read_text()) == json.loads(json.dumps(result))
    assert result["reconstruction"]["fvu"] == 0
    assert result["reconstruction"]["l0"] == D  # of x and −x, one fires
    assert result["language_model"]["loss_recovered"] == 1
    assert result["language_model"]["kl"]["spliced"] == 0
    histogram = result["reconstruction"]["density_histogram"]
    assert sum(histogram["features"]) + result["reconstruction"]["dead"] == 2 * D
    assert "loss recovered" in capsys.readouterr().out


def test_only_held_out_rows_and_sequences_are_measured(home, tmp_path):
    identity(home).save(tmp_path)
    cache = ActivationCache.open(home / "cache")
    x_nd = torch.cat([cache.read(shard)[0] for shard in cache.shards("held_out")]).double().numpy()
    result = evaluate(EvaluationConfig(tmp_path, home / "cache", device="cpu"))
    assert result["reconstruction"]["rows"] == len(x_nd) == cache.rows("held_out") < cache.rows("train")
    assert result["reconstruction"]["l1"] == pytest.approx(np.abs(x_nd).sum(1).mean(), rel=1e-5)
    tokens = cache.tokens
    held_out = np.flatnonzero(np.asarray(tokens.sequence_split) == 1)
    assert result["language_model"]["tokens"] == (np.diff(tokens.sequence_starts)[held_out] - 1).sum()


@pytest.mark.parametrize("encoder", each(*METHODS))
def test_every_encoder_measures_the_same(home, tmp_path, encoder, capsys):
    """And the file says which it was."""
    both = identity(home)
    theta_f = torch.linspace(0, 1, 2 * D)
    made = Dictionary(both.W_enc_fd, both.b_enc_f, both.W_dec_fo, both.b_dec_o, gate=Threshold(theta_f), metadata=both.metadata)
    made.save(tmp_path)
    result = evaluate(EvaluationConfig(tmp_path, home / "cache", device="cpu", sequences=0, encoder=encoder))
    assert result["encoder"] == json.loads((tmp_path / "evaluation.json").read_text())["encoder"] == encoder
    assert ("name it with --encoder" in capsys.readouterr().out) == (encoder != "product")
    cache = ActivationCache.open(home / "cache")
    x_nd = torch.cat([cache.read(shard)[0] for shard in cache.shards("held_out")]).double()
    z_nf = torch.cat([x_nd, -x_nd], dim=1)
    acts_nf = z_nf * (z_nf > theta_f)
    error = (acts_nf[:, :D] - acts_nf[:, D:] - x_nd).square().sum()
    assert result["reconstruction"]["fvu"] == pytest.approx(float(error / (x_nd - x_nd.mean(0)).square().sum()), rel=1e-6)
    assert result["reconstruction"]["l0"] == int((acts_nf > 0).sum()) / len(x_nd)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"keep_bos": True},
        {"positions": "2:9"},
        {"skip_special": True},
        {"max_norm_ratio": 1.1},
        {"max_norm_ratio": 1.05, "keep_bos": True},
    ],
    ids=str,
)
def test_exactly_the_positions_that_the_cache_stored_are_replaced(home, tmp_path, changes):
    """By hand from the tokens and the norms that the model gives, sequence by sequence: KL of writing zeros there."""
    make_cache(home, tmp_path / "cache", model=str(home / "lm_eos"), **changes)
    identity(home).save(tmp_path / "sae")
    result = evaluate(EvaluationConfig(tmp_path / "sae", tmp_path / "cache", device="cpu"))["language_model"]
    lm, tokens = LanguageModel.load(str(home / "lm_eos"), device="cpu"), ActivationCache.open(tmp_path / "cache").tokens
    starts = tokens.sequence_starts
    sequences = [torch.tensor(tokens.ids[starts[i] : starts[i + 1]].astype(np.int64)) for i in np.flatnonzero(tokens.sequence_split == 1)]
    norms = [lm.record(ids[None], [SITE])[SITE][0].norm(dim=-1) for ids in sequences]
    kept = [torch.ones(len(ids), dtype=torch.bool) if changes.get("keep_bos") else ids != 0 for ids in sequences]
    if changes.get("skip_special"):
        kept = [own & (ids != 7) for own, ids in zip(kept, sequences)]
    if "positions" in changes:
        kept = [own & (torch.arange(len(own)) >= 2) & (torch.arange(len(own)) < 9) for own in kept]
    if "max_norm_ratio" in changes:  # all held-out sequences are one pool
        limit = changes["max_norm_ratio"] * torch.cat([norm[own] for norm, own in zip(norms, kept)]).median()
        kept = [own & (norm <= limit) for own, norm in zip(kept, norms)]
    kl = 0.0
    for ids, own in zip(sequences, kept):
        clean = lm.logits(ids[None])[0, :-1].double().log_softmax(-1)
        with lm.edited({SITE: lambda x, own=own: torch.where(own[:, None], 0, x)}):
            zeroed = lm.logits(ids[None])[0, :-1].double().log_softmax(-1)
        kl += float((clean.exp() * (clean - zeroed)).sum())
    assert 0 < result["replaced"] == int(sum(own.sum() for own in kept)) < sum(map(len, kept)) + (changes == {"keep_bos": True})
    assert result["kl"]["zero"] == pytest.approx(kl / result["tokens"], rel=1e-5)


@pytest.mark.parametrize("rows", [1_000_000, 100])
def test_fvu_is_measured_with_and_without_massive_rows(home, tmp_path, rows, monkeypatch, capsys):
    """A model with one token a hundred times as large as the others, against the formula on the rows by hand."""
    model = GPT2LMHeadModel.from_pretrained(home / "lm")
    with torch.no_grad():
        model.transformer.wte.weight[5] *= 100
    model.save_pretrained(tmp_path / "loud")
    make_cache(home, tmp_path / "cache", model=str(tmp_path / "loud"), max_norm_ratio=None)
    monkeypatch.setattr(sys.modules["sae.evaluation.evaluate"], "READ_ROWS", 7)
    sae = identity(home, model_fingerprint=None, model_name=None)
    with torch.no_grad():
        sae.W_dec_fo[0] = 0  # so that something is left to explain
    sae.save(tmp_path / "sae")
    cache = ActivationCache.open(tmp_path / "cache")
    x_nd = torch.cat([cache.read(shard)[0] for shard in cache.shards("held_out")]).double()[:rows]
    norm_n = x_nd.norm(dim=-1)
    massive_n = norm_n > 10 * norm_n.median()
    assert 0 < massive_n.sum() < 0.1 * len(x_nd)
    result = evaluate(EvaluationConfig(tmp_path / "sae", tmp_path / "cache", sequences=0, rows=rows, device="cpu"))
    for chosen_nd, found in ((x_nd, result["reconstruction"]), (x_nd[~massive_n], result["massive_rows"]["without"])):
        error = chosen_nd[:, 0].clamp(min=0).square().sum()
        assert found["fvu"] == pytest.approx(float(error / (chosen_nd - chosen_nd.mean(0)).square().sum()), rel=1e-4)
        assert found["rows"] == len(chosen_nd)
    assert result["massive_rows"]["rows"] == massive_n.sum()
    share = float((norm_n[massive_n] ** 2).sum() / (norm_n**2).sum())
    assert result["massive_rows"]["share_of_squared_norm"] == pytest.approx(share)
    assert "FVU without the massive rows" in capsys.readouterr().out


def test_massive_rows_that_a_cache_left_out_are_mentioned(home, tmp_path, capsys):
    make_cache(home, tmp_path / "cache", max_norm_ratio=1.3)
    identity(home).save(tmp_path)
    assert evaluate(EvaluationConfig(tmp_path, tmp_path / "cache", sequences=0, device="cpu"))["massive_rows"] is None
    assert "--max-norm-ratio None keeps them" in " ".join(capsys.readouterr().out.split())


def test_fewer_rows_and_no_model_when_asked(home, tmp_path):
    identity(home).save(tmp_path)
    out = tmp_path / "elsewhere.json"
    result = evaluate(EvaluationConfig(tmp_path, home / "cache", rows=17, sequences=0, device="cpu", out=out))
    assert result["reconstruction"]["rows"] == 17
    assert result["language_model"] is None
    assert out.exists()
    assert not (tmp_path / "evaluation.json").exists()


def test_constant_dictionary_gives_null_where_a_ratio_is_undefined(home, tmp_path):
    zeros = torch.zeros(3, D)
    Dictionary.autoencoder(zeros, torch.zeros(3), zeros.clone(), torch.zeros(D), {"site": SITE}).save(tmp_path)
    result = evaluate(EvaluationConfig(tmp_path, home / "cache", device="cpu"))
    assert "NaN" not in (tmp_path / "evaluation.json").read_text()
    assert result["reconstruction"]["relative_bias"] is None
    assert result["language_model"]["loss_recovered"] == 0
    assert result["reconstruction"]["dead"] == 3


def test_unsuitable_caches_are_refused(home, tmp_path):
    identity(home, model_fingerprint="0123456789ab").save(tmp_path / "other_model")
    identity(home, model_fingerprint=None, model_name="gpt2").save(tmp_path / "other_name")
    identity(home, site="resid_post.1").save(tmp_path / "other_site")
    wide = torch.zeros(3, D + 1)
    Dictionary.autoencoder(wide, torch.zeros(3), wide.clone(), torch.zeros(D + 1)).save(tmp_path / "wider")
    expected = {"other_model": "0123456789ab", "other_name": "gpt2", "other_site": SITE, "wider": "width 17"}
    for name, said in expected.items():
        with pytest.raises(InputError, match=said):
            evaluate(EvaluationConfig(tmp_path / name, home / "cache", device="cpu"))
    cfg = json.loads((tmp_path / "other_site" / "cfg.json").read_text())
    del cfg["metadata"]["site"]  # as SAELens writes it, with the hook alone
    (tmp_path / "other_site" / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(InputError, match=SITE):
        evaluate(EvaluationConfig(tmp_path / "other_site", home / "cache", device="cpu"))


def test_a_name_that_cannot_be_checked_is_believed_to_who_names_the_model(home, tmp_path, capsys):
    identity(home, model_fingerprint=None, model_name="gpt2").save(tmp_path)
    evaluate(EvaluationConfig(tmp_path, home / "cache", str(home / "model"), sequences=0, device="cpu"))
    assert "no fingerprint tells" in capsys.readouterr().err


def test_training_tokens_are_refused(home, tmp_path):
    """A cache without held-out tokens, and one that holds out other documents than the cache trained on."""
    identity(home).save(tmp_path)
    make_cache(home, "all_train", held_out=0.0)
    with pytest.raises(InputError, match="held-out"):
        evaluate(EvaluationConfig(tmp_path, home / "all_train", sequences=0, device="cpu"))
    make_cache(home, "other_split", seed=5)
    (tmp_path / "training.json").write_text(json.dumps({"settings": {"cache": str(home / "other_split")}, "scale": 1.0, "last": {}}))
    with pytest.raises(InputError, match="other documents"):
        evaluate(EvaluationConfig(tmp_path, home / "cache", sequences=0, device="cpu"))
    evaluate(EvaluationConfig(tmp_path, home / "other_split", sequences=0, device="cpu"))


def test_another_model_than_the_caches_is_refused(home, tmp_path):
    identity(home).save(tmp_path)
    torch.manual_seed(1)
    settings = dict(vocab_size=40, n_positions=16, n_embd=D, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(GPT2Config(**settings)).save_pretrained(tmp_path / "lm")
    with pytest.raises(InputError, match="fingerprint"):
        evaluate(EvaluationConfig(tmp_path, home / "cache", model=str(tmp_path / "lm"), device="cpu"))


@pytest.mark.parametrize(("name", "value"), [("rows", 0), ("batch", 0), ("sequences", -1), ("seed", -1)])
def test_impossible_settings_are_refused(home, tmp_path, name, value):
    with pytest.raises(InputError, match=f"--{name}"):
        evaluate(EvaluationConfig(tmp_path, home / "cache", **{name: value}))


def test_a_transcoder_is_measured_where_it_writes(home, tmp_path, capsys):
    make_cache(home, "two sites", sites=("resid_pre.1", "mlp_out.1"))
    made = json.loads((home / "two sites" / "manifest.json").read_text())["model"]
    g = torch.Generator().manual_seed(0)
    W_enc_fd, W_dec_fd = torch.randn(2, 24, D, generator=g)
    metadata = {"site": "resid_pre.1", "site_out": "mlp_out.1", "model_name": made["name"], "model_fingerprint": made["fingerprint"]}
    dictionary = Dictionary(W_enc_fd, torch.zeros(24), W_dec_fd / 9, torch.zeros(D), metadata=metadata).requires_grad_(False)
    dictionary.save(tmp_path)
    result = evaluate(EvaluationConfig(tmp_path, home / "two sites", device="cpu", sequences=8))
    printed = " ".join(capsys.readouterr().out.split())
    assert " at resid_pre.1 to mlp_out.1, held-out tokens of" in printed
    assert "cosine of target and reconstruction" in printed
    assert "norm of x" not in printed
    caches = [ActivationCache.open(home / "two sites", site) for site in ("resid_pre.1", "mlp_out.1")]
    x, y = (torch.cat([cache.read(shard)[0] for shard in cache.shards("held_out")]).double() for cache in caches)
    error = (y - (x @ W_enc_fd.double().T).relu() @ W_dec_fd.double() / 9).square().sum()
    assert result["reconstruction"]["fvu"] == pytest.approx(float(error / (y - y.mean(0)).square().sum()), rel=1e-5)
    assert (result["site"], result["site_out"]) == ("resid_pre.1", "mlp_out.1")
    make_cache(home, "one site", sites=("resid_pre.1",))
    with pytest.raises(InputError, match="too, where this transcoder writes"):
        evaluate(EvaluationConfig(tmp_path, home / "one site", device="cpu"))
    wide = Dictionary(W_enc_fd, torch.zeros(24), torch.randn(24, D + 1), torch.zeros(D + 1), metadata=metadata)
    wide.save(tmp_path / "wide")
    with pytest.raises(InputError, match=f"writes {D} values at mlp_out.1"):
        evaluate(EvaluationConfig(tmp_path / "wide", home / "two sites", device="cpu"))
    identity(home, site=None).save(tmp_path / "no site")
    with pytest.raises(InputError, match=r"does not name its site, and .* has several, resid_pre.1, mlp_out.1"):
        evaluate(EvaluationConfig(tmp_path / "no site", home / "two sites", device="cpu"))


def test_a_cross_layer_transcoder_is_measured_in_the_model(home, tmp_path, capsys):
    said = {"model_kind": "cross_layer_transcoder", "model_name": str(home / "lm")}
    said |= {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    (tmp_path / "config.yaml").write_text(json.dumps(said))  # which is yaml
    g = torch.Generator().manual_seed(0)
    w = [{"W_enc": torch.randn(24, D, generator=g), "W_dec": torch.randn(24, 2 - i, D, generator=g) / 9} for i in range(2)]
    for i, one in enumerate(w):
        rest = {f"b_enc_{i}": torch.full((24,), -1.0), f"b_dec_{i}": torch.full((D,), 0.1)}
        save_file({f"W_enc_{i}": one["W_enc"]} | rest, tmp_path / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": one["W_dec"]}, tmp_path / f"W_dec_{i}.safetensors")
    result = evaluate(EvaluationConfig(tmp_path, home / "cache", device="cpu", sequences=10_000, model=str(home / "lm")))
    assert json.loads((tmp_path / "evaluation.json").read_text()) == json.loads(json.dumps(result))
    assert "all sites replaced" in capsys.readouterr().out

    cache, lm = ActivationCache.open(home / "cache"), LanguageModel.load(str(home / "lm"), device="cpu")
    sites = ["resid_mid.0", "resid_mid.1", "mlp_out.0", "mlp_out.1"]
    values = {site: [] for site in sites}
    stored = {int(position) for shard in cache.shards("held_out") for position in cache.read(shard)[1]}
    starts = cache.tokens.sequence_starts
    for start, end in pairwise(starts):
        ids = torch.from_numpy(np.asarray(cache.tokens.ids[start:end]).astype(np.int64))[None]
        own = [position - start for position in range(start, end) if position in stored]
        for site, value in lm.record(ids, sites).items() if own and len(ids[0]) > 1 else ():
            values[site].append(value[0, own].double())
    values = {site: torch.cat(rows) for site, rows in values.items()}
    acts = [(values[f"resid_mid.{i}"] @ w[i]["W_enc"].double().T - 1).relu() for i in range(2)]
    outs = [acts[0] @ w[0]["W_dec"][:, 0].double() + 0.1]
    outs.append(acts[0] @ w[0]["W_dec"][:, 1].double() + acts[1] @ w[1]["W_dec"][:, 0].double() + 0.1)
    for i in range(2):
        y = values[f"mlp_out.{i}"]
        assert result["sites"][f"mlp_out.{i}"]["fvu"] == pytest.approx(
            float((y - outs[i]).square().sum() / (y - y.mean(0)).square().sum()), rel=1e-5
        )
        layer = result["layers"][str(i)]
        assert layer["l0"] == pytest.approx(float((acts[i] != 0).sum(1).double().mean()), abs=1e-3)
        assert layer["dead"] == int((acts[i] == 0).all(0).sum())
    assert result["rows"] == len(y)
    assert result["layers"]["0"]["writes"] == ["mlp_out.0", "mlp_out.1"]
    with pytest.raises(InputError, match="expected --sequences of at least 1 for a set"):
        evaluate(EvaluationConfig(tmp_path, home / "cache", device="cpu", sequences=0))
    with pytest.raises(InputError, match=r"is a set of 2 dictionaries, one for each layer; choose one, such as .*/layer_0"):
        Dictionary.load(tmp_path)
    with pytest.raises(InputError, match="expected --out for the numbers of"):
        evaluate(EvaluationConfig(f"{tmp_path}/layer_1", home / "cache", device="cpu"))
