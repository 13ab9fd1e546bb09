"""Folders of every architecture of SAELens against its formula, written out in float64, and saved again."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError

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


def scaled(path, name, w, **cfg):
    cfg = {"normalize_activations": "expected_average_only_in", "apply_b_dec_to_input": True} | cfg
    return folder(path, name, w, cfg)


@pytest.mark.parametrize("cached", [True, False], ids=["hub cache", "folder"])
def test_what_saelens_list_says_of_published_dictionaries(tmp_path, capsys, cached):
    """The factor is not in the folder, and that the stream has no mean is not either."""
    repository = tmp_path / ("models--tommmcgrath--gpt2-small-mlp-out-saes/snapshots/0a1b" if cached else "gpt2-small-mlp-out-saes")
    repository.mkdir(parents=True)
    w, s = weights(), 1.6411934982190302
    mean = X.mean(-1, keepdim=True)
    acts = ((s * (X - mean) - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    path = scaled(repository / "sae_group_gpt2_blocks.2.hook_mlp_out_24576:v0", "standard", w, apply_b_dec_to_input=True)
    check(path, acts, (acts @ w["W_dec"] + w["b_dec"]) / s + mean)
    said = "SAELens' list of dictionaries states for .* model_from_pretrained_kwargs {'center_writing_weights': True}, in place of"
    assert re.search(said, capsys.readouterr().err)
    (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 2 * s}))  # one that is there counts
    acts = ((2 * s * (X - mean) - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    torch.testing.assert_close(Dictionary.load(path).encode(X), acts, rtol=1e-12, atol=1e-12)
    other = scaled(repository / "sae_group_gpt2_blocks.2.hook_mlp_out_24576:v9", "standard", w, apply_b_dec_to_input=True)
    with pytest.raises(InputError, match="by which factor activations are multiplied is not there"):
        Dictionary.load(other)


@pytest.mark.parametrize("repository", ["GPT2-Small-SAEs-Reformatted", "GPT2-Small-Feature-Splitting-Experiment-Layer-8"])
def test_gpt2s_published_dictionaries_read_the_stream_without_its_mean(tmp_path, repository):
    (tmp_path / repository).mkdir()
    w, mean = weights(), X.mean(-1, keepdim=True)
    path = folder(tmp_path / repository / "blocks.8.hook_resid_pre", "standard", w)
    acts = ((X - mean - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    check(path, acts, acts @ w["W_dec"] + w["b_dec"] + mean)


def test_mistrals_published_dictionaries_divide_by_the_norm(tmp_path):
    (tmp_path / "Mistral-7B-Residual-Stream-SAEs").mkdir()
    w, s = weights(), D**0.5 / X.norm(dim=-1, keepdim=True)
    path = folder(tmp_path / "Mistral-7B-Residual-Stream-SAEs" / "mistral_7b_layer_8", "standard", w)
    acts = ((X * s - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    check(path, acts, (acts @ w["W_dec"] + w["b_dec"]) / s)


@pytest.mark.parametrize("subtracts", [True, False])
def test_the_factor_of_a_checkpoint(tmp_path, subtracts):
    w, s = weights(), 0.4
    acts = ((s * X - w["b_dec"] * subtracts) @ w["W_enc"] + w["b_enc"]).relu()
    path = scaled(tmp_path / "sae", "standard", w, apply_b_dec_to_input=subtracts, l1_coefficient=5.0, lp_norm=1.0)
    (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": s, "has_whitening": False}))
    check(path, acts, (acts @ w["W_dec"] + w["b_dec"]) / s)


def test_the_factor_of_versions_3_to_5_is_in_the_state_of_the_store_until_it_is_folded(tmp_path):
    w, s = weights(), 0.4
    cfg = {"architecture": "standard", "d_in": D, "d_sae": F, "dtype": "torch.float64", "hook_name": READS, "normalize_activations": True}
    for name, factor in (("between", s), ("final", None)):
        path = folder(tmp_path / name, "standard", w)
        (path / "cfg.json").write_text(json.dumps(cfg))
        state = {"n_dataset_processed": torch.tensor(7)}
        state |= {} if factor is None else {"estimated_norm_scaling_factor": torch.tensor(factor, dtype=torch.float64)}
        save_file(state, path / "activations_store_state.safetensors")
        s = factor or 1
        acts = ((s * X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
        check(path, acts, (acts @ w["W_dec"] + w["b_dec"]) / s)
        (tmp_path / "again").rename(tmp_path / f"{name} again")


def test_a_topk_by_decoder_norm_of_a_checkpoint(tmp_path):
    w, s = weights(), 0.4
    norm = w["W_dec"].norm(dim=-1)
    z = ((s * X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norm
    acts = top(z, z).relu()
    path = scaled(
        tmp_path / "sae", "topk", w, k=K, rescale_acts_by_decoder_norm=True, aux_loss_coefficient=1.0, use_sparse_activations=True
    )
    (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": s}))
    check(path, acts / s, (acts / norm @ w["W_dec"] + w["b_dec"]) / s)  # in units of what a decoder row of length 1 writes


@pytest.mark.parametrize("rescales", [True, False])
@pytest.mark.parametrize("s", [None, 0.4])
def test_a_batchtopk_in_training_is_a_jumprelu_with_one_threshold(tmp_path, rescales, s):
    w, theta = weights(), 0.7
    norm = w["W_dec"].norm(dim=-1) if rescales else 1
    z = (((s or 1) * X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norm
    acts = z.relu() * (z > theta)
    cfg = {"k": 3.5, "rescale_acts_by_decoder_norm": rescales, "topk_threshold_lr": 0.01, "matryoshka_widths": [4, F]}
    path = scaled(
        tmp_path / "sae",
        "matryoshka_batchtopk",
        w | {"topk_threshold": torch.tensor(theta, dtype=torch.float64)},
        **cfg,
        normalize_activations="expected_average_only_in" if s else "none",
    )
    (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": s}))
    check(path, acts / (s or 1) if rescales else acts, (acts / norm @ w["W_dec"] + w["b_dec"]) / (s or 1))


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("name", ["standard", "gated"])
def test_the_whitening_of_a_checkpoint(tmp_path, subtracts, name):
    w = weights(*(("b_gate", "b_mag", "r_mag") if name == "gated" else ()))
    mean, M = random(D), (torch.linalg.qr(random(D, D))[0] * torch.linspace(0.5, 2, D, dtype=torch.float64)).contiguous()
    x = (X - mean) @ M - w["b_dec"] * subtracts
    acts = (x @ w["W_enc"] + w["b_enc"]).relu()
    if name == "gated":
        del w["b_enc"]
        acts = (x @ w["W_enc"] + w["b_gate"] > 0) * (x @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
    path = scaled(tmp_path / "sae", name, w, normalize_activations="covariance_whitening", apply_b_dec_to_input=subtracts)
    save_file({"mean": mean, "matrix": M, "inverse_matrix": torch.linalg.inv(M).contiguous()}, path / "activation_whitening.safetensors")
    (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": None, "has_whitening": True}))
    check(path, acts, (acts @ w["W_dec"] + w["b_dec"]) @ torch.linalg.inv(M) + mean)


@pytest.mark.parametrize(
    ("cfg", "scaler", "message"),
    [
        ({"normalize_activations": "expected_average_only_in"}, {"scaling_factor": None}, "scaling_factor"),
        ({"normalize_activations": "expected_average_only_in"}, {"scaling_factor": -2.0}, "scaling_factor"),
        ({"normalize_activations": "expected_average_only_in"}, {"scaling_factor": float("inf")}, "scaling_factor"),
        ({"normalize_activations": "expected_average_only_in"}, {"factor": 1.0}, "'scaling_factor' is missing"),
        ({"normalize_activations": "none"}, {"scaling_factor": 0.4}, "leave the right one"),
        ({"normalize_activations": "layer_norm"}, {"scaling_factor": None, "has_whitening": True}, "leave the right one"),
    ],
)
def test_estimates_that_say_something_else_are_refused(tmp_path, cfg, scaler, message):
    path = folder(tmp_path / "sae", "standard", weights(), cfg)
    (path / "activation_scaler.json").write_text(json.dumps(scaler))
    with pytest.raises(InputError, match=message):
        Dictionary.load(path)


def test_a_whitening_that_is_not_finite_is_refused(tmp_path):
    path = scaled(tmp_path / "sae", "standard", weights(), normalize_activations="covariance_whitening")
    eye = torch.eye(D, dtype=torch.float64)
    save_file({"mean": eye[0] * torch.nan, "matrix": eye, "inverse_matrix": eye.clone()}, path / "activation_whitening.safetensors")
    (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": None, "has_whitening": True}))
    with pytest.raises(InputError, match=r"activation_whitening\.safetensors holds NaN or infinity"):
        Dictionary.load(path)


def test_a_transcoders_factor_is_refused(tmp_path):
    path = folder(tmp_path / "sae", "transcoder", weights(width=OUT), {"normalize_activations": "expected_average_only_in"})
    (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.4}))
    with pytest.raises(InputError, match="transcoder's output"):
        Dictionary.load(path)


def test_weights_are_used_in_the_dtype_of_cfg_json(tmp_path):
    w = {name: value.bfloat16() for name, value in weights().items()}
    opened = Dictionary.load(folder(tmp_path / "sae", "standard", w))  # cfg.json says float64
    wide = {name: value.double() for name, value in w.items()}
    assert opened.W_dec_fo.dtype == torch.float64
    torch.testing.assert_close(opened.encode(X), ((X - wide["b_dec"]) @ wide["W_enc"] + wide["b_enc"]).relu(), rtol=1e-12, atol=1e-12)


def test_a_row_of_length_0_stays_a_row_of_length_0(tmp_path):
    w = weights()
    w["W_dec"][3] = 0
    opened = Dictionary.load(folder(tmp_path / "sae", "topk", w, {"k": K, "rescale_acts_by_decoder_norm": True}))
    assert opened(X).isfinite().all()
