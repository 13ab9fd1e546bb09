"""Each mistake is planted in a good dictionary and has to be named; the good one has to be left alone."""

import pytest
import torch
from check_world import ROOT, changed, declared, gemma, gpt2, kinds, llama, recorder_of, searched, trained

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.frames import Frame
from sae.dictionaries.gates import AbsTopK, Threshold, TopK
from sae.evaluation.check.alternatives import usual_scale
from sae.evaluation.check.promises import Promise
from sae.evaluation.check.recording import Point
from sae.model.language_model import LanguageModel


def shown(steps):
    return steps[-1].use.name


@pytest.fixture(scope="module")
def demo():
    return recorder_of(LanguageModel.load(str(ROOT / "checkpoints" / "demo-lm"), device="cpu"), 300)


@pytest.fixture(scope="module")
def demo_sae(demo):
    """The features that fire on this text; without the others every number is the same and got sooner."""
    whole = Dictionary.load(ROOT / "checkpoints" / "demo-sae")
    fires_f = (whole.encode(demo.values(Point("resid_post.2", True))) > 0).any(0)
    return changed(whole, W_enc_fd=whole.W_enc_fd[fires_f], b_enc_f=whole.b_enc_f[fires_f], W_dec_fo=whole.W_dec_fo[fires_f])


def sparse(d: Dictionary) -> Dictionary:
    """The same with a JumpReLU."""
    return changed(d, gate=Threshold(torch.full((d.d_sae,), 8.0)))


def uneven(d: Dictionary) -> torch.Tensor:
    return torch.exp(1.5 * torch.randn(d.d_sae, generator=torch.Generator().manual_seed(0)))


def long_rows(d: Dictionary, norm_f: torch.Tensor) -> Dictionary:
    """The same activations but for their units: decoder rows of other lengths."""
    return changed(d, W_enc_fd=d.W_enc_fd / norm_f[:, None], b_enc_f=d.b_enc_f / norm_f, W_dec_fo=d.W_dec_fo * norm_f[:, None])


def off_centre(d: Dictionary) -> Dictionary:
    """Reads the mean over the width, which a centred token does not have; this model's tokens have little of it, so much of that."""
    return changed(d, W_enc_fd=d.W_enc_fd + 10, b_enc_f=d.b_enc_f + 10 * d.b_dec_o.sum())


S = 0.0939  # √d over the mean norm of the demo model's stream
DEMO = {
    "bias": lambda d: changed(d, b_in_d=None),
    "site": lambda d: declared(d, site="resid_post.3"),
    "site down": lambda d: declared(d, site="resid_post.1"),
    "site pre": lambda d: declared(d, site="resid_pre.2"),
    "site attn": lambda d: declared(d, site="attn_out.2"),
    "site mlp": lambda d: declared(d, site="mlp_out.2"),
    "bos": lambda d: declared(d, prepend_bos=False),
    "frame": lambda d: changed(d, frame=Frame("layer_norm")),
    "frame constant": lambda d: changed(d, frame=Frame("constant_norm_rescale")),
    "frame centred": off_centre,
    "scale": lambda d: d.folded(1 / S),
    "scale twice": lambda d: d.folded(S),
    "scale fitted": lambda d: d.folded(3.0),
    "threshold": lambda d: changed(sparse(d), gate=Threshold(sparse(d).gate.theta_f / S)),
    "decoder_norm": lambda d: changed(d, W_dec_fo=d.W_dec_fo * uneven(d)[:, None]),
    "decoder_norm topk": lambda d: changed(long_rows(d, uneven(d)), gate=TopK(6)),
}


@pytest.mark.parametrize("plant", DEMO)
def test_a_mistake_planted_in_the_demo_dictionary_is_named(plant, demo, demo_sae):
    steps = searched(demo, DEMO[plant](demo_sae))
    assert kinds(steps) == [plant.split()[0]], shown(steps)
    assert steps[-1].fits
    assert steps[-1].fvu < 0.9 * steps[0].fvu
    if plant.startswith("site"):
        assert steps[-1].use.reads.site in ("resid_post.2", "resid_pre.3")  # which are the same values
    if plant == "scale fitted":
        assert float(shown(steps).split()[2].rstrip(",")) == pytest.approx(1 / 3, rel=0.15)


def test_the_units_of_the_demo_model_are_what_the_plants_take_them_for(demo):
    assert usual_scale(demo.values(Point("resid_post.2", True))) == pytest.approx(S, rel=0.05)


def test_good_dictionaries_of_the_demo_model_are_left_alone(demo, demo_sae):
    jump, topk = sparse(demo_sae), changed(demo_sae, gate=TopK(14))
    for good in (demo_sae, jump, topk, long_rows(jump, 1 + 0.2 * torch.rand(jump.d_sae)), long_rows(demo_sae, uneven(demo_sae))):
        steps = searched(demo, good)
        assert len(steps) == 1, shown(steps)
        assert steps[0].fits


def test_two_mistakes_at_once_are_both_named(demo, demo_sae):
    steps = searched(demo, declared(changed(demo_sae, b_in_d=None), site="resid_post.1"))
    assert sorted(kinds(steps)) == ["bias", "site"]
    assert steps[-1].fvu == pytest.approx(searched(demo, demo_sae)[0].fvu)


def test_a_promised_l0_decides_about_thresholds(demo, demo_sae):
    """A threshold that is too low lowers the FVU, so that only the number of features can tell."""
    good = sparse(demo_sae)
    low = changed(good, gate=Threshold(good.gate.theta_f * S))
    assert len(searched(demo, low)) == 1
    l0 = searched(demo, good)[0].l0
    steps = searched(demo, low, [Promise("l0", l0, l0, "a test")])
    assert kinds(steps) == ["threshold"]
    assert steps[-1].l0 == pytest.approx(l0, rel=0.1)
    norm_f = uneven(demo_sae)
    divided = searched(demo, long_rows(good, norm_f), [Promise("l0", l0, l0, "a test")])
    assert shown(divided) == "threshold ÷ the decoder norm"
    assert divided[-1].l0 == pytest.approx(l0, rel=1e-3)


def test_a_random_dictionary_fits_nowhere(demo, demo_sae):
    generator = torch.Generator().manual_seed(1)
    W_fd = torch.nn.functional.normalize(torch.randn(1024, 256, generator=generator), dim=1)
    x_nd = demo.values(Point("resid_post.2", True))
    for bias in (0.0, -20.0):
        random = Dictionary.autoencoder(W_fd, torch.full((1024,), bias), W_fd.clone(), x_nd.mean(0), demo_sae.metadata)
        steps = searched(demo, random)
        assert len(steps) == 1
        assert not steps[0].fits


def test_a_dictionary_of_another_model_fits_nowhere_but_in_that_model(demo, demo_sae):
    """The other model is the same one with its width turned by a random rotation, which leaves its predictions alone but no direction."""
    from copy import deepcopy

    turned = deepcopy(demo.lm.model)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(256, generator=generator)  # LayerNorm lets coordinates change places
    state = turned.state_dict()
    for name, value in state.items():
        if name.endswith(("wte.weight", "wpe.weight", "c_proj.weight")):
            value.copy_(value[:, order])
        elif name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.bias")) or ".ln_" in name:
            value.copy_(value[order])
    other = LanguageModel(turned, demo.lm.tokenizer, "turned")
    ids = torch.tensor([demo.sequences[0].tolist()])
    assert torch.allclose(other.logits(ids), demo.lm.logits(ids), atol=1e-3)
    alone = searched(recorder_of(other, 300), demo_sae)
    assert len(alone) == 1
    assert not alone[0].fits
    both = searched(recorder_of(other, 300, demo.lm), demo_sae)
    assert kinds(both) == ["model"]
    assert both[-1].fvu == pytest.approx(searched(demo, demo_sae)[0].fvu)


@pytest.fixture(scope="module")
def tiny_llama(byte_lm):
    return recorder_of(llama(byte_lm.tokenizer))


LLAMA = {
    "bias": (dict(), lambda d: changed(d, b_in_d=None)),
    "bias off": (dict(subtracts=False), lambda d: changed(d, b_in_d=d.b_dec_o)),
    "site": (dict(), lambda d: declared(d, site="resid_post.2")),
    "site down": (dict(), lambda d: declared(d, site="resid_post.0")),
    "site pre": (dict(), lambda d: declared(d, site="resid_pre.1")),
    "site mlp": (dict(), lambda d: declared(d, site="mlp_out.1")),
    "site mid": (dict(), lambda d: declared(d, site="resid_mid.1")),
    "site far": (dict(), lambda d: declared(d, site="resid_pre.0")),
    "site gain": (dict(site="mlp_in.1"), lambda d: declared(d, site="mlp_in_nogain.1")),
    "site no gain": (dict(site="mlp_in_nogain.1"), lambda d: declared(d, site="mlp_in.1")),
    "bos": (dict(), lambda d: declared(d, prepend_bos=False)),
    "bos there": (dict(bos=False), lambda d: declared(d, prepend_bos=True)),
    "frame constant": (dict(frame="constant_norm_rescale"), lambda d: changed(d, frame=None)),
    "frame norm": (dict(frame="layer_norm"), lambda d: changed(d, frame=None)),
    "frame centred": (dict(frame="centred"), lambda d: changed(d, frame=None)),
    "frame none": (dict(), lambda d: changed(d, frame=Frame("layer_norm"))),
    "frame none centred": (dict(), lambda d: changed(d, frame=Frame("centred"))),
    "scale": (dict(), lambda d: d.folded(5.0)),
}


@pytest.mark.parametrize("plant", LLAMA)
def test_a_mistake_planted_in_a_llama_is_named(plant, tiny_llama):
    how, mistaken = LLAMA[plant]
    good = trained(tiny_llama, **{"site": "resid_post.1", **how})
    alone = searched(tiny_llama, good)
    assert len(alone) == 1, shown(alone)
    assert alone[0].fits
    steps = searched(tiny_llama, mistaken(good))
    assert kinds(steps) == [plant.split()[0]], shown(steps)
    if plant != "scale":
        assert steps[-1].fvu == pytest.approx(alone[0].fvu, rel=1e-3)


def test_an_l0_that_the_gate_bounds_is_no_reason_to_look_further(tiny_llama):
    good = changed(trained(tiny_llama, "resid_post.1"), gate=TopK(5))
    assert len(searched(tiny_llama, good, [Promise("l0", 0, 5, "its gate")])) == 1


def test_transposed_weights_are_named(tiny_llama):
    """With as many features as dimensions: the principal directions, and the half that are largest in each row."""
    x_nd = tiny_llama.values(Point("resid_post.1", True))
    _, _, V_fd = torch.linalg.svd(x_nd - x_nd.mean(0), full_matrices=False)
    metadata = {"site": "resid_post.1", "prepend_bos": True}
    good = Dictionary(V_fd, torch.zeros(32), V_fd.clone(), x_nd.mean(0), b_in_d=x_nd.mean(0), gate=AbsTopK(12), metadata=metadata)
    assert len(searched(tiny_llama, good)) == 1
    for parts, name in (
        ({"W_enc_fd": V_fd.T.contiguous()}, "W_enc transposed"),
        ({"W_dec_fo": V_fd.T.contiguous()}, "W_dec transposed"),
        ({"W_enc_fd": V_fd.T.contiguous(), "W_dec_fo": V_fd.T.contiguous()}, "W_enc and W_dec transposed"),
    ):
        steps = searched(tiny_llama, changed(good, **parts))
        assert shown(steps) == name


def test_a_transcoder_is_moved_at_either_end_and_its_skip_turned(tiny_llama):
    good = trained(tiny_llama, "mlp_in.2", out="mlp_out.2", l1=0.3)
    x_nd, y_no = (tiny_llama.values(Point(site, True)) for site in ("mlp_in.2", "mlp_out.2"))
    ones_n1 = torch.ones(len(x_nd), 1)
    *skip_do, constant_o = torch.linalg.lstsq(torch.cat([x_nd, ones_n1], dim=1), y_no - good(x_nd)).solution
    W_skip_od = torch.stack(skip_do, dim=1)
    good = changed(good, W_skip_od=W_skip_od, b_dec_o=good.b_dec_o + constant_o)
    alone = searched(tiny_llama, good)
    assert len(alone) == 1, shown(alone)
    for mistaken, name in (
        (declared(good, site="resid_mid.2"), "reads mlp_in.2"),
        (declared(good, site_out="mlp_out.3"), "writes mlp_out.2"),
        (declared(good, site="mlp_in.3", site_out="mlp_out.3"), "reads mlp_in.2 and writes mlp_out.2"),
        (changed(good, W_skip_od=W_skip_od.T.contiguous()), "the skip matrix transposed"),
        (changed(good, b_in_d=good.b_dec_o), "no bias is taken off the input"),
    ):
        steps = searched(tiny_llama, mistaken)
        assert steps[-1].fvu == pytest.approx(alone[0].fvu, rel=1e-3), shown(steps)
        assert shown(steps) == name


def test_the_near_side_of_a_post_norm_is_named(byte_lm):
    recorder = recorder_of(gemma(byte_lm.tokenizer))
    for site in ("attn_out.1", "mlp_out.1"):
        good, early = trained(recorder, site), trained(recorder, site, before_norm=True)
        assert len(searched(recorder, good)) == 1
        steps = searched(recorder, early)
        assert kinds(steps) == ["post_norm"], shown(steps)


def test_what_transformer_lens_makes_of_a_model_is_named(byte_lm):
    """GPT-2's weights processed as TransformerLens does, written here again: writing weights centred, value biases folded."""
    lm = gpt2(byte_lm.tokenizer)
    recorder = recorder_of(lm)
    processed = processed_gpt2(lm.model)
    theirs = recorder_of(LanguageModel(processed, byte_lm.tokenizer, "processed"))
    ids = torch.tensor([recorder.sequences[0].tolist()])
    expected, found = lm.logits(ids).log_softmax(-1), theirs.lm.logits(ids).log_softmax(-1)
    assert torch.allclose(found, expected, atol=1e-3)
    for site, kind in (("resid_post.1", "frame"), ("mlp_out.2", "frame"), ("v.1", "value_bias"), ("head_out.1", "value_bias")):
        theirs_nd = theirs.values(Point(site, True))
        ours_nd = recorder.values(Point(site, True))
        as_theirs_nd = ours_nd - (recorder.value_bias(site) if kind == "value_bias" else ours_nd.mean(1, keepdim=True))
        assert torch.allclose(as_theirs_nd, theirs_nd, atol=1e-3)
        good = trained(theirs, site)
        steps = searched(recorder, good)
        assert kinds(steps) == [kind], shown(steps)
        assert steps[-1].fvu == pytest.approx(searched(theirs, good)[0].fvu, rel=0.1)


def processed_gpt2(model):
    """center_writing_weights, and fold_value_biases together with the bias of the norm that they are seen through."""
    from copy import deepcopy

    model = deepcopy(model)
    decoder, d = model.transformer, model.config.n_embd
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # it reads, so it stays as it is
    with torch.no_grad():
        for block in decoder.h:
            own, out = block.attn.c_attn, block.attn.c_proj
            seen_d = block.ln_1.bias @ own.weight + own.bias  # q, k and v of the norm's bias
            out.bias += seen_d[2 * d :] @ out.weight
            own.bias[2 * d :] -= seen_d[2 * d :]
            for writer in (out, block.mlp.c_proj):
                writer.weight -= writer.weight.mean(1, keepdim=True)
                writer.bias -= writer.bias.mean()
        for embedding in (decoder.wte, decoder.wpe):
            embedding.weight -= embedding.weight.mean(1, keepdim=True)
    return model


def test_first_positions_that_are_unlike_the_others_are_named(byte_lm):
    lm = gpt2(byte_lm.tokenizer)
    lm.model.transformer.wpe.weight.data[:4] *= 30
    recorder = recorder_of(lm)
    good = trained(recorder, "resid_post.1", first=3)
    steps = searched(recorder, good)
    assert kinds(steps) == ["positions"], shown(steps)
