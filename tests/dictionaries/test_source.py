"""Names of dictionaries: folders, files, and a hub."""

import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from sae.dictionaries import source
from sae.dictionaries.bundle import Bundle, load
from sae.dictionaries.dictionary import Dictionary
from sae.disk.checksum import crc32
from sae.disk.hub import fetch
from sae.errors import InputError

D, F = 3, 4


def scope(folder, seed=0):
    """A dictionary of Gemma Scope in the folder."""
    random = np.random.default_rng(seed)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,), "threshold": (F,)}
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: np.abs(random.standard_normal(shape)) for name, shape in shapes.items()})
    return folder


def refused(name, message):
    with pytest.raises(InputError, match=message) as error:
        Dictionary.load(name)
    assert "\n" not in str(error.value)


def test_a_name_on_the_hub_is_downloaded_once_and_then_opens_offline(hub, offline, capsys):
    name = "google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"
    scope(hub.root / name)
    scope(hub.root / "google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_22")
    (hub.root / name / "README.md").write_text("not needed")
    dictionary = Dictionary.load(name)
    assert dictionary.site == "resid_post.12"
    assert hub.asked == ["layer_12/width_16k/average_l0_82/params.npz"]
    assert "downloading 1 files (0.0 MB) of google/gemma-scope-2b-pt-res from the hub" in capsys.readouterr().err
    offline()
    again = Dictionary.load(name)
    assert torch.equal(again.W_dec_fo, dictionary.W_dec_fo)
    assert again.site == "resid_post.12"
    assert Dictionary.load("google/gemma-scope-2b-pt-res/layer_12/width_16k/canonical").site == "resid_post.12"
    assert Dictionary.load(f"{name}/params.npz").site == "resid_post.12"
    refused(name.replace("82", "22"), "average_l0_22 is not on this machine and the hub cannot be reached .HF_HUB_OFFLINE is set")
    assert capsys.readouterr().err == ""


def test_the_hubs_refusals_are_sentences(hub, monkeypatch):
    scope(hub.root / "google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82")
    repo = "google/gemma-scope-2b-pt-res"
    refused("google/other/x", "expected google/other on this machine or on the hub, found it on neither")
    refused(f"{repo}@v3", f"{repo} is on the hub, but not in that revision")
    refused(repo, f"{repo}/ holds no weights of a dictionary; name one of layer_12")
    with pytest.raises(InputError, match=f"there is no {repo}/layer_12/x.npz on the hub"):
        fetch(f"hf://{repo}/layer_12/x.npz")
    with pytest.raises(InputError, match=r"expected a file on the hub, such as .*, got 'hf://a/b'"):
        fetch("hf://a/b")
    refused(f"{repo}/layer_13", f"there is no layer_13 in {repo} on the hub; name one of layer_12")
    refused(f"{repo}/layer_12/width_16k", "holds no weights of a dictionary; name one of average_l0_82")
    assert Dictionary.load(f"{repo}/layer_12/width_16k/average_l0_82@v2").d_sae == F
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    refused("google/x/y", r"google/x/y is not on this machine and the hub cannot be reached .* `hf download google/x --include 'y\*'`")


def test_canonical_is_what_saelens_says_or_a_question(hub, offline, tmp_path):
    repo = "google/gemma-scope-9b-pt-res"
    for l0 in (51, 129, 204):
        scope(hub.root / repo / "layer_0/width_16k" / f"average_l0_{l0}", l0)
        scope(hub.root / repo / "layer_0/width_4k" / f"average_l0_{l0}", l0)
    assert Dictionary.load(f"{repo}/layer_0/width_16k/canonical").metadata["promised"] == {"l0": 129}
    which = "no list says which of average_l0_129, average_l0_204, average_l0_51 in .*/layer_0/width_4k is canonical"
    refused(f"{repo}/layer_0/width_4k/canonical", which)
    shutil.copytree(hub.root / "google", "models")
    offline()
    assert Dictionary.load("models/gemma-scope-9b-pt-res/layer_0/width_16k/canonical").metadata["promised"] == {"l0": 129}
    refused("models/gemma-scope-9b-pt-res/layer_0/width_4k/canonical", which)
    refused("models/gemma-scope-9b-pt-res/layer_0/canonical", "expected folders average_l0_… in .*, found width_16k, width_4k")
    refused("models/gemma-scope-9b-pt-res/layer_1/width_16k", "which does not exist; check its name")


def test_every_canonical_l0_is_that_of_saelens():
    table = source.canonical_l0()
    assert sum(len(layers) for widths in table.values() for layers in widths.values()) == 429
    assert source.canonical_folder("google/gemma-scope-2b-pt-res/layer_0/width_16k") == "average_l0_105"
    assert source.canonical_folder("google/gemma-scope-2b-pt-res/layer_0/width_3k") is None


def write_set(folder, layers=3):
    folder.mkdir(parents=True)
    said = "model_kind: transcoder_set\nmodel_name: a/b\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: mlp.hook_out\n"
    (folder / "config.yaml").write_text(said)
    for i in range(layers):
        tensors = {"W_enc": torch.full((F, D), i + 1.0), "b_enc": torch.zeros(F), "W_dec": torch.ones(F, D), "b_dec": torch.zeros(D)}
        save_file(tensors, folder / f"layer_{i}.safetensors")
    return folder


def test_of_a_set_only_the_chosen_layer_is_downloaded(hub, offline, capsys):
    write_set(hub.root / "a/set")
    assert Dictionary.load("a/set/layer_1").site == "mlp_in.1"
    assert sorted(hub.asked) == ["config.yaml", "layer_1.safetensors"]
    bundle = load("a/set")
    assert isinstance(bundle, Bundle)
    assert len(bundle) == 3
    assert sorted(hub.asked[2:]) == ["layer_0.safetensors", "layer_2.safetensors"]
    assert float(Dictionary.load("a/set/layer_2").W_enc_fd[0, 0]) == 3
    offline()
    capsys.readouterr()
    assert len(load("a/set")) == 3
    assert "only the layers of a/set/ that were downloaded before are used: a/set/ is not" in capsys.readouterr().err
    refused("a/set/layer_7", "a/set/layer_7 is not on this machine")


def test_names_that_are_no_folder_and_none_on_the_hub(hub, tmp_path):
    write_set(tmp_path / "here" / "runs" / "set")
    scope(tmp_path / "here" / "runs" / "one")
    refused("runs/other", "expected a dictionary in runs/other, which does not exist")
    refused("./other/x", "expected a dictionary in other/x, which does not exist")
    refused("nothing", "expected a dictionary in nothing, which does not exist")
    refused("runs/one/layer_3", "found a single dictionary; leave out /layer_3")
    refused("runs/set/layer_3", "which has 0, 1, 2")
    assert not hub.asked
    refused("hf://runs/set", "expected runs/set on this machine or on the hub")


def test_many_files_of_weights_in_one_folder_ask_for_one(hub):
    (hub.root / "a/b").mkdir(parents=True)
    for i in range(6):
        torch.save({"x": torch.ones(2)}, hub.root / "a/b" / f"part{i}.pt")
    (hub.root / "a/b/config.json").write_text("{}")
    refused("a/b", "a/b/ holds 6 files of weights; name one of part0.pt, part1.pt")
    refused("a/b/part1.pt", "part1.pt, found no known format")
    assert sorted(hub.asked) == ["config.json", "part1.pt"]


def test_weights_are_known_by_their_checksum(tmp_path):
    def crc_of(name):
        return source.weights_crc32(name, [Dictionary.load(name).parts()])

    folder = write_set(tmp_path / "set")
    assert len({crc_of(folder / f"layer_{layer}") for layer in range(3)}) == 3
    before = crc_of(folder / "layer_0")
    shutil.copy(folder / "layer_1.safetensors", folder / "layer_0.safetensors")
    assert crc_of(folder / "layer_0") == crc_of(folder / "layer_1") != before
    one = scope(tmp_path / "one")
    assert crc_of(one) == crc_of(one / "params.npz")
    dictionary = Dictionary.load(one)
    dictionary.save(tmp_path / "ours")
    assert crc_of(tmp_path / "ours") == crc32(tmp_path / "ours" / "sae_weights.safetensors")
    for k, parameter in enumerate(dictionary.parameters()):
        parameter[(0,) * parameter.ndim] += 1
        assert source.weights_crc32(one, [dictionary.parts()]) != crc_of(one), k
        parameter[(0,) * parameter.ndim] -= 1
