"""Frozen passes against products written here in float64, against the unsteered pass and against recomputation.

s sequences · p positions · h heads · z width of a head · d model width · v vocabulary
"""

from contextlib import ExitStack

import pytest
import torch
import transformers as hf
from test_language_model import GPT2, ids_of, randomised, tiny

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.circuits.model_graph.frozen import PARTS, Internals, frozen, frozen_as_unsteered, internals
from steering.intervention import steered
from steering.vector import SteeringVector

FAMILIES = ["gpt2", "llama", "gemma2", "qwen3"]
ARMS = [("norms",), ("patterns",), ("values",), ("norms", "patterns"), ("norms", "patterns", "values")]
SITE, C = "resid_post.0", 2.0


def direction(lm: LanguageModel, site: str = SITE) -> SteeringVector:
    return SteeringVector.at(site, torch.randn(lm.width(site), generator=torch.Generator().manual_seed(3)))


def assert_near(found: torch.Tensor, expected: torch.Tensor):
    """To rounding of the largest: logits without norms are in the hundreds."""
    torch.testing.assert_close(found, expected, rtol=0, atol=float(2e-5 * expected.abs().max()))


def unsteered(lm: LanguageModel, ids_sp: torch.Tensor, parts=PARTS, mask_sp=None) -> tuple[Internals, torch.Tensor]:
    with internals(lm, parts) as kept:
        return kept, lm.logits(ids_sp, mask_sp)


def arm(lm: LanguageModel, ids_sp: torch.Tensor, parts, at: Internals, c: float, mask_sp=None, sites=()) -> tuple:
    seen = {}

    def keep(site):
        return lambda value: seen.setdefault(site, value)

    with steered(lm, [(direction(lm), c)]), frozen(lm, parts, at), lm.edited({site: keep(site) for site in sites}):
        return lm.logits(ids_sp, mask_sp), seen


def linear_gpt2(mlp: bool) -> LanguageModel:
    """Two blocks in float64, whose MLPs are linear, or zero."""
    lm = randomised(hf.GPT2Config(**{**GPT2, "n_layer": 2}, activation_function="linear"), 5)
    model = lm.model.double()
    if not mlp:
        for block in model.transformer.h:
            for weight in block.mlp.parameters():
                weight.zero_()
    return LanguageModel(model, name="linear")


def test_with_norms_and_patterns_frozen_the_change_is_the_linear_prediction():
    lm, ids_sp = linear_gpt2(mlp=True), ids_of()
    kept, before = unsteered(lm, ids_sp)
    model, vector = lm.model.transformer, direction(lm).direction_d.double()

    def normed(norm, name, delta_spd):
        """What a frozen LayerNorm makes of a change of its input."""
        return (delta_spd - delta_spd.mean(-1, keepdim=True)) / kept.scales[name] * norm.weight

    block = model.h[1]
    delta = vector.expand(*ids_sp.shape, -1)
    W_V = block.attn.c_attn.weight[:, 64:]  # of [query, key, value], 32 wide each
    value_sphz = (normed(block.ln_1, "h.1.ln_1", delta) @ W_V).view(*ids_sp.shape, 4, 8)
    mixed = torch.einsum("shqk,skhz->sqhz", kept.patterns[1], value_sphz).flatten(2)
    delta = delta + mixed @ block.attn.c_proj.weight
    delta = delta + normed(block.ln_2, "h.1.ln_2", delta) @ block.mlp.c_fc.weight @ block.mlp.c_proj.weight
    change = normed(model.ln_f, "ln_f", delta) @ lm.model.lm_head.weight.T
    for c in (0.5, 128.0):  # of which c·v is exact in float32
        after, _ = arm(lm, ids_sp, ("norms", "patterns"), kept, c)
        torch.testing.assert_close(after - before, c * change, rtol=1e-10, atol=1e-10)


def test_with_everything_frozen_later_writes_are_the_unsteered_ones():
    lm, ids_sp = linear_gpt2(mlp=False), ids_of()
    writes = ["attn_out.1", "mlp_out.1"]
    kept, _ = unsteered(lm, ids_sp)
    plain = lm.record(ids_sp, writes)
    _, seen = arm(lm, ids_sp, PARTS, kept, C, sites=writes)
    for site in writes:
        torch.testing.assert_close(seen[site], plain[site], rtol=1e-12, atol=1e-12)
    with steered(lm, [(direction(lm), C)]):
        assert not torch.allclose(lm.record(ids_sp, writes)["attn_out.1"], plain["attn_out.1"], rtol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parts", ARMS)
def test_coefficient_zero_keeps_every_bit(family, parts):
    lm, ids_sp = tiny(family), ids_of()
    kept, plain = unsteered(lm, ids_sp, parts)
    after, _ = arm(lm, ids_sp, parts, kept, 0.0)
    assert torch.equal(after, plain)
    steered_logits, _ = arm(lm, ids_sp, parts, kept, C)
    assert (steered_logits - plain).abs().max() > 0.01
    torch.testing.assert_close(plain, lm.logits(ids_sp), rtol=1e-4, atol=1e-4)  # eager attention is the model's function


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_frozen_is_what_the_steered_pass_uses(family):
    lm, ids_sp = tiny(family), ids_of()
    kept, _ = unsteered(lm, ids_sp)
    with steered(lm, [(direction(lm), C)]), internals(lm) as free:
        lm.logits(ids_sp)
    for layer in (1, 2):
        assert not torch.allclose(free.patterns[layer], kept.patterns[layer], atol=0.01)
        assert not torch.allclose(free.values[layer], kept.values[layer], atol=0.01)
    _, seen = arm(lm, ids_sp, PARTS, kept, C, sites=["attn_out.1", "attn_out.2"])
    with lm.attention_edited(lambda layer, pattern, value: (pattern, value)):
        plain = lm.record(ids_sp, list(seen))
    for site in seen:  # patterns and values together are all that attention adds
        assert torch.equal(seen[site], plain[site])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_norm_divides_by_the_other_scale(family):
    """Against the norm's own weights, in float64."""
    lm, ids_sp = tiny(family), ids_of()
    kept, _ = unsteered(lm, ids_sp, ("norms",))
    decoder, calls = lm.model.get_decoder(), {}
    modules = dict(decoder.named_modules())
    with ExitStack() as stack:
        stack.enter_context(steered(lm, [(direction(lm), C)]))
        stack.enter_context(frozen(lm, ("norms",), kept))
        for name in kept.scales:
            hook = modules[name].register_forward_hook(lambda _m, args, y, name=name: calls.update({name: (args[0], y)}))
            stack.callback(hook.remove)
        lm.logits(ids_sp)
    expected = {"gpt2": 7, "llama": 7, "gemma2": 13, "qwen3": 13}[family]
    assert len(calls) == expected == sum("norm" in type(m).__name__.lower() for m in modules.values())
    for name, (x, y) in calls.items():
        norm, x = modules[name], x.double()
        gain = norm.weight.double() + (family == "gemma2")
        centred = x - x.mean(-1, keepdim=True) if family == "gpt2" else x
        by_hand = centred / kept.scales[name].double() * gain + (norm.bias.double() if family == "gpt2" else 0)
        torch.testing.assert_close(y.double(), by_hand, rtol=1e-4, atol=1e-4)
    assert calls["layers.1.self_attn.q_norm"][0].ndim == 4 if family == "qwen3" else True


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parts", ARMS)
def test_a_padded_batch_equals_its_rows_alone(family, parts):
    lm = tiny(family)
    long_sp, short_sp = ids_of(1, 9), ids_of(1, 6, seed=4)
    ids_sp = torch.cat([long_sp, torch.nn.functional.pad(short_sp, (3, 0), value=1)])
    mask_sp = torch.ones_like(ids_sp)
    mask_sp[1, :3] = 0
    both, _ = arm(lm, ids_sp, parts, unsteered(lm, ids_sp, parts, mask_sp)[0], C, mask_sp)
    for row, alone_sp in ((0, long_sp), (1, short_sp)):
        alone, _ = arm(lm, alone_sp, parts, unsteered(lm, alone_sp, parts)[0], C)
        assert_near(both[row, -alone_sp.shape[1] :], alone[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parts", ARMS)
def test_generation_with_a_cache_equals_frozen_passes_over_the_whole_text(family, parts):
    lm, prompt_sp = tiny(family), ids_of(2, 6)
    steps = []
    with steered(lm, [(direction(lm), C)]), frozen_as_unsteered(lm, parts):
        hook = lm.model.register_forward_hook(lambda _m, _a, out: steps.append(out.logits[:, -1]))
        text_sp = lm.generate(prompt_sp, max_new_tokens=5, temperature=0)
        hook.remove()
        whole = lm.logits(text_sp)
    steered_steps = torch.stack(steps[1::2], dim=1)  # each is after one of the unsteered model
    kept, plain = unsteered(lm, text_sp, parts)
    by_hand, _ = arm(lm, text_sp, parts, kept, C)
    assert_near(whole, by_hand)
    assert_near(steered_steps, by_hand[:, 5:-1])
    assert_near(torch.stack(steps[::2], dim=1), plain[:, 5:-1])


def test_the_model_is_as_before_outside_and_after_an_error():
    lm, ids_sp = tiny("llama"), ids_of()
    before, implementation = lm.logits(ids_sp), lm.model.config._attn_implementation
    kept, _ = unsteered(lm, ids_sp)
    with pytest.raises(InputError, match=r"expected the norm layers.0.input_layernorm of a pass of the same tokens, shape \(2, 4, 1\)"):
        arm(lm, ids_sp[:, :4], PARTS, kept, C)
    assert torch.equal(lm.logits(ids_sp), before)
    assert lm.model.config._attn_implementation == implementation


def test_models_and_parts_that_cannot_be_frozen_are_refused():
    ids_sp = ids_of()
    with pytest.raises(InputError, match=r"block 0 has none: GPTJModel has its own attention code"), internals(tiny("gptj"), ["patterns"]):
        pass
    with pytest.raises(InputError, match="expected parts to freeze as a list of norms, patterns, values, got 'norms'"):
        unsteered(tiny("gpt2"), ids_sp, "norms")
    lm = tiny("gpt2")
    kept, _ = unsteered(lm, ids_sp, ["norms"])
    with pytest.raises(InputError, match=r"the patterns of block 0 of a pass of the same tokens, .* got nothing"):
        arm(lm, ids_sp, ["patterns"], kept, C)
    with frozen_as_unsteered(lm, PARTS), pytest.raises(InputError, match=r"generate with lm\.generate"):
        lm.model.generate(ids_sp, max_new_tokens=2, do_sample=False)
