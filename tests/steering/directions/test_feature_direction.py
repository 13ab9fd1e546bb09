"""A feature's direction against the dictionary's own decoding; its choice by a word and by what it does to the output."""

import json
import math
from pathlib import Path

import pytest
import torch

from sae.activations.harvest.command import HarvestConfig, harvest
from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.features.index.build import IndexConfig, build_index
from sae.features.index.reader import FeatureIndex
from steering.directions.feature import by_output_score, by_search_word, feature_direction, output_scores


def dictionary(metadata=None) -> Dictionary:
    torch.manual_seed(3)
    return Dictionary.autoencoder(torch.randn(6, 32), torch.zeros(6), 3 * torch.randn(6, 32), torch.randn(32), metadata)


def test_strength_one_is_what_the_feature_adds_at_its_maximum():
    sae = dictionary({"site": "resid_post.1", "model_name": "m"})
    made = feature_direction(sae, 4, 2.5)
    acts_f = torch.zeros(6)
    silent = sae.decode(acts_f)
    acts_f[4] = 2.5
    torch.testing.assert_close(made.direction_d, (sae.decode(acts_f) - silent).detach(), rtol=1e-5, atol=1e-5)
    assert made.site == "resid_post.1"
    assert made.provenance == {"method": "feature", "feature": 4, "max_activation": 2.5, "model": "m"}


def test_features_that_cannot_steer():
    sae = dictionary()
    for feature, highest, site, sentence in [
        (6, 1.0, "resid_post.1", "features 0 to 5"),
        (-1, 1.0, "resid_post.1", "features 0 to 5"),
        (2, 0.0, "resid_post.1", "never fires"),
        (2, float("nan"), "resid_post.1", "never fires"),
        (2, 1.0, None, "name its site"),
    ]:
        with pytest.raises(InputError, match=sentence):
            feature_direction(sae, feature, highest, site)


def index_of(lm, folder: Path) -> tuple[FeatureIndex, Dictionary]:
    """Feature 2 reads the letter Z off the token embeddings; the others read nothing in particular."""
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"row {i} of aZc and Z by {i}"}) + "\n" for i in range(40)))
    text = (str(folder / "text.jsonl"),)
    harvest(HarvestConfig(text=text, out=folder / "cache", model=str(folder / "model"), sites=("resid_pre.0",), tokens=600))
    W_fd = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    z_d = lm.model.transformer.wte.weight[lm.tokenizer("Z")["input_ids"][0]].detach()
    W_fd[2] = 5 * z_d / z_d.norm()
    b_enc_f = torch.full((6,), -1.0)
    b_enc_f[2] = -0.7 * float(W_fd[2] @ z_d)
    model = {"model_name": str(folder / "model"), "model_fingerprint": lm.fingerprint(), "site": "resid_pre.0"}
    Dictionary.autoencoder(W_fd, b_enc_f, W_fd, torch.zeros(32), model).save(folder / "sae")
    build_index(IndexConfig(cache=folder / "cache", dictionary=folder / "sae", out=folder / "index"))
    return FeatureIndex.open(folder / "index"), Dictionary.load(folder / "sae")


def test_a_word_finds_the_feature_that_fires_on_it(byte_lm, tmp_path):
    index, sae = index_of(byte_lm, tmp_path)
    made = by_search_word(index, sae, "Z")
    assert made.provenance["search"] == "Z"
    assert made.provenance["feature"] == index.search("Z", 1)[0].feature == 2
    highest = float(index.feature(2).values.max())
    torch.testing.assert_close(made.direction_d, highest * sae.W_dec_fo[2], rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="does not occur as a whole word"):
        by_search_word(index, sae, "quince")


@pytest.mark.parametrize("site", ["resid_post.1", "head_out.1"])
def test_output_score_against_the_formula_by_hand(byte_lm, site):
    sae = dictionary({"site": site})
    highest = [1.5, 0.5, -2.0]
    scores = output_scores(byte_lm, sae, [4, 0, 3], highest, prompt="Well,", factor=4.0, tokens=3)
    ids = torch.tensor([[0, *byte_lm.tokenizer("Well,")["input_ids"]]])
    transformer = byte_lm.model.transformer
    for j, most, score in zip([4, 0, 3], highest, scores):

        def clamped(hidden_spd, j=j, most=most):
            acts_spf = sae.encode(hidden_spd)
            error_spd = hidden_spd - sae.decode(acts_spf)
            acts_spf[..., j] = 4 * most
            return sae.decode(acts_spf) + error_spd

        block, row_d = transformer.h[1], math.copysign(1, most) * sae.W_dec_fo[j]
        with torch.no_grad():
            if site == "resid_post.1":
                handle = block.register_forward_hook(
                    lambda _module, _args, out, f=clamped: (f(out[0]), *out[1:]) if isinstance(out, tuple) else f(out)
                )
            else:
                handle = block.attn.c_proj.register_forward_pre_hook(lambda _module, args, f=clamped: (f(args[0]),))
                row_d = row_d @ block.attn.c_proj.weight
            p_v = byte_lm.model(ids).logits[0, -1].double().softmax(-1)
            handle.remove()
            row_d = (row_d - row_d.mean()) * transformer.ln_f.weight
            lens_v = byte_lm.model.lm_head.weight @ row_d
        lens = sorted(range(len(lens_v)), key=lambda token: -lens_v[token])[:3]
        order = sorted(range(len(p_v)), key=lambda token: -p_v[token])
        by_hand = (1 - min(order.index(token) for token in lens) / len(p_v)) * max(float(p_v[token]) for token in lens)
        assert score == pytest.approx(by_hand, rel=1e-3)
    assert len({round(score, 6) for score in scores}) == 3


def test_the_feature_that_drives_the_output_is_chosen_over_one_that_does_not(byte_lm):
    """One row points to where a token is read off, one to where nothing is: the mean that the final norm takes away."""
    W_fd = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    token = byte_lm.tokenizer("Q")["input_ids"][0]
    W_fd[0], W_fd[1] = torch.ones(32), byte_lm.model.lm_head.weight[token].detach()
    sae = Dictionary.autoencoder(W_fd, torch.zeros(3), W_fd, torch.zeros(32), {"site": "resid_post.2"})
    made = by_output_score(byte_lm, sae, [0, 1], [5.0, 5.0])
    assert made.provenance["feature"] == 1
    assert made.provenance["output_scores"]["1"] > 0.3 > 0.05 > made.provenance["output_scores"]["0"]
    torch.testing.assert_close(made.direction_d, 5 * W_fd[1])
    for features, highest, sentence in [
        ([], [], "got 0 for 0"),
        ([1], [1.0, 2.0], "got 2 for 1"),
        ([1, 7], [1.0, 2.0], "0 to 2"),
        ([1, 2], [1.0, 0.0], "never fires"),
    ]:
        with pytest.raises(InputError, match=sentence):
            by_output_score(byte_lm, sae, features, highest)
