"""Files of OpenAI's autoencoders against their formula, written out in float64."""

from collections import OrderedDict

import pytest
import torch

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.formats import load
from sae.errors import InputError

D, F, K = 6, 12, 4
X = torch.randn(40, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
SHAPES = {"pre_bias": (D,), "encoder.weight": (F, D), "latent_bias": (F,), "decoder.weight": (D, F)}


def state(activation="TopK", **change):
    w = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    w |= {"activation.k": K} if activation == "TopK" else {}  # as their own state_dict() repeats it
    w |= {"stats_last_nonzero": torch.zeros(F, dtype=torch.long), "latents_mean_square": torch.ones(F)}
    settings = OrderedDict({"k": K, "postact_fn": "ReLU"} if activation == "TopK" else {})
    return OrderedDict(w | {"activation": activation, "activation_state_dict": settings} | change)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)
    return path


@pytest.mark.parametrize("activation", ["TopK", "ReLU"])
def test_both_versions(tmp_path, activation):
    w = state(activation)
    mean, std = X.mean(-1, keepdim=True), X.std(-1, keepdim=True)
    x = (X - mean) / (std + 1e-5) if activation == "TopK" else X
    z = (x - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]
    kept = torch.zeros_like(z).scatter_(-1, z.topk(K).indices, 1) if activation == "TopK" else 1
    acts = z.relu() * kept
    out = acts @ w["decoder.weight"].T + w["pre_bias"]
    dictionary = Dictionary.load(write(tmp_path / "any.pt", w))
    torch.testing.assert_close(dictionary.encode(X), acts, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dictionary(X), out * std + mean if activation == "TopK" else out, rtol=1e-12, atol=1e-12)
    assert dictionary.site is None


def test_a_file_that_names_no_activation_is_relu(tmp_path):
    w = state("ReLU")
    del w["activation"], w["activation_state_dict"]
    acts = ((X - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]).relu()
    torch.testing.assert_close(Dictionary.load(write(tmp_path / "any.pt", w)).encode(X), acts, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("path", "site"),
    [
        ("gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt", "resid_post.8"),
        ("gpt2-small/resid_post_attn_v5_128k/autoencoders/11.pt", "resid_mid.11"),
        ("gpt2-small/resid_delta_attn_v5_32k/autoencoders/0.pt", "attn_out.0"),
        ("gpt2-small/resid_delta_mlp/autoencoders/0.pt", "mlp_out.0"),
        ("gpt2-small/mlp_post_act_v4/autoencoders/3.pt", "mlp_act.3"),
    ],
)
def test_sites_by_the_path(tmp_path, path, site):
    dictionary = Dictionary.load(write(tmp_path / path, state()))
    assert (dictionary.site, dictionary.metadata["model_name"]) == (site, "gpt2")


def test_a_folder_of_all_layers(tmp_path):
    folder = tmp_path / "gpt2-small" / "resid_post_mlp_v5_32k" / "autoencoders"
    for layer in (0, 2, 10):
        write(folder / f"{layer}.pt", state())
    layers = load(folder)
    assert {layer: parts().site for layer, parts in layers.items()} == {0: "resid_post.0", 2: "resid_post.2", 10: "resid_post.10"}
    assert Dictionary.load(folder / "layer_2").site == "resid_post.2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "GELU"}, "activation 'GELU', which is not understood; expected 'ReLU' or 'TopK'"),
        ({"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "postact_fn 'Identity', which is not understood"),
        ({"activation_state_dict": {"k": 13, "postact_fn": "ReLU"}}, "k from 1 to 12"),
        ({"activation_state_dict": {}}, "k from 1 to 12"),
        ({"activation.k": K + 1}, "activation.k 5, which is not understood; expected 4"),
        ({"normalize": True}, "holds normalize, which may change"),
    ],
)
def test_settings_that_are_not_understood(tmp_path, change, message):
    w = state(**change)
    if "activation_state_dict" in change:
        del w["activation.k"]
    with pytest.raises(InputError, match=message):
        Dictionary.load(write(tmp_path / "a.pt", w))
