"""Files of dictionary_learning against the formula of each class, written out in float64."""

import json

import pytest
import torch

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError

D, F, K, THETA = 6, 12, 4, 0.7
X = torch.randn(40, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
LINEAR = {"encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F)}
MATRICES = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
SHAPES = {
    "AutoEncoder": {"bias": (D,)} | LINEAR,
    "AutoEncoderNew": LINEAR | {"decoder.bias": (D,)},
    "GatedAutoEncoder": {"decoder_bias": (D,), "r_mag": (F,), "gate_bias": (F,), "mag_bias": (F,)}
    | {key: LINEAR[key] for key in ("encoder.weight", "decoder.weight")},
    "JumpReluAutoEncoder": MATRICES | {"threshold": (F,)},
    "AutoEncoderTopK": LINEAR | {"b_dec": (D,)},
    "BatchTopKSAE": LINEAR | {"b_dec": (D,)},
    "MatryoshkaBatchTopKSAE": MATRICES,
}
TRAINER = {
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderNew": "StandardTrainerNew",
    "GatedAutoEncoder": "GatedSAETrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
}
KEEPS_K = ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")


def state(name, **buffers):
    w = {
        key: torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for i, (key, shape) in enumerate(SHAPES[name].items())
    }
    if "threshold" in w:
        w["threshold"] = w["threshold"].abs()
    if name in KEEPS_K:
        w |= {"k": torch.tensor(K), "threshold": torch.tensor(THETA, dtype=torch.float64)}
    if name == "MatryoshkaBatchTopKSAE":
        w["group_sizes"] = torch.tensor([2, 4, 6])
    return w | buffers


def folder(path, name, value, buffer=None, **settings):
    path.mkdir(parents=True)
    torch.save(value, path / "ae.pt")
    trainer = {"dict_class": name, "trainer_class": TRAINER.get(name, "?"), "activation_dim": D, "dict_size": F, "lr": 1e-4}
    trainer |= (
        ({"k": K} if name in KEEPS_K else {}) | {"layer": 3, "lm_name": "some/llama", "submodule_name": "resid_post_layer_3"} | settings
    )
    trainer = {key: value for key, value in (trainer | settings).items() if value is not ...}
    (path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128, "io": "out"} | (buffer or {})}))
    return path


def formula(name, w, x=X):
    """Features as the file has them, and the output."""
    if name == "AutoEncoder":
        acts = ((x - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
        return acts, acts @ w["decoder.weight"].T + w["bias"]
    if name == "AutoEncoderNew":
        acts = (x @ w["encoder.weight"].T + w["encoder.bias"]).relu()
        return acts, acts @ w["decoder.weight"].T + w["decoder.bias"]
    if name == "GatedAutoEncoder":
        z = (x - w["decoder_bias"]) @ w["encoder.weight"].T
        acts = (z + w["gate_bias"] > 0) * (w["r_mag"].exp() * z + w["mag_bias"]).relu()
        return acts, acts @ w["decoder.weight"].T + w["decoder_bias"]
    if name == "JumpReluAutoEncoder":
        z = x @ w["W_enc"] + w["b_enc"]
        acts = (z * (z > w["threshold"])).relu()
        return acts, acts @ w["W_dec"] + w["b_dec"]
    W_e, b_e = (w["W_enc"], w["b_enc"]) if "W_enc" in w else (w["encoder.weight"].T, w["encoder.bias"])
    z = ((x - w["b_dec"]) @ W_e + b_e).relu()
    kept = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, z.topk(K).indices, True)
    acts = z * (kept if name == "AutoEncoderTopK" or w.get("threshold", -1) < 0 else z > w["threshold"])
    return acts, acts @ (w["W_dec"] if "W_dec" in w else w["decoder.weight"].T) + w["b_dec"]


def check(path, expected, x=X):
    dictionary = Dictionary.load(path)
    for found, wanted in zip((dictionary.encode(x), dictionary(x)), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    return dictionary


@pytest.mark.parametrize("name", SHAPES)
def test_every_class(tmp_path, name):
    acts, out = formula(name, w := state(name))
    if name == "AutoEncoder":  # as their loader gives it, with decoder rows of length 1
        acts = acts * w["decoder.weight"].norm(dim=0)
    path = folder(tmp_path / "sae", name, w)
    dictionary = check(path, (acts, out))
    assert (dictionary.site, dictionary.metadata["model_name"], dictionary.metadata["context_size"]) == ("resid_post.3", "some/llama", 128)
    check(path / "ae.pt", (acts, out))


def test_what_its_authors_measured(tmp_path):
    path = folder(tmp_path / "sae", "AutoEncoderNew", state("AutoEncoderNew"))
    (path / "eval_results.json").write_text(json.dumps({"l0": 41.5, "frac_variance_explained": 0.75, "frac_recovered": 0.9, "cossim": 1.0}))
    assert Dictionary.load(path).metadata["promised"] == {"l0": 41.5, "fvu": 0.25, "loss_recovered": 0.9}


@pytest.mark.parametrize("name", SHAPES)
def test_a_backup_takes_activations_divided_by_its_factor(tmp_path, name, capsys):
    w, factor = state(name), 3.5
    backup = {"step": 700, "ae": w, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}, "config": {"k": K}, "norm_factor": factor}
    acts, out = formula(name, w, X / factor)
    if name == "AutoEncoder":
        acts = acts * w["decoder.weight"].norm(dim=0)
    check(folder(tmp_path / "sae", name, backup), (acts * factor, out * factor))
    assert "ae.pt is the backup of a training that was not finished" in capsys.readouterr().err


def test_a_checkpoint_beside_the_settings(tmp_path):
    path = folder(tmp_path / "sae", "AutoEncoderNew", w := state("AutoEncoderNew"))
    (path / "checkpoints").mkdir()
    other = w | {"decoder.bias": w["decoder.bias"] + 1}
    torch.save(other, path / "checkpoints" / "ae_500.pt")
    check(path / "checkpoints" / "ae_500.pt", formula("AutoEncoderNew", other))


@pytest.mark.parametrize("name", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
@pytest.mark.parametrize("theta", [torch.tensor(-1.0), None])
def test_without_a_threshold_each_token_keeps_k(tmp_path, name, theta, capsys):
    w = state(name)
    w = {key: value for key, value in (w | {"threshold": theta}).items() if value is not None}
    check(folder(tmp_path / "sae", name, w), formula(name, w))
    assert f"has no threshold yet, so each token keeps its {K} largest" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"])
def test_the_tensors_tell_the_class_where_no_settings_do(tmp_path, name):
    """As in the first releases, whose config.json has other things; the folders' names tell the site."""
    path = folder(tmp_path / "resid_out_layer2" / "10_12", name, w := state(name))
    (path / "config.json").write_text(json.dumps({"ctx_len": 128, "dictionary_size": F}))
    out = formula(name, w)[1]
    dictionary = Dictionary.load(path)
    torch.testing.assert_close(dictionary(X), out, rtol=1e-11, atol=1e-11)
    assert (dictionary.site, "model_name" in dictionary.metadata) == ("resid_post.2", False)


def test_a_k_that_only_the_settings_say(tmp_path):
    w = {key: value for key, value in state("AutoEncoderTopK").items() if key not in ("k", "threshold")}
    check(folder(tmp_path / "sae", "AutoEncoderTopK", w, trainer_class="TrainerTopK"), formula("AutoEncoderTopK", w))


def test_the_normaliser_of_the_fork(tmp_path):
    mean, scale = torch.linspace(-1, 1, D, dtype=torch.float64), 0.3
    on = {
        "activation_mean": mean,
        "activation_std": mean.abs() + 1,
        "activation_global_scale": torch.tensor(scale),
        "target_rms": torch.tensor(1.0),
    }
    w = state("BatchTopKSAE")
    acts, out = formula("BatchTopKSAE", w, (X - mean) * torch.tensor(scale).double())
    check(folder(tmp_path / "on", "BatchTopKSAE", w | on), (acts, out / (torch.tensor(scale).double() + 1e-8) + mean))
    off = on | {"activation_mean": torch.full((D,), torch.nan), "activation_std": torch.full((D,), torch.nan)}
    check(folder(tmp_path / "off", "BatchTopKSAE", w | off), formula("BatchTopKSAE", w))
    with pytest.raises(InputError, match="lacks target_rms"):
        Dictionary.load(folder(tmp_path / "half", "BatchTopKSAE", w | {key: on[key] for key in list(on)[:3]}))


@pytest.mark.parametrize(
    ("submodule", "model", "io", "site", "site_out"),
    [
        ("resid_post_layer_3", "some/llama", "out", "resid_post.3", "resid_post.3"),
        ("resid_post_layer_3", "some/llama", "in", "resid_pre.3", "resid_pre.3"),
        ("mlp_out_layer3", "some/llama", "out", "mlp_out.3", "mlp_out.3"),
        ("attn_out_layer_3", "some/llama", "out", "attn_out.3", "attn_out.3"),
        ("mlp_out_layer_3", "google/gemma-2-2b", "out", None, None),
        ("mlp_out_layer_3", "some/llama", "in_and_out", "mlp_in.3", "mlp_out.3"),
        ("something", "some/llama", "out", None, None),
        (None, None, "out", None, None),
    ],
)
def test_sites(tmp_path, submodule, model, io, site, site_out):
    path = folder(tmp_path / "sae", "AutoEncoderNew", state("AutoEncoderNew"), {"io": io}, submodule_name=submodule, lm_name=model)
    dictionary = Dictionary.load(path)
    assert (dictionary.site, dictionary.site_out) == (site, site_out)


@pytest.mark.parametrize(
    ("name", "settings", "buffers", "message"),
    [
        (
            "AutoEncoder",
            {"trainer_class": "TopKTrainer"},
            {},
            "dict_class 'AutoEncoder' and trainer_class 'TopKTrainer', which trains 'A",
        ),
        ("AutoEncoder", {"dict_class": "IdentityDict", "trainer_class": ...}, {}, "of class IdentityDict, expected one of AutoEncoder, "),
        ("AutoEncoderTopK", {"dict_class": ..., "trainer_class": "MyTrainer"}, {}, "of class unknown, expected one of"),
        ("AutoEncoder", {"dict_class": "AutoEncoderNew", "trainer_class": ...}, {}, "lacks decoder.bias"),
        ("AutoEncoderTopK", {"k": 5}, {}, f"expected one k from 1 to {F} in .*, found 4 and 5"),
        ("AutoEncoderTopK", {"k": F + 1}, {"k": torch.tensor(F + 1)}, f"expected one k from 1 to {F} in .*, found 13"),
        ("BatchTopKSAE", {}, {"threshold": torch.tensor(torch.nan)}, "expected one number as threshold in .*, found nan"),
        ("BatchTopKSAE", {}, {"threshold": torch.ones(F)}, "expected one number as threshold"),
        (
            "MatryoshkaBatchTopKSAE",
            {},
            {"group_sizes": torch.tensor([2, 4])},
            r"that add up to 12 features, found \[2, 4\]",
        ),
        ("AutoEncoder", {}, {"activation_mean": torch.ones(D)}, "holds activation_mean beside"),
        ("AutoEncoder", {"layer": 0}, {}, "says layer 0 and resid_post_layer_3, which differ"),
        ("AutoEncoder", {"layer": 4}, {}, "says layer 4 and resid_post_layer_3, which differ"),
        ("AutoEncoder", {"lm_name": 3}, {}, "'trainer.lm_name' should be a valid string"),
    ],
)
def test_settings_and_buffers_that_are_refused(tmp_path, name, settings, buffers, message):
    with pytest.raises(InputError, match=message):
        Dictionary.load(folder(tmp_path / "sae", name, state(name, **buffers), **settings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_factor": None}, "expected ae, config, norm_factor, optimizer, step in the backup"),
        ({"norm_factor": float("nan")}, "in the backup"),
        ({"ema": {}}, "found step, ae, optimizer, config, norm_factor, ema"),
        ({"ae": [1]}, "expected the tensors of one dictionary"),
    ],
)
def test_backups_that_are_refused(tmp_path, change, message):
    backup = {"step": 1, "ae": state("AutoEncoder"), "optimizer": {}, "config": {}, "norm_factor": 1.0} | change
    with pytest.raises(InputError, match=message):
        Dictionary.load(folder(tmp_path / "sae", "AutoEncoder", backup))


def test_a_transcoder_of_an_unknown_module_is_refused(tmp_path):
    path = folder(tmp_path / "sae", "AutoEncoderNew", state("AutoEncoderNew"), {"io": "in_and_out"}, submodule_name="something")
    with pytest.raises(InputError, match="io 'in_and_out' of something; expected out or in, or"):
        Dictionary.load(path)
