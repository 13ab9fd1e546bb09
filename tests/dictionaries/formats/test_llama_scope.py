"""Llama Scope in both layouts of OpenMOSS' tools against what their authors' code computes, written out in float64."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError

D, F, K, THETA = 6, 12, 4, 0.9
IN, OUT = 3.0, 5.0
"""mean norms of what is read and written"""
X = torch.randn(40, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
HOOK = "blocks.3.hook_resid_post"
TRANSCODER = {"hook_point_in": "blocks.3.ln2.hook_normalized", "hook_point_out": "blocks.3.hook_mlp_out"}


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights():
    """Rows of the decoder have lengths far from 1."""
    decoder = random(D, F, seed=3) * torch.linspace(0.3, 2, F, dtype=torch.float64)
    return {
        "encoder.weight": random(F, D, seed=1),
        "encoder.bias": random(F, seed=2),
        "decoder.weight": decoder,
        "decoder.bias": random(D, seed=4),
    }


def version_1(path, w=None, weights_in="checkpoints/final.safetensors", **change):
    (path / weights_in).parent.mkdir(parents=True)
    w = weights() if w is None else w
    torch.save({"sae": w, "version": "1"}, path / weights_in) if weights_in.endswith(".pt") else save_file(w, path / weights_in)
    cfg = {"d_model": D, "d_sae": F, "hook_point_in": HOOK, "hook_point_out": HOOK, "act_fn": "topk", "top_k": K}
    cfg |= {"jump_relu_threshold": THETA, "norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": IN, "out": IN}}
    cfg |= {"sparsity_include_decoder_norm": True, "apply_decoder_bias_to_pre_encoder": False, "use_decoder_bias": True}
    (path / "hyperparams.json").write_text(json.dumps(cfg | {"use_glu_encoder": False, "lp": 1, "seed": 42} | change))
    return path


def gated(act_fn, z, scores, theta):
    if act_fn == "relu":
        return z * (scores > 0)
    if act_fn in ("topk", "batchtopk"):
        return z * torch.zeros_like(z).scatter_(-1, scores.relu().topk(K).indices, 1) * (scores > 0)
    return z * (scores > theta)


def authors_1(w, act_fn, theta, norm_in, norm_out, *, unit=True, subtracts=False):
    """The three steps of their loader, in their order: norms of the data, decoder norm, threshold."""
    s_in, s_out = D**0.5 / norm_in, D**0.5 / norm_out
    W_e, b_e, W_d, b_d = w["encoder.weight"], w["encoder.bias"], w["decoder.weight"], w["decoder.bias"]
    b_e, W_d, b_d = b_e / s_in, W_d * s_in / s_out, b_d / s_out
    if unit:
        n = W_d.norm(dim=0)
        W_d, W_e, b_e = W_d / n, W_e * n[:, None], b_e * n
    z = (X - b_d if subtracts else X) @ W_e.T + b_e
    acts = gated(act_fn, z, z, theta)
    return acts, acts @ W_d.T + b_d


def same(dictionary, expected):
    for found, wanted in zip((dictionary.encode(X), dictionary(X)), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("file", ["checkpoints/final.safetensors", "checkpoints/pruned.pt", "sae_weights.safetensors"])
def test_version_1_has_the_decoder_norm_ahead_of_the_threshold(tmp_path, file):
    w = weights()
    path = version_1(tmp_path / "Llama3_1-8B-Base-LXR-8x" / "Llama3_1-8B-Base-L3R-8x", w, file)
    for dictionary in (Dictionary.load(path), Dictionary.load(path / file)):
        same(dictionary, authors_1(w, "jumprelu", THETA, IN, IN))
        assert dictionary.metadata["model_name"] == "meta-llama/Llama-3.1-8B"
        assert dictionary.metadata["promised"] == {"l0": K}
        assert dictionary.site == dictionary.site_out == "resid_post.3"
    other, _ = authors_1(w, "jumprelu", THETA, IN, IN, unit=False)
    assert ((other != 0) != (dictionary.encode(X) != 0)).any()  # the lengths decide which features fire


@pytest.mark.parametrize(("act_fn", "theta"), [("topk", 0), ("relu", 0), ("jumprelu", THETA)])
@pytest.mark.parametrize("unit", [True, False])
def test_version_1_without_the_threshold_of_inference(tmp_path, act_fn, theta, unit):
    path = version_1(tmp_path / "x", act_fn=act_fn, jump_relu_threshold=theta, sparsity_include_decoder_norm=unit)
    same(Dictionary.load(path), authors_1(weights(), act_fn, theta, IN, IN, unit=unit))


def test_a_transcoder_of_version_1_has_two_norms(tmp_path):
    dictionary = Dictionary.load(version_1(tmp_path / "x", dataset_average_activation_norm={"in": IN, "out": OUT}, **TRANSCODER))
    same(dictionary, authors_1(weights(), "jumprelu", THETA, IN, OUT))
    assert (dictionary.site, dictionary.site_out) == ("mlp_in_nogain.3", "mlp_out.3")


def test_version_1_with_the_bias_taken_off_or_none_or_folded(tmp_path):
    w = weights()
    same(
        Dictionary.load(version_1(tmp_path / "a", apply_decoder_bias_to_pre_encoder=True)),
        authors_1(w, "jumprelu", THETA, IN, IN, subtracts=True),
    )
    folded = version_1(tmp_path / "b", norm_activation="inference")
    same(Dictionary.load(folded), authors_1(w, "jumprelu", THETA, D**0.5, D**0.5))
    without = {name: tensor for name, tensor in w.items() if name != "decoder.bias"}
    path = version_1(tmp_path / "c", without, use_decoder_bias=False, apply_decoder_bias_to_pre_encoder=True)
    same(Dictionary.load(path), authors_1(w | {"decoder.bias": torch.zeros(D, dtype=torch.float64)}, "jumprelu", THETA, IN, IN))


def test_the_file_beside_it_names_the_model(tmp_path):
    path = version_1(tmp_path / "x")
    assert "model_name" not in Dictionary.load(path).metadata
    (path / "lm_config.json").write_text(json.dumps({"model_name": "openai-community/gpt2", "d_model": 768}))
    assert Dictionary.load(path).metadata["model_name"] == "openai-community/gpt2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_activation": "token-wise"}, "norm_activation 'token-wise', which is not understood; expected 'dataset-wise'"),
        ({"use_glu_encoder": True}, "use_glu_encoder True, which is not understood"),
        ({"act_fn": "gelu"}, "act_fn 'gelu', which is not understood"),
        ({"rotation": 1}, "hyperparams.json has rotation, which may change what the dictionary computes"),
        (
            {"dataset_average_activation_norm": {"in": 0, "out": 2}},
            "expected dataset_average_activation_norm in .* with in and out above 0",
        ),
        ({"dataset_average_activation_norm": None}, "expected dataset_average_activation_norm in"),
        ({"jump_relu_threshold": -1}, "has jump_relu_threshold -1, where at least 0"),
        ({"jump_relu_threshold": 0, "top_k": F + 1}, "has top_k 13, where a whole number from 1 to 12 is expected"),
        ({"hook_point_in": "blocks.3.hook_elsewhere"}, "names the hook 'blocks.3.hook_elsewhere', which is none of the sites"),
        (TRANSCODER | {"apply_decoder_bias_to_pre_encoder": True}, "takes the bias of .*hook_mlp_out off what it reads at"),
        ({"d_sae": F + 1}, r"expected encoder.weight in .* with f = 13, d = 6, found \[12, 6\]"),
        ({"d_model": "x"}, "'d_model' should be a valid integer"),
    ],
)
def test_version_1_that_is_not_understood(tmp_path, change, message):
    with pytest.raises(InputError, match=message) as error:
        Dictionary.load(version_1(tmp_path / "x", **change))
    assert "\n" not in str(error.value)


# Llamascopium


def version_2(path, early=False, norms=True, act_fn="jumprelu", **change):
    path.mkdir(parents=True)
    w = weights()
    theta = {"log_jumprelu_threshold": theta_f().log()} if act_fn == "jumprelu" else {}
    if early:
        tensors = w | theta
    else:
        tensors = {"W_E": w["encoder.weight"].T.contiguous(), "b_E": w["encoder.bias"], "W_D": w["decoder.weight"].T.contiguous()}
        tensors |= {"b_D": w["decoder.bias"]} | {f"activation_function.{name}": tensor for name, tensor in theta.items()}
    cfg = {"sae_type": "sae", "d_model": D, "expansion_factor": F / D, "hook_point_in": HOOK, "hook_point_out": HOOK, "act_fn": act_fn}
    cfg |= {"top_k": K, "norm_activation": "dataset-wise", "use_triton_kernel": False, "sparsity_include_decoder_norm": True} | change
    if norms:
        hooks = {cfg["hook_point_in"]: IN, cfg["hook_point_out"]: IN if cfg["hook_point_in"] == cfg["hook_point_out"] else OUT}
        tensors |= {f"dataset_average_activation_norm.{hook}": torch.tensor(norm) for hook, norm in hooks.items()}
    save_file(tensors, path / "sae_weights.safetensors")
    (path / "config.json").write_text(json.dumps(cfg))
    return path


def theta_f():
    return torch.linspace(0.2, 2, F, dtype=torch.float64)


def authors_2(act_fn, s_in, s_out, *, weighs=True, subtracts=False):
    """Activations are normalised, encoded, gated by activation times decoder norm, decoded and brought back."""
    w = weights()
    x = X * s_in - (w["decoder.bias"] if subtracts else 0)
    z = x @ w["encoder.weight"].T + w["encoder.bias"]
    n = w["decoder.weight"].norm(dim=0) if weighs else 1
    acts = gated(act_fn, z, z * n, theta_f())
    out = (acts @ w["decoder.weight"].T + w["decoder.bias"]) / s_out
    return acts * n if "topk" in act_fn else acts, out


@pytest.mark.parametrize("early", [True, False], ids=["early names", "today's"])
@pytest.mark.parametrize("weighs", [True, False])
@pytest.mark.parametrize("act_fn", ["jumprelu", "relu", "topk", "batchtopk"])
def test_version_2(tmp_path, capsys, act_fn, weighs, early):
    path = tmp_path / "Llama-Scope-R1-Distill" / "0-Slimpajama-800M-OpenR1-Math-220k" / "L3R"
    version_2(path, early, act_fn=act_fn, sparsity_include_decoder_norm=weighs)
    for dictionary in (Dictionary.load(path), Dictionary.load(path / "sae_weights.safetensors")):
        same(dictionary, authors_2(act_fn, D**0.5 / IN, D**0.5 / IN, weighs=weighs))
        assert dictionary.site == dictionary.site_out == "resid_post.3"
        assert dictionary.metadata["model_name"] == "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    assert (f"keeps {K} features of a token in the mean" in capsys.readouterr().err) == (act_fn == "batchtopk")


def test_a_transcoder_of_version_2_has_two_norms(tmp_path):
    dictionary = Dictionary.load(version_2(tmp_path / "x", **TRANSCODER))
    same(dictionary, authors_2("jumprelu", D**0.5 / IN, D**0.5 / OUT))
    assert (dictionary.site, dictionary.site_out) == ("mlp_in_nogain.3", "mlp_out.3")


def test_version_2_with_other_norms(tmp_path):
    folded = version_2(tmp_path / "a", norm_activation="inference")
    same(Dictionary.load(folded), authors_2("jumprelu", 1, 1))
    tokens = version_2(tmp_path / "b", norms=False, norm_activation="token-wise")
    s = D**0.5 / X.norm(dim=-1, keepdim=True)
    same(Dictionary.load(tokens), authors_2("jumprelu", s, s))
    subtracting = version_2(tmp_path / "c", True, apply_decoder_bias_to_pre_encoder=True)
    same(Dictionary.load(subtracting), authors_2("jumprelu", D**0.5 / IN, D**0.5 / IN, subtracts=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sae_type": "crosscoder"}, "is of sae_type 'crosscoder', which is not known here; expected 'sae'"),
        ({"norm_activation": "batch-wise"}, "norm_activation 'batch-wise', which is not understood"),
        ({"norms": False}, "expected dataset_average_activation_norm.blocks.3.hook_resid_post in .*, each one number above 0"),
        (TRANSCODER | {"norm_activation": "token-wise"}, "a transcoder's output needs the norm of its target"),
        ({"use_glu_encoder": True}, "use_glu_encoder True, which is not understood"),
        ({"rotation": 1}, "config.json has rotation, which may change"),
        ({"act_fn": "topk", "top_k": 0}, "has top_k 0, where a whole number"),
        ({"hook_point_in": "blocks.3.hook_elsewhere"}, "names the hook 'blocks.3.hook_elsewhere'"),
        ({"expansion_factor": 3}, r"with d = 6, f = 18"),
        ({"use_decoder_bias": False}, "holds b_D beside"),
    ],
)
def test_version_2_that_is_not_understood(tmp_path, change, message):
    change = {"hook_point_out": HOOK} | change
    with pytest.raises(InputError, match=message) as error:
        Dictionary.load(version_2(tmp_path / "x", **change))
    assert "\n" not in str(error.value)


def test_a_row_of_zeros_of_the_decoder_adds_nothing(tmp_path):
    w = weights()
    w["decoder.weight"][:, 5] = 0
    dictionary = Dictionary.load(version_1(tmp_path / "x", w))
    assert dictionary(X).isfinite().all()
    dictionary.save(tmp_path / "saved")
    torch.testing.assert_close(Dictionary.load(tmp_path / "saved")(X), dictionary(X))


@pytest.mark.parametrize("inside", [None, {"sae": 1}, {"sae": {"encoder.weight": [1.0]}}, {"model": weights()}])
def test_a_pt_file_without_a_dictionary(tmp_path, inside):
    path = version_1(tmp_path / "x", weights_in="checkpoints/final.pt")
    torch.save(inside, path / "checkpoints" / "final.pt")
    with pytest.raises(InputError, match=r"expected the tensors of a dictionary under 'sae' in .*final.pt, found other things"):
        Dictionary.load(path)
