"""Files as Qwen-Scope publishes them, against the code of its model cards, written out in float64."""

import pytest
import torch

from sae.dictionaries.bundle import Bundle, load
from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError

D, F, K = 6, 12, 9
X = torch.randn(40, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NAME = f"SAE-Res-Qwen3.5-2B-Base-W32K-L0_{K}"


def weights(seed=1):
    random = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (F, D), "W_dec": (D, F), "b_enc": (F,), "b_dec": (D,)}
    return {name: torch.randn(shape, generator=random, dtype=torch.float64) for name, shape in shapes.items()}


def write(folder, layers=(0,), w=None):
    folder.mkdir(parents=True)
    for layer in layers:
        torch.save(weights(layer) if w is None else w, folder / f"layer{layer}.sae.pt")
    return folder


def card(w, x):
    pre_acts = x @ w["W_enc"].T + w["b_enc"]
    values, index = pre_acts.topk(K, dim=-1)
    acts = torch.zeros_like(pre_acts).scatter_(-1, index, values)
    return acts, acts @ w["W_dec"].T + w["b_dec"]


def test_each_layer_and_the_set(tmp_path):
    folder = write(tmp_path / NAME, (2, 10))
    bundle = load(folder)
    assert isinstance(bundle, Bundle)
    assert list(bundle) == [2, 10]
    for layer in (2, 10):
        for dictionary in (bundle[layer], Dictionary.load(folder / f"layer_{layer}"), Dictionary.load(folder / f"layer{layer}.sae.pt")):
            acts, out = card(weights(layer), X)
            torch.testing.assert_close(dictionary.encode(X), acts, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(dictionary(X), out, rtol=1e-12, atol=1e-12)
            assert dictionary.site == dictionary.site_out == f"resid_post.{layer}"
            assert dictionary.metadata["model_name"] == "Qwen/Qwen3.5-2B-Base"
    assert (acts < 0).any()  # so that a ReLU would be seen


@pytest.mark.parametrize(
    ("name", "message"), [("sae", "in a folder with the name of its repository"), ("", "has L0 99, where a whole number")]
)
def test_a_folder_that_does_not_tell_k(tmp_path, name, message):
    folder = write(tmp_path / (name or NAME.replace(f"L0_{K}", "L0_99")))
    with pytest.raises(InputError, match=message):
        Dictionary.load(folder / "layer0.sae.pt")
