"""Folders of every architecture of SAELens against its formula, written out in float64, and saved again."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sae.dictionaries.dictionary import Dictionary

D, F, OUT, K = 6, 10, 5, 4
READS, WRITES = "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"
G = torch.Generator().manual_seed(0)
X = torch.randn(40, D, generator=G, dtype=torch.float64) + 0.5


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def folder(path, architecture, w, extra=(), **metadata):
    path.mkdir()
    transcoder = "transcoder" in architecture
    hooks = {"hook_name": READS} | ({"hook_name_out": WRITES} if transcoder else {})
    cfg = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": F,
        "dtype": "float64",
        "apply_b_dec_to_input": not transcoder,
        "normalize_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", **hooks, **metadata},
    }
    (path / "cfg.json").write_text(json.dumps(cfg | ({"d_out": OUT} if transcoder else {}) | dict(extra)))
    save_file(w, path / "sae_weights.safetensors")
    return path


def weights(*more, width=D):
    w = {"W_enc": random(D, F), "b_enc": random(F) / 3, "W_dec": random(F, width), "b_dec": random(width)}
    return w | {name: random(width, D) if name == "W_skip" else random(F).abs() if name == "threshold" else random(F) for name in more}


def top(z, by):
    keep = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, by.topk(K).indices, True)
    return torch.where(keep, z, 0)


def check(path, acts, out, x=X):
    """The folder as it stands, and as we write it."""
    opened = Dictionary.load(path)
    opened.save(path.with_name("again"))
    for dictionary in (opened, Dictionary.load(path.with_name("again"))):
        torch.testing.assert_close(dictionary.encode(x), acts, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dictionary(x), out, rtol=1e-12, atol=1e-12)
    return opened


@pytest.mark.parametrize("subtracts", [True, False])
def test_jumprelu_and_gated(tmp_path, subtracts):
    flag = {"apply_b_dec_to_input": subtracts}
    w = weights("threshold")
    x = X - w["b_dec"] * subtracts
    z = x @ w["W_enc"] + w["b_enc"]
    acts = z.relu() * (z > w["threshold"])
    check(folder(tmp_path / "jumprelu", "jumprelu", w, flag), acts, acts @ w["W_dec"] + w["b_dec"])

    w = weights("b_gate", "b_mag", "r_mag")
    del w["b_enc"]
    x = X - w["b_dec"] * subtracts
    acts = (x @ w["W_enc"] + w["b_gate"] > 0) * (x @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
    check(folder(tmp_path / "gated", "gated", w, flag), acts, acts @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("rescales", [True, False])
def test_topk_and_abstopk(tmp_path, rescales):
    w = weights()
    z = (X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    z = z * w["W_dec"].norm(dim=-1) if rescales else z
    for name, acts in (("topk", top(z, z).relu()), ("abstopk", top(z, z.abs()))):
        out = (acts / w["W_dec"].norm(dim=-1) if rescales else acts) @ w["W_dec"] + w["b_dec"]
        opened = check(folder(tmp_path / name, name, w, {"k": K, "rescale_acts_by_decoder_norm": rescales}), acts, out)
        assert opened.gate.signed == (name == "abstopk")
        (tmp_path / "again").rename(tmp_path / f"{name} again")


def test_topk_of_versions_3_to_5(tmp_path):
    w = weights()
    z = (X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    acts = top(z, z).relu()
    path = folder(tmp_path / "sae", "standard", w)
    cfg = {"architecture": "standard", "d_in": D, "d_sae": F, "dtype": "torch.float64", "hook_name": READS}
    (path / "cfg.json").write_text(json.dumps(cfg | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}))
    check(path, acts, acts @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"])
def test_transcoders(tmp_path, architecture):
    more = (["W_skip"] if "skip" in architecture else []) + (["threshold"] if "jumprelu" in architecture else [])
    w = weights(*more, width=OUT)
    z = X @ w["W_enc"] + w["b_enc"]
    acts = z.relu() * (z > w.get("threshold", torch.zeros(F)))
    out = acts @ w["W_dec"] + w["b_dec"] + (X @ w["W_skip"].T if "W_skip" in w else 0)
    opened = check(folder(tmp_path / "sae", architecture, w), acts, out)
    assert (opened.site, opened.site_out) == ("resid_pre.1", "mlp_out.1")
    assert opened.is_transcoder


def test_normalisation_at_run_time(tmp_path):
    w = weights()
    norm = X.norm(dim=-1, keepdim=True) / D**0.5
    acts = ((X / norm - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    path = folder(tmp_path / "constant", "standard", w, {"normalize_activations": "constant_norm_rescale"})
    check(path, acts, (acts @ w["W_dec"] + w["b_dec"]) * norm)
    (tmp_path / "again").rename(tmp_path / "constant again")

    mean = X.mean(-1, keepdim=True)
    std = (X - mean).std(-1, keepdim=True)
    acts = (((X - mean) / (std + 1e-5) - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    check(
        folder(tmp_path / "layer", "standard", w, {"normalize_activations": "layer_norm"}),
        acts,
        (acts @ w["W_dec"] + w["b_dec"]) * std + mean,
    )


def test_a_model_whose_writing_weights_were_centred(tmp_path):
    """Trained on the stream without its mean over the width, which leaves the rest of the stream as it is."""
    w = weights()
    mean = X.mean(-1, keepdim=True)
    acts = ((X - mean - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    path = folder(tmp_path / "sae", "standard", w, model_from_pretrained_kwargs={"center_writing_weights": True})
    check(path, acts, acts @ w["W_dec"] + w["b_dec"] + mean)


def test_the_factors_of_fine_tuning(tmp_path):
    w = weights() | {"scaling_factor": random(F).abs()}
    acts = ((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    path = folder(tmp_path / "sae", "standard", w, {"finetuning_scaling_factor": True})
    check(path, acts, (acts * w["scaling_factor"]) @ w["W_dec"] + w["b_dec"])
