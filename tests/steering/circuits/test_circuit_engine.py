"""Passes with edges cut, against the corrupt run, products written here and finite differences.

s sequences · p positions · d width · r readers · w writers · e edges
"""

import copy

import pytest
import torch
from circuit_world import FAMILIES, P, engine_of, exact, hooks_of, logit_difference  # noqa: F401  (a fixture)
from test_language_model import ids_of, tiny
from test_sites import made

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.circuits.finding.scores import edge_scores
from steering.circuits.model_graph.engine import Engine

CLEAN, CORRUPT = ids_of(2, P, seed=1), ids_of(2, P, seed=2)
FLOAT32_INSIDE = ("gptj", "mixtral")  # queries and keys, the router, whatever the dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_the_finite_difference_of_every_edge_is_its_eap_score(family, exact):  # noqa: F811
    engine = Engine(exact(family))
    graph, (clean_sp, corrupt_sp) = engine.graph, (CLEAN[:1], CORRUPT[:1])
    score_rw = edge_scores(engine, clean_sp, corrupt_sp, logit_difference, method="eap").score_srw[0]
    edges_e2, step = graph.exists_rw.nonzero(), 1e-2 if family in FLOAT32_INSIDE else 1e-6  # OPT's ReLUs have kinks
    assert len(edges_e2) == graph.n_edges
    cut_erw = torch.zeros(len(edges_e2), *graph.exists_rw.shape, dtype=torch.float64)
    cut_erw[torch.arange(len(edges_e2)), edges_e2[:, 0], edges_e2[:, 1]] = step
    corrupt_wspd, moved = engine.writers(corrupt_sp), []
    for sign in (1, -1):
        with engine.patched(corrupt_wspd, sign * cut_erw), torch.no_grad():
            moved.append(logit_difference(engine.lm.logits(clean_sp.expand(len(edges_e2), -1))))
    difference_e, score_e = (moved[0] - moved[1]) / (2 * step), score_rw[edges_e2[:, 0], edges_e2[:, 1]]
    tolerance = 1e-3 if family in FLOAT32_INSIDE else 1e-6
    torch.testing.assert_close(score_e, difference_e, rtol=0, atol=tolerance * float(score_e.abs().max()))
    assert (score_rw[~graph.exists_rw] == 0).all()
    assert (score_e.abs() > 1e-6 * score_e.abs().max()).float().mean() > 0.8  # they are not all zero


@pytest.mark.parametrize("family", FAMILIES)
def test_all_edges_cut_is_the_corrupt_run_and_cut_with_the_clean_run_the_clean_one(family, exact):  # noqa: F811
    engine = Engine(exact(family))
    clean, corrupt = engine.run(CLEAN), engine.run(CORRUPT)
    all_rw, tolerance = engine.graph.exists_rw.double(), 1e-5 if family in FLOAT32_INSIDE else 1e-12
    for run, expected_spv in ((corrupt, corrupt.logits_spv), (clean, clean.logits_spv)):
        with engine.patched(run.written_wspd, all_rw), torch.no_grad():
            found_spv = engine.lm.logits(CLEAN)
        torch.testing.assert_close(found_spv, expected_spv, rtol=tolerance, atol=tolerance)
    with engine.patched(corrupt.written_wspd, 0 * all_rw), torch.no_grad():
        assert torch.equal(engine.lm.logits(CLEAN), clean.logits_spv)


@pytest.mark.parametrize("family", FAMILIES)
def test_readers_that_no_cut_edge_reaches_keep_every_bit(family):
    engine = engine_of(family)
    plain = engine.lm.record(CLEAN, ["head_out.0", "mlp_in.1", "q.1"])
    cut_rw = engine.graph.circuit(["embed->q.1.2", "embed->logits"]).float()
    with engine.patched(engine.writers(CORRUPT), cut_rw):
        found = engine.lm.record(CLEAN, ["head_out.0", "q.1"])
    width = engine.lm.width("q.1") // engine.graph.n_heads
    others = [n for n in range(engine.lm.width("q.1")) if n // width != 2]
    assert torch.equal(found["head_out.0"], plain["head_out.0"])
    assert torch.equal(found["q.1"][..., others], plain["q.1"][..., others])
    assert not torch.allclose(found["q.1"], plain["q.1"])


def test_edges_of_gpt2_by_hand(exact):  # noqa: F811
    """Into a query, a value and an MLP from heads of another block, by hooks written here."""
    engine = Engine(exact("gpt2"))
    block_0, block_1 = engine.lm.model.transformer.h[:2]
    seen: dict[str, torch.Tensor] = {}

    def head_writes(_module, args):
        seen["z"] = args[0]

    def written(z_spc, head):
        own = slice(8 * head, 8 * head + 8)
        return z_spc[..., own] @ block_0.attn.c_proj.weight[own]

    handle = block_0.attn.c_proj.register_forward_pre_hook(head_writes)
    with torch.no_grad():
        engine.lm.logits(CORRUPT)
    corrupt_z = seen["z"]

    def change_attention(_module, _args, output):
        output = output.clone()
        for kind, head, writer, share in ((0, 1, 3, 1.0), (2, 2, 0, 0.5)):  # query 1 from head 3, value 2 from half of head 0
            x = seen["x"] + share * (written(corrupt_z, writer) - written(seen["z"], writer))
            own = slice(32 * kind + 8 * head, 32 * kind + 8 * head + 8)
            normed = torch.nn.functional.layer_norm(x, (32,), block_1.ln_1.weight, block_1.ln_1.bias, block_1.ln_1.eps)
            output[..., own] = normed @ block_1.attn.c_attn.weight[:, own] + block_1.attn.c_attn.bias[own]
        return output

    handles = [
        handle,
        block_1.ln_1.register_forward_pre_hook(lambda _module, args: seen.__setitem__("x", args[0])),
        block_1.attn.c_attn.register_forward_hook(change_attention),
        block_1.ln_2.register_forward_pre_hook(lambda _module, args: (args[0] + written(corrupt_z, 2) - written(seen["z"], 2),)),
    ]
    with torch.no_grad():
        expected = engine.lm.logits(CLEAN)
    for handle in handles:
        handle.remove()
    cut_rw = engine.graph.circuit(["head.0.3->q.1.1", "head.0.2->mlp_in.1"]).double()
    cut_rw[engine.graph.edge("head.0.0->v.1.2")] = 0.5
    with engine.patched(engine.writers(CORRUPT), cut_rw), torch.no_grad():
        torch.testing.assert_close(engine.lm.logits(CLEAN), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_padded_prompts_are_patched_and_scored_as_alone(family):
    engine, cut_rw = engine_of(family), torch.rand(engine_of(family).graph.exists_rw.shape) * engine_of(family).graph.exists_rw
    mask_sp = torch.ones(2, P, dtype=torch.long)
    mask_sp[0, :2] = 0
    scores = edge_scores(engine, CLEAN, CORRUPT, logit_difference, mask_sp)
    with engine.patched(engine.writers(CORRUPT, mask_sp), cut_rw), torch.no_grad():
        padded_sv = engine.lm.logits(CLEAN, mask_sp)[:, -1]
    for row, first in ((0, 2), (1, 0)):
        clean_sp, corrupt_sp = (ids_sp[row : row + 1, first:] for ids_sp in (CLEAN, CORRUPT))
        with engine.patched(engine.writers(corrupt_sp), cut_rw), torch.no_grad():
            torch.testing.assert_close(padded_sv[row], engine.lm.logits(clean_sp)[0, -1], rtol=1e-4, atol=1e-4)
        alone_rw = edge_scores(engine, clean_sp, corrupt_sp, logit_difference).score_srw[0]
        torch.testing.assert_close(scores.score_srw[row], alone_rw, rtol=0, atol=2e-5 * float(alone_rw.abs().max()))


def test_a_cut_asks_for_gradients(exact):  # noqa: F811
    """They are the scores at the cut: with all edges cut, those at the corrupt run."""
    engine = Engine(exact("llama"))
    cut_rw = torch.zeros(engine.graph.exists_rw.shape, dtype=torch.float64, requires_grad=True)
    with engine.patched(engine.writers(CORRUPT), cut_rw):
        logit_difference(engine.lm.logits(CLEAN)).sum().backward()
    scores = edge_scores(engine, CLEAN, CORRUPT, logit_difference, method="eap").score_srw.sum(0)
    torch.testing.assert_close(cut_rw.grad, scores, rtol=1e-9, atol=1e-9)


def test_hooks_and_settings_are_gone_behind_an_exception():
    engine = engine_of("phi3")
    attention = engine.lm.model.model.layers[1].self_attn
    before = hooks_of(engine.lm)
    settings = (attention.num_key_value_groups, attention.num_key_value_heads)

    def fail():
        assert attention.num_key_value_groups == 1
        return 1 / 0

    with pytest.raises(ZeroDivisionError), engine.patched(engine.writers(CORRUPT), engine.graph.exists_rw.float()):
        fail()
    with pytest.raises(ZeroDivisionError):
        engine.gradients(CLEAN, None, lambda logits_spv: 1 / 0)
    assert hooks_of(engine.lm) == before
    assert (attention.num_key_value_groups, attention.num_key_value_heads) == settings


def test_what_stands_in_for_writers():
    engine = engine_of("gpt2")
    written_wspd = engine.writers(CLEAN)
    mask_sp = torch.ones_like(CLEAN)
    mask_sp[1, :3] = 0
    real_w3d = torch.cat([engine.writers(CLEAN, mask_sp)[:, 0], engine.writers(CLEAN, mask_sp)[:, 1, 3:]], dim=1)
    torch.testing.assert_close(engine.mean_writers(CLEAN, mask_sp)[:, 0, 0], real_w3d.mean(1))
    with engine.patched(engine.zero_writers(), engine.graph.circuit(["mlp.2->logits"]).float()), torch.no_grad():
        found_spv = engine.lm.logits(CLEAN)
    stream_spd = engine.lm.record(CLEAN, ["resid_post.2"])["resid_post.2"] - written_wspd[engine.graph.writer("mlp.2")]
    expected_spv = engine.lm.model.lm_head(engine.lm.model.transformer.ln_f(stream_spd))
    torch.testing.assert_close(found_spv, expected_spv, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("olmo2", "Olmo2RMSNorm norms the queries or keys of all heads together"),
        ("opt 350m", "expected a norm before the unembedding of 'opt 350m'"),
        ("falcon", "its query heads share keys and values in a way that cannot be undone"),
        ("qwen3_next", "not so block 0: q is not known: no one module of the attention makes it"),
    ],
)
def test_models_that_the_graph_does_not_describe_are_refused(family, message):
    with pytest.raises(InputError, match=message):
        Engine(tiny(family) if family in ("olmo2", "opt 350m") else made(family))


def test_other_cuts_and_metrics_are_refused():
    engine = engine_of("gpt2")
    with (
        pytest.raises(InputError, match="expected a cut of 40 readers by 16 writers"),
        engine.patched(engine.zero_writers(), torch.zeros(3, 3)),
    ):
        pass
    with pytest.raises(InputError, match="one of edges that do not exist"), engine.patched(engine.zero_writers(), torch.ones(40, 16)):
        pass
    with pytest.raises(InputError, match="expected a metric that makes one number"):
        engine.gradients(CLEAN, None, lambda logits_spv: logits_spv.sum())


def test_a_model_loaded_in_8_bits_is_refused():
    """As bitsandbytes has it: a linear layer whose weight is of whole numbers, with a scale for each row."""

    class Linear8bitLt(torch.nn.Linear):
        def __init__(self, inner):
            super().__init__(inner.in_features, inner.out_features, inner.bias is not None)
            self.scale_c = inner.weight.detach().abs().amax(1, keepdim=True) / 127
            self.weight = torch.nn.Parameter((inner.weight.detach() / self.scale_c).round().to(torch.int8), requires_grad=False)

        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale_c, self.bias)

    model = copy.deepcopy(tiny("llama").model)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Linear8bitLt(getattr(layer.self_attn, name)))
    with pytest.raises(InputError, match=r"got Linear8bitLt; load the model whole, without adapters and not in 8 bits$"):
        Engine(LanguageModel(model, name="quantized"))


def test_projections_that_are_no_plain_linear_maps_are_refused():
    class Adapted(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    model = copy.deepcopy(tiny("llama").model)
    attention = model.model.layers[1].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    with pytest.raises(InputError, match="expected projections that are plain linear maps in 'adapted', got Adapted; load the model whole"):
        Engine(LanguageModel(model, name="adapted"))
