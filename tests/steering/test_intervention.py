"""Interventions: the contracts on tiny randomly initialised models of every family, for every operation and place.

s sequences · p positions · d model width · f features
"""

import numpy as np
import pytest
import torch
import transformers as hf
from test_language_model import CONFIGS, FAMILIES, kinds_of, tiny

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.model.language_model import LanguageModel, NonFiniteLogits
from steering.intervention import DictionaryFeature, steered
from steering.vector import SteeringVector


def vector(site: str, seed: int = 0, size: float = 1.0, width: int = 32) -> SteeringVector:
    return SteeringVector.at(site, size * torch.randn(width, generator=torch.Generator().manual_seed(seed)), {"seed": seed})


def ids_of(rows: int = 2, length: int = 7, seed: int = 0):
    return torch.randint(2, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


def dictionary(zero_rows: bool = False) -> Dictionary:
    generator = torch.Generator().manual_seed(5)
    W_enc_fd, W_dec_fd = torch.randn(6, 32, generator=generator), torch.randn(6, 32, generator=generator)
    return Dictionary.autoencoder(
        W_enc_fd, torch.randn(6, generator=generator), 0 * W_dec_fd if zero_rows else W_dec_fd, torch.randn(32, generator=generator)
    )


SITE = "resid_post.1"
NAMED = ("prompt", "generated", "last")


def table(site: str, seed: int = 0, positions: int = 3) -> SteeringVector:
    return SteeringVector.at(site, torch.stack([vector(site, seed + i).direction_d for i in range(positions)]))


def united(*vectors: SteeringVector) -> SteeringVector:
    return SteeringVector({site: direction for one in vectors for site, direction in one.directions.items()})


def settings_of(lm: LanguageModel, prompt_length: int) -> dict[str, tuple[list, dict]]:
    """Every operation and place, with every kind of vector that a method makes: one direction, one per position, at heads, at several
    sites, a feature."""
    heads = united(*(vector(f"head_out.{layer}", layer, width=lm.width("head_out.0")) for layer in (0, 2)))
    cases: dict[str, tuple[list, dict]] = {
        "add everywhere": ([(vector(SITE), 2.0), heads], {}),
        "add to the prompt": ([(vector(SITE), 2.0)], {"positions": "prompt"}),
        "add where generated": ([(vector(SITE), 2.0), vector("resid_pre.2", 1)], {"positions": "generated"}),
        "add at the last": ([(vector(SITE), 4.0)], {"positions": "last"}),
        "add at the first": ([(vector(SITE), 2.0)], {"positions": ("first", 2)}),
        "add at some": ([(vector(SITE), 2.0)], {"positions": [0, 10]}),  # one of the prompt, one beyond it
        "add by position": ([(table(SITE), 2.0), vector(SITE)], {}),
        "add by position at several sites": ([(united(table("resid_pre.0", 2), table(SITE), vector("resid_post.0", 5)), -1.5)], {}),
        "add at heads": ([(heads, 3.0)], {"positions": "generated"}),
        "rotate": ([(vector(SITE), 3.0)], {"operation": "rotate"}),
        "rotate by position": ([(table(SITE), 3.0)], {"operation": "rotate"}),
        "rotate at several sites": ([(united(vector("resid_pre.0", 4), vector("resid_post.2", 5)), 3.0), heads], {"operation": "rotate"}),
        "clamp": ([(DictionaryFeature(dictionary(), i, SITE), 2.0 * i) for i in (0, 3)], {"operation": "clamp"}),
        "clamp at several sites": (
            [(DictionaryFeature(dictionary(), 1, "resid_post.0"), 2.0), (DictionaryFeature(dictionary(), 1, SITE), 3.0), (heads, 1.5)],
            {"operation": "clamp", "positions": "generated"},
        ),
        "clamp a vector in the prompt": ([(vector(SITE), 3.0)], {"operation": "clamp", "positions": "prompt"}),
        "ablate": (
            [vector(SITE), vector(SITE, 1), DictionaryFeature(dictionary(), 2, SITE)],
            {"operation": "ablate", "positions": "generated"},
        ),
        "ablate at several sites": ([united(vector("resid_pre.0", 4), vector("resid_post.0", 5)), heads], {"operation": "ablate"}),
    }
    for _, settings in cases.values():
        settings |= {"prompt_length": prompt_length} if settings.get("positions") in NAMED else {}
    return cases


def padded(rows: list[torch.Tensor], longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids_sp = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=1) for row in rows])
    return ids_sp, torch.cat([torch.nn.functional.pad(torch.ones_like(row), (longest - row.shape[1], 0)) for row in rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_vectors_and_leaving_the_context_change_no_bit(family):
    lm, ids_sp = tiny(family), ids_of()
    before = lm.logits(ids_sp)
    zeros = [SteeringVector({f"{kind}.{layer}": torch.zeros(lm.width(f"{kind}.{layer}")) for layer in (0, 1)}) for kind in kinds_of(lm)]
    for operation in ("add", "rotate", "clamp", "ablate"):
        for positions in ("all", "generated", [1, 2]):
            place = {"positions": positions} | ({"prompt_length": 3} if positions == "generated" else {})
            with steered(lm, zeros, operation=operation, **place):
                assert torch.equal(lm.logits(ids_sp), before)
            if operation != "clamp":  # whose coefficient is a target
                with steered(lm, [(vector(SITE), 0.0)], operation=operation, **place):
                    assert torch.equal(lm.logits(ids_sp), before)
    by_position = [SteeringVector.at(f"{kind}.1", torch.zeros(2, lm.width(f"{kind}.1"))) for kind in kinds_of(lm)]
    for operation in ("add", "rotate"):
        for added in (by_position, [(table(SITE), 0.0)], [*by_position, (vector(SITE), 0.0)]):
            with steered(lm, added, operation=operation):
                assert torch.equal(lm.logits(ids_sp), before)
    for operation in ("clamp", "ablate"):
        with steered(lm, [(DictionaryFeature(dictionary(zero_rows=True), 1, SITE), 1.0)], operation=operation):
            assert torch.equal(lm.logits(ids_sp), before)
    for items, settings in settings_of(lm, 7).values():
        with steered(lm, items, **settings):
            assert not torch.equal(lm.logits(ids_sp), before)
        assert torch.equal(lm.logits(ids_sp), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_equals_uncached(family):
    lm, ids_sp = tiny(family), ids_of()
    for name, (items, settings) in settings_of(lm, ids_sp.shape[1]).items():
        steps = []
        with steered(lm, items, **settings):
            hook = lm.model.register_forward_hook(lambda _m, _a, out, steps=steps: steps.append(out.logits[:, -1]))
            cached = lm.generate(ids_sp, max_new_tokens=6, temperature=0)
            hook.remove()
            uncached_logits = lm.logits(cached[:, :-1])[:, -6:]
        torch.testing.assert_close(
            torch.stack(steps, dim=1), uncached_logits, rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert torch.equal(cached[:, -6:], torch.stack(steps, dim=1).argmax(-1))
        if name in ("add everywhere", "add where generated", "rotate"):  # every generated token is chosen under steering
            assert (lm.logits(cached[:, :-1])[:, -6:] - uncached_logits).abs().amax(dim=(0, 2)).min() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batch_equals_one_by_one(family):
    lm, longest = tiny(family), 8
    rows = [ids_of(1, length, seed=length) for length in (3, 8, 1)]
    ids_sp, mask_sp = padded(rows, longest)
    for name, (items, settings) in settings_of(lm, longest).items():
        with lm.edited({}), steered(lm, items, **settings):
            batch = lm.generate(ids_sp, mask_sp, max_new_tokens=4, temperature=0)
            logits = lm.logits(batch, torch.nn.functional.pad(mask_sp, (0, 4), value=1))
        for i, row in enumerate(rows):
            items, settings = settings_of(lm, row.shape[1])[name]
            with steered(lm, items, **settings):
                alone_logits = lm.logits(batch[i : i + 1, longest - row.shape[1] :])
            torch.testing.assert_close(
                logits[i, longest - row.shape[1] :], alone_logits[0], rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
            )
            assert torch.equal(alone_logits[0, -5:-1].argmax(-1), batch[i, -4:])


@pytest.mark.parametrize(
    ("positions", "expected"),  # of rows with 3 of 7 and with 7 of 7 prompt tokens, padded left, and two more tokens each
    [
        ("prompt", ({0, 1, 2}, set(range(7)))),
        ("generated", ({2, 3, 4}, {6, 7, 8})),
        ("last", ({2}, {6})),
        (("first", 4), ({0, 1, 2, 3}, {0, 1, 2, 3})),
        ([4, 1], ({1, 4}, {1, 4})),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_are_those_of_the_rows_own_tokens(positions, expected, side):
    lm = tiny("llama")
    ids_sp, mask_sp = padded([ids_of(1, 3), ids_of(1, 7)], 7)
    if side == "right":
        ids_sp[:1], mask_sp[:1] = ids_sp[:1].roll(3, 1), mask_sp[:1].roll(3, 1)
    ids_sp, mask_sp = torch.cat([ids_sp, ids_of(2, 2)], 1), torch.nn.functional.pad(mask_sp, (0, 2), value=1)
    plain = lm.record(ids_sp, [SITE], mask_sp)[SITE]
    place = {"positions": positions} | ({"prompt_length": 7} if positions in NAMED else {})
    with steered(lm, [vector(SITE)], **place):
        changed = lm.record(ids_sp, [SITE], mask_sp)[SITE]
    for i in range(2):
        columns = mask_sp[i].nonzero()[:, 0].tolist()
        own = {columns[n] for n in expected[i]}
        for column in range(9):
            target = plain[i, column] + vector(SITE).direction_d if column in own else plain[i, column]
            assert torch.equal(changed[i, column], target), (i, column)


def test_the_positions_of_a_prompt_end_with_it():
    lm, ids_sp = tiny("llama"), ids_of(2, 6)
    plain = lm.record(ids_sp, [SITE])[SITE]
    table_pd = torch.randn(3, 32)
    positional = SteeringVector.at(SITE, table_pd)
    with steered(lm, [(positional, -1.5)]):
        front = lm.record(ids_sp, [SITE])[SITE]
    torch.testing.assert_close(front[:, :3], plain[:, :3] - 1.5 * table_pd)
    assert torch.equal(front[:, 3:], plain[:, 3:])
    with steered(lm, [positional, vector(SITE)], positions=[5, 0, 2]):
        chosen = lm.record(ids_sp, [SITE])[SITE]
    torch.testing.assert_close(chosen[:, [5, 0, 2]], plain[:, [5, 0, 2]] + table_pd + vector(SITE).direction_d)
    assert torch.equal(chosen[:, [1, 3, 4]], plain[:, [1, 3, 4]])
    ids_sp, mask_sp = padded([ids_of(1, 2), ids_of(1, 4)], 4)
    longer_sp, longer_mask = torch.cat([ids_sp, ids_of(2, 2)], 1), torch.nn.functional.pad(mask_sp, (0, 2), value=1)
    plain = lm.record(longer_sp, [SITE], longer_mask)[SITE]
    with steered(lm, [positional], prompt_length=4):  # the first row's prompt has no third position
        short = lm.record(longer_sp, [SITE], longer_mask)[SITE]
    torch.testing.assert_close(short[0, 2:4], plain[0, 2:4] + table_pd[:2])
    assert torch.equal(short[0, 4:], plain[0, 4:])
    torch.testing.assert_close(short[1, :3], plain[1, :3] + table_pd)


def test_clamping_is_decoding_changed_activations_with_the_error_kept():
    """At one site and at two, whose second then meets what the first made of it."""
    for family in FAMILIES:
        lm, ids_sp, sae = tiny(family), ids_of(), dictionary()
        for operation, targets in (("clamp", {j: 0.7 * j for j in range(5)}), ("ablate", dict.fromkeys(range(5), 0.0))):

            def items(*sites, operation=operation, targets=targets, sae=sae):
                given = {j: target if operation == "clamp" else 1.0 for j, target in targets.items()}
                return [(DictionaryFeature(sae, j, site), c) for site in sites for j, c in given.items()]

            for before in ([], ["resid_post.0"]):
                with steered(lm, items(*before), operation=operation):
                    plain = lm.record(ids_sp, [SITE])[SITE]
                with steered(lm, items(*before, SITE), operation=operation):
                    clamped = lm.record(ids_sp, [SITE])[SITE]
                acts = sae.encode(plain)
                wanted = acts.clone()
                assert before or 0 < (acts[..., :5] > 0).float().mean() < 1  # the encoder's ReLU matters
                for j, target in targets.items():
                    wanted[..., j] = target
                error = plain - sae.decode(acts)
                torch.testing.assert_close(clamped, sae.decode(wanted) + error, rtol=1e-4, atol=1e-4)


def test_vectors_are_clamped_ablated_and_rotated_to_what_numpy_says():
    lm, ids_sp = tiny("gpt2"), ids_of()
    plain = lm.record(ids_sp, [SITE])[SITE].double().numpy()
    one, two = vector(SITE, 0), vector(SITE, 1)
    v, both = one.direction_d.double().numpy(), torch.stack([one.direction_d, two.direction_d]).double().numpy()

    def after(items, operation):
        with steered(lm, items, operation=operation):
            return lm.record(ids_sp, [SITE])[SITE].double().numpy()

    u = v / np.linalg.norm(v)
    np.testing.assert_allclose(after([(one, 1.5)], "clamp") @ u, 1.5 * np.linalg.norm(v), rtol=1e-4)
    np.testing.assert_allclose(after([(one, 1.5)], "clamp"), plain + (1.5 * v @ u - plain @ u)[..., None] * u, atol=1e-4)
    coefficients = np.linalg.lstsq(both.T, plain.reshape(-1, 32).T, rcond=None)[0]
    spanned = (both.T @ coefficients).T.reshape(plain.shape)
    np.testing.assert_allclose(after([one, two], "ablate"), plain - spanned, atol=1e-4)
    np.testing.assert_allclose(after([one, two, 2 * one, one - two], "ablate"), plain - spanned, atol=1e-4)
    np.testing.assert_allclose(after([(one, 0.25)], "ablate"), plain - 0.25 * (plain @ u)[..., None] * u, atol=1e-4)
    moved = plain + 3 * v - 2 * both[1]
    lengths = [np.linalg.norm(x, axis=-1, keepdims=True) for x in (plain, moved)]
    np.testing.assert_allclose(after([(one, 3.0), (two, -2.0)], "rotate"), moved * lengths[0] / lengths[1], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_adding_at_the_heads_equals_adding_their_projection(family):
    lm, ids_sp = tiny(family), ids_of()
    if family in ("gemma2", "gemma3", "gemma3_text", "olmo2"):
        pytest.skip("a norm stands between the projection and attn_out")
    at_heads = vector("head_out.1", width=lm.width("head_out.1"))
    projection = lm.place("head_out.1").module
    with torch.no_grad():
        projected_d = (projection(at_heads.direction_d[None]) - projection(torch.zeros(1, lm.width("head_out.1"))))[0]
    with steered(lm, [(at_heads, 1.5)]):
        expected = lm.logits(ids_sp)
    with steered(lm, [(SteeringVector.at("attn_out.1", projected_d), 1.5)]):
        torch.testing.assert_close(lm.logits(ids_sp), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_coefficients_per_sequence(family):
    lm, ids_sp, coefficients = tiny(family), ids_of(3), [0.5, 0.0, 1.0]
    for name, (items, settings) in settings_of(lm, 7).items():
        plain = [item[0] if isinstance(item, tuple) else item for item in items]
        with steered(lm, [(item, coefficients) for item in plain], **settings):
            together = lm.logits(ids_sp)
        for i, coefficient in enumerate(coefficients):
            with steered(lm, [(item, coefficient) for item in plain], **settings):
                alone = lm.logits(ids_sp[i : i + 1])[0]
            torch.testing.assert_close(together[i], alone, rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


BEAMED = (
    "add everywhere",
    "add by position at several sites",
    "add at heads",
    "rotate at several sites",
    "clamp at several sites",
    "ablate",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_faces_own_generation_with_beams_and_several_texts(family):
    """A coefficient for each of two sequences, padded: each as if alone, and greedy search as in our own generation."""
    lm, coefficients = tiny(family), (1.0, 0.3)
    rows = [ids_of(1, length, seed=length) for length in (3, 6)]
    ids_sp, mask_sp = padded(rows, 6)
    beams = dict(num_beams=3, num_return_sequences=2, do_sample=False, max_new_tokens=4, pad_token_id=1)
    for name in BEAMED:
        items, settings = settings_of(lm, 6)[name]
        plain = [item[0] if isinstance(item, tuple) else item for item in items]
        with steered(lm, [(item, coefficients) for item in plain], **settings):
            together = lm.model.generate(ids_sp, attention_mask=mask_sp, **beams)
        assert together.shape == (4, 10)
        for i, (row, coefficient) in enumerate(zip(rows, coefficients)):
            _, settings = settings_of(lm, row.shape[1])[name]
            with steered(lm, [(item, coefficient) for item in plain], **settings):
                alone = lm.model.generate(row, attention_mask=torch.ones_like(row), **beams)
                greedy = lm.model.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=4, pad_token_id=1)
                assert torch.equal(greedy, lm.generate(row, max_new_tokens=4, temperature=0)), name
            assert torch.equal(together[2 * i : 2 * i + 2, 6 - row.shape[1] :], alone), name


@pytest.mark.parametrize("sample", [False, True])
def test_logits_that_are_not_finite_are_reported(sample):
    torch.manual_seed(0)
    lm = LanguageModel(hf.AutoModelForCausalLM.from_config(CONFIGS["llama"]()).half())
    ids_sp, strong = ids_of(), 1e6 * vector(SITE)  # above what float16 holds
    with pytest.raises(NonFiniteLogits, match="not finite"), steered(lm, [strong]):
        lm.model.generate(ids_sp, attention_mask=torch.ones_like(ids_sp), do_sample=sample, max_new_tokens=3, pad_token_id=1)
    with pytest.raises(NonFiniteLogits, match="new token 1"), steered(lm, [strong]):
        lm.generate(ids_sp, max_new_tokens=3)
    with pytest.raises(RuntimeError, match="another"), steered(lm, [vector(SITE)]):
        raise RuntimeError("another")
    with pytest.raises(OverflowError, match="so long"), steered(lm, [(vector(SITE), 1e300)]):
        pass


def test_more_positions_than_the_context():
    lm, ids_sp = tiny("llama"), ids_of(1, 62)
    with pytest.raises(InputError, match="at most 64 positions"), steered(lm, [vector(SITE)]):
        lm.model.generate(ids_sp, attention_mask=torch.ones_like(ids_sp), do_sample=False, max_new_tokens=4, pad_token_id=1)
    with pytest.raises(InputError, match="at most 64 positions"), steered(lm, [vector(SITE)]):
        lm.logits(ids_of(1, 65))


POSITIONAL = SteeringVector.at(SITE, torch.ones(3, 32))
FEATURE = DictionaryFeature(dictionary(), 1, SITE)


@pytest.mark.parametrize(
    ("added", "settings", "sentence"),
    [
        ([vector("resid_post.7")], {}, r"resid_post\.0 to resid_post\.2"),
        ([vector(SITE, width=31)], {}, "width 32 for resid_post.1"),
        ([vector(SITE)], {"positions": "middle"}, "one of all, prompt, generated, last"),
        ([vector(SITE)], {"positions": "last"}, "prompt_length"),
        ([vector(SITE)], {"positions": "generated"}, "prompt_length"),
        ([vector(SITE)], {"prompt_length": 3}, "no prompt_length"),
        ([vector(SITE)], {"positions": "generated", "prompt_length": 0}, "at least 1"),
        ([vector(SITE)], {"positions": ("first", 0)}, "different positions"),
        ([vector(SITE)], {"positions": [1, 1]}, "different positions"),
        ([vector(SITE)], {"positions": [-1]}, "different positions"),
        ([vector(SITE)], {"positions": []}, "different positions"),
        ([vector(SITE)], {"positions": [3], "prompt_length": 3}, "inside the prompt"),
        ([POSITIONAL], {"positions": [3, 4]}, "as many positions as the 3"),
        ([POSITIONAL], {"positions": "last", "prompt_length": 5}, "one direction per position"),
        ([POSITIONAL], {"prompt_length": 2}, "at least as long"),
        ([POSITIONAL], {"operation": "ablate"}, "not clamped or ablated"),
        ([vector(SITE)], {"operation": "multiply"}, "add, rotate, clamp, ablate"),
        ([(FEATURE, 1.0)], {}, "can be clamped"),
        ([FEATURE], {"operation": "clamp"}, "activation that is given"),
        ([(FEATURE, 1.0), (FEATURE, 2.0)], {"operation": "clamp"}, "once"),
        ([(vector(SITE), float("nan"))], {}, "a coefficient"),
        ([(vector(SITE), [1.0, 2.0]), (vector(SITE), [1.0, 2.0, 3.0])], {}, r"\[2, 3\]"),
    ],
)
def test_unusable_interventions(added, settings, sentence):
    with pytest.raises(InputError, match=sentence), steered(tiny("gpt2"), added, **settings):
        pass


def test_more_bad_input():
    with pytest.raises(InputError, match="2 sequences"), steered(tiny("gpt2"), [(vector(SITE), [1.0, 2.0])]):
        tiny("gpt2").logits(ids_of(3))
    with pytest.raises(InputError, match="features 0 to 5"):
        DictionaryFeature(dictionary(), 6, SITE)
    with pytest.raises(InputError, match="name its site"):
        DictionaryFeature(dictionary(), 1)
