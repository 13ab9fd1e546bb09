"""Files of Goodfire and qresearch against the code of their model cards and of r1-interpretability, written out in float64."""

import pytest
import torch

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.formats.releases import goodfire
from sae.errors import InputError

D, F, K = 6, 12, 3
X = torch.randn(40, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(end=""):
    shapes = {"encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F), "decoder.bias": (D,)}
    return {name.replace(".", f"{end}."): random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def tied(d_sae=F):
    return {"W": random(D, d_sae, seed=1), "b_enc": random(d_sae, seed=2), "b_dec": random(D, seed=3)}


def write(file, state):
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    return file


def same(dictionary, acts, out):
    torch.testing.assert_close(dictionary.encode(X), acts, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dictionary(X), out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "end", "site", "model", "l0"),
    [
        ("Llama-3.1-8B-Instruct-SAE-l19.pth", "_linear", "resid_post.19", "meta-llama/Llama-3.1-8B-Instruct", 91),
        ("Llama-3.3-70B-Instruct-SAE-l50.pt", "_linear", "resid_post.50", "meta-llama/Llama-3.3-70B-Instruct", 121),
        ("DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", "", "resid_post.19", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 93),
        ("Llama-3.2-1B-Instruct-SAE-l9.pt", "", "resid_post.9", "meta-llama/Llama-3.2-1B-Instruct", 63),
    ],
)
def test_relu(tmp_path, name, end, site, model, l0):
    w = linear(end)
    file = write(tmp_path / name.rpartition(".")[0] / name, w)
    acts = (X @ w[f"encoder{end}.weight"].T + w[f"encoder{end}.bias"]).relu()
    for dictionary in (Dictionary.load(file), Dictionary.load(file.parent)):
        same(dictionary, acts, acts @ w[f"decoder{end}.weight"].T + w[f"decoder{end}.bias"])
        assert (dictionary.site, dictionary.metadata["model_name"]) == (site, model)
        assert dictionary.metadata["promised"] == {"l0": l0}


@pytest.mark.parametrize("name", ["math", "logic"])
def test_deepseek_r1_is_tied(tmp_path, capsys, monkeypatch, name):
    assert goodfire.KEPT == {"math": 128, "logic": 64}
    monkeypatch.setitem(goodfire.KEPT, name, K)
    w = tied()
    file = write(tmp_path / "DeepSeek-R1-SAE-l37" / name / "DeepSeek-R1-SAE-l37.pt", w)
    acts = torch.stack([(x @ w["W"] + w["b_enc"]).relu() for x in X])
    acts = acts * torch.zeros_like(acts).scatter_(-1, acts.topk(K).indices, 1)
    for dictionary in (Dictionary.load(file), Dictionary.load(file.parent)):
        same(dictionary, acts, acts @ w["W"].T + w["b_dec"])
        assert (dictionary.site, dictionary.metadata["model_name"]) == ("resid_post.37", "deepseek-ai/DeepSeek-R1")
    assert f"keeps {K} features of a token in the mean over a batch; here each token keeps its {K} largest" in capsys.readouterr().err
    dictionary.save(tmp_path / "saved")
    same(Dictionary.load(tmp_path / "saved"), acts, acts @ w["W"].T + w["b_dec"])


def test_r1_elsewhere_does_not_tell_k(tmp_path):
    file = write(tmp_path / "other" / "DeepSeek-R1-SAE-l37.pt", tied())
    with pytest.raises(InputError, match=r"expected .* in a folder math or logic, .* found it in other; name the folder so"):
        Dictionary.load(file)


def test_a_file_of_another_name_is_known_by_its_tensors(tmp_path):
    dictionary = Dictionary.load(write(tmp_path / "renamed.pt", linear("_linear")))
    assert (dictionary.d_sae, dictionary.site, "model_name" in dictionary.metadata) == (F, None, False)
    with pytest.raises(InputError, match="found no known format"):  # dictionary_learning's AutoEncoderNew has the same names
        Dictionary.load(write(tmp_path / "other.pt", linear()))
