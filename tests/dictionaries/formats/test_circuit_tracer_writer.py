"""A set of transcoders as circuit-tracer reads it: its folder opened by a reader written from its published layout, in float64."""

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from sae.dictionaries.bundle import load
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.frames import Frame
from sae.dictionaries.gates import AbsTopK, BareTopK, GroupMax, Threshold, TopK
from sae.errors import InputError
from sae.features.exports.transcoders import TranscodersConfig, export_transcoders

D, F, K = 6, 20, 4
X = np.random.default_rng(0).normal(size=(9, D)) + 0.2


def transcoder(layer, seed=0, gate=None, site="mlp_in", site_out="mlp_out", **rest):
    g = torch.Generator().manual_seed(10 * seed + layer)
    shapes = ((F, D), (F,), (F, D), (D,))
    metadata = {"model_name": "gpt2", "site": f"{site}.{layer}", "site_out": f"{site_out}.{layer}"} | rest.pop("metadata", {})
    weights = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    return Dictionary(*weights, gate=gate, metadata=metadata, **rest).requires_grad_(False)


def given(tmp_path, transcoders):
    """Their folders."""
    for n, made in enumerate(transcoders):
        made.save(tmp_path / f"layer {n}")
    return tuple(str(tmp_path / f"layer {n}") for n in range(len(transcoders)))


def exported(tmp_path, *transcoders, **flags):
    export_transcoders(TranscodersConfig(dictionaries=given(tmp_path, transcoders), out=tmp_path / "set", **flags))
    return tmp_path / "set"


def theirs(folder, layer, x):
    """Activations and output, as circuit-tracer's README and single_layer_transcoder.py give them."""
    w = load_file(folder / f"layer_{layer}.safetensors")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    z = x @ w["W_enc"].T + w["b_enc"]
    if config.get("activation") == "topk":
        keep = np.zeros_like(z, dtype=bool)
        np.put_along_axis(keep, np.argsort(-z, axis=1)[:, : config["k"]], True, 1)
        acts = z * keep
    elif "activation_function.threshold" in w:
        acts = z * (z > w["activation_function.threshold"])
    else:
        acts = np.maximum(z, 0)
    return acts, acts @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if "W_skip" in w else 0)


THETA = torch.linspace(0, 1, F, dtype=torch.float64)
KINDS = {
    "relu": {},
    "jumprelu": dict(gate=Threshold(THETA)),
    "a bias of its own": dict(b_in_d=torch.linspace(-1, 1, D, dtype=torch.float64)),
    "skip": dict(W_skip_od=torch.linspace(-1, 1, D * D, dtype=torch.float64).reshape(D, D)),
    "jumprelu and skip": dict(gate=Threshold(THETA), W_skip_od=torch.eye(D, dtype=torch.float64)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_computes_there_what_it_computes_here(tmp_path, kind):
    made = [transcoder(layer, **KINDS[kind]) for layer in (2, 0, 1)]  # in any order
    folder = exported(tmp_path, *made)
    assert {path.name for path in folder.iterdir()} == {"config.yaml", *(f"layer_{layer}.safetensors" for layer in range(3))}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    assert config == {"model_kind": "transcoder_set", "model_name": "gpt2", **hooks}
    for one in made:
        acts, out = theirs(folder, int(one.site[-1]), X)
        np.testing.assert_allclose(one.encode(torch.tensor(X)), acts, atol=1e-12)
        np.testing.assert_allclose(one(torch.tensor(X)), out, atol=1e-12)
    opened = load(folder)  # and by our own reader, from which the set can be written again
    for one in made:
        torch.testing.assert_close(opened[int(one.site[-1])](torch.tensor(X)), one(torch.tensor(X)))
    export_transcoders(TranscodersConfig(dictionaries=(str(folder),), out=tmp_path / "again"))
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("gate", [TopK, BareTopK])
def test_topk_is_theirs_up_to_their_lack_of_a_relu(tmp_path, capsys, gate):
    made = transcoder(0, gate=gate(15))  # of 20: some of them are below 0
    exported(tmp_path, made, model_name="Qwen/Qwen3-0.6B")
    config = yaml.safe_load((tmp_path / "set" / "config.yaml").read_text())
    assert (config["activation"], config["k"], config["model_name"]) == ("topk", 15, "Qwen/Qwen3-0.6B")
    acts, _ = theirs(tmp_path / "set", 0, X)
    assert (acts < 0).any()
    np.testing.assert_allclose(made.encode(torch.tensor(X)), acts if gate is BareTopK else np.maximum(acts, 0), atol=1e-12)
    said = capsys.readouterr().err
    assert ("no ReLU" in said) == (gate is TopK)
    assert "takes for ReLU" in said


def test_an_older_set_is_replaced_and_nothing_else(tmp_path):
    exported(tmp_path, transcoder(0), transcoder(1))
    folder = exported(tmp_path, transcoder(0, seed=5))
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "layer_0.safetensors"}
    acts, _ = theirs(folder, 0, X)
    np.testing.assert_allclose(transcoder(0, seed=5).encode(torch.tensor(X)), acts)
    (folder / "config.yaml").unlink()
    with pytest.raises(InputError, match="holds something else"):
        exported(tmp_path, transcoder(0))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([transcoder(0), transcoder(2)], "but 1 lack one"),
        ([transcoder(1)], "but 0 lack one"),
        ([transcoder(0), transcoder(0, seed=1)], "two for layer 0"),
        ([transcoder(0), transcoder(1, metadata={"model_name": "other"})], "one model_name .* 'gpt2' and, in layer 1, 'other'"),
        ([transcoder(0), transcoder(1, site="resid_mid")], "feature_input_hook"),
        ([transcoder(0), transcoder(1, W_skip_od=torch.eye(D, dtype=torch.float64))], "skip connection"),
        ([transcoder(0, metadata={"site_out": "mlp_out.1"})], r"from mlp_in\.0 .* to mlp_out\.1"),
        ([transcoder(0, frame=Frame("layer_norm", restores=False))], "layer_norm"),
        ([transcoder(0, metadata={"model_name": None})], "--model-name"),
        ([Dictionary.initial(D, F, seed=0)], "got a dictionary at no known site"),
        ([transcoder(0, site="resid_pre")], r"MLP.* got one from resid_pre\.0"),
        ([], "but 0 lack one"),
        ([transcoder(0, gate=GroupMax(K))], "GroupMax"),
        ([transcoder(0, gate=AbsTopK(K))], "AbsTopK"),
    ],
)
def test_what_circuit_tracer_cannot_compute_is_refused_by_name(tmp_path, made, message):
    with pytest.raises(InputError, match=message):
        exported(tmp_path, *made)
    assert not (tmp_path / "set").exists()
