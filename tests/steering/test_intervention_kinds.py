"""Clamping and ablating features of every kind of dictionary, against the formula at every position of the value."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.frames import Frame
from sae.dictionaries.gates import AbsTopK, GroupMax, Threshold, TopK
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.directions.feature import feature_direction
from steering.intervention import DictionaryFeature, steered
from steering.vector import SteeringVector

D, F, J = 16, 30, 7
IDS = torch.arange(1, 13).view(2, 6)
KINDS = {
    "jumprelu": dict(gate=Threshold(torch.full((F,), 0.4))),
    "no input bias": dict(b_in_d=None),
    "topk": dict(gate=TopK(9)),
    "abstopk": dict(gate=AbsTopK(9)),
    "groupmax": dict(gate=GroupMax(10)),
    "layer norm": dict(frame=Frame("layer_norm")),
    "constant norm": dict(frame=Frame("constant_norm_rescale"), gate=TopK(9)),
    "centred": dict(frame=Frame("centred")),
}


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=D, n_layer=2, n_head=2, initializer_range=0.4)
    return LanguageModel(GPT2LMHeadModel(config), name="tiny")


def made(site="resid_post.0", **rest) -> Dictionary:
    g = torch.Generator().manual_seed(0)
    W_enc_fd, W_dec_fd = torch.randn(2, F, D, generator=g)
    rest = {"b_in_d": torch.randn(D, generator=g), "metadata": {"site": site}} | rest
    return Dictionary(W_enc_fd, torch.randn(F, generator=g) / 9, W_dec_fd, torch.zeros(D), **rest).requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_clamp_and_ablate(lm, kind):
    dictionary = made(**KINDS[kind])
    before = lm.record(IDS, ["resid_post.0"])["resid_post.0"]
    act = dictionary.encode(before)[..., [J, 3]]
    added = dictionary.W_dec_fo[[J, 3]]
    unit = dictionary.unit(before)
    for operation, gap in (("clamp", torch.tensor([2.0, -1.0]) - act), ("ablate", -torch.tensor([2.0, -1.0]) * act)):
        features = [(DictionaryFeature(dictionary, J), 2.0), (DictionaryFeature(dictionary, 3), -1.0)]
        with steered(lm, features, operation=operation):
            found = lm.record(IDS, ["resid_post.0"])["resid_post.0"]
        torch.testing.assert_close(found, before + (gap * unit) @ added, rtol=1e-5, atol=1e-5)
    assert act.abs().max() > 0


def test_a_transcoder_is_read_in_one_place_and_written_in_another(lm):
    g = torch.Generator().manual_seed(5)
    metadata = {"site": "resid_pre.1", "site_out": "mlp_out.1"}
    dictionary = made(b_in_d=None, W_skip_od=torch.randn(D, D, generator=g), metadata=metadata)
    x, y = (lm.record(IDS, ["resid_pre.1", "mlp_out.1"])[site] for site in ("resid_pre.1", "mlp_out.1"))
    other = SteeringVector.at("mlp_out.1", torch.ones(D))
    with steered(lm, [(DictionaryFeature(dictionary, J), 3.0)], operation="clamp"):
        found = lm.record(IDS, ["resid_pre.1", "mlp_out.1"])
    torch.testing.assert_close(found["resid_pre.1"], x)
    expected = y + (3 - dictionary.encode(x)[..., J])[..., None] * dictionary.W_dec_fo[J]
    torch.testing.assert_close(found["mlp_out.1"], expected, rtol=1e-5, atol=1e-5)
    both = [(DictionaryFeature(dictionary, J), 3.0), (DictionaryFeature(dictionary, 3), -1.0)]  # they share what they read
    with steered(lm, both, operation="clamp"):
        found = lm.record(IDS, ["mlp_out.1"])["mlp_out.1"]
    gap = torch.tensor([3.0, -1.0]) - dictionary.encode(x)[..., [J, 3]]
    torch.testing.assert_close(found, y + gap @ dictionary.W_dec_fo[[J, 3]], rtol=1e-5, atol=1e-5)
    backwards = made(b_in_d=None, metadata={"site": "mlp_out.1", "site_out": "resid_pre.1"})
    with pytest.raises(InputError, match="before it reads"), steered(lm, [(DictionaryFeature(backwards, J), 3.0)], operation="clamp"):
        lm.logits(IDS)
    with steered(lm, [(DictionaryFeature(dictionary, J), 3.0), (other, 0.0)], operation="clamp"):
        new = lm.generate(IDS, max_new_tokens=4, temperature=0)  # with a cache: one position a pass
    assert new.shape == (2, 10)
    assert feature_direction(dictionary, J, 2.0).directions.keys() == {"mlp_out.1"}


def test_a_direction_of_a_dictionary_that_normalises_tokens_is_refused():
    with pytest.raises(InputError, match="clamp it instead"):
        feature_direction(made(frame=Frame("layer_norm")), J, 2.0)
    torch.testing.assert_close(feature_direction(made(frame=Frame("centred")), J, 2.0).direction_d, 2 * made().W_dec_fo[J])
