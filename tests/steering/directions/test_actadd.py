"""Activation addition against two forward passes by hand."""

import pytest
import torch

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.directions.actadd import actadd
from steering.intervention import steered


def rows_by_hand(lm: LanguageModel, layer: int, text: str) -> torch.Tensor:
    """Input of a block, from Hugging Face's own list of hidden states; `text` is already as long as it should be."""
    ids = torch.tensor([[0, *lm.tokenizer(text)["input_ids"]]])
    return lm.model(ids, output_hidden_states=True).hidden_states[layer][0]


@pytest.mark.parametrize(("positive", "negative"), [("Love", "Hate"), (" weddings", ""), ("I", "I am sad"), ("", "no")])
def test_each_position_is_the_difference_of_two_prompts_padded_with_spaces(byte_lm, positive, negative):
    made = actadd(byte_lm, positive, negative, "resid_pre.2")
    longest = max(len(positive), len(negative))
    expected_pd = rows_by_hand(byte_lm, 2, positive.ljust(longest)) - rows_by_hand(byte_lm, 2, negative.ljust(longest))
    (value_pd,) = made.directions.values()
    assert value_pd.shape == (1 + longest, 32)
    torch.testing.assert_close(value_pd, expected_pd.detach(), rtol=1e-4, atol=1e-5)
    assert not value_pd[0].any()
    assert value_pd[-1].any()
    assert (made.site, made.provenance["positive"], made.provenance["negative"]) == ("resid_pre.2", positive, negative)


def test_rows_before_the_first_different_token_are_exactly_zero(byte_lm):
    (value_pd,) = actadd(byte_lm, "I am glad", "I am cold", "resid_pre.2").directions.values()
    different = 1 + len("I am ")
    assert not value_pd[:different].any()
    assert value_pd[different:].any(dim=1).all()


def test_steering_adds_the_rows_once_at_the_front_of_the_prompt(byte_lm):
    vector = actadd(byte_lm, "Love", "Hate", "resid_pre.1")
    (value_pd,) = vector.directions.values()
    ids_sp, _ = byte_lm.encode(["I think that"])
    plain_pd = byte_lm.record(ids_sp, ["resid_pre.1"])["resid_pre.1"][0]
    with steered(byte_lm, [(vector, 3.0)]):
        changed_pd = byte_lm.record(ids_sp, ["resid_pre.1"])["resid_pre.1"][0]
    torch.testing.assert_close(changed_pd[:5], plain_pd[:5] + 3 * value_pd)
    assert torch.equal(changed_pd[5:], plain_pd[5:])
    assert torch.equal(changed_pd[0], plain_pd[0])


def test_unusable_prompts_sites_and_tokenizers(byte_lm):
    for positive, negative, site, sentence in [
        ("a", "b", "resid_post.1", "expected a resid_pre site"),
        ("a", "b", "resid_pre.3", "resid_pre.0 to resid_pre.2"),
        ("same", "same", "resid_pre.1", "two different prompts"),
        ("same", "same  ", "resid_pre.1", "two different prompts"),
    ]:
        with pytest.raises(InputError, match=sentence):
            actadd(byte_lm, positive, negative, site)
    with pytest.raises(InputError, match="tokenizer beside the model"):
        actadd(LanguageModel(byte_lm.model), "a", "b", "resid_pre.1")


def test_a_tokenizer_without_a_token_for_a_space(byte_lm):
    class NoSpace:
        bos_token_id, deprecation_warnings = 0, {}

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [t for word in text.split() for t in (5, len(word))]}

    spaceless = LanguageModel(byte_lm.model, NoSpace(), "no space")
    with pytest.raises(InputError, match=r"one token for a space .* got 0"):
        actadd(spaceless, "one two", "three", "resid_pre.1")
    assert actadd(spaceless, "one", "three", "resid_pre.1").provenance["tokens"] == [[0, 5, 3], [0, 5, 5]]
