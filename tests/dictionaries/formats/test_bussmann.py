"""Folders of Bussmann's two repositories against the formula of each type, written out in float64."""

import json

import pytest
import torch

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError

D, F, K, THETA = 6, 12, 4, 0.7
X = torch.randn(40, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
SHAPES = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}


def weights(name, threshold=True):
    shapes = SHAPES | ({"jumprelu.log_threshold": (F,)} if name == "jumprelu" else {})
    w = {
        key: torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for i, (key, shape) in enumerate(shapes.items())
    }
    return w | (
        {"threshold": torch.tensor(THETA, dtype=torch.float64)} if threshold and name not in ("vanilla", "topk", "jumprelu") else {}
    )


def folder(path, name, w, **change):
    path.mkdir()
    torch.save(w, path / "sae.pt")
    config = {"sae_type": name, "act_size": D, "dict_size": F, "top_k": K, "input_unit_norm": True, "seed": 49, "dtype": "torch.float32"}
    config |= {"hook_point": "blocks.8.hook_resid_pre", "model_name": "gpt2-small", "seq_len": 128, "group_sizes": "[2, 4, 6]"} | change
    (path / "config.json").write_text(json.dumps(config))
    return path


def formula(name, w, normalises):
    mean, std = X.mean(-1, keepdim=True), X.std(-1, keepdim=True)
    x = (X - mean) / (std + 1e-5) if normalises else X
    if name == "vanilla":
        acts = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    elif name == "jumprelu":
        z = (x @ w["W_enc"] + w["b_enc"]).relu()
        acts = z * (z > w["jumprelu.log_threshold"].exp())
    else:
        z = ((x - w["b_dec"]) @ w["W_enc"]).relu()
        acts = z * (torch.zeros_like(z).scatter_(-1, z.topk(K).indices, 1) if "threshold" not in w else z > w["threshold"])
    out = acts @ w["W_dec"] + w["b_dec"]
    return acts, out * std + mean if normalises else out


@pytest.mark.parametrize("normalises", [True, False])
@pytest.mark.parametrize("name", ["vanilla", "topk", "jumprelu", "batch-topk", "global-matryoshka-topk"])
def test_every_type(tmp_path, name, normalises):
    path = folder(tmp_path / "sae", name, w := weights(name), input_unit_norm=normalises)
    for dictionary in (Dictionary.load(path), Dictionary.load(path / "sae.pt")):
        for found, wanted in zip((dictionary.encode(X), dictionary(X)), formula(name, w, normalises)):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert (dictionary.site, dictionary.metadata["model_name"], dictionary.metadata["context_size"]) == ("resid_pre.8", "gpt2-small", 128)


def test_without_a_threshold_each_token_keeps_k(tmp_path, capsys):
    path = folder(tmp_path / "sae", "batchtopk", w := weights("batchtopk", threshold=False))
    torch.testing.assert_close(Dictionary.load(path)(X), formula("batchtopk", w, True)[1], rtol=1e-12, atol=1e-12)
    assert f"has no threshold, so each token keeps its {K} largest" in capsys.readouterr().err


def test_a_hook_that_is_no_site_is_left_open(tmp_path):
    dictionary = Dictionary.load(folder(tmp_path / "sae", "topk", weights("topk"), hook_point="blocks.8.attn.hook_rot_q"))
    assert (dictionary.site, dictionary.metadata["hook_name"]) == (None, "blocks.8.attn.hook_rot_q")


@pytest.mark.parametrize(
    ("name", "change", "more", "message"),
    [
        ("gated", {}, {}, "sae_type 'gated', which is not understood; expected 'vanilla' or"),
        ("topk", {"top_k": 0}, {}, "top_k 0, where 1 to 12"),
        ("topk", {"dict_size": 13}, {}, r"W_enc in .* with d = 6, f = 13, found \[6, 12\]"),
        ("topk", {"act_size": "6"}, {}, "'act_size' should be a valid integer"),
        ("topk", {}, {"threshold": torch.tensor(1.0)}, "holds threshold beside"),
        ("batchtopk", {}, {"threshold": torch.tensor(torch.inf)}, "expected one number as threshold in .*, found inf"),
        ("vanilla", {}, {"scale": torch.ones(F)}, "holds scale beside"),
    ],
)
def test_what_is_not_understood(tmp_path, name, change, more, message):
    with pytest.raises(InputError, match=message):
        Dictionary.load(folder(tmp_path / "sae", name, weights(name) | more, **change))
