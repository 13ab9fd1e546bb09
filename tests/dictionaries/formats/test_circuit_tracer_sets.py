"""Folders as circuit-tracer and Gemma Scope 2 publish them for several layers, against the published formulas in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from sae.dictionaries.bundle import Bundle, load
from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError

D, F, K, N = 6, 10, 4, 3
X = {layer: torch.randn(40, D, generator=torch.Generator().manual_seed(layer), dtype=torch.float64) + 0.5 for layer in range(N)}
SETTINGS = {
    "model_kind": "transcoder_set",
    "model_name": "a/llama",
    "feature_input_hook": "mlp.hook_in",
    "feature_output_hook": "mlp.hook_out",
}
CROSS = SETTINGS | {"model_kind": "cross_layer_transcoder", "feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + 100 * seed), dtype=torch.float64)


def write_yaml(folder, settings, **more):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | more))
    return folder


def write_set(folder, gate, **more):
    """Three layers, and what each gives."""
    write_yaml(folder, SETTINGS, **more)
    expected = {}
    for layer in range(N):
        w = {name: random(*shape, seed=layer) for name, shape in (("W_enc", (F, D)), ("b_enc", (F,)), ("W_dec", (F, D)), ("b_dec", (D,)))}
        z = X[layer] @ w["W_enc"].T + w["b_enc"]
        if gate == "jumprelu":
            w["activation_function.threshold"] = random(F, seed=50 + layer).abs()
            acts = z * (z > w["activation_function.threshold"])
        elif gate == "topk":
            acts = torch.zeros_like(z).scatter(1, z.topk(K).indices, 1) * z
        else:
            acts = z.relu()
        out = acts @ w["W_dec"] + w["b_dec"]
        if gate == "relu":
            w["W_skip"] = random(D, D, seed=layer)
            out = out + X[layer] @ w["W_skip"].T
        save_file(w | ({"k": torch.tensor(K)} if gate == "topk" else {}), folder / f"layer_{layer}.safetensors")
        expected[layer] = acts, out
    return expected


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", ["relu", "jumprelu", "topk"])
def test_a_set_of_transcoders(tmp_path, gate):
    expected = write_set(tmp_path, gate, **({} if gate == "jumprelu" else {"activation": gate}), k=K if gate == "topk" else None)
    bundle = load(tmp_path)
    assert isinstance(bundle, Bundle)
    assert list(bundle) == [0, 1, 2]
    values = {f"mlp_in.{layer}": X[layer] for layer in X}
    acts = bundle.encode(values)
    outputs = bundle.decode(acts, values)
    for layer, (acts_bf, out_bd) in expected.items():
        same(acts[layer], acts_bf)
        same(outputs[f"mlp_out.{layer}"], out_bd)
        one = Dictionary.load(tmp_path / f"layer_{layer}")
        same(one(X[layer]), out_bd)
        assert (one.site, one.site_out, one.metadata["model_name"]) == (f"mlp_in.{layer}", f"mlp_out.{layer}", "a/llama")
    assert one.gate.signed == (gate == "topk")


def cross(seed=0):
    w = [
        {name: random(*shape, seed=i) for name, shape in (("W_enc", (F, D)), ("b_enc", (F,)), ("W_dec", (F, N - i, D)), ("b_dec", (D,)))}
        for i in range(N)
    ]
    return [one | {"threshold": random(F, seed=70 + i).abs()} for i, one in enumerate(w)]


def cross_formula(w, jumprelu, x=X):
    acts = [x[i] @ w[i]["W_enc"].T + w[i]["b_enc"] for i in range(N)]
    acts = [z * (z > one["threshold"]) if jumprelu else z.relu() for z, one in zip(acts, w)]
    outs = [w[layer]["b_dec"] + sum(acts[i] @ w[i]["W_dec"][:, layer - i] for i in range(layer + 1)) for layer in range(N)]
    return acts, outs


@pytest.mark.parametrize("jumprelu", [True, False])
def test_a_cross_layer_transcoder(tmp_path, jumprelu):
    w = cross()
    acts, outs = cross_formula(w, jumprelu)
    write_yaml(tmp_path, CROSS)
    for i, one in enumerate(w):
        enc = {f"{name}_{i}": one[name] for name in ("W_enc", "b_enc", "b_dec", *(["threshold"] if jumprelu else []))}
        save_file(enc, tmp_path / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": one["W_dec"]}, tmp_path / f"W_dec_{i}.safetensors")
    bundle = load(tmp_path)
    values = {f"resid_mid.{i}": X[i] for i in range(N)}
    found = bundle.encode(values)
    outputs = bundle.decode(found, values)
    for i in range(N):
        same(found[i], acts[i])
        same(outputs[f"mlp_out.{i}"], outs[i])
    assert [port.site for port in bundle[1].writes] == ["mlp_out.1", "mlp_out.2"]
    with pytest.raises(InputError, match=r"writes 2 of them \(mlp_out.1, mlp_out.2\)"):
        _ = bundle[1].site_out


@pytest.mark.parametrize("kind", ["clt", "crosscoder"])
@pytest.mark.parametrize("told", [True, False], ids=["config.json", "names"])
def test_gemma_scope_2_of_several_layers(tmp_path, kind, told):
    """The last layer too, which circuit-tracer's own loader leaves out, and an entry before its own layer counts for nothing."""
    w, layers = cross(), [0, 1, 2] if kind == "clt" else [7, 13, 22]
    acts, outs = cross_formula(w, True)
    name = "clt/width_262k_l0_big_affine" if kind == "clt" else "crosscoder/layer_7_13_22_width_262k_l0_medium"
    folder = tmp_path / ("x" if told else f"gemma-scope-2-270m-pt/{name}")
    folder.mkdir(parents=True)
    for i, one in enumerate(w):
        noise = random(F, i, D, seed=90)
        tensors = {"w_enc": one["W_enc"].T.contiguous(), "w_dec": torch.cat([noise, one["W_dec"]], 1), "threshold": one["threshold"]}
        tensors |= {name: one[name] for name in ("b_enc", "b_dec")}
        if kind == "clt":
            tensors["affine_skip_connection"] = random(D, D, seed=i)
            outs[i] = outs[i] + X[i] @ random(D, D, seed=i)
        save_file(tensors, folder / f"params_layer_{i}.safetensors")
    if told:
        at = "{all}" if kind == "clt" else "{7,13,22}"
        hooks = ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output") if kind == "clt" else ("output", "output")
        config = {key: f"model.layers.{at}.{hook}" for key, hook in zip(("hf_hook_point_in", "hf_hook_point_out"), hooks)}
        config |= {"architecture": "jump_relu", "model_name": "google/gemma-3-270m-pt", "l0": 150, "affine_connection": kind == "clt"}
        (folder / "config.json").write_text(json.dumps(config | {"type": kind, "width": 262080}))
    bundle = load(folder)
    reads, writes = ("mlp_in", "mlp_out") if kind == "clt" else ("resid_post", "resid_post")
    values = {f"{reads}.{layer}": X[i] for i, layer in enumerate(layers)}
    found = bundle.encode(values)
    outputs = bundle.decode(found, values)
    for i, layer in enumerate(layers):
        same(found[layer], acts[i])
        same(outputs[f"{writes}.{layer}"], outs[i])
    last = Dictionary.load(folder / f"layer_{layers[-1]}")
    assert (last.site, last.site_out) == (f"{reads}.{layers[-1]}", f"{writes}.{layers[-1]}")
    assert last.metadata["model_name"] == "google/gemma-3-270m"


def test_transcoders_that_lie_elsewhere(tmp_path, monkeypatch):
    """As in mwhanna's and mntss' copies of Gemma Scope: files on the hub, here in its cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    z, places = {}, []
    for layer in range(2):
        w = {"W_enc": random(D, F, seed=layer), "b_enc": random(F), "W_dec": random(F, D), "b_dec": random(D), "threshold": random(F).abs()}
        z[layer] = X[layer] @ w["W_enc"] + w["b_enc"]
        name = f"layer_{layer}/width_16k/average_l0_7/params.npz"
        repo = tmp_path / "hub" / "models--google--gemma-scope-2b-pt-transcoders"
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / "main").write_text("0a1b")
        file = repo / "snapshots" / "0a1b" / name
        file.parent.mkdir(parents=True)
        np.savez(file, **{key: value.numpy() for key, value in w.items()})
        places.append(f"hf://google/gemma-scope-2b-pt-transcoders/{name}")
    said = {"model_name": "google/gemma-2-2b", "feature_input_hook": "ln2.hook_normalized", "feature_output_hook": "hook_mlp_out"}
    write_yaml(tmp_path / "set", SETTINGS | said, transcoders=places)
    bundle = load(tmp_path / "set")
    for layer in range(2):
        same(bundle[layer].encode(X[layer]), z[layer].relu() * (z[layer] > w["threshold"]))
        assert bundle[layer].site == f"mlp_in_nogain.{layer}"
    write_yaml(tmp_path / "set", SETTINGS | said, transcoders=places[::-1])
    with pytest.raises(InputError, match=r"says site mlp_in_nogain.0 of hf://.*layer_1/.*, whose own names say mlp_in_nogain.1"):
        Dictionary.load(tmp_path / "set" / "layer_0")


def test_what_a_set_cannot_be(tmp_path):
    def refused(message, source=tmp_path, **more):
        write_yaml(tmp_path, SETTINGS, **more)
        with pytest.raises(InputError, match=message):
            Dictionary.load(source)

    refused("expected files layer_.*.safetensors in .*, or a list of transcoders")
    write_set(tmp_path, "relu", activation="relu")
    refused("is a set of 3 dictionaries, one for each layer; choose one, such as .*/layer_0$", activation="relu")
    refused("which has 0, 1, 2; choose one of them", tmp_path / "layer_3", activation="relu")
    one = tmp_path / "layer_0"
    refused("names the hooks hook_k and mlp.hook_out; known are", one, feature_input_hook="hook_k")
    refused("names the hooks mlp.hook_in and mlp.hook_out; known are .* of Gemma not mlp.hook_out", one, model_name="google/gemma-3-4b-pt")
    refused("activation 'topk', but there is no threshold and k nowhere", one, activation="topk")
    refused("activation 'relu', but there is no threshold and k 3", one, activation="relu", k=3)
    refused("'activation' should be 'relu' or 'topk'", one, activation="gelu")
    write_set(tmp_path, "jumprelu")
    refused("activation 'relu', but there is a threshold", one, activation="relu")
    (tmp_path / "layer_1.safetensors").unlink()
    refused("layer_1.safetensors, which does not exist", tmp_path / "layer_1")
    write_set(tmp_path, "topk")
    refused("k 4 or 5", one, activation="topk", k=5)


def test_thresholds_below_0_are_refused(tmp_path):
    write_yaml(tmp_path, SETTINGS)
    tensors = {
        "W_enc": random(F, D),
        "b_enc": random(F),
        "W_dec": random(F, D),
        "b_dec": random(D),
        "activation_function.threshold": random(F),
    }
    save_file(tensors, tmp_path / "layer_0.safetensors")
    with pytest.raises(InputError, match="thresholds below 0"):
        Dictionary.load(tmp_path / "layer_0")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize("kind", ["cross_layer_transcoder", "clt"])
def test_the_weights_of_a_set_stay_on_the_disk(tmp_path, kind):
    """An opened set takes no memory of its own, only pages of its files, which the system may drop."""
    n, f, d = 2, 4096, 512
    write_yaml(tmp_path, CROSS) if kind != "clt" else (tmp_path / "clt").mkdir()
    for i in range(n):
        if kind == "clt":
            w = {"w_enc": torch.ones(d, f), "w_dec": torch.ones(f, n, d), "b_enc": torch.ones(f), "b_dec": torch.ones(d)}
            save_file(w | {"threshold": torch.ones(f)}, tmp_path / "clt" / f"params_layer_{i}.safetensors")
        else:
            rest = {f"b_enc_{i}": torch.ones(f), f"b_dec_{i}": torch.ones(d)}
            save_file({f"W_enc_{i}": torch.ones(f, d)} | rest, tmp_path / f"W_enc_{i}.safetensors")
            save_file({f"W_dec_{i}": torch.ones(f, n - i, d)}, tmp_path / f"W_dec_{i}.safetensors")
    before = anonymous()
    bundle = load(tmp_path / "clt" if kind == "clt" else tmp_path)
    assert sum(one.W_enc_fd.nbytes + one.W_dec_fo.nbytes for one in bundle.values()) > 40e6
    assert anonymous() - before < 8e6


def anonymous():
    """Bytes of this process that are in no file."""
    (line,) = [line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Anonymous:")]
    return int(line.split()[1]) * 1024
