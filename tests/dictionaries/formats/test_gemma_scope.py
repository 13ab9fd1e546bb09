"""Files as Gemma Scope publishes them, against its formula written out in float64."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError

D, F, OUT = 6, 10, 5
X = torch.randn(40, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5


def weights(out=D):
    random = torch.Generator().manual_seed(1)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, out), "b_dec": (out,), "threshold": (F,)}
    w = {name: torch.randn(shape, generator=random, dtype=torch.float64) for name, shape in shapes.items()}
    return w | {"threshold": w["threshold"].abs()}


def formula(w, x):
    z = x @ w["W_enc"] + w["b_enc"]
    acts = z.relu() * (z > w["threshold"])
    return acts, acts @ w["W_dec"] + w["b_dec"]


def write_1(folder, w, compress=False):
    folder.mkdir(parents=True)
    (np.savez_compressed if compress else np.savez)(folder / "params.npz", **{name: tensor.numpy() for name, tensor in w.items()})
    return folder


def same(dictionary, expected, x=X):
    for found, wanted in zip((dictionary.encode(x), dictionary(x)), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "site", "site_out", "model"),
    [
        ("gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", "resid_post.12", "resid_post.12", "google/gemma-2-2b"),
        ("gemma-scope-9b-it-res/layer_9/width_16k/average_l0_82", "resid_post.9", "resid_post.9", "google/gemma-2-9b-it"),
        ("gemma-scope-9b-pt-mlp/layer_3/width_16k/average_l0_82", "mlp_out.3", "mlp_out.3", "google/gemma-2-9b"),
        ("gemma-scope-27b-pt-att/layer_10/width_131k/average_l0_82", "head_out.10", "head_out.10", "google/gemma-2-27b"),
        ("gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_82", "mlp_in_nogain.0", "mlp_out.0", "google/gemma-2-2b"),
        ("nothing/is/known/average_l0_82", None, None, None),
    ],
)
@pytest.mark.parametrize("cached", [True, False], ids=["hub cache", "folder"])
def test_gemma_scope(tmp_path, name, site, site_out, model, cached):
    owner = "models--google--" if cached else ""
    repo, rest = name.split("/", 1)
    w = weights()
    lower = {key.replace("W_", "w_") if cached else key: value for key, value in w.items()}
    path = write_1(tmp_path / f"{owner}{repo}" / ("snapshots/0a1b" if cached else "") / rest, lower, compress=cached)
    dictionary = Dictionary.load(path)
    same(dictionary, formula(w, X))
    assert (dictionary.site, dictionary.site_out) == (site, site_out)
    assert dictionary.metadata.get("model_name") == model
    assert dictionary.metadata["promised"] == {"l0": 82}
    assert torch.equal(Dictionary.load(path / "params.npz").W_dec_fo, dictionary.W_dec_fo)  # the file itself


def test_embeddings_are_read_after_gemma_has_scaled_them(tmp_path):
    w = weights()
    acts, out = formula(w, X)
    dictionary = Dictionary.load(write_1(tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_44", w))
    same(dictionary, (acts, out * D**0.5), X * D**0.5)
    assert dictionary.site == "resid_pre.0"


def write_2(folder, w, config):
    folder.mkdir(parents=True)
    save_file({name.replace("W_", "w_"): tensor for name, tensor in w.items()}, folder / "params.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", "model_name": "gemma-v3-1b-it"} | config))
    return folder


HOOKS = [
    ("resid_post_all/layer_3_width_16k_l0_small", "language_model.model.layers.3.output", None, "resid_post.3", "resid_post.3"),
    ("attn_out/layer_3_width_16k_l0_small", "model.layers.3.self_attn.o_proj.input", None, "head_out.3", "head_out.3"),
    ("mlp_out_all/layer_3_width_16k_l0_small", "model.layers.3.post_feedforward_layernorm.output", None, "mlp_out.3", "mlp_out.3"),
    (
        "transcoder_all/layer_3_width_16k_l0_small",
        "model.layers.3.pre_feedforward_layernorm.output",
        "model.layers.3.post_feedforward_layernorm.output",
        *("mlp_in.3", "mlp_out.3"),
    ),
]


@pytest.mark.parametrize(("name", "reads", "writes", "site", "site_out"), HOOKS)
@pytest.mark.parametrize("told", [True, False], ids=["config.json", "names"])
def test_gemma_scope_2(tmp_path, name, reads, writes, site, site_out, told):
    affine = writes is not None
    w = weights(OUT if affine else D)
    acts, out = formula(w, X)
    if affine:
        w["affine_skip_connection"] = torch.linspace(-1, 1, D * OUT, dtype=torch.float64).reshape(D, OUT)
        out = out + X @ w["affine_skip_connection"]
    config = {"hf_hook_point_in": reads, "hf_hook_point_out": writes, "affine_connection": affine}
    place = tmp_path / ("x" if told else f"gemma-scope-2-1b-it/{name}_affine")
    dictionary = Dictionary.load(write_2(place, w, config if told else None))
    same(dictionary, (acts, out))
    assert (dictionary.site, dictionary.site_out) == (site, site_out)
    assert dictionary.metadata["model_name"] == "google/gemma-3-1b-it"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "topk"}, "architecture 'topk', which is not understood; expected 'jump_relu'"),
        ({"affine_connection": True}, "affine_connection True, which is not understood; expected False"),
        ({"hf_hook_point_in": "model.layers.3.mlp.output"}, "hook point 'model.layers.3.mlp.output', which is none of"),
        ({"model_name": 3}, "'model_name' should be a valid string"),
    ],
)
def test_a_config_that_says_something_else_is_refused(tmp_path, change, message):
    config = {"hf_hook_point_in": "model.layers.3.output"} | change
    with pytest.raises(InputError, match=message):
        Dictionary.load(write_2(tmp_path / "x", weights(), config))


def test_a_scaling_factor_is_refused_unless_it_is_one(tmp_path):
    assert Dictionary.load(write_1(tmp_path / "a", weights() | {"scaling_factor": torch.ones(F)})).d_sae == F
    with pytest.raises(InputError, match="scaling_factor other than 1"):
        Dictionary.load(write_1(tmp_path / "b", weights() | {"scaling_factor": torch.full((F,), 2.0)}))
