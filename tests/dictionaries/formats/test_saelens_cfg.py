"""Which folders of SAELens open, and which are refused by name: cfg.json of all its versions, written down from its wheels."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.formats.transformer_lens import HOOK_NAMES, hook_of_site, site_of_hook
from sae.errors import InputError

D, F = 6, 10
HOOK = "blocks.1.hook_resid_post"

VERSION_6 = {
    "d_in": D,
    "d_sae": F,
    "dtype": "float32",
    "device": "cuda",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {
        "sae_lens_version": "6.54.12",
        "sae_lens_training_version": "6.54.12",
        "model_name": "gpt2-small",
        "hook_name": HOOK,
        "hook_head_index": None,
        "context_size": 128,
        "prepend_bos": True,
        "seqpos_slice": [None],
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
        "training_architecture": "standard",
        "training_architecture_details": {"l1_coefficient": 5},
    },
    "architecture": "standard",
}
VERSION_3 = {  # to 5
    "architecture": "standard",
    "d_in": D,
    "d_sae": F,
    "dtype": "torch.float32",
    "device": "cuda",
    "model_name": "gpt2-small",
    "hook_name": HOOK,
    "hook_layer": 1,
    "hook_head_index": None,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "sae_lens_training_version": "5.11.0",
    "prepend_bos": True,
    "dataset_path": "Skylion007/openwebtext",
    "dataset_trust_remote_code": True,
    "context_size": 128,
    "normalize_activations": "none",
    "neuronpedia_id": "gpt2-small/1-res-jb",
    "model_from_pretrained_kwargs": {},
    "seqpos_slice": [None],
}
VERSION_2 = {  # and older: the whole run's settings, of which these are some
    "model_name": "gpt2-small",
    "hook_point": HOOK,
    "hook_point_layer": 1,
    "hook_point_head_index": None,
    "dataset_path": "Skylion007/openwebtext",
    "context_size": 128,
    "d_in": D,
    "d_sae": F,
    "dtype": "torch.float32",
    "device": "mps",
    "seed": 42,
    "expansion_factor": 32,
    "b_dec_init_method": "geometric_median",
    "l1_coefficient": 8e-05,
    "lr": 0.0004,
    "use_ghost_grads": True,
    "train_batch_size": 4096,
}


def tensors(**others):
    g = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()} | others


def write(folder, cfg, weights=None):
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(weights or tensors(), folder / "sae_weights.safetensors")
    return folder


def in_metadata(**changes):
    return {"metadata": VERSION_6["metadata"] | changes}


@pytest.mark.parametrize("cfg", [VERSION_6, VERSION_3, VERSION_2], ids=["6", "3 to 5", "2"])
@pytest.mark.parametrize("more", [{}, {"scaling_factor": torch.ones(F)}], ids=["four tensors", "and a factor of ones"])
def test_plain_dictionaries_of_all_versions_open_at_their_site(tmp_path, capsys, cfg, more):
    sae, x_bd = Dictionary.load(write(tmp_path, cfg, tensors(**more))), torch.randn(7, D)
    w = tensors()
    acts_bf = torch.relu((x_bd - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    torch.testing.assert_close(sae.encode(x_bd), acts_bf)
    torch.testing.assert_close(sae(x_bd), acts_bf @ w["W_dec"] + w["b_dec"])
    assert sae.site == "resid_post.1"
    assert sae.metadata["model_name"] == "gpt2-small"
    assert sae.metadata["context_size"] == 128
    said = capsys.readouterr().err
    if cfg is VERSION_2:
        assert said.count("\n") == 1
        assert "b_dec_init_method, expansion_factor, lr, seed, train_batch_size" in said
    else:
        assert said == ""


@pytest.mark.parametrize(
    ("cfg", "change"),
    [
        (VERSION_6, {"normalize_activations": None}),
        (VERSION_3, {"normalize_activations": False}),
        (VERSION_3, {"noise_scale": 0.1, "lp_norm": 1, "mse_loss_normalization": None}),
        (VERSION_6, {"l1_coefficient": 5.0, "decoder_init_norm": 0.1, "lp_norm": 1.0, "l1_warm_up_steps": 0}),
        (VERSION_6, in_metadata(my_own_fact="kept", exclude_special_tokens=True)),
        (VERSION_3, {"model_from_pretrained_kwargs": {"fold_ln": True, "center_unembed": True, "fold_value_biases": True}}),
        (VERSION_2, {"hook_point": "blocks.{layer}.hook_resid_post"}),
    ],
)
def test_facts_that_change_nothing_are_kept(tmp_path, cfg, change):
    sae = Dictionary.load(write(tmp_path, cfg | change))
    assert sae.site == "resid_post.1"
    if "metadata" in change:
        assert sae.metadata["my_own_fact"] == "kept"


@pytest.mark.parametrize(
    ("cfg", "change", "message"),
    [
        (VERSION_3, {"activation_fn_str": "tanh-relu"}, "activation_fn 'tanh-relu'"),
        (VERSION_2, {"activation_fn": "topk"}, "k None"),
        (VERSION_3, {"activation_fn_kwargs": {"k": 8}}, "k 8 and architecture 'standard'"),
        (VERSION_3, {"activation_fn_kwargs": {"k": 8, "slope": 2}}, "activation_fn_kwargs"),
        (VERSION_6, {"architecture": "topk"}, "k None"),
        (VERSION_6, {"architecture": "topk", "k": 11}, "k 11"),
        (VERSION_6, {"architecture": "topk", "k": True}, "k True"),
        (VERSION_6, {"architecture": "crosscoder"}, "architecture 'crosscoder'.*expected 'standard' or 'jumprelu'"),
        (VERSION_6, {"architecture": "temporal"}, "architecture 'temporal', which attends to earlier tokens"),
        (VERSION_6, {"architecture": "matching_pursuit"}, "architecture 'matching_pursuit', which chooses .* what is left"),
        (VERSION_6, {"architecture": "jumprelu"}, "lacks threshold"),
        (VERSION_6, {"k": 8}, "k 8"),
        (VERSION_6, {"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm"),
        (VERSION_6, {"normalize_activations": "expected_average_only_in"}, r"'expected_average_only_in'.*activation_scaler\.json"),
        (VERSION_3, {"normalize_activations": True}, r"'expected_average_only_in'.*activation_scaler\.json"),
        (VERSION_6, {"normalize_activations": "covariance_whitening"}, r"'covariance_whitening'.*activation_whitening\.safetensors"),
        (VERSION_6, {"normalize_activations": "unit"}, "normalize_activations 'unit'"),
        (VERSION_6, {"reshape_activations": "hook_q"}, "reshape_activations"),
        (VERSION_6, {"reshape_activations": "hook_z"}, "reshape_activations 'hook_z', but reads resid_post.1"),
        (VERSION_6, {"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input 'yes'"),
        (VERSION_6, {"use_error_term": True}, "use_error_term"),
        (VERSION_6, {"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
        (VERSION_3, {"finetuning_scaling_factor": True}, "scaling_factor"),
        (VERSION_3, {"hook_head_index": 3}, "hook_head_index 3"),
        (VERSION_2, {"hook_point_head_index": 3}, "hook_head_index 3"),
        (VERSION_6, in_metadata(hook_head_index=3), "hook_head_index 3"),
        (VERSION_6, in_metadata(hook_name_out="blocks.1.hook_mlp_out"), "hook_name_out"),
        (
            VERSION_6,
            in_metadata(model_from_pretrained_kwargs={"center_writing_weights": True}) | {"normalize_activations": "constant_norm_rescale"},
            "center_writing_weights",
        ),
        (VERSION_6, {"architecture": "transcoder", "d_out": D, "apply_b_dec_to_input": False}, "hook_name_out None"),
        (
            VERSION_6,
            {"architecture": "transcoder", "d_out": D} | in_metadata(hook_name_out="blocks.1.hook_mlp_out"),
            "apply_b_dec_to_input true",
        ),
        (VERSION_3, {"model_from_pretrained_kwargs": {"checkpoint_index": 4}}, "checkpoint_index"),
        (VERSION_3, {"model_from_pretrained_kwargs": [1]}, "where an object is expected"),
        (
            VERSION_6,
            in_metadata(hook_name="blocks.1.attn.hook_z", model_from_pretrained_kwargs={"refactor_factored_attn_matrices": True}),
            "refactor_factored_attn_matrices",
        ),
        (
            VERSION_6,
            in_metadata(hook_name="blocks.1.attn.hook_v", model_from_pretrained_kwargs={"fold_value_biases": True}),
            "fold_value_biases",
        ),
        (VERSION_6, in_metadata(hook_name="blocks.1.hook_pos_embed"), "'blocks.1.hook_pos_embed', which is none of the sites"),
        (VERSION_3, {"hook_name": "blocks.1.ln1.hook_scale"}, "none of the sites"),
        (VERSION_2, {"hook_point": "model.layers.3"}, "none of the sites"),
        (VERSION_3, {"hook_layer": 3}, "hook_layer 3"),
        (VERSION_6, in_metadata(site="resid_post.0"), "site 'resid_post.0'"),
        (VERSION_6, in_metadata(site="somewhere"), "expected a site of the model"),
        (VERSION_6, {"hook_name": "blocks.0.hook_resid_post"}, "two things of hook_name"),
        (VERSION_6, {"post_bias": True}, "post_bias, which may change"),
        (VERSION_6, {"d_out": D + 1}, "d_out 7"),
        (VERSION_6, {"d_sae": 11}, r"W_enc .* has shape \(6, 10\) where cfg.json asks for \(6, 11\)"),
        (VERSION_6, {"d_in": None}, "d_in None"),
        (VERSION_3, {"d_in": 6.0}, "d_in 6.0"),
        (VERSION_6, {"metadata": "none"}, "'metadata' should be a valid dictionary"),
    ],
)
def test_what_changes_the_function_or_what_it_reads_is_refused_by_name(tmp_path, cfg, change, message):
    with pytest.raises(InputError, match=message):
        Dictionary.load(write(tmp_path, cfg | change))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"threshold": torch.zeros(F)}, "holds threshold beside"),
        ({"W_skip": torch.zeros(D, D)}, "holds W_skip beside"),
        ({"r_mag": torch.zeros(F), "b_gate": torch.zeros(F)}, "b_gate, r_mag"),
        ({"scaling_factor": torch.full((F,), 1.5)}, "scaling_factor"),
        ({"b_enc": torch.full((F,), torch.nan)}, "b_enc .* NaN or infinity"),
        ({"W_dec": torch.full((F, D), -torch.inf)}, "W_dec .* NaN or infinity"),
        ({"W_enc": torch.zeros(D, F, dtype=torch.int8)}, "W_enc of torch.int8"),
        ({"b_dec": torch.zeros(D, dtype=torch.float16)}, "one dtype.*b_dec of torch.float16"),
    ],
)
@pytest.mark.parametrize("cfg", [VERSION_6, VERSION_3], ids=["6", "3 to 5"])
def test_other_tensors_than_a_plain_dictionarys_are_refused(tmp_path, cfg, more, message):
    with pytest.raises(InputError, match=message):
        Dictionary.load(write(tmp_path, cfg, tensors(**more)))


def test_a_half_finite_tensor_is_found_wherever_the_number_stands(tmp_path):
    for place in (0, D * F // 2, D * F - 1):
        weights = tensors()
        weights["W_enc"].view(-1)[place] = torch.nan
        with pytest.raises(InputError, match="W_enc"):
            Dictionary.load(write(tmp_path, VERSION_6, weights))


def test_other_names_of_the_same_values_open_too():
    assert site_of_hook("blocks.3.hook_mlp_in") == "resid_mid.3"  # TransformerLens' copy of the stream before the norm
    assert site_of_hook("blocks.3.mlp.hook_in") == "mlp_in.3"
    assert hook_of_site("resid_mid.3") == "blocks.3.hook_resid_mid"
    assert site_of_hook("hook_embed") == "embed"
    assert hook_of_site("embed") == "hook_embed"
    assert site_of_hook("hook_embed.3") is None


@pytest.mark.parametrize("kind", [kind for kind in HOOK_NAMES if kind != "embed"])
def test_hooks_and_sites_name_one_another(tmp_path, kind):
    hook = hook_of_site(f"{kind}.11")
    assert site_of_hook(hook) == f"{kind}.11"
    for other in (hook + "x", "x" + hook, hook.replace("11", "-1"), hook.replace("11", "011"), hook.replace("11", "")):
        assert site_of_hook(other) is None
    opened = Dictionary.load(write(tmp_path / "a", VERSION_3 | {"hook_name": hook, "hook_layer": 11}))
    assert opened.site == f"{kind}.11"
    opened.save(tmp_path / "b")  # and comes back from our own folder the same
    again = Dictionary.load(tmp_path / "b")
    assert again.site == opened.site
    assert again.metadata["hook_name"] == hook
    by_head = json.loads((tmp_path / "b" / "cfg.json").read_text())["reshape_activations"] == "hook_z"
    assert by_head == hook.endswith(("_q", "_k", "_v", "_z"))
    assert load_file(tmp_path / "b" / "sae_weights.safetensors").keys() == tensors().keys()
