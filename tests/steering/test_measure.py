"""Word rates against counts by eye, continuation loss against a sum in float64.

s sequences · p positions
"""

import pytest
import torch
import transformers as hf

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.intervention import steered
from steering.strength.measure import continuation_loss, word_rate
from steering.vector import SteeringVector


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=None)
    model = hf.GPT2LMHeadModel(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    return LanguageModel(model)


def test_whole_words_in_any_case_are_counted():
    texts = ["Damn! That damned, DAMN thing.", "Goddamn it; hell-bent shells", ""]
    rate = word_rate(texts, ["damn", "hell"])
    assert (rate.found, rate.words) == (3, 10)
    assert rate.rate == pytest.approx(0.3)
    assert word_rate(texts, ["damn", "damned", "goddamn"]).found == 4
    assert word_rate(["I don’t and I don't, no cats' don"], ["don't"]) == (2, 8)
    assert word_rate(["New York, new york and New Yorkers"], ["new york"]).found == 2
    assert word_rate([""], ["a"]).rate == 0.0
    assert word_rate(["a.b axb"], ["a.b"]).found == 1


@pytest.mark.parametrize("words", [[], ["fine", " "]])
def test_an_empty_word_is_refused(words):
    with pytest.raises(InputError, match="list of words"):
        word_rate(["text"], words)


def by_hand(lm, ids: list[int], prompt: int, end: int) -> list[float]:
    """Nats of tokens prompt..end - 1, one forward pass per token, in float64."""
    losses = []
    for i in range(prompt, end):
        log_probs = lm.logits(torch.tensor([ids[:i]]))[0, -1].double().log_softmax(-1)
        losses.append(-log_probs[ids[i]].item())
    return losses


def test_loss_is_the_mean_of_new_tokens_alone_up_to_the_end_of_text(lm):
    prompts, new = [[0, 4, 5], [0, 9, 8]], [[7, 3, 11, 12], [20, 21, 22, 23]]
    lm.model.generation_config.eos_token_id = 3
    try:
        loss = continuation_loss(lm, torch.tensor(prompts), torch.tensor(new))
    finally:
        lm.model.generation_config.eos_token_id = None
    losses = by_hand(lm, prompts[0] + new[0], 3, 5) + by_hand(lm, prompts[1] + new[1], 3, 7)
    assert loss == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_loss_of_a_left_padded_prompt(lm):
    prompt, new = [0, 4, 5], [7, 6]
    padded, mask = torch.tensor([[1, 1, *prompt]]), torch.tensor([[0, 0, 1, 1, 1]])
    expected = sum(by_hand(lm, prompt + new, 3, 5)) / 2
    assert continuation_loss(lm, padded, torch.tensor([new]), mask) == pytest.approx(expected, rel=1e-4)


def test_loss_rises_for_text_that_the_model_would_not_say(lm):
    prompt_sp = torch.tensor([[0, 4, 5]] * 8)
    added = SteeringVector.at("resid_post.1", 40 * torch.randn(32, generator=torch.Generator().manual_seed(1)))
    own = lm.generate(prompt_sp, max_new_tokens=8)[:, 3:]
    with steered(lm, [added]):
        strange = lm.generate(prompt_sp, max_new_tokens=8)[:, 3:]
    assert continuation_loss(lm, prompt_sp, strange) > continuation_loss(lm, prompt_sp, own) + 0.5


def test_no_new_tokens(lm):
    with pytest.raises(InputError, match="at least one position"):
        continuation_loss(lm, torch.tensor([[0]]), torch.zeros(1, 0, dtype=torch.long))
