"""Dictionaries of every kind, imported and opened again: the same function, and a note of where they come from."""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from sae.dictionaries.bundle import Bundle, load
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.gates import AbsTopK, BareTopK, GroupMax, Threshold, TopK
from sae.dictionaries.importing import ImportConfig, import_dictionary
from sae.dictionaries.source import weights_crc32
from sae.errors import InputError

D, F = 6, 10


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + 100 * seed), dtype=torch.float64)


@pytest.fixture
def scope(tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k" / "average_l0_82"
    folder.mkdir(parents=True)
    w = {"W_enc": random(D, F), "b_enc": random(F), "W_dec": random(F, D), "b_dec": random(D), "threshold": random(F).abs()}
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in w.items()})
    return folder


def write_cross(folder, n=3):
    folder.mkdir()
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_kind": "cross_layer_transcoder", "model_name": "a/b", **hooks}))
    for i in range(n):
        rest = {f"b_enc_{i}": random(F, seed=i), f"b_dec_{i}": random(D, seed=i), f"threshold_{i}": random(F, seed=9 + i).abs()}
        save_file({f"W_enc_{i}": random(F, D, seed=i)} | rest, folder / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": random(F, n - i, D, seed=i)}, folder / f"W_dec_{i}.safetensors")
    return folder


def write_topk(folder):
    folder.mkdir()
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out", "activation": "topk", "k": 4}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_kind": "transcoder_set", "model_name": "a/b", **hooks}))
    for i in range(2):
        tensors = {"W_enc": random(F, D, seed=i), "b_enc": random(F), "W_dec": random(F, D, seed=i), "b_dec": random(D)}
        save_file(tensors | {"W_skip": random(D, D, seed=i)}, folder / f"layer_{i}.safetensors")
    return folder


def same(one, other):
    x = random(40, one.d_in, seed=5)
    torch.testing.assert_close(one.encode(x), other.encode(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one(x), other(x), rtol=1e-12, atol=1e-12)
    assert (one.reads, one.writes) == (other.reads, other.writes)


def test_a_dictionary(tmp_path, scope, capsys):
    import_dictionary(ImportConfig(str(scope), dry_run=True))
    said = capsys.readouterr().out
    for text in ("Gemma Scope", "JumpReLU autoencoder", "10", "resid_post.12, 6 wide", "float64", "l0 82.0", "google/gemma-2-2b"):
        assert text in said
    assert not (tmp_path / "out").exists()
    import_dictionary(ImportConfig(str(scope), tmp_path / "out"))
    found = Dictionary.load(tmp_path / "out")
    same(found, Dictionary.load(scope))
    assert found.metadata["imported"] == {
        "source": str(scope),
        "format": "Gemma Scope",
        "weights_crc32": weights_crc32(scope, [Dictionary.load(scope).parts()]),
    }
    assert found.metadata["promised"] == {"l0": 82}
    assert found.metadata["model_name"] == "google/gemma-2-2b"


def test_other_number_formats(tmp_path, scope):
    import_dictionary(ImportConfig(str(scope), tmp_path / "out", dtype="bfloat16"))
    found, whole = Dictionary.load(tmp_path / "out"), Dictionary.load(scope)
    for name in ("W_enc_fd", "b_enc_f", "W_dec_fo", "b_dec_o"):
        assert torch.equal(getattr(found, name), getattr(whole, name).bfloat16())
    assert torch.equal(found.gate.theta_f, whole.gate.theta_f.bfloat16())


def test_a_cross_layer_transcoder(tmp_path, capsys):
    source = write_cross(tmp_path / "cross")
    import_dictionary(ImportConfig(str(source), tmp_path / "out"))
    assert "3 dictionaries, 0 to 2" in capsys.readouterr().out
    bundle, found = load(source), load(tmp_path / "out")
    assert isinstance(found, Bundle)
    assert list(found) == [0, 1, 2]
    for layer in bundle:
        same(found[layer], bundle[layer])
        same(Dictionary.load(tmp_path / "out" / f"layer_{layer}"), bundle[layer])
    assert [port.site for port in found[0].writes] == ["mlp_out.0", "mlp_out.1", "mlp_out.2"]
    one = tmp_path / "one"
    import_dictionary(ImportConfig(f"{source}/layer_1", one))
    same(Dictionary.load(one), bundle[1])


def test_kinds_that_saelens_has_not(tmp_path):
    source = write_topk(tmp_path / "set")
    import_dictionary(ImportConfig(str(source), tmp_path / "out"))
    bundle, found = load(source), load(tmp_path / "out")
    for layer in bundle:
        same(found[layer], bundle[layer])
        assert isinstance(found[layer].gate, BareTopK)
    cfg = json.loads((tmp_path / "out" / "layer_0" / "cfg.json").read_text())
    assert cfg["architecture"] == "bare_topk_skip_transcoder"
    assert cfg["metadata"]["settings_of_source"] == {"k": 4}


def test_an_affine_cross_layer_transcoder(tmp_path):
    """The skip goes to its own layer alone."""
    folder = tmp_path / "gemma-scope-2-270m-pt" / "clt" / "width_262k_l0_big_affine"
    folder.mkdir(parents=True)
    for i in range(2):
        w = {
            "w_enc": random(D, F, seed=i),
            "b_enc": random(F),
            "w_dec": random(F, 2, D, seed=i),
            "b_dec": random(D),
            "threshold": random(F).abs(),
        }
        save_file(w | {"affine_skip_connection": random(D, D, seed=i)}, folder / f"params_layer_{i}.safetensors")
    import_dictionary(ImportConfig(str(folder), tmp_path / "out"))
    bundle, found = load(folder), load(tmp_path / "out")
    for layer in bundle:
        same(found[layer], bundle[layer])


GATES = {
    "relu": Threshold(),
    "jumprelu": Threshold(random(F).abs()),
    "topk": TopK(4),
    "abstopk": AbsTopK(4),
    "bare topk": BareTopK(4),
    "groupmax": GroupMax(2),
}
SITES = {
    "autoencoder": {"site": "resid_post.1"},
    "transcoder": {"site": "mlp_in.1", "site_out": "mlp_out.1"},
    "crosscoder of layers": {"site": ["resid_post.1", "resid_post.2"]},
    "crosscoder of models": {"site": ["resid_post.1", "resid_post.1"], "hook_name": "blocks.1.hook_resid_post"},
    "crosscoder of places without a name": {"site": [None, None]},
    "cross-layer": {"site": "mlp_in.1", "site_out": ["mlp_out.1", "mlp_out.2"]},
    "unknown": {},
}


@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("skips", [True, False])
def test_every_kind_is_read_as_it_was_written(tmp_path, sites, gate, skips):
    W_skip_od = random(D // 2, D) if skips else None  # of the first of two sites
    metadata = SITES[sites] | {"k": 99, "apply_b_dec_to_input": True, "site_out": SITES[sites].get("site_out", SITES[sites].get("site"))}
    made = Dictionary(random(F, D), random(F), random(F, D), random(D), gate=GATES[gate], W_skip_od=W_skip_od, metadata=metadata)
    made.save(tmp_path / "a")
    found = Dictionary.load(tmp_path / "a")
    same(found, made.requires_grad_(False))
    assert type(found.gate) is type(made.gate)
    assert found.metadata["settings_of_source"] == {"k": 99, "apply_b_dec_to_input": True}


def test_what_cannot_be_imported(tmp_path, scope):
    for config, message in (
        (ImportConfig(str(scope)), "expected --out, the folder to write, or --dry-run"),
        (ImportConfig(str(tmp_path), tmp_path / "out"), "found no known format"),
        (ImportConfig("", tmp_path / "out"), "got an empty text"),
        (ImportConfig(str(scope), scope.parent), "holds something else"),
    ):
        with pytest.raises(InputError, match=message):
            import_dictionary(config)
    assert not (tmp_path / "out").exists()
