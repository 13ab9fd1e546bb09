"""Inference-time intervention: a planted head is found, and its direction and scale are those computed by hand."""

import warnings

import numpy as np
import pytest
import torch

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.directions.iti import _by_site, _held_out, _probes, fit_iti, head_outputs
from steering.intervention import steered

# The last byte tells the label: the heads of the first block see it through the embedding at once.
TEXTS = [f"text number {i} is {'A' if i % 2 else 'B'}" for i in range(80)]
LABELS = [i % 2 for i in range(80)]
GROUPS = [i // 4 for i in range(80)]


def planted(n: int = 200, layers: int = 2, heads: int = 3, width: int = 4, at=(1, 2), seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Noise everywhere, and at one head a separable difference along its second axis."""
    z_nlhe = torch.randn(n, layers, heads, width, generator=torch.Generator().manual_seed(seed))
    label_n = np.arange(n) % 2
    z_nlhe[:, at[0], at[1], 1] = torch.where(torch.from_numpy(label_n == 1), 1.0, -1.0) * (2 + z_nlhe[:, at[0], at[1], 1].abs())
    return z_nlhe, label_n


def test_heads_outputs_are_the_last_tokens_inputs_of_the_projection(byte_lm):
    texts = ["a b", "something longer"]
    z_nlhe = head_outputs(byte_lm, texts)
    assert z_nlhe.shape == (2, 3, 4, 8)
    seen = []
    with torch.no_grad():
        handle = byte_lm.model.transformer.h[1].attn.c_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for text in texts:
            byte_lm.model(torch.tensor([[0, *byte_lm.tokenizer(text)["input_ids"]]]))
        handle.remove()
    for n in range(2):
        torch.testing.assert_close(z_nlhe[n, 1].flatten(), seen[n][0, -1], rtol=1e-4, atol=1e-5)


def test_probes_find_the_planted_head_and_agree_with_gradient_descent():
    z_nlhe, label_n = planted()
    held_n = _held_out(label_n, np.arange(200), 0.2, 0)
    accuracy_lh, weight_lhe = _probes(z_nlhe, label_n, held_n)
    assert np.unravel_index(accuracy_lh.argmax(), accuracy_lh.shape) == (1, 2)
    assert accuracy_lh[1, 2] == 1
    assert np.delete(accuracy_lh.reshape(-1), 5).max() < 0.8
    # the same loss by hand: sum of log(1 + exp(-y (w z + b))) + |w|²/2, by Newton's steps
    z_ne = torch.cat([z_nlhe[~held_n, 0, 1].double(), torch.ones(int((~held_n).sum()), 1, dtype=torch.double)], dim=1)
    y_n = torch.from_numpy(label_n[~held_n]).double()
    penalty = torch.diag(torch.tensor([1.0, 1, 1, 1, 0], dtype=torch.double))
    w_e = torch.zeros(5, dtype=torch.double)
    for _ in range(30):
        p_n = (z_ne @ w_e).sigmoid()
        w_e -= torch.linalg.solve(z_ne.T @ (z_ne * (p_n * (1 - p_n))[:, None]) + penalty, z_ne.T @ (p_n - y_n) + penalty @ w_e)
    torch.testing.assert_close(weight_lhe[0, 1].double(), w_e[:4], rtol=0, atol=1e-3)
    right = ((torch.cat([z_nlhe[held_n, 0, 1].double(), torch.ones(40, 1)], 1) @ w_e) > 0) == torch.from_numpy(label_n[held_n] == 1)
    assert accuracy_lh[0, 1] == right.double().mean().item()


def test_groups_stay_on_one_side():
    group_n, label_n = np.array(GROUPS), np.array(LABELS)
    held_n = _held_out(label_n, group_n, 0.25, 3)
    assert {len(set(held_n[group_n == g])) for g in set(GROUPS)} == {1}
    assert held_n.sum() == 20
    assert not np.array_equal(held_n, _held_out(label_n, group_n, 0.25, 4))


def test_rows_stand_in_their_heads_places():
    directions = _by_site([(2, 1), (0, 3), (2, 0)], torch.tensor([[1.0, 2], [3, 4], [5, 6]]), 4)
    assert {site: d.tolist() for site, d in directions.items()} == {
        "head_out.0": [0, 0, 0, 0, 0, 0, 3, 4],
        "head_out.2": [5, 6, 1, 2, 0, 0, 0, 0],
    }


@pytest.mark.parametrize("direction", ["mass_mean", "probe"])
def test_vector_is_sigma_times_the_unit_direction_at_each_chosen_head(byte_lm, direction):
    tuning = TEXTS[:30]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = fit_iti(byte_lm, TEXTS, LABELS, groups=GROUPS, heads=5, direction=direction, tuning_texts=tuning, seed=2)
    z, label_n = head_outputs(byte_lm, TEXTS).double(), np.array(LABELS)
    accuracy_lh, weight_lhe = _probes(z.float(), label_n, _held_out(label_n, np.array(GROUPS), 0.2, 2))
    chosen = [(entry["layer"], entry["head"]) for entry in made.provenance["heads"]]
    ranked = sorted(np.ndindex(3, 4), key=lambda place: (-accuracy_lh[place], place))
    assert chosen == ranked[:5]
    total = 0
    for entry in made.provenance["heads"]:
        layer, head = entry["layer"], entry["head"]
        if direction == "mass_mean":
            means = [sum(z[i, layer, head] for i in range(80) if LABELS[i] == label) / 40 for label in (1, 0)]
            theta_e = means[0] - means[1]
        else:
            theta_e = weight_lhe[layer, head].double()
        unit_e = theta_e / theta_e.norm()
        projection = [float(z[i, layer, head] @ unit_e) for i in range(30)]
        sigma = (sum((x - sum(projection) / 30) ** 2 for x in projection) / 30) ** 0.5
        value_e = made.directions[f"head_out.{layer}"][8 * head : 8 * head + 8]
        torch.testing.assert_close(value_e.double(), sigma * unit_e, rtol=1e-3, atol=1e-6)
        assert entry["sigma"] == pytest.approx(sigma, rel=1e-4)
        assert entry["accuracy"] == accuracy_lh[layer, head]
        total += sigma**2
    assert made.norm == pytest.approx(total**0.5, rel=1e-4)
    assert (made.provenance["method"], made.provenance["positive"], made.provenance["groups"]) == ("iti", 40, 20)


def test_adding_at_a_head_is_adding_its_projection_to_the_attention(byte_lm):
    made = fit_iti(byte_lm, TEXTS, LABELS, heads=1)
    ((site, value_d),) = made.directions.items()
    layer = int(site.split(".")[1])
    ids_sp, _ = byte_lm.encode(["A new prompt"])
    plain_spd = byte_lm.record(ids_sp, [f"attn_out.{layer}"])[f"attn_out.{layer}"]
    with steered(byte_lm, [(made, 15.0)]):
        changed_spd = byte_lm.record(ids_sp, [f"attn_out.{layer}"])[f"attn_out.{layer}"]
    projected_d = 15 * value_d @ byte_lm.model.transformer.h[layer].attn.c_proj.weight
    torch.testing.assert_close(changed_spd - plain_spd, projected_d.expand_as(plain_spd), rtol=1e-3, atol=1e-4)


def test_it_steers_generation_with_and_without_a_cache_alike(byte_lm):
    made = fit_iti(byte_lm, TEXTS, LABELS, heads=4)
    ids_sp, _ = byte_lm.encode(["A new prompt"])
    with steered(byte_lm, [(made, 15.0)], positions="generated", prompt_length=ids_sp.shape[1]):
        cached_sp = byte_lm.generate(ids_sp, max_new_tokens=8, temperature=0)
        grown_sp = ids_sp
        for _ in range(8):
            grown_sp = torch.cat([grown_sp, byte_lm.logits(grown_sp)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached_sp, grown_sp)
    assert not torch.equal(cached_sp, byte_lm.generate(ids_sp, max_new_tokens=8, temperature=0))


def test_few_examples_warn_and_unusable_ones_are_refused(byte_lm):
    with pytest.warns(UserWarning, match="few examples, 6 positive and 6 negative: .* mean difference at these heads .* cosine of"):
        fit_iti(byte_lm, TEXTS[:12], LABELS[:12], heads=2, validation=0.5)
    with pytest.warns(UserWarning, match="unequally many examples, 40 positive and 20 negative"):
        fit_iti(byte_lm, TEXTS[:40] + TEXTS[41::2], LABELS[:40] + LABELS[41::2], heads=2)
    for settings, sentence in [
        (dict(labels=[1] * 80), r"both labels, 1 and 0, got \[1\]"),
        (dict(labels=LABELS[:-1]), "a label and a group for each text, got 79 and 80 for 80"),
        (dict(heads=13), "1 to 12 heads"),
        (dict(heads=0), "1 to 12 heads"),
        (dict(direction="random"), "mass_mean"),
        (dict(validation=1.0), "between 0 and 1"),
        (dict(groups=LABELS), "both labels to fit the probes on"),
    ]:
        with pytest.raises(InputError, match=sentence):
            fit_iti(**dict(lm=byte_lm, texts=TEXTS, labels=LABELS, heads=2) | settings)
    with pytest.raises(InputError, match="tokenizer"):
        fit_iti(LanguageModel(byte_lm.model), TEXTS, LABELS, heads=2)
