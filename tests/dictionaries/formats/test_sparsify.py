"""Folders of sparsify against its formula, written out in float64."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.formats import load
from sae.errors import InputError

D, F, K = 6, 12, 4
G = torch.Generator().manual_seed(0)
X = torch.randn(40, D, generator=G, dtype=torch.float64) + 0.5
SHAPES = {"encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)}
RUN = {"model": "some/llama", "sae": {}, "dataset": "some/text"}


def weights(*more):
    shapes = SHAPES | dict.fromkeys(more, (D, D))
    return {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for i, (name, shape) in enumerate(shapes.items())
    }


def folder(path, w, run=RUN, **cfg):
    path.mkdir(parents=True)
    cfg = {"expansion_factor": 2, "normalize_decoder": True, "num_latents": 0, "k": K, "multi_topk": False, "d_in": D} | cfg
    (path / "cfg.json").write_text(json.dumps({key: value for key, value in cfg.items() if value is not None}))
    save_file(w, path / "sae.safetensors")
    if run is not None:
        (path.parent / "config.json").write_text(json.dumps(run))
    return path


def formula(w, *, subtracts, activation="topk"):
    x = X - w["b_dec"] if subtracts else X
    z = x @ w["encoder.weight"].T + w["encoder.bias"]
    acts = torch.zeros_like(z)
    for b in range(len(z)):
        by = z[b].abs() if activation == "signed" else z[b]
        if activation == "groupmax":
            kept = [group * (F // K) + int(by[group * (F // K) : (group + 1) * (F // K)].argmax()) for group in range(K)]
        else:
            kept = by.argsort(descending=True)[:K].tolist()
        acts[b, kept] = z[b, kept] if activation == "signed" else z[b, kept].relu()
    skip = X @ w["W_skip"].T if "W_skip" in w else 0
    return acts, acts @ w["W_dec"] + w["b_dec"] + skip


def check(path, expected, site, site_out=None):
    dictionary = Dictionary.load(path)
    dictionary.save(path.with_name("again"))
    for opened in (dictionary, Dictionary.load(path.with_name("again"))):
        for found, wanted in zip((opened.encode(X), opened(X)), expected):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        assert (opened.site, opened.site_out) == (site, site_out or site)
    return dictionary


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_an_autoencoder(tmp_path, activation):
    path = folder(tmp_path / "layers.3", w := weights(), activation=activation, transcode=False, skip_connection=False)
    dictionary = check(path, formula(w, subtracts=True, activation=activation), "resid_post.3")
    assert dictionary.metadata["model_name"] == "some/llama"


def test_an_autoencoder_of_2024(tmp_path):
    """cfg.json had fewer keys, for a short time "signed"; the model was named as now."""
    check(folder(tmp_path / "a" / "h.0", w := weights()), formula(w, subtracts=True), "resid_post.0")
    check(folder(tmp_path / "b" / "layers.1", w, signed=True), formula(w, subtracts=True, activation="signed"), "resid_post.1")


@pytest.mark.parametrize("skip", [True, False])
def test_a_transcoder_takes_no_bias_off_its_input(tmp_path, skip):
    path = folder(tmp_path / "layers.2.mlp", w := weights(*["W_skip"] * skip), transcode=True, skip_connection=skip)
    check(path, formula(w, subtracts=False), "mlp_in.2", "mlp_out.2")
    assert Dictionary.load(path / "sae.safetensors").is_transcoder


def test_a_transcoder_of_before_february_2025_does(tmp_path):
    """The run's config.json alone says that it is one."""
    path = folder(tmp_path / "layers.2.mlp", w := weights("W_skip"), run=RUN | {"transcode": True}, skip_connection=True)
    check(path, formula(w, subtracts=True), "mlp_in.2", "mlp_out.2")


@pytest.mark.parametrize(
    ("hookpoint", "model", "site"),
    [
        ("layers.4", "some/llama", "resid_post.4"),
        ("decoder.layers.4.self_attn", "some/opt", "attn_out.4"),
        ("layers.4.attention", "EleutherAI/pythia-70m", "attn_out.4"),
        ("h.4.mlp", "gpt2", "mlp_out.4"),
        ("layers.4.mlp", "google/gemma-2-2b", None),  # a norm follows
        ("layers.4", "google/gemma-2-2b", "resid_post.4"),
        ("layers.4.mlp.down_proj", "some/llama", None),
        ("embed_tokens", "some/llama", None),
    ],
)
def test_sites_of_hookpoints(tmp_path, hookpoint, model, site):
    dictionary = Dictionary.load(folder(tmp_path / hookpoint, weights(), run=RUN | {"model": model}))
    assert (dictionary.site, dictionary.metadata["hookpoint"]) == (site, hookpoint)


def test_without_the_runs_settings_a_sublayer_is_told(tmp_path, capsys):
    assert Dictionary.load(folder(tmp_path / "layers.0.mlp", weights(), run=None)).site == "mlp_out.0"
    assert "names the model: layers.0.mlp is taken as mlp_out.0" in capsys.readouterr().err
    assert Dictionary.load(folder(tmp_path / "layers.0", weights(), run={"model_type": "somebody else's"})).site == "resid_post.0"
    assert capsys.readouterr().err == ""


def test_a_run_is_a_set_of_layers(tmp_path):
    ws = {layer: weights() | {"b_dec": torch.full((D,), float(layer), dtype=torch.float64)} for layer in (0, 2, 10)}
    for layer, w in ws.items():
        folder(tmp_path / f"layers.{layer}", w)
    layers = load(tmp_path)
    assert list(layers) == [0, 2, 10]
    for layer, part in layers.items():
        parts = part()
        assert parts.site == f"resid_post.{layer}"
        assert torch.equal(parts.b_dec_o, ws[layer]["b_dec"])
    assert Dictionary.load(tmp_path / "layer_10").site == "resid_post.10"
    folder(tmp_path / "layers.0.mlp", weights())
    with pytest.raises(InputError, match=r"found layers.0, layers.0.mlp, layers.10, layers.2; choose one"):
        Dictionary.load(tmp_path)


def test_seeds(tmp_path):
    for seed in (0, 1):
        folder(tmp_path / "layers.3" / f"seed{seed}", weights(), run=None)
    (tmp_path / "config.json").write_text(json.dumps(RUN))
    dictionary = Dictionary.load(tmp_path / "layers.3" / "seed1")
    assert (dictionary.site, dictionary.metadata["seed"], dictionary.metadata["model_name"]) == ("resid_post.3", "seed1", "some/llama")
    with pytest.raises(InputError, match=r"found layers.3/seed0, layers.3/seed1; choose one"):
        Dictionary.load(tmp_path)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"rotate": True}, "has rotate, which may change"),
        ({"activation": "relu"}, "activation 'relu', which is not understood"),
        ({"activation": "groupmax", "k": 5}, "k 5 and 12 features, which make no equal groups"),
        ({"activation": "groupmax", "signed": True}, "the latter unsigned"),
        ({"k": 13}, "k 13, where 1 to 12"),
        ({"k": None, "num_latents": 12}, "k 32, where 1 to 12"),
        ({"num_latents": 13}, r"encoder.weight in .* with f = 13, d = 6, found \[12, 6\]"),
        ({"skip_connection": True}, "lacks W_skip"),
        ({"d_in": "6"}, "'d_in' should be a valid integer"),
        ({"d_in": None}, "'d_in' is missing"),
    ],
)
def test_settings_that_are_not_understood(tmp_path, cfg, message):
    with pytest.raises(InputError, match=message):
        Dictionary.load(folder(tmp_path / "layers.0", weights(), **cfg))


@pytest.mark.parametrize(
    ("hookpoint", "model"), [("layers.1.mlp", "google/gemma-2-2b"), ("embed_tokens", "some/llama"), ("layers.1.mlp.up_proj", "some/llama")]
)
def test_a_transcoder_between_other_than_sites_is_refused(tmp_path, hookpoint, model):
    with pytest.raises(InputError, match=f"to the output of {hookpoint} in {model}, which are not both"):
        Dictionary.load(folder(tmp_path / hookpoint, weights(), run=RUN | {"model": model}, transcode=True))
