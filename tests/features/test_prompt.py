"""What a typed text makes fire, by hand: in the small world the stream at the start is the token itself, so every activation is known."""

import numpy as np
import pytest
import torch

from sae.errors import InputError
from sae.features.browser.prompt import Selection, read_prompt
from sae.model.language_model import LanguageModel

TEXT = "The low zebra 🦓 sat."


@pytest.fixture(scope="module")
def lm(world):
    return LanguageModel.load(str(world.model), device="cpu")


def ids_of(lm) -> np.ndarray:
    return np.array([lm.bos_id, *lm.tokenizer(TEXT, add_special_tokens=False)["input_ids"]])


def activations(world, lm) -> np.ndarray:
    """[p, f], from the token ids alone."""
    return np.maximum(world.dictionary.W_enc_fd.numpy().T[ids_of(lm)] + world.dictionary.b_enc_f.numpy(), 0)


def test_every_active_feature_comes_with_its_activation_strongest_first(world, lm):
    reading = read_prompt(lm, world.dictionary, world.index, TEXT, Selection(n=40))
    acts = activations(world, lm)
    assert "".join(reading.texts[1:]) == TEXT
    assert reading.firings[0] == []  # beginning-of-text, which the index never looked at
    for p in range(1, len(acts)):
        expected = sorted((-acts[p, j], j) for j in np.flatnonzero(acts[p]))
        assert [(-f.activation, f.feature) for f in reading.firings[p]] == expected
        assert all(f.position == p for f in reading.firings[p])
    assert reading.active == np.count_nonzero(acts[1:])
    assert reading.measured == 0
    assert all(f.effect is None for found in reading.firings for f in found)


def test_percentiles_are_shares_of_the_features_own_activations(world, lm, dense):
    reading = read_prompt(lm, world.dictionary, world.index, TEXT, Selection(n=40, order="percentile"))
    scanned = np.asarray(world.index.tokens["scanned"])
    for found in reading.firings[1:]:
        shares = [f.percentile for f in found]
        assert shares == sorted(shares, reverse=True)
        for f in found:
            own = dense[scanned, f.feature].astype(np.float16)
            own = own[own > 0]
            assert f.percentile == pytest.approx(np.mean(own <= np.float16(f.activation)))


def test_the_effect_is_the_rise_of_all_later_losses_without_the_feature(world, lm):
    """Against a float64 copy of the model that is given the changed embedding directly, one pair at a time."""
    reading = read_prompt(lm, world.dictionary, world.index, TEXT, Selection(n=40, order="effect", most_pairs=10_000))
    ids, acts = ids_of(lm), activations(world, lm)
    exact = LanguageModel.load(str(world.model), device="cpu", dtype="float64").model
    plain = torch.eye(lm.d_model, dtype=torch.float64)[ids]

    def losses(embedded: torch.Tensor) -> torch.Tensor:
        log_p = exact(inputs_embeds=embedded[None]).logits[0, :-1].log_softmax(-1)
        return -log_p[torch.arange(len(ids) - 1), torch.from_numpy(ids[1:])]

    W_dec_fd = world.dictionary.W_dec_fo.double()
    before = losses(plain)
    assert reading.losses[0] is None
    assert reading.losses[1:] == pytest.approx(before.tolist(), abs=1e-4)
    measured = 0
    for found in reading.firings[1:-1]:
        effects = [f.effect for f in found]
        assert effects == sorted(effects, reverse=True)
        for f in found[::5]:
            changed = plain.clone()
            changed[f.position] -= acts[f.position, f.feature] * W_dec_fd[f.feature]
            expected = (losses(changed) - before)[f.position :].sum().item()
            assert f.effect == pytest.approx(expected, abs=2e-4)
            measured += 1
    assert measured > 20
    assert all(f.effect is None for f in reading.firings[-1])  # nothing comes after the last token
    assert reading.measured == np.count_nonzero(acts[1:-1])


def test_of_too_many_pairs_those_with_the_longest_vectors_are_measured(world, lm):
    reading = read_prompt(lm, world.dictionary, world.index, TEXT, Selection(n=40, order="effect", most_pairs=9))
    acts = activations(world, lm)[:-1]
    acts[0] = 0
    lengths = acts * world.dictionary.W_dec_fo.norm(dim=-1).numpy()
    measured = [lengths[f.position, f.feature] for found in reading.firings for f in found if f.effect is not None]
    assert sorted(measured) == pytest.approx(np.sort(lengths.ravel())[-9:].tolist())
    assert reading.measured == 9
    assert reading.active > 9
    for found in reading.firings:  # those that were not measured stand last
        assert [f.effect is None for f in found] == sorted(f.effect is None for f in found)


def test_chosen_tokens_and_dense_features(world, lm):
    only = read_prompt(lm, world.dictionary, world.index, TEXT, Selection(n=40, positions=[2, 0, 99]))
    assert [p for p, found in enumerate(only.firings) if found] == [2]
    assert only.firings[2] == read_prompt(lm, world.dictionary, world.index, TEXT, Selection(n=40)).firings[2]
    sparse = read_prompt(lm, world.dictionary, world.index, TEXT, Selection(n=40, density_max=0.3))
    assert all(world.index.columns["density"][f.feature] <= 0.3 for found in sparse.firings for f in found)
    assert sparse.active < read_prompt(lm, world.dictionary, world.index, TEXT).active


def test_unusable_text_is_refused(world, lm):
    with pytest.raises(InputError, match="at most 32 tokens"):
        read_prompt(lm, world.dictionary, world.index, "low " * 40)
    with pytest.raises(InputError, match="order"):
        read_prompt(lm, world.dictionary, world.index, TEXT, Selection(order="beauty"))  # type: ignore[arg-type]
