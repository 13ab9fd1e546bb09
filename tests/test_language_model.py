"""Every family on a tiny randomly initialised model, against Hugging Face's own hidden states and by-hand products.

s sequences · p positions · d model width · v vocabulary
"""

import copy
import types
from functools import cache

import pytest
import torch
import transformers as hf

from sae.errors import InputError
from sae.model.language_model import LanguageModel, NonFiniteLogits
from sae.model.sites import KINDS, Site, parse_site
from steering.directions.actadd import actadd
from steering.directions.diffmean import diffmean_of_texts
from steering.directions.iti import fit_iti, head_outputs
from steering.directions.pca import principal_directions_of_texts
from steering.directions.texts import activations_of_texts
from steering.strength.calibration import calibrate, encode_cut
from steering.strength.measure import listed_words, word_rate
from steering.studies.effects import Rollouts
from steering.studies.truthfulqa import answer_log_probs
from steering.vector import SteeringVector

N_LAYERS, VOCAB = 3, 50
COMMON = dict(vocab_size=VOCAB, bos_token_id=0, eos_token_id=None, pad_token_id=None)
GPT2 = dict(n_embd=32, n_layer=N_LAYERS, n_head=4, n_positions=64, **COMMON)
LLAMA = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=N_LAYERS, num_attention_heads=4, max_position_embeddings=64, **COMMON)
GROUPED = dict(num_key_value_heads=2, **LLAMA)
HEAD_DIM = dict(head_dim=12, **GROUPED)  # 4 heads of 12: wider than the stream
OPT = dict(hidden_size=32, ffn_dim=40, num_hidden_layers=N_LAYERS, num_attention_heads=4, max_position_embeddings=64)
OPT |= dict(vocab_size=VOCAB, word_embed_proj_dim=32, bos_token_id=0, eos_token_id=None, pad_token_id=1)
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

CONFIGS = {
    "gpt2": lambda: hf.GPT2Config(**GPT2),
    "gptj": lambda: hf.GPTJConfig(rotary_dim=4, **GPT2),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        hidden_size=32,
        num_layers=N_LAYERS,
        num_heads=4,
        max_position_embeddings=64,
        attention_types=[[["global", "local", "global"], 1]],
        window_size=4,
        **COMMON,
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(use_parallel_residual=True, **LLAMA),
    "gpt_neox sequential": lambda: hf.GPTNeoXConfig(use_parallel_residual=False, **LLAMA),
    "llama": lambda: hf.LlamaConfig(**GROUPED),
    "mistral": lambda: hf.MistralConfig(sliding_window=4, **GROUPED),
    "mixtral": lambda: hf.MixtralConfig(num_local_experts=2, **GROUPED),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**HEAD_DIM),
    "phi": lambda: hf.PhiConfig(**LLAMA),
    "phi3": lambda: hf.Phi3Config(**GROUPED),
    "olmo": lambda: hf.OlmoConfig(**LLAMA),
    "olmo2": lambda: hf.Olmo2Config(**GROUPED),
    "gemma2": lambda: hf.Gemma2Config(sliding_window=4, layer_types=SLIDING, **HEAD_DIM),
    "gemma3_text": lambda: hf.Gemma3TextConfig(sliding_window=4, layer_types=SLIDING, **HEAD_DIM),
    "gemma3": lambda: hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(sliding_window=4, layer_types=SLIDING, **HEAD_DIM),
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14),
        mm_tokens_per_image=4,
        boi_token_index=47,
        eoi_token_index=48,
        image_token_index=49,
    ),
    "opt": lambda: hf.OPTConfig(**OPT),
    "opt 350m": lambda: hf.OPTConfig(**{**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
}
FAMILIES = sorted(CONFIGS)
PROJECTIONS = {"gpt2": "attn.c_proj", "gptj": "attn.out_proj", "gpt_neo": "attn.attention.out_proj", "phi": "self_attn.dense"}
PROJECTIONS |= {"gpt_neox": "attention.dense", "opt": "self_attn.out_proj"}


@cache
def tiny(family: str) -> LanguageModel:
    return randomised(CONFIGS[family](), FAMILIES.index(family), family)


def randomised(config: hf.PreTrainedConfig, seed: int, name: str = "") -> LanguageModel:
    torch.manual_seed(seed)
    kind = hf.Gemma3ForConditionalGeneration if isinstance(config, hf.Gemma3Config) else hf.AutoModelForCausalLM
    model = kind(config) if isinstance(config, hf.Gemma3Config) else kind.from_config(config)
    for weight_name, weight in model.named_parameters():  # biases and norms start at 0 or 1, which would hide mistakes
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, mean=1.0 if "norm" in weight_name and "bias" not in weight_name else 0.0, std=0.3)
        else:
            torch.nn.init.normal_(weight, std=0.15)
    lm = LanguageModel(model, name=name)
    if lm.model.generation_config:  # random models would end at any token
        lm.model.generation_config.eos_token_id = None
    return lm


def ids_of(rows: int = 2, length: int = 9, seed: int = 0):
    return torch.randint(2, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


def hidden_states(lm: LanguageModel, ids_sp: torch.Tensor) -> tuple:
    with torch.no_grad():
        return lm.model(input_ids=ids_sp, output_hidden_states=True, use_cache=False).hidden_states


def blocks_of(lm: LanguageModel) -> torch.nn.ModuleList:
    """Found by another road than the table of paths."""
    return next(m for m in lm.model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList) and len(m) == N_LAYERS)


def projection_of(lm: LanguageModel, family: str, layer: int) -> torch.nn.Module:
    return blocks_of(lm)[layer].get_submodule(PROJECTIONS.get(family.split()[0], "self_attn.o_proj"))


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_sites_are_the_hidden_states(family):
    lm, ids_sp = tiny(family), ids_of()
    states = hidden_states(lm, ids_sp)
    seen = lm.record(ids_sp, lm.sites())
    for layer in range(N_LAYERS):
        assert torch.equal(seen[f"resid_pre.{layer}"], states[layer])
        if layer < N_LAYERS - 1:
            assert torch.equal(seen[f"resid_post.{layer}"], states[layer + 1])
    last = seen[f"resid_post.{N_LAYERS - 1}"]
    if family == "opt 350m":
        assert lm.final_norm is None
        assert torch.equal(lm.model.model.decoder.project_out(last), states[-1])
    else:
        assert torch.equal(lm.final_norm(last), states[-1])


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "opt 350m"])  # its norms stand on the stream itself
def test_the_stream_grows_by_attention_and_mlp(family):
    lm, ids_sp = tiny(family), ids_of()
    seen = lm.record(ids_sp, lm.sites())
    for layer in range(N_LAYERS):
        total = sum(seen[f"{kind}.{layer}"] for kind in ("resid_pre", "attn_out", "mlp_out"))
        torch.testing.assert_close(seen[f"resid_post.{layer}"], total, rtol=1e-5, atol=1e-5)
        assert seen[f"attn_out.{layer}"].norm() > 0.1
        assert seen[f"mlp_out.{layer}"].norm() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_times_output_projection_is_the_attention_output(family):
    lm, ids_sp = tiny(family), ids_of()
    outputs, handles = {}, []
    for layer in range(N_LAYERS):
        module = blocks_of(lm)[layer].get_submodule(PROJECTIONS.get(family.split()[0], "self_attn.o_proj").rpartition(".")[0])
        handles.append(module.register_forward_hook(lambda _m, _a, out, layer=layer: outputs.update({layer: out[0]})))
    seen = lm.record(ids_sp, [*(f"head_out.{layer}" for layer in range(N_LAYERS)), f"resid_post.{N_LAYERS - 1}"])
    for handle in handles:
        handle.remove()
    for layer in range(N_LAYERS):
        projection = projection_of(lm, family, layer)
        weight = projection.weight if isinstance(projection, hf.pytorch_utils.Conv1D) else projection.weight.T
        by_hand = seen[f"head_out.{layer}"] @ weight + (projection.bias if projection.bias is not None else 0)
        torch.testing.assert_close(by_hand, outputs[layer], rtol=1e-5, atol=1e-5)
        assert lm.width(f"head_out.{layer}") == weight.shape[0] == seen[f"head_out.{layer}"].shape[-1]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma3", "opt"])
@pytest.mark.parametrize("site", ["resid_pre.1", "attn_out.1", "head_out.1", "mlp_out.1", "resid_post.1"])
def test_recording_stops_after_the_deepest_site(family, site):
    lm, calls = tiny(family), []
    blocks, _ = blocks_of(lm), lm.sites()  # which have been looked for now
    handles = [block.register_forward_pre_hook(lambda _m, _a, i=i: calls.append(i)) for i, block in enumerate(blocks)]
    handles.append(lm.model.get_output_embeddings().register_forward_pre_hook(lambda _m, _a: calls.append("unembedding")))
    try:
        lm.record(ids_of(), ["resid_pre.0", site])
        assert calls == [0, 1]  # for resid_pre.1, block 1 is entered and left at its door
        calls.clear()
        lm.logits(ids_of())
        assert calls == [0, 1, 2, "unembedding"]
    finally:
        for handle in handles:
            handle.remove()


def additive(d: int, seed: int = 5, size: float = 1.5):
    vector_d = size * torch.randn(d, generator=torch.Generator().manual_seed(seed))
    return lambda value: value + vector_d


def kinds_of(lm: LanguageModel, layer: int = 1) -> list[str]:
    return [kind for kind in KINDS if f"{kind}.{layer}" in lm.sites()]


def edits_everywhere(lm: LanguageModel):
    return {f"{kind}.1": additive(lm.width(f"{kind}.1"), seed) for seed, kind in enumerate(kinds_of(lm))}


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_under_an_edit_equals_uncached_recomputation(family):
    lm, ids_sp = tiny(family), ids_of()
    steps = []  # the logits of each cached step's last position
    with lm.edited(edits_everywhere(lm)):
        hook = lm.model.register_forward_hook(lambda _m, _a, out: steps.append(out.logits[:, -1]))
        cached = lm.generate(ids_sp, max_new_tokens=8, temperature=0)
        hook.remove()
        by_hugging_face = lm.model.generate(
            input_ids=ids_sp, attention_mask=torch.ones_like(ids_sp), max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        uncached = ids_sp
        for _ in range(8):
            uncached = torch.cat([uncached, lm.logits(uncached)[:, -1:].argmax(-1)], dim=1)
        uncached_logits = lm.logits(uncached[:, :-1])[:, -8:]
    assert cached.tolist() == uncached.tolist() == by_hugging_face.tolist()
    torch.testing.assert_close(torch.stack(steps, dim=1), uncached_logits, rtol=1e-4, atol=1e-4)
    assert (lm.logits(uncached[:, :-1])[:, -8:] - uncached_logits).abs().amax(dim=(0, 2)).min() > 0.05  # every step is edited


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_edits_and_leaving_the_context_change_no_bit(family):
    lm, ids_sp = tiny(family), ids_of()
    before = lm.logits(ids_sp)
    with lm.edited({site: lambda value: value + torch.zeros(value.shape[-1]) for site in lm.sites()}):
        assert torch.equal(lm.logits(ids_sp), before)
    with lm.edited(edits_everywhere(lm)):
        assert not torch.equal(lm.logits(ids_sp), before)
    assert torch.equal(lm.logits(ids_sp), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batch_equals_one_by_one(family):
    lm = tiny(family)
    rows = [ids_of(1, length, seed=length) for length in (4, 9, 6)]
    ids_sp = torch.cat([torch.nn.functional.pad(row, (9 - row.shape[1], 0), value=1) for row in rows])
    mask_sp = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (9 - row.shape[1], 0)) for row in rows])
    with lm.edited(edits_everywhere(lm)):
        batch = lm.generate(ids_sp, mask_sp, max_new_tokens=5, temperature=0)
        batch_logits = lm.logits(ids_sp, mask_sp)
        sites = [f"{kind}.2" for kind in kinds_of(lm, 2)]
        batch_seen = lm.record(ids_sp, sites, mask_sp)
        for i, row in enumerate(rows):
            n = row.shape[1]
            torch.testing.assert_close(batch_logits[i, -n:], lm.logits(row)[0], rtol=1e-4, atol=1e-4)
            for site, value in lm.record(row, sites).items():
                torch.testing.assert_close(batch_seen[site][i, -n:], value[0], rtol=1e-4, atol=1e-4)
            assert batch[i, -n - 5 :].tolist() == lm.generate(row, max_new_tokens=5, temperature=0)[0].tolist()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("gemma2", "gemma3", "gemma3_text", "olmo2")])  # norm in between
def test_adding_at_the_heads_equals_adding_the_projection(family):
    lm, ids_sp = tiny(family), ids_of()
    projection = projection_of(lm, family, 1)
    weight = projection.weight if isinstance(projection, hf.pytorch_utils.Conv1D) else projection.weight.T
    vector = torch.randn(lm.width("head_out.1"), generator=torch.Generator().manual_seed(3))
    with lm.edited({"head_out.1": lambda value: value + vector}):
        at_heads = lm.logits(ids_sp)
    with lm.edited({"attn_out.1": lambda value: value + vector @ weight}):
        at_attention = lm.logits(ids_sp)
    torch.testing.assert_close(at_heads, at_attention, rtol=1e-4, atol=1e-4)
    assert (at_heads - lm.logits(ids_sp)).abs().max() > 0.01


def test_an_edit_replaces_and_nested_edits_apply_in_order():
    lm, ids_sp = tiny("llama"), ids_of()
    with lm.edited({"resid_post.0": lambda value: torch.full_like(value, 2.0)}), lm.edited({"resid_post.0": lambda value: value * 3}):
        seen = lm.record(ids_sp, ["resid_post.0", "resid_pre.1"])
    assert (seen["resid_post.0"] == 6).all()
    assert (seen["resid_pre.1"] == 6).all()


def test_an_edit_of_the_wrong_shape_is_refused_and_leaves_no_hook():
    lm, ids_sp = tiny("gpt2"), ids_of()
    before = lm.logits(ids_sp)
    wrong = lm.edited({"resid_post.1": lambda value: value[:, -1]})
    with wrong, pytest.raises(InputError, match=r"edit at resid_post\.1 to return shape \(2, 9, 32\)"):
        lm.logits(ids_sp)
    with pytest.raises(InputError), lm.edited({"resid_post.0": lambda value: value * 0, "resid_post.9": lambda value: value}):
        pass
    assert torch.equal(lm.logits(ids_sp), before)


def test_gradients_reach_what_an_edit_brings_in():
    lm, ids_sp = tiny("llama"), ids_of()
    vector_d = torch.zeros(lm.d_model, requires_grad=True)
    with lm.edited({"resid_post.1": lambda value: value + vector_d}):
        lm.logits(ids_sp)[:, -1, 7].sum().backward()
    step = 1e-2 * torch.nn.functional.one_hot(torch.tensor(4), lm.d_model)
    with lm.edited({"resid_post.1": lambda value: value + step}):
        up = lm.logits(ids_sp)[:, -1, 7].sum()
    with lm.edited({"resid_post.1": lambda value: value - step}):
        down = lm.logits(ids_sp)[:, -1, 7].sum()
    torch.testing.assert_close(vector_d.grad[4], (up - down) / 2e-2, rtol=1e-2, atol=1e-3)
    assert not lm.logits(ids_sp).requires_grad


@pytest.mark.parametrize("text", ["resid_post", "resid_post.x", "resid_post.-1", "resid_post.01", "residual.1", "blocks.1", ""])
def test_malformed_site(text):
    with pytest.raises(InputError, match=r"one of embed, resid_pre\.0 to resid_pre\.L.*head_out\.0 to head_out\.L.*, got"):
        parse_site(text)


def test_a_site_reads_back_as_written_and_an_absent_one_lists_what_there_is():
    assert parse_site("head_out.12") == Site("head_out", 12)
    assert str(Site("head_out", 12)) == "head_out.12"
    for call in (lambda: tiny("gpt2").width("resid_post.3"), lambda: tiny("gpt2").record(ids_of(), ["resid_post.3"])):
        with pytest.raises(InputError, match=r"resid_post\.0 to resid_post\.2.*got 'resid_post\.3'"):
            call()


def test_a_model_without_a_list_of_blocks_says_so():
    model = copy.deepcopy(tiny("gpt2").model)
    model.transformer.h = torch.nn.ModuleDict({str(i): block for i, block in enumerate(model.transformer.h)})
    with pytest.raises(InputError, match=r"expected 'odd' to keep its 3 blocks in a list of modules, found none in GPT2Model"):
        LanguageModel(model, name="odd")


def test_sampling_repeats_with_its_seed_and_leaves_global_randomness_alone():
    lm, ids_sp = tiny("gpt2"), ids_of()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = lm.generate(ids_sp, max_new_tokens=10, seed=4)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(lm.generate(ids_sp, max_new_tokens=10, seed=4), first)
    assert not torch.equal(lm.generate(ids_sp, max_new_tokens=10, seed=5), first)
    assert torch.equal(first[:, :9], ids_sp)


def test_sampled_frequencies_follow_temperature_and_top_p():
    lm = tiny("gpt2")
    ids_sp = ids_of(1, 4).expand(4000, -1)
    logits_v = lm.logits(ids_sp[:1])[0, -1].double()
    drawn = lm.generate(ids_sp, max_new_tokens=1, temperature=0.7, top_p=0.6)[:, -1]
    counts_v = torch.bincount(drawn, minlength=VOCAB) / 4000
    probs = (logits_v / 0.7).softmax(-1)
    kept, total = [], 0.0
    for token in probs.argsort(descending=True).tolist():
        if total >= 0.6:
            break
        kept.append(token)
        total += probs[token].item()
    expected_v = torch.zeros(VOCAB, dtype=torch.double)
    expected_v[kept] = probs[kept] / total
    assert set(drawn.tolist()) <= set(kept)
    assert (counts_v - expected_v).abs().max() < 5 * 0.5 / 4000**0.5


def test_a_row_ends_at_the_end_of_text_and_generation_when_all_have():
    lm, ids_sp = tiny("gpt2"), ids_of(2)
    free = lm.generate(ids_sp, max_new_tokens=8, temperature=0)[:, 9:]
    end = free[0, 2].item()
    lengths = [row.tolist().index(end) + 1 if end in row.tolist() else 8 for row in free]
    lm.model.generation_config.eos_token_id = end
    try:
        new = lm.generate(ids_sp, max_new_tokens=8, temperature=0)[:, 9:]
        assert new.shape[1] == max(lengths)
        for row, whole, n in zip(new, free, lengths):
            assert row[:n].tolist() == whole[:n].tolist()
            assert (row[n:] == lm.pad_id).all()
    finally:
        lm.model.generation_config.eos_token_id = None


def test_generate_ignores_penalties_in_the_models_generation_config():
    lm, ids_sp = tiny("llama"), ids_of()
    plain = lm.generate(ids_sp, max_new_tokens=12, temperature=0)
    lm.model.generation_config.repetition_penalty = 50.0
    try:
        assert torch.equal(lm.generate(ids_sp, max_new_tokens=12, temperature=0), plain)
    finally:
        lm.model.generation_config.repetition_penalty = None


def test_non_finite_logits_are_an_error():
    lm = tiny("gpt2")
    with lm.edited({"resid_post.2": lambda value: value * float("inf")}), pytest.raises(NonFiniteLogits, match="new token 1"):
        lm.generate(ids_of(), max_new_tokens=3)


@pytest.mark.parametrize("bad", [dict(max_new_tokens=0), dict(max_new_tokens=2, temperature=-1), dict(max_new_tokens=2, top_p=0)])
def test_unusable_sampling_settings(bad):
    with pytest.raises(InputError, match="expected max_new_tokens"):
        tiny("gpt2").generate(ids_of(), **bad)


def test_longer_than_the_context():
    with pytest.raises(InputError, match=r"at most 64 positions.*got 60 and 5 new ones"):
        tiny("gpt2").generate(ids_of(1, 60), max_new_tokens=5)
    with pytest.raises(InputError, match=r"at most 64 positions.*got 65"):
        tiny("gpt2").logits(ids_of(1, 65))


def test_fingerprint_knows_other_weights():
    assert tiny("llama").fingerprint() == tiny("llama").fingerprint()
    torch.manual_seed(99)
    other = LanguageModel(hf.LlamaForCausalLM(CONFIGS["llama"]()))
    assert other.fingerprint() != tiny("llama").fingerprint()


def test_stories_model_says_its_known_greedy_words(shared):
    lm = LanguageModel.load(str(shared / "models" / "stories260k"), device="cpu")
    ids_sp, mask_sp = lm.encode([""])
    assert ids_sp.tolist() == [[lm.bos_id]]
    text = lm.tokenizer.decode(lm.generate(ids_sp, mask_sp, max_new_tokens=45, temperature=0)[0], skip_special_tokens=True)
    known = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    assert text.strip().startswith(known)


def test_starter_model_predicts_text_and_encodes_left_padded(shared):
    lm = LanguageModel.load(str(shared / "models" / "starter-lm"), device="cpu")
    ids_sp, mask_sp = lm.encode(["What are you", "I do not know what you want from"])
    assert mask_sp.sum(1).tolist()[1] == ids_sp.shape[1] > mask_sp.sum(1).tolist()[0]
    assert ids_sp[mask_sp.bool()].tolist().count(lm.bos_id) == 2
    assert ids_sp[1, 0] == lm.bos_id
    words = [lm.tokenizer.decode(i) for i in lm.logits(ids_sp, mask_sp)[0, -1].topk(10).indices]
    assert " doing" in words


def test_a_text_that_brings_its_own_beginning_gets_no_second_one(byte_lm):
    plain, own, twice = (byte_lm.encode([text])[0][0].tolist() for text in ("ab", "<s>ab", "<s><s>ab"))
    assert plain == own == twice
    assert plain.count(byte_lm.bos_id) == 1
    assert byte_lm.encode(["a<s>b"])[0][0].tolist().count(byte_lm.bos_id) == 2  # the one within is the text's
    assert byte_lm.encode(["", "<s>"])[0].tolist() == [[byte_lm.bos_id]] * 2
    assert actadd(byte_lm, "<s>ab", "<s>cb", "resid_pre.1").provenance["tokens"][0] == plain


def test_halves_of_surrogate_pairs_are_replaced_and_counted(byte_lm):
    with pytest.warns(UserWarning, match=r"halves of surrogate pairs in texts are replaced by U\+FFFD \(2\)"):
        ids_sp, _ = byte_lm.encode(["x \ud83d", "\udcffy \u00e9"])
    assert [byte_lm.tokenizer.decode(row, skip_special_tokens=True) for row in ids_sp] == ["x \ufffd", "\ufffdy \u00e9"]
    with pytest.warns(UserWarning, match="halves of surrogate pairs in text"):
        assert byte_lm.token_ids("\udcffy") == byte_lm.token_ids("\ufffdy")


def test_a_string_is_no_list_of_strings(byte_lm):
    site, pair = "resid_post.1", ["I love it", "I hate it"]
    calls = {
        "texts": [
            lambda: byte_lm.encode("I think"),
            lambda: activations_of_texts(byte_lm, "I think", site),
            lambda: encode_cut(byte_lm, "I think"),
            lambda: principal_directions_of_texts(byte_lm, "I think", site, 1),
            lambda: head_outputs(byte_lm, "I think"),
            lambda: fit_iti(byte_lm, "ab", [0, 1]),
            lambda: word_rate("I think", ["think"]),
            lambda: calibrate(byte_lm, SteeringVector.at(site, torch.ones(32)), [0.1], "I think"),
        ],
        "sites": [lambda: byte_lm.record(ids_of(), site), lambda: LanguageModel.load("anywhere", sites=site)],
        "positive_texts": [lambda: diffmean_of_texts(byte_lm, *pair, site)],
        "negative_texts": [lambda: diffmean_of_texts(byte_lm, pair, "I hate it", site)],
        "tuning_texts": [lambda: fit_iti(byte_lm, pair, [0, 1], tuning_texts="ab")],
        "words": [lambda: word_rate(pair, "think"), lambda: listed_words("think")],
        "answers": [lambda: answer_log_probs(byte_lm, "I", "think")],
        "prompts": [lambda: Rollouts(byte_lm, None, "I think").activations([])],
    }
    for name, tries in calls.items():
        for call in tries:
            with pytest.raises(InputError, match=f"expected {name} to be a list of strings, got the single string"):
                call()


PADS = [(7, None, 7), (VOCAB, 9, 9), (VOCAB, None, 0), (VOCAB + 3, VOCAB, 0), (None, None, 0)]


@pytest.mark.parametrize(("pad", "eos", "expected"), PADS)
def test_padding_is_a_token_that_the_model_has(pad, eos, expected):
    lm = LanguageModel(copy.deepcopy(tiny("gpt2").model))
    lm.model.generation_config.eos_token_id = eos
    lm.tokenizer = types.SimpleNamespace(pad_token_id=pad)
    assert lm.pad_id == expected


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(byte_lm):
    lm = LanguageModel(copy.deepcopy(tiny("gpt2").model), byte_lm.tokenizer)
    with pytest.raises(InputError, match="expected a tokenizer of at most 50 tokens"):
        lm.encode(["zz"])


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_padding_on_the_right_is_moved_to_the_left(family):
    lm, n = tiny(family), 6
    rows = [ids_of(1, length, seed=length) for length in (3, 6, 4)]
    right_sp, right_mask_sp = (
        torch.cat([torch.nn.functional.pad(x, (0, n - x.shape[1])) for x in made]) for made in (rows, [torch.ones_like(r) for r in rows])
    )
    new = lm.generate(right_sp, right_mask_sp, max_new_tokens=5, temperature=0)
    for row, whole in zip(rows, new):
        assert whole[n - row.shape[1] :].tolist() == lm.generate(row, max_new_tokens=5, temperature=0)[0].tolist()
    with pytest.raises(InputError, match="all padding"):
        lm.generate(right_sp, torch.zeros_like(right_sp), max_new_tokens=1)
    with pytest.raises(InputError, match=r"attention mask of the ids' shape \(3, 6\), got \(3, 5\)"):
        lm.logits(right_sp, right_mask_sp[:, 1:])


def test_virtual_tokens_are_refused_and_other_adapters_are_not():
    model, ids_sp = copy.deepcopy(tiny("llama").model), ids_of()
    lm = LanguageModel(model)
    model.active_peft_config = types.SimpleNamespace(is_prompt_learning=False, peft_type="LORA")
    lm.record(ids_sp, ["resid_post.0"])
    model.active_peft_config = types.SimpleNamespace(is_prompt_learning=True, peft_type="PREFIX_TUNING")
    for call in (lambda: LanguageModel(model), lambda: lm.record(ids_sp, ["resid_post.0"])):
        with pytest.raises(InputError, match=r"without virtual tokens, got .* with PREFIX_TUNING"):
            call()


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "LoraConfig"])
def test_adapters_of_peft(kind):
    peft = pytest.importorskip("peft")
    lora = dict(target_modules=["q_proj"], init_lora_weights=False)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **(lora if kind == "LoraConfig" else dict(num_virtual_tokens=3)))
    model, ids_sp = peft.get_peft_model(copy.deepcopy(tiny("llama").model), config), ids_of()
    if kind != "LoraConfig":
        with pytest.raises(InputError, match="without virtual tokens"):
            LanguageModel(model)
        return
    lm = LanguageModel(model)
    plain = lm.logits(ids_sp)
    assert not torch.equal(plain, tiny("llama").logits(ids_sp))
    with lm.edited({"resid_post.1": additive(32)}):
        assert not torch.allclose(lm.logits(ids_sp), plain)


@pytest.mark.parametrize("given", [{"a": 1}, "2", [1, None], 1.5, True])
def test_a_damaged_end_of_text_token_is_one_sentence(given):
    lm = copy.deepcopy(tiny("gpt2"))
    lm.model.generation_config.eos_token_id = given
    with pytest.raises(InputError, match="one token id or a list"):
        lm.generate(torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.long), max_new_tokens=1)
