"""Gradients under rules against GPT-2 and Llama written here by hand, with `detach` where the rules ask for it; and that no rule is idle.

s sequences · p positions · d width of the stream · h heads · z width of a head · r readers
"""

import math

import pytest
import torch
from circuit_world import FAMILIES, P, engine_of, exact, hooks_of, logit_difference  # noqa: F401  (a fixture)
from test_language_model import CONFIGS, ids_of, randomised

from sae.errors import InputError
from steering.circuits.finding.scores import edge_scores
from steering.circuits.model_graph.engine import Engine
from steering.circuits.model_graph.rules import RULES, RULES_OF, find_neurons, gradient_rules

CLEAN, CORRUPT = ids_of(2, P, seed=1), ids_of(2, P, seed=2)
GATED = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite"}
ATTENTION_RULES = {"patterns", "softmax", "products"}


def half(x):
    return x / 2 + (x / 2).detach()


def normed(x, eps, gain, bias, rules):
    x = x if bias is None else x - x.mean(-1, keepdim=True)
    scale = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return x / (scale.detach() if "norms" in rules else scale) * gain + (0 if bias is None else bias)


def attention(q_shpz, k_shpz, v_shpz, rules):
    if "products" in rules:
        q_shpz, k_shpz, v_shpz = half(half(q_shpz)), half(half(k_shpz)), half(v_shpz)
    score_shpp = q_shpz @ k_shpz.transpose(-1, -2) / math.sqrt(q_shpz.shape[-1])
    score_shpp = score_shpp.masked_fill(torch.ones(P, P).triu(1).bool(), -1e30)
    pattern_shpp = score_shpp.softmax(-1)
    if "softmax" in rules:
        warm_shpp = 2 * (score_shpp / 2).softmax(-1)  # whose slope is t · (g − Σ g t)
        pattern_shpp = pattern_shpp.detach() + warm_shpp - warm_shpp.detach()
    if "patterns" in rules:
        pattern_shpp = pattern_shpp.detach()
    return pattern_shpp @ v_shpz


def activated(function, x, rules):
    return x * (function(x) / x).detach() if "activations" in rules else function(x)


def rotated(x_shpz, base):
    z = x_shpz.shape[-1]
    angle_pz = torch.outer(torch.arange(P).float(), 1 / base ** (torch.arange(0, z, 2).float() / z)).repeat(1, 2)
    turned = torch.cat([-x_shpz[..., z // 2 :], x_shpz[..., : z // 2]], -1)
    return x_shpz * angle_pz.cos().double() + turned * angle_pz.sin().double()


def by_hand(lm, rules, added_rspd):
    """The logits; reader r reads the stream plus its own row of `added_rspd`."""
    config, w = lm.model.config, {name.split(".", 1)[-1]: value.detach() for name, value in lm.model.named_parameters()}
    gpt2, heads, rows = config.model_type == "gpt2", config.num_attention_heads, iter(added_rspd)
    groups = heads if gpt2 else config.num_key_value_heads
    eps = config.layer_norm_epsilon if gpt2 else config.rms_norm_eps

    def norm(x, name):
        return normed(x, eps, w[f"{name}.weight"], w[f"{name}.bias"] if gpt2 else None, rules)

    x_spd = w["wte.weight"][CLEAN] + w["wpe.weight"][:P] if gpt2 else w["embed_tokens.weight"][CLEAN]
    for layer in range(lm.n_layers):
        block = f"h.{layer}." if gpt2 else f"layers.{layer}."
        made = {}
        for n, kind in enumerate("qkv"):
            if gpt2:
                weight_cd, bias_c = (w[f"{block}attn.c_attn.{part}"].chunk(3, -1)[n] for part in ("weight", "bias"))
                weight_cd = weight_cd.T
            else:
                weight_cd, bias_c = w[f"{block}self_attn.{kind}_proj.weight"], torch.zeros(1)
            shared = 1 if kind == "q" else heads // groups
            size = len(weight_cd) // (heads // shared)
            made[kind] = []
            for head in range(heads):
                own = slice(head // shared * size, (head // shared + 1) * size)
                read_spd = norm(x_spd + next(rows), block + ("ln_1" if gpt2 else "input_layernorm"))
                made[kind].append(read_spd @ weight_cd[own].T + (bias_c[own] if gpt2 else 0))
        q, k, v = (torch.stack(made[kind], 1) for kind in "qkv")
        if not gpt2:
            base = config.rope_parameters["rope_theta"]
            q, k = rotated(q, base), rotated(k, base)
        heads_spc = attention(q, k, v, rules).transpose(1, 2).flatten(2)
        if gpt2:
            x_spd = x_spd + heads_spc @ w[f"{block}attn.c_proj.weight"] + w[f"{block}attn.c_proj.bias"]
        else:
            x_spd = x_spd + heads_spc @ w[f"{block}self_attn.o_proj.weight"].T
        read_spd = norm(x_spd + next(rows), block + ("ln_2" if gpt2 else "post_attention_layernorm"))
        if gpt2:
            pre = read_spd @ w[f"{block}mlp.c_fc.weight"] + w[f"{block}mlp.c_fc.bias"]
            gelu = activated(lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), pre, rules)
            x_spd = x_spd + gelu @ w[f"{block}mlp.c_proj.weight"] + w[f"{block}mlp.c_proj.bias"]
        else:
            gate, up = (read_spd @ w[f"{block}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
            gate = activated(lambda x: x / (1 + torch.exp(-x)), gate, rules)
            gate, up = (half(gate), half(up)) if "gates" in rules else (gate, up)
            x_spd = x_spd + (gate * up) @ w[f"{block}mlp.down_proj.weight"].T
    # the engine's gradient at the logits is with respect to the stream ahead of the final norm
    final_spd = norm(x_spd + next(rows), "ln_f" if gpt2 else "norm")
    return final_spd @ lm.model.get_output_embeddings().weight.detach().T


def gradients(engine, rules):
    logits = []

    def metric(logits_spv):
        logits.append(logits_spv.detach().clone())
        return logit_difference(logits_spv)

    _, parts = engine.gradients(CLEAN, None, metric, rules=rules)
    return torch.cat([part.gradient_nspd for part in parts]), logits[0]


@pytest.mark.parametrize("rules", [(), *((rule,) for rule in RULES), *RULES_OF.values()], ids=lambda rules: "+".join(rules) or "none")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradients_are_those_of_a_model_written_by_hand(family, rules, exact):  # noqa: F811
    engine = Engine(exact(family))
    added_rspd = torch.zeros(len(engine.graph.readers), *CLEAN.shape, engine.lm.d_model, dtype=torch.float64, requires_grad=True)
    logits_spv = by_hand(engine.lm, rules, added_rspd)
    found_rspd, found_logits_spv = gradients(engine, rules)
    torch.testing.assert_close(found_logits_spv, logits_spv.detach(), rtol=1e-6, atol=1e-6)
    (expected_rspd,) = torch.autograd.grad(logit_difference(logits_spv).sum(), added_rspd)
    torch.testing.assert_close(found_rspd, expected_rspd, rtol=1e-6, atol=1e-7 * float(expected_rspd.abs().max()))


@pytest.mark.parametrize(
    ("family", "attention_code"),
    [*((family, code) for family in ("gpt2", "llama", "qwen3") for code in ("eager", "sdpa")), ("gemma2", "eager")],  # all it has
)
def test_each_rule_changes_gradients_and_no_bit_of_the_logits(family, attention_code):
    lm = randomised(CONFIGS[family](), seed=5, name=family)
    lm.model.set_attn_implementation(attention_code)
    engine, before = Engine(lm), hooks_of(lm)
    plain_rspd, plain_spv = gradients(engine, ())
    with lm.attention_edited(lambda _, pattern, values: (pattern, values)):
        eager_rspd, eager_spv = gradients(engine, ())
    for rule in RULES:
        found_rspd, found_spv = gradients(engine, (rule,))
        before_rspd, before_spv = (eager_rspd, eager_spv) if rule in ATTENTION_RULES else (plain_rspd, plain_spv)
        assert torch.equal(found_spv, before_spv), rule
        change = float((found_rspd - before_rspd).norm() / before_rspd.norm())
        if rule == "gates" and family == "gpt2":  # no gates
            assert change == 0
        else:
            assert change > 1e-3, rule  # rounding is some 1e-6
    assert lm.model.config._attn_implementation == attention_code
    assert hooks_of(lm) == before


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"mixtral"}))
def test_activations_and_gates_are_found_and_both_methods_score(family):
    engine = engine_of(family)
    neurons = find_neurons(engine.lm)
    assert {own.gated for own in neurons} == {family in GATED}
    assert len({own.activation for own in neurons}) == engine.lm.n_layers
    if family == "gptj":  # attends by code of its own
        for method in RULES_OF:
            with pytest.raises(InputError, match="expected attention patterns in all blocks of 'gptj'"):
                edge_scores(engine, CLEAN, CORRUPT, logit_difference, method=method)
        return
    scores = [edge_scores(engine, CLEAN, CORRUPT, logit_difference, method=method).score_srw for method in ("eap", *RULES_OF)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert float((scores[one] - scores[other]).norm() / scores[one].norm()) > 0.01


def test_methods_multiply_changes_by_gradients_under_their_rules(exact):  # noqa: F811
    engine = Engine(exact("llama"))
    change_wspd = engine.writers(CORRUPT) - engine.writers(CLEAN)
    for method, rules in RULES_OF.items():
        expected_srw = torch.einsum("rspd,wspd->srw", gradients(engine, rules)[0], change_wspd) * engine.graph.exists_rw
        found = edge_scores(engine, CLEAN, CORRUPT, logit_difference, method=method)
        torch.testing.assert_close(found.score_srw, expected_srw, rtol=1e-9, atol=1e-12)
        to_queries = found.score_srw[:, engine.graph.head_inputs("q", 1)]
        assert (to_queries == 0).all() == (method == "relp")


def test_what_rules_cannot_change_is_refused():
    engine = engine_of("mixtral")
    with pytest.raises(InputError, match=r"expected an MLP whose activation .* in block 0 .* as with experts; take another"):
        edge_scores(engine, CLEAN, CORRUPT, logit_difference, method="relp")
    with pytest.raises(InputError, match=r"expected rules among norms, patterns, .* got norm"), gradient_rules(engine.lm, ["norm"], []):
        pass
