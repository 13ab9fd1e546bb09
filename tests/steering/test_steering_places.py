"""Places in prompts that are read in several passes and with caches of fixed size, against one pass with a growing cache."""

import pytest
import torch
from test_language_model import FAMILIES, ids_of, tiny

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.intervention import steered
from steering.vector import SteeringVector

VECTOR = SteeringVector.at("resid_post.1", 3 * torch.randn(32, generator=torch.Generator().manual_seed(1)))
PLACES = [("prompt", 6), ("generated", 6), ("last", 6), ([0, 3], 6), (("first", 2), None), ([2, 7], None)]
WAYS = [
    dict(cache_implementation="static"),
    dict(prefill_chunk_size=4),
    dict(prefill_chunk_size=1),
    dict(cache_implementation="static", prefill_chunk_size=4),
]


def written(lm: LanguageModel, positions, prompt_length: int | None, **way) -> list[list[int]]:
    ids_sp = ids_of(2, 6)
    mask_sp = torch.ones_like(ids_sp)
    mask_sp[0, :2] = 0
    with steered(lm, [VECTOR], positions=positions, prompt_length=prompt_length):
        return lm.model.generate(
            input_ids=ids_sp, attention_mask=mask_sp, max_new_tokens=4, do_sample=False, pad_token_id=0, **way
        ).tolist()


# GPT-Neo's own static cache writes other text than its growing one, without steering too; Mistral's hides columns after its window
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("gpt_neo", "mistral")])
def test_several_passes_and_static_caches_write_the_same(family):
    lm = tiny(family)
    for positions, prompt_length in PLACES:
        expected = written(lm, positions, prompt_length)
        for way in WAYS:
            assert written(lm, positions, prompt_length, **way) == expected, (positions, way)


def test_a_static_cache_whose_windows_hide_the_prompt_steers_or_is_refused():
    lm = tiny("mistral")  # window 4
    for positions, prompt_length in PLACES:
        expected = written(lm, positions, prompt_length)
        assert written(lm, positions, prompt_length, prefill_chunk_size=4) == expected
        if prompt_length:
            assert written(lm, positions, prompt_length, cache_implementation="static") == expected
        else:
            with pytest.raises(InputError, match="shows all 7 columns so far"):
                written(lm, positions, prompt_length, cache_implementation="static")


def test_a_prompt_in_passes_that_turns_out_to_be_padded_on_the_right_is_refused():
    lm, ids_sp = tiny("llama"), ids_of(2, 6)
    mask_sp = torch.ones_like(ids_sp)
    mask_sp[0, 3:] = 0
    with (
        pytest.raises(InputError, match="padded on the left, got padding after tokens"),
        steered(lm, [VECTOR], positions="last", prompt_length=6),
    ):
        lm.model.generate(input_ids=ids_sp, attention_mask=mask_sp, max_new_tokens=2, do_sample=False, pad_token_id=0, prefill_chunk_size=2)


FORM = r"expected vectors as a list such as \[vector\] or \[\(vector, 2\.0\)"
NO_PLACES = [3, None, ("first", "2"), ("first", 2.5), ("first", 0), [True], [1.0], {1}, "1", torch.tensor([1]), []]


@pytest.mark.parametrize(
    "vectors", [{VECTOR: 2.0}, VECTOR, (VECTOR, 2.0), [[VECTOR, 2.0]], [(VECTOR,)], [(2.0, VECTOR)], [torch.zeros(32)], "vector", 3, None]
)
def test_other_forms_than_a_list_of_vectors_are_refused_with_the_form(vectors):
    with pytest.raises(InputError, match=FORM), steered(tiny("llama"), vectors):
        pass


@pytest.mark.parametrize("coefficient", ["2", None, [[1.0, 2.0]], [], VECTOR, float("nan"), [1.0, [2.0]], 1j, 10**400])
def test_what_is_no_coefficient_is_refused(coefficient):
    with pytest.raises(InputError, match="expected a coefficient"), steered(tiny("llama"), [(VECTOR, coefficient)]):
        pass


@pytest.mark.parametrize("positions", NO_PLACES)
def test_what_is_no_place_is_refused(positions):
    with pytest.raises(InputError, match="expected positions to be one of"), steered(tiny("llama"), [VECTOR], positions=positions):
        pass


@pytest.mark.parametrize("prompt_length", ["6", 0, 2.5, True])
def test_what_is_no_prompt_length_is_refused(prompt_length):
    with (
        pytest.raises(InputError, match="expected prompt_length"),
        steered(tiny("llama"), [VECTOR], positions="last", prompt_length=prompt_length),
    ):
        pass


def test_a_bare_model_is_refused():
    with pytest.raises(InputError, match="expected a LanguageModel to steer, got LlamaForCausalLM"), steered(tiny("llama").model, [VECTOR]):
        pass
