"""Crosscoders of both layouts against their formulas, written out in float64, and what one is to the toolkit."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.parts import Port
from sae.errors import InputError

D, F = 5, 12
CODES = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def x_of(places):
    return random(40, places, D, seed=9) + 0.5


def check(dictionary, x, acts, out):
    """Ours reads and writes the places one after the other."""
    torch.testing.assert_close(dictionary.encode(x.flatten(1)), acts, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(dictionary(x.flatten(1)), out.flatten(1), rtol=1e-11, atol=1e-11)


# Kissane and Nanda


def kissane(folder, places=2, name=None, **cfg):
    folder.mkdir(parents=True, exist_ok=True)
    w = {
        "W_enc": random(places, D, F),
        "b_enc": random(F, seed=1),
        "W_dec": random(F, places, D, seed=2),
        "b_dec": random(places, D, seed=3),
    }
    cfg = {"dict_size": F, "d_in": D, "model_name": "gemma-2-2b", "site": "resid_pre", "enc_dtype": "fp32", "seq_len": 1024} | cfg
    torch.save(w, folder / (f"{name}.pt" if name else "cc_weights.pt"))
    (folder / (f"{name}_cfg.json" if name else "cfg.json")).write_text(json.dumps(cfg))
    return w


def relu_formula(w, x):
    acts = (torch.einsum("bpd,pdf->bf", x, w["W_enc"]) + w["b_enc"]).relu()
    return acts, torch.einsum("bf,fpd->bpd", acts, w["W_dec"]) + w["b_dec"]


def test_two_models_at_one_hook(tmp_path, capsys):
    w = kissane(tmp_path / "cc", hook_point="blocks.14.hook_resid_pre")
    dictionary = Dictionary.load(tmp_path / "cc")
    assert "takes activations multiplied at each place by √d / their mean norm" in capsys.readouterr().err
    check(dictionary, x_of(2), *relu_formula(w, x_of(2)))
    assert dictionary.reads == dictionary.writes == (Port("resid_pre.14", D),) * 2
    assert dictionary.metadata["model_name"] == "gemma-2-2b"
    check(Dictionary.load(tmp_path / "cc" / "cc_weights.pt"), x_of(2), *relu_formula(w, x_of(2)))


def test_all_layers_of_one_model(tmp_path):
    w = kissane(tmp_path, 3, name="7", site="resid_post")
    dictionary = Dictionary.load(tmp_path / "7.pt")
    check(dictionary, x_of(3), *relu_formula(w, x_of(3)))
    assert [port.site for port in dictionary.reads] == ["resid_post.0", "resid_post.1", "resid_post.2"]


def test_the_factors_of_training_are_folded_in(tmp_path):
    w = kissane(tmp_path / "cc", hook_point="blocks.14.hook_resid_pre")
    factors = torch.tensor([0.276, 0.244], dtype=torch.float64)
    folded = Dictionary.load(tmp_path / "cc").folded(factors.repeat_interleave(D))
    x = x_of(2)
    acts, out = relu_formula(w, x * factors[:, None])
    length_f = (w["W_dec"] / factors[:, None]).flatten(1).norm(dim=-1)
    check(folded, x, acts * length_f, out / factors[:, None])
    torch.testing.assert_close(folded.norms(), torch.ones(F, dtype=torch.float64))


def test_port_norms_tell_where_a_feature_belongs(tmp_path):
    w = kissane(tmp_path / "cc", hook_point="blocks.14.hook_resid_pre")
    norms_pf = Dictionary.load(tmp_path / "cc").port_norms()
    for p in range(2):
        for f in range(F):
            assert float(norms_pf[p, f]) == pytest.approx(float((w["W_dec"][f, p] ** 2).sum() ** 0.5))


def test_two_models_at_one_site_are_no_place_of_one_model(tmp_path):
    kissane(tmp_path / "cc", hook_point="blocks.14.hook_resid_pre")
    dictionary = Dictionary.load(tmp_path / "cc")
    for site in (None, "resid_pre.14"):
        with pytest.raises(InputError, match=r"of one site, but this one reads 2 of them \(resid_pre.14, resid_pre.14\)"):
            dictionary.require_site(site)
    with pytest.raises(InputError, match=r"reads resid_pre.14, resid_pre.14 of several models"):
        dictionary.joined({"resid_pre.14": x_of(1)[:, 0]})


def test_places_of_one_model_are_joined_and_split(tmp_path):
    kissane(tmp_path, 3, name="7", site="resid_post")
    dictionary = Dictionary.load(tmp_path / "7.pt")
    values = {f"resid_post.{layer}": x_of(3)[:, layer] for layer in (2, 0, 1)}
    assert torch.equal(dictionary.joined(values), x_of(3).flatten(1))
    assert {site: torch.equal(y, x_of(3)[:, int(site[-1])]) for site, y in dictionary.split(x_of(3).flatten(1)).items()} == dict.fromkeys(
        ("resid_post.0", "resid_post.1", "resid_post.2"), True
    )


def test_settings_of_other_sizes_are_refused(tmp_path):
    kissane(tmp_path / "cc", d_in=D + 1)
    with pytest.raises(InputError, match=r"W_enc in .* d = 6, f = 12, found \[2, 5, 12\]"):
        Dictionary.load(tmp_path / "cc")


# crosscoder_learning


def learned(code, places=2, read=None, **change):
    """The state dict as its classes write it, with rows that one place does not write."""
    w = {
        "encoder.weight": random(places if read is None else read, D, F),
        "encoder.bias": random(F, seed=1),
        "decoder.weight": random(places, F, D, seed=2),
        "decoder.bias": random(places, D, seed=3),
        "code_normalization_id": torch.tensor(CODES.index(code) + 1),
    }
    w["decoder.weight"][0, 3] = 0
    return w | change


def thresholded(code, places=2, **change):
    theta = torch.linspace(0.6, 0.9, places, dtype=torch.float64) if code == "DECOUPLED" else torch.tensor(2.0, dtype=torch.float64)
    return learned(code, places) | {"k": torch.tensor(100), "threshold": theta} | change


def write(folder, w, prefix="", **settings):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({prefix + name: tensor for name, tensor in w.items()}, folder / "model_final.pt")
    name = "BatchTopKCrossCoder" if "threshold" in w else "CrossCoder"
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": name, "lm_name": "chat-base", "layer": 13} | settings}))
    return folder


def normaliser(places=2):
    mean = random(places, D, seed=5)
    scale = torch.linspace(0.3, 0.7, places, dtype=torch.float64)
    return {"activation_mean": mean, "activation_std": mean.abs() + 1, "activation_global_scale": scale, "target_rms": torch.tensor(1.0)}


def into(n, x):
    return (x - n["activation_mean"]) * n["activation_global_scale"][:, None]


def out_of(n, y):
    return y / (n["activation_global_scale"][:, None] + 1e-8) + n["activation_mean"]


def batch_formula(w, x, code):
    """Activations [b, f], of a decoupled one [b, p, f], and the output."""
    z = (torch.einsum("bpd,pdf->bf", x, w["encoder.weight"]) + w["encoder.bias"]).relu()
    rows = w["decoder.weight"]
    if code == "DECOUPLED":
        acts = torch.stack([z * (z * rows[p].norm(dim=-1) > w["threshold"][p]) for p in range(len(rows))], dim=1)
        return acts, torch.einsum("bpf,pfd->bpd", acts, rows) + w["decoder.bias"]
    separate = sum(rows[p].norm(dim=-1) for p in range(len(rows)))
    together = (rows**2).sum(dim=(0, 2)) ** 0.5
    c = {"CROSSCODER": separate, "SAE": together, "MIXED": together + 0.1 * separate, "NONE": 1}[code]
    acts = z * (z * c > w["threshold"])
    return acts, torch.einsum("bf,pfd->bpd", acts, rows) + w["decoder.bias"]


@pytest.mark.parametrize("normalised", [True, False])
def test_a_crosscoder_with_relu(tmp_path, normalised):
    n = normaliser(3)
    w = learned("CROSSCODER", 3)
    x = into(n, x_of(3)) if normalised else x_of(3)
    acts = (torch.einsum("bpd,pdf->bf", x, w["encoder.weight"]) + w["encoder.bias"]).relu()
    out = torch.einsum("bf,pfd->bpd", acts, w["decoder.weight"]) + w["decoder.bias"]
    dictionary = Dictionary.load(write(tmp_path / "cc", w | (n if normalised else {}), prefix="_orig_mod."))
    check(dictionary, x_of(3), acts, out_of(n, out) if normalised else out)
    assert dictionary.reads == (Port(None, D),) * 3


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("code", CODES)
def test_a_crosscoder_with_thresholds(tmp_path, code, normalised):
    n, w = normaliser(), thresholded(code)
    x = into(n, x_of(2)) if normalised else x_of(2)
    if normalised and code == "DECOUPLED":
        x = into(n, x)  # as their code has it
    acts, out = batch_formula(w, x, code)
    assert 0.05 < float((acts > 0).double().mean()) < 0.6
    dictionary = Dictionary.load(write(tmp_path / "cc", w | (n if normalised else {})))
    dictionary.save(tmp_path / "again")
    for opened in (dictionary, Dictionary.load(tmp_path / "again")):
        check(opened, x_of(2), acts.flatten(1), out_of(n, out) if normalised else out)
        assert opened.reads == opened.writes == (Port(None, D),) * 2
    assert dictionary.metadata.get("decoupled") == (F if code == "DECOUPLED" else None)


def test_a_folder_from_the_hub(tmp_path):
    """config.json has the arguments of the class, in the first versions without its name."""
    w = thresholded("MIXED")
    off = normaliser() | {name: torch.full((2, D), torch.nan) for name in ("activation_mean", "activation_std")}
    save_file(w | off, tmp_path / "model.safetensors")
    config = {
        "activation_dim": D,
        "dict_size": F,
        "num_layers": 2,
        "k": 100,
        "code_normalization": "MIXED",
        "code_normalization_alpha_cc": 0.1,
    }
    for more in ({}, {"dict_class": "BatchTopKCrossCoder"}):
        (tmp_path / "config.json").write_text(json.dumps(config | more))
        acts, out = batch_formula(w, x_of(2), "MIXED")
        check(Dictionary.load(tmp_path), x_of(2), acts, out)


def test_a_place_that_is_written_but_not_read(tmp_path):
    w = learned("CROSSCODER", 3, read=2)
    acts = (torch.einsum("bpd,pdf->bf", x_of(3)[:, [2, 0]], w["encoder.weight"]) + w["encoder.bias"]).relu()
    out = torch.einsum("bf,pfd->bpd", acts, w["decoder.weight"]) + w["decoder.bias"]
    check(Dictionary.load(write(tmp_path / "cc", w, encoder_layers=[2, 0])), x_of(3), acts, out)
    for layers in (None, [0, 0], [0, 3], [0, 1, 2]):
        with pytest.raises(InputError, match="reads 2 of 3 places, and its encoder_layers are"):
            Dictionary.load(write(tmp_path / "cc", w, encoder_layers=layers))


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"threshold": torch.tensor(-1.0)}, {}, "expected a threshold of at least 0 in .*, for SAE, found -1.0"),
        ({"threshold": torch.ones(2)}, {}, "expected a threshold of at least 0"),
        ({"code_normalization_id": torch.tensor(6)}, {}, "code_normalization number 6, expected one of"),
        ({}, {"code_normalization": "MIXED"}, "code_normalization MIXED in its config.json and SAE in its tensors"),
        ({}, {"latent_processor": "f"}, "has a latent_processor, which is code"),
        ({}, {"dict_class": "CrossCoder"}, "holds k, threshold beside"),
        ({}, {"trainer_class": "CrossCoderTrainer"}, "dict_class 'BatchTopKCrossCoder' and trainer_class 'CrossCoderTrainer'"),
    ],
)
def test_what_is_not_understood(tmp_path, change, settings, message):
    with pytest.raises(InputError, match=message):
        Dictionary.load(write(tmp_path / "cc", thresholded("SAE") | change, **settings))
