"""Hooks under compilation, replaced modules, several threads: what is said to be done is done, or refused.

s sequences · p positions
"""

import copy
import threading

import pytest
import torch
import transformers as hf
from test_language_model import ids_of, tiny

from sae.errors import InputError
from sae.model.language_model import LanguageModel

SITE = "resid_post.1"


def edit(coefficient: float):
    vector_d = 2 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    return {SITE: lambda value: value + coefficient * vector_d}


def whole(model):
    return LanguageModel(torch.compile(model, backend="eager"))


def in_place(model):
    model.compile(backend="eager")
    return LanguageModel(model)


def decoder(model):
    model.model = torch.compile(model.model, backend="eager")
    return LanguageModel(model)


def decoder_of_a_wrapped_model(model):
    lm = LanguageModel(model)
    model.model = torch.compile(model.model, backend="eager")
    return lm


def block(model):
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return LanguageModel(model)


@pytest.mark.parametrize("compiled", [whole, in_place, decoder, decoder_of_a_wrapped_model, block])
@pytest.mark.parametrize("warm", [True, False])  # compiled before the first hook, or under it
def test_a_compiled_model_is_edited_recorded_and_left_as_an_eager_one(compiled, warm):
    torch._dynamo.reset()
    plain, ids_sp = tiny("llama"), ids_of()
    lm = compiled(copy.deepcopy(plain.model))
    if warm:
        torch.testing.assert_close(lm.logits(ids_sp), plain.logits(ids_sp))
    for coefficient in (1.0, -2.0):
        with lm.edited(edit(coefficient)):
            found, seen = lm.logits(ids_sp), lm.record(ids_sp, ["resid_post.2"])["resid_post.2"]
            new = lm.generate(ids_sp, max_new_tokens=3, temperature=0)
        with plain.edited(edit(coefficient)):
            torch.testing.assert_close(found, plain.logits(ids_sp))
            torch.testing.assert_close(seen, plain.record(ids_sp, ["resid_post.2"])["resid_post.2"])
            assert torch.equal(new, plain.generate(ids_sp, max_new_tokens=3, temperature=0))
    torch.testing.assert_close(lm.logits(ids_sp), plain.logits(ids_sp))
    assert lm.fingerprint() == plain.fingerprint()


def test_hugging_faces_own_compilation_is_steered():
    torch._dynamo.reset()
    plain, ids_sp = tiny("llama"), ids_of()
    lm = LanguageModel(copy.deepcopy(plain.model))
    compiled = hf.CompileConfig(backend="eager")
    compiled._compile_all_devices = True  # not on CUDA alone
    common = dict(input_ids=ids_sp, attention_mask=torch.ones_like(ids_sp), max_new_tokens=6, do_sample=False, pad_token_id=0)
    for coefficient in (0.0, 1.0, -2.0, 0.0):
        with lm.edited(edit(coefficient)) if coefficient else torch.no_grad():
            found = lm.model.generate(**common, cache_implementation="static", compile_config=compiled)
        with plain.edited(edit(coefficient)):
            assert found.tolist() == plain.model.generate(**common).tolist()
    assert hasattr(lm.model, "_compiled_call")


def test_a_pass_that_goes_by_a_site_is_refused():
    ids_sp = ids_of()
    lm = LanguageModel(copy.deepcopy(tiny("llama").model))
    lm.sites()
    lm.model.model.layers[1] = copy.deepcopy(lm.model.model.layers[1])
    for run in (lambda: lm.logits(ids_sp), lambda: lm.model(input_ids=ids_sp), lambda: lm.generate(ids_sp, max_new_tokens=1)):
        with lm.edited(edit(1.0)), pytest.raises(InputError, match=r"go through resid_post\.1, but it did not"):
            run()
    with pytest.raises(InputError, match=r"go through resid_post\.1, but it did not"):
        lm.record(ids_sp, ["resid_post.0", SITE])
    fresh = LanguageModel(lm.model)
    fresh.model.model.layers[1] = copy.deepcopy(fresh.model.model.layers[1])  # before its sites were looked for
    with pytest.raises(InputError, match=r"got resid_post\.1, which it does not have: a pass goes through the block 0 times"):
        fresh.record(ids_sp, [SITE])
    lm.model.model = copy.deepcopy(lm.model.model)
    with lm.edited({"resid_post.0": lambda value: value}), pytest.raises(InputError, match="but it did not"):
        lm.logits(ids_sp)


def test_a_second_thread_is_refused_and_the_first_is_not_disturbed():
    lm, ids_sp = tiny("llama"), ids_of()
    plain = lm.logits(ids_sp)
    with lm.edited(edit(1.0)):
        expected = lm.logits(ids_sp)
    tries = {
        "logits": lambda: lm.logits(ids_sp),
        "the model itself": lambda: lm.model(input_ids=ids_sp),
        "record": lambda: lm.record(ids_sp, [SITE]),
        "edited": lambda: lm.edited(edit(2.0)).__enter__(),
    }
    said = {}

    def other() -> None:
        for name, run in tries.items():
            with pytest.raises(InputError) as caught:
                run()
            said[name] = str(caught.value)

    with lm.edited(edit(1.0)):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert torch.equal(lm.logits(ids_sp), expected)
        assert set(lm.record(ids_sp, [SITE])) == {SITE}
    assert said.keys() == tries.keys()
    assert all(sentence.startswith("expected one thread at a time") for sentence in said.values())
    found = []
    thread = threading.Thread(target=lambda: found.append((lm.logits(ids_sp), lm.record(ids_sp, [SITE]))))
    thread.start()
    thread.join()
    assert torch.equal(found[0][0], plain)


@pytest.mark.parametrize(("edits", "got"), [({SITE: torch.zeros(32)}, "Tensor"), ({SITE: 2.0}, "float")])
def test_what_is_no_function_is_no_edit(edits, got):
    with pytest.raises(InputError, match=rf"expected a function of the value at resid_post\.1, got {got}"), tiny("llama").edited(edits):
        pass


def test_an_edit_that_returns_nothing_is_refused():
    lm = tiny("llama")
    with lm.edited({SITE: lambda value: None}), pytest.raises(InputError, match="got NoneType"):
        lm.logits(ids_of())
