"""Sites of structurally different families against sums and products of hooks written here, with the modules' names from their sources.

s sequences · p positions · d model width
"""

from copy import deepcopy
from functools import cache
from typing import NamedTuple

import pytest
import torch
import transformers as hf
from test_language_model import COMMON, GROUPED, LLAMA, N_LAYERS, ids_of, randomised, tiny

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.model.sites import KINDS

MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=24)
MORE = {
    "bloom": lambda: hf.BloomConfig(hidden_size=32, n_layer=N_LAYERS, n_head=4, **COMMON),
    "falcon": lambda: hf.FalconConfig(parallel_attn=True, new_decoder_architecture=False, alibi=False, **LLAMA),
    "granite": lambda: hf.GraniteConfig(residual_multiplier=0.22, embedding_multiplier=12.0, **GROUPED),
    "qwen3_next": lambda: hf.Qwen3NextConfig(
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        head_dim=8,
        **MOE,
        **GROUPED,
    ),
}


class Names(NamedTuple):
    """Of the modules of a block; empty: there is none."""

    attention: str
    mlp: str
    norm_1: str
    norm_2: str
    attn_out: str
    """whose output is added"""
    mlp_out: str
    down: str = ""
    parallel: bool = False
    factor: float = 1.0
    centred: bool = False
    """its norms are LayerNorms"""
    offset: float = 0.0
    """of the gain"""


LLAMA_LIKE = Names("self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "self_attn", "mlp", "mlp.down_proj")
NAMES = {
    "gpt2": Names("attn", "mlp", "ln_1", "ln_2", "attn", "mlp", "mlp.c_proj", centred=True),
    "llama": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "gemma2": Names(
        *("self_attn", "mlp", "input_layernorm", "pre_feedforward_layernorm"),
        *("post_attention_layernorm", "post_feedforward_layernorm", "mlp.down_proj"),
        offset=1.0,
    ),
    "olmo2": Names("self_attn", "mlp", "", "", "post_attention_layernorm", "post_feedforward_layernorm", "mlp.down_proj"),
    "opt": Names("self_attn", "fc1", "self_attn_layer_norm", "final_layer_norm", "self_attn", "fc2", "fc2", centred=True),
    "bloom": Names(
        *("self_attention", "mlp", "input_layernorm", "post_attention_layernorm", "self_attention.dense", "mlp.dense_4h_to_h"),
        "mlp.dense_4h_to_h",
        centred=True,
    ),
    "gpt_neox": Names(
        *("attention", "mlp", "input_layernorm", "post_attention_layernorm", "attention", "mlp", "mlp.dense_4h_to_h"),
        parallel=True,
        centred=True,
    ),
    "gptj": Names("attn", "mlp", "ln_1", "ln_1", "attn", "mlp", "mlp.fc_out", parallel=True, centred=True),
    "falcon": Names(
        *("self_attention", "mlp", "input_layernorm", "input_layernorm", "self_attention", "mlp", "mlp.dense_4h_to_h"),
        parallel=True,
        centred=True,
    ),
    "granite": LLAMA_LIKE._replace(factor=0.22),
    "mixtral": LLAMA_LIKE._replace(down=""),
    "qwen3_next": LLAMA_LIKE._replace(down="", offset=1.0),
}
FAMILIES = sorted(NAMES)


@cache
def made(family: str) -> LanguageModel:
    return tiny(family) if family not in MORE else randomised(MORE[family](), FAMILIES.index(family))


def names_of(family: str, layer: int) -> Names:
    names = NAMES[family]
    linear = family == "qwen3_next" and layer != 1
    return names._replace(attention="linear_attn", attn_out="linear_attn") if linear else names


def block_of(lm: LanguageModel, layer: int) -> torch.nn.Module:
    blocks = [m for m in lm.model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList) and len(m) == N_LAYERS]
    return blocks[0][layer]


def first_tensor(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def taken_and_given(lm: LanguageModel, layer: int, ids_sp: torch.Tensor) -> tuple[dict, dict]:
    """Input and output of every module of the block by its name, copied at once, as [s, p, width]; "" is the block itself."""
    taken, given, handles = {}, {}, []

    def keep(kept, name, value):
        value = value[0] if isinstance(value, tuple) else value
        if isinstance(value, torch.Tensor) and value.numel() % ids_sp.numel() == 0:
            kept[name] = value.clone().reshape(*ids_sp.shape, -1)

    for name, module in block_of(lm, layer).named_modules():
        handles.append(
            module.register_forward_pre_hook(
                lambda _m, args, kwargs, name=name: keep(taken, name, args[0] if args else kwargs.get("hidden_states")), with_kwargs=True
            )
        )
        handles.append(module.register_forward_hook(lambda _m, _args, output, name=name: keep(given, name, output)))
    with torch.no_grad():
        lm.model(input_ids=ids_sp, use_cache=False)
    for handle in handles:
        handle.remove()
    return taken, given


def normalised(x: torch.Tensor, norm: torch.nn.Module, centred: bool) -> torch.Tensor:
    """Before gain and bias, in float64."""
    x = x.double() - x.double().mean(-1, keepdim=True) if centred else x.double()
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def by_hand(lm: LanguageModel, family: str, layer: int, ids_sp: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each site's value from hooks on modules known by name, sums and the norm's formula."""
    names, (taken, given) = names_of(family, layer), taken_and_given(lm, layer, ids_sp)
    values = {"resid_pre": taken[""], "resid_post": given[""]}
    values["attn_in"] = given[names.norm_1] if names.norm_1 else taken[""]
    values["attn_out"] = names.factor * given[names.attn_out]
    mid = taken[""] + values["attn_out"]
    if not names.parallel:
        values["resid_mid"] = mid
    values["mlp_in"] = given[names.norm_2] if names.norm_2 else mid
    if names.norm_2 and names.norm_2 != names.norm_1:
        values["mlp_in_nogain"] = normalised(taken[names.norm_2], block_of(lm, layer).get_submodule(names.norm_2), names.centred).float()
    if names.down:
        values["mlp_act"] = taken[names.down]
    values["mlp_out"] = names.factor * given[names.mlp_out]
    torch.testing.assert_close(mid + values["mlp_out"], values["resid_post"], rtol=1e-5, atol=1e-5)
    return values


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_values_are_those_computed_by_hand(family):
    lm, ids_sp = made(family), ids_of()
    for layer in range(N_LAYERS):
        expected = by_hand(lm, family, layer, ids_sp)
        there = {kind for kind in KINDS if f"{kind}.{layer}" in lm.sites()}
        assert there - {"head_out", "q", "k", "v"} == set(expected)
        for kind, value in lm.record(ids_sp, [f"{kind}.{layer}" for kind in expected]).items():
            torch.testing.assert_close(value, expected[kind.partition(".")[0]], rtol=1e-5, atol=1e-5)
            assert lm.width(kind) == value.shape[-1]


def mlp_by_hand(lm: LanguageModel, family: str, layer: int, h: torch.Tensor) -> torch.Tensor:
    """What the MLP adds to the stream where it receives `h`."""
    names, block = names_of(family, layer), block_of(lm, layer)
    if family == "opt":
        return block.fc2(block.activation_fn(block.fc1(h)))
    out = block.mlp(h, torch.zeros_like(h)) if family == "bloom" else block.mlp(h)  # BLOOM's adds the stream itself
    out = out[0] if isinstance(out, tuple) else out
    return names.factor * (block.get_submodule(names.mlp_out)(out) if family in ("gemma2", "olmo2") else out)


def down_by_hand(lm: LanguageModel, family: str, layer: int, neurons: torch.Tensor) -> torch.Tensor:
    names, block = names_of(family, layer), block_of(lm, layer)
    out = block.get_submodule(names.down)(neurons)
    return names.factor * (block.get_submodule(names.mlp_out)(out) if family in ("gemma2", "olmo2") else out)


def attention_by_hand(lm: LanguageModel, family: str, layer: int, ids_sp: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """What the attention adds where it receives `new`, by way of the norm before it."""
    names, block = names_of(family, layer), block_of(lm, layer)
    module = block.get_submodule(names.norm_1 or names.attention)
    if names.norm_1:
        handle = module.register_forward_hook(lambda *_: new)
    else:
        handle = module.register_forward_pre_hook(lambda _m, args, kwargs: (args, kwargs | {"hidden_states": new}), with_kwargs=True)
    _, given = taken_and_given(lm, layer, ids_sp)
    handle.remove()
    return names.factor * given[names.attn_out]


def stream_after(lm: LanguageModel, family: str, layer: int, ids_sp: torch.Tensor, kind: str, new: torch.Tensor) -> torch.Tensor:
    """resid_post where `new` takes the place of the value at the site."""
    names, block, values = names_of(family, layer), block_of(lm, layer), by_hand(lm, family, layer, ids_sp)
    pre, attention, mlp = values["resid_pre"], values["attn_out"], values["mlp_out"]
    if kind == "mlp_in":
        return pre + attention + mlp_by_hand(lm, family, layer, new)
    if kind == "mlp_in_nogain":
        norm = block.get_submodule(names.norm_2)
        gained = new * (names.offset + norm.weight) + (norm.bias if names.centred else 0)
        return pre + attention + mlp_by_hand(lm, family, layer, gained)
    if kind in ("mlp_act", "mlp_out"):
        return pre + attention + (new if kind == "mlp_out" else down_by_hand(lm, family, layer, new))
    attention = attention_by_hand(lm, family, layer, ids_sp, new) if kind == "attn_in" else new
    if names.parallel:
        return pre + attention + mlp
    mid = new if kind == "resid_mid" else pre + attention
    return mid + mlp_by_hand(lm, family, layer, block.get_submodule(names.norm_2)(mid) if names.norm_2 else mid)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_change_reaches_what_follows_and_nothing_else(family, layer):
    lm, ids_sp = made(family), ids_of()
    kinds = [kind for kind in KINDS if f"{kind}.{layer}" in lm.sites()]
    before = lm.record(ids_sp, [f"{kind}.{layer}" for kind in kinds])
    for kind in set(kinds) - {"resid_pre", "q", "k", "v", "head_out", "resid_post"}:
        site = f"{kind}.{layer}"
        new = before[site] + 0.5 * torch.randn(before[site].shape, generator=torch.Generator().manual_seed(1))
        with lm.edited({site: lambda _, new=new: new}):
            seen = lm.record(ids_sp, list(before))
        expected = stream_after(lm, family, layer, ids_sp, kind, new)
        torch.testing.assert_close(seen[f"resid_post.{layer}"], expected, rtol=1e-4, atol=1e-4)
        assert (expected - before[f"resid_post.{layer}"]).abs().max() > 0.01
        earlier = kinds[: kinds.index(kind)]
        if names_of(family, layer).parallel and kind.startswith("mlp"):
            earlier = [k for k in earlier if k.startswith("mlp")]
        for unchanged in earlier if kind != "attn_in" or not names_of(family, layer).parallel else [*earlier, "mlp_in", "mlp_out"]:
            assert torch.equal(seen[f"{unchanged}.{layer}"], before[f"{unchanged}.{layer}"])


@pytest.mark.parametrize("family", FAMILIES)
def test_each_site_is_replaced_and_put_back(family):
    lm, ids_sp = made(family), ids_of()
    plain = lm.logits(ids_sp)
    values = lm.record(ids_sp, lm.sites())
    for site, value in values.items():
        with lm.edited({site: lambda _, value=value: value.clone()}):  # not the tensor that was given
            assert torch.equal(lm.logits(ids_sp), plain)
        new = torch.randn(value.shape, generator=torch.Generator().manual_seed(2))
        kept = new.clone()
        with lm.edited({site: lambda _, new=new: new}):
            torch.testing.assert_close(lm.record(ids_sp, [site])[site], new, rtol=1e-5, atol=1e-5)
            assert (lm.logits(ids_sp) - plain).abs().max() > 1e-3
        assert torch.equal(new, kept)
    assert torch.equal(lm.logits(ids_sp), plain)


@pytest.mark.parametrize("family", sorted(MORE))
def test_cached_generation_under_edits_of_more_families(family):
    lm, ids_sp = made(family), ids_of()
    edits = {site: lambda value: value + 0.3 for site in lm.sites() if site.endswith(".1")}
    with lm.edited(edits):
        cached = lm.generate(ids_sp, max_new_tokens=6, temperature=0)
        uncached = ids_sp
        for _ in range(6):
            uncached = torch.cat([uncached, lm.logits(uncached)[:, -1:].argmax(-1)], dim=1)
    assert cached.tolist() == uncached.tolist()


def test_the_embedding_is_the_table_times_the_models_constant():
    ids_sp = ids_of()
    for family, factor in (("llama", 1.0), ("granite", 12.0), ("gpt2", 1.0)):
        lm = made(family)
        table = lm.model.get_input_embeddings().weight
        torch.testing.assert_close(lm.record(ids_sp, ["embed"])["embed"], factor * table[ids_sp])
        if family != "gpt2":
            torch.testing.assert_close(lm.record(ids_sp, ["embed"])["embed"], lm.record(ids_sp, ["resid_pre.0"])["resid_pre.0"])


def test_nested_edits_of_the_middle_apply_in_order_also_ahead_of_the_mlps_own():
    lm, ids_sp = made("olmo2"), ids_of()  # whose MLP takes the stream itself, so that both sites are one input
    ones, twos = torch.ones(2, 9, 32), torch.full((2, 9, 32), 2.0)
    with lm.edited({"mlp_in.1": lambda x: x + 1}), lm.edited({"resid_mid.1": lambda _: ones}), lm.edited({"resid_mid.1": lambda x: 2 * x}):
        seen = lm.record(ids_sp, ["resid_mid.1", "mlp_in.1", "mlp_out.1", "resid_post.1"])
    assert torch.equal(seen["resid_mid.1"], twos)
    assert torch.equal(seen["mlp_in.1"], twos + 1)
    torch.testing.assert_close(seen["resid_post.1"], twos + mlp_by_hand(lm, "olmo2", 1, twos + 1), rtol=1e-4, atol=1e-4)


def test_what_a_model_overwrites_is_kept_as_it_was():
    lm, ids_sp = made("falcon"), ids_of()  # adds the attention's output into the MLP's
    alone = lm.record(ids_sp, ["mlp_out.1"])["mlp_out.1"]
    later = lm.record(ids_sp, ["mlp_out.1", "resid_post.2"])["mlp_out.1"]
    assert torch.equal(alone, later)


def test_gradients_flow_through_a_change_of_the_middle():
    lm, ids_sp = made("llama"), ids_of()
    for site in ("resid_mid.1", "mlp_in_nogain.1", "mlp_act.1"):
        vector_d = torch.zeros(lm.width(site), requires_grad=True)
        with lm.edited({"attn_out.0": lambda x: x, site: lambda x, v=vector_d: x + v}):
            lm.logits(ids_sp)[:, -1, 7].sum().backward()
        step_d = 1e-2 * torch.nn.functional.one_hot(torch.tensor(3), lm.width(site))
        totals = []
        for sign in (1, -1):
            with lm.edited({site: lambda x, sign=sign, step_d=step_d: x + sign * step_d}):
                totals.append(lm.logits(ids_sp)[:, -1, 7].sum())
        torch.testing.assert_close(vector_d.grad[3], (totals[0] - totals[1]) / 2e-2, rtol=2e-2, atol=1e-3)


def test_sites_are_found_whatever_the_weights():
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, vocab_size=20))
    for weight in model.parameters():
        torch.nn.init.zeros_(weight)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        lm = LanguageModel(model.to(dtype))
        assert {site.partition(".")[0] for site in lm.sites()} == {"embed", *KINDS}
        assert lm.refused_sites() == {}


def test_sites_are_found_in_the_middle_of_an_edit_which_does_not_notice():
    lm, calls, sites = LanguageModel(made("llama").model), [], made("llama").sites()
    with lm.edited({"resid_post.0": lambda x: calls.append(x.shape) or x}):
        assert lm.sites() == sites
    assert calls == []


def with_block(forward) -> LanguageModel:
    """A Llama whose block 1 computes `forward(block, stream, the attention's output)`."""
    model = deepcopy(tiny("llama").model)
    block = model.model.layers[1]

    def changed(hidden_states, **kwargs):
        attention, _ = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **kwargs)
        return forward(block, hidden_states, attention)

    block.forward = changed
    return LanguageModel(model)


def usual(block, x, attention):
    mid = x + attention
    return mid + block.mlp(block.post_attention_layernorm(mid))


@pytest.mark.parametrize(
    ("forward", "refused"),
    [
        (usual, set()),
        # the MLP receives something else than the norm's output
        (lambda b, x, a: (m := x + a) + b.mlp(2 * b.post_attention_layernorm(m)), {"mlp_in", "mlp_in_nogain"}),
        # a third part beside the MLP's that no module gives
        (
            lambda b, x, a: (m := x + a) + b.mlp(b.post_attention_layernorm(m)) + m.roll(1, -1),
            {"resid_mid", "mlp_act", "mlp_out", "mlp_in_nogain"},
        ),
        # the stream and the MLP's part each times a number
        (
            lambda b, x, a: 0.7 * (m := x + a) + 1.9 * b.mlp(b.post_attention_layernorm(m)),
            {"resid_mid", "mlp_act", "mlp_out", "mlp_in_nogain"},
        ),
        # the stream is normalised itself, as in OPT-350m
        (lambda b, x, a: b.post_attention_layernorm((m := x + a) + b.mlp(m)), {"resid_mid", "mlp_act", "mlp_out", "mlp_in_nogain"}),
        # a module that the pass goes through twice
        (
            lambda b, x, a: (m := x + a) + b.self_attn.o_proj(m),
            {"q", "k", "v", "head_out", "resid_mid", "mlp_in_nogain", "mlp_in", "mlp_act", "mlp_out"},
        ),
        # attention that is not added but multiplied
        (lambda b, x, a: (m := x * a) + b.mlp(b.post_attention_layernorm(m)), {"attn_out", "resid_mid"}),
    ],
)
def test_a_site_that_is_not_what_its_name_says_is_refused_by_name(forward, refused):
    lm = with_block(forward)
    assert {site.partition(".")[0] for site in lm.refused_sites() if site.endswith(".1")} == refused
    assert {site for site in lm.refused_sites() if not site.endswith(".1")} == set()
    for kind in refused:
        with pytest.raises(InputError, match=rf"expected a site of '', got {kind}\.1, which it does not have: "):
            lm.place(f"{kind}.1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sites_of_a_deep_model_with_a_large_stream_and_massive_activations(dtype):
    """As SmolLM2-135M has: a gated MLP multiplies whatever the pass of three tokens adds to make values distinct."""
    lm = randomised(hf.LlamaConfig(**{**GROUPED, "num_hidden_layers": 24}), 0)
    with torch.no_grad():
        weight_vd = lm.model.get_input_embeddings().weight
        weight_vd *= 100
        weight_vd[:, 3] += 5000
    lm = LanguageModel(lm.model.to(dtype), lm.tokenizer)
    assert lm.refused_sites() == {}
