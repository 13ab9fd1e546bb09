"""Principal directions: each metric against a case worked out otherwise, then the whole study on a tiny model."""

import json
import math

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from sae.activations.text.documents import TextConfig
from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.statistics import data_and_resamples
from steering.directions.random import random_direction
from steering.strength.calibration import kl_per_token
from steering.strength.sequences import KLCalibrator, Sequences, read_sequences, site_activations
from steering.studies.measured import consistency
from steering.studies.principal import (
    PrincipalConfig,
    Prompts,
    effective_tokens,
    label_aurocs,
    linearity,
    measure_direction,
    pair_cosines,
    principal_study,
    recovered_labels,
)
from steering.studies.principal_report import beats, chance, holm


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_linear_read_out_is_perfectly_consistent_and_linear():
    torch.manual_seed(3)
    config = hf.OPTConfig(
        vocab_size=60, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32,
        word_embed_proj_dim=16, do_layer_norm_before=False, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    lm = LanguageModel(hf.OPTForCausalLM(config), name="no norm before the unembedding")
    assert lm.final_norm is None
    ids_sp = torch.randint(2, 60, (5, 9), generator=torch.Generator().manual_seed(0))
    prompts = Sequences(ids_sp, np.full(5, -1), [], 3)
    unit = random_direction(16, "resid_post.1", 7)
    found = measure_direction(unit, Prompts(lm, prompts), KLCalibrator(lm, prompts, unit.site), 0.3)
    assert consistency(found.plus.cosine_ss, np.ones((1, 5)))[0] == pytest.approx(1, abs=1e-4)
    assert found.linearity_s == pytest.approx(np.ones(5), abs=1e-4)
    change_v = found.plus.coefficient * (lm.model.get_output_embeddings().weight @ unit.direction_d)
    top = change_v.topk(50)
    assert found.plus.top_tokens[:10] == top.indices[:10].tolist()
    assert found.plus.effective_tokens == pytest.approx(math.exp(torch.distributions.Categorical(logits=top.values).entropy()), rel=1e-3)
    assert found.sensitivity == pytest.approx(np.mean([s.kl / s.rho**2 for s in (found.plus, found.minus)]))


def test_the_coefficient_reaches_the_budget(byte_lm):
    ids_sp = torch.randint(1, 250, (6, 20), generator=torch.Generator().manual_seed(1))
    calibrator, unit = (
        KLCalibrator(byte_lm, Sequences(ids_sp, np.full(6, -1), [], 5), "resid_post.1"),
        random_direction(32, "resid_post.1", 2),
    )
    for sign in (1, -1):
        found = calibrator.coefficient(unit, 0.3, sign)
        assert found.reached
        kl = kl_per_token(byte_lm, ids_sp, torch.ones_like(ids_sp), [(unit, sign * found.coefficient)])
        assert kl == pytest.approx(0.3, rel=0.04)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(lambda w: sum(x > 0 for x in w) > 1), st.integers(0, 99))
def test_consistency_is_the_mean_cosine_of_pairs_of_different_prompts(weights, seed):
    change_spv = normal(4, 3, 7, seed=seed)
    total, pairs = 0.0, 0
    for s, t in np.ndindex(4, 4):
        if s != t:
            cosine = torch.nn.functional.cosine_similarity(change_spv[s][:, None], change_spv[t][None], dim=-1)
            total += weights[s] * weights[t] * float(cosine.sum())
            pairs += weights[s] * weights[t] * 9
    assert consistency(pair_cosines(change_spv), np.array([weights], dtype=float))[0] == pytest.approx(total / pairs, abs=1e-5)


def test_consistency_of_independent_changes_is_zero_however_few_prompts():
    found = [consistency(pair_cosines(normal(6, 4, 300, seed=i)), np.ones((1, 6)))[0] for i in range(40)]
    assert abs(np.mean(found)) < 3e-3


def test_effective_tokens_of_known_distributions():
    assert effective_tokens(torch.zeros(200)) == pytest.approx(50)
    assert effective_tokens(torch.tensor([30.0] + [0.0] * 80)) == pytest.approx(1, abs=1e-6)
    assert effective_tokens(torch.tensor([0.5, 0.25, 0.125, 0.125]).log()) == pytest.approx(math.exp(1.75 * math.log(2)))


def test_linearity_of_odd_even_and_mixed_changes():
    odd_spv, even_spv = normal(3, 4, 9, seed=1), normal(3, 4, 9, seed=2)
    assert linearity(odd_spv, -2 * odd_spv) == pytest.approx(np.ones(3))
    assert linearity(even_spv, even_spv) == pytest.approx(-np.ones(3))
    orthogonal = torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[-1.0, 1.0]]])  # an odd and an equally large even part
    assert linearity(*orthogonal) == pytest.approx([0])


def test_aurocs_against_sklearn_with_ties():
    rng = np.random.default_rng(0)
    label_n, score_nk = rng.integers(0, 3, 80), rng.integers(0, 6, (80, 4)).astype(float)
    found_kl = label_aurocs(score_nk, label_n, 4)
    for k, j in np.ndindex(4, 3):
        assert found_kl[k, j] == pytest.approx(roc_auc_score(label_n == j, score_nk[:, k]))
    assert np.isnan(found_kl[:, 3]).all()  # a label that no document has


def test_label_and_sign_are_chosen_on_the_fit_documents_alone():
    label_n = np.repeat([0, 1, 2], 40)
    fit_nk = np.random.default_rng(1).normal(size=(120, 2))
    held_nk = np.random.default_rng(2).normal(size=(120, 2))
    fit_nk[label_n == 1, 0] -= 5  # the first direction shows label 1, from below, in both sets
    held_nk[label_n == 1, 0] -= 5
    fit_nk[label_n == 2, 1] += 5  # the second shows label 2 when fitted, and turned round when held out
    held_nk[label_n == 2, 1] -= 5
    (first, first_auroc), (second, second_auroc) = recovered_labels(fit_nk, label_n, held_nk, label_n, 3)
    assert (first, second) == (1, 2)
    assert first_auroc > 0.99
    assert second_auroc < 0.01


def test_holm_on_a_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005], 0.05) == [True, False, False, True]
    assert holm([0.02, 0.9], 0.025) == [False, False]


def test_what_beats_a_random_group_and_what_would_by_chance():
    rng = np.random.default_rng(0)
    others_k = rng.normal(0.5, 0.1, 40)  # hardly any noise over prompts: each differs surely from the mean of the others
    others_kr = others_k[:, None] + rng.normal(0, 1e-4, (40, 1001))
    weight_rk = data_and_resamples(40, rng, rounds=1000)
    own_kr = np.stack([np.full(1001, 0.9), np.full(1001, 0.5 - 0.3), np.full(1001, others_k.mean())])
    above, below, same = beats(own_kr, others_kr, weight_rk)
    assert above.passes
    assert above.percentile == 1
    assert above.p < 0.01
    assert not below.passes
    assert not same.passes
    assert below.p == 1
    standard_error = others_k.std() / math.sqrt(40)
    surely = np.mean(others_k > others_k.mean() + 1.96 * standard_error)
    assert chance(others_kr, weight_rk) == pytest.approx(surely, abs=0.08)
    assert surely > 0.3  # so the rule alone says little


@pytest.fixture
def parts(byte_lm, tmp_path):
    """The byte model and a dictionary of it as folders, and labelled text: shouting and counting."""
    byte_lm.model.save_pretrained(tmp_path / "lm")
    byte_lm.tokenizer.save_pretrained(tmp_path / "lm")
    rng = np.random.default_rng(0)
    texts = [("loud", "".join(rng.choice(list("ABCDEF!"), 30))) for _ in range(60)]
    texts += [("count", "".join(rng.choice(list("0123456789 "), 30))) for _ in range(60)] + [("count", "12")]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t, "domain": label}) + "\n" for label, t in texts))
    dictionary = Dictionary.initial(32, 48, seed=1)
    dictionary.metadata = {"site": "resid_post.1"}
    dictionary.save(tmp_path / "sae")
    return tmp_path


def config(parts, **changes):
    small = {
        "components": 3,
        "random": 4,
        "fit_documents": 60,
        "held_documents": 40,
        "calibration_documents": 4,
        "prompts": 5,
        "length": 12,
    }
    known = {"model": str(parts / "lm"), "site": "resid_post.1", "text": (str(parts / "text.jsonl"),), "device": "cpu"}
    return PrincipalConfig(**{**known, "label_field": "domain", "out": parts / "out", **small, **changes})


def test_the_study_of_a_tiny_model(parts, capsys):
    result = principal_study(config(parts, dictionary=parts / "sae"))
    assert json.loads((parts / "out" / "principal.json").read_text()) == json.loads(json.dumps(result))
    counts = {g["group"]: g["directions"] for g in result["groups"]}
    assert counts["component"] == 3
    assert counts["random in span"] == 4
    assert counts["random"] == counts["feature"] == 2
    assert counts["difference of means"] == 2
    assert 1 <= counts["feature of a label"] <= 2
    assert all(g["sides_off_budget"] == 0 for g in result["groups"])
    for group in result["groups"]:
        own = [row for row in result["directions"] if row["group"] == group["group"]]
        for metric in ("consistency", "linearity"):
            assert group[metric]["value"] == pytest.approx(np.mean([row[metric]["value"] for row in own]))
        assert group["label_auroc"]["value"] == pytest.approx(np.mean([row["label"]["auroc"] for row in own]))
    assert next(g for g in result["groups"] if g["group"] == "difference of means")["label_auroc"]["value"] > 0.99
    printed = capsys.readouterr().out
    assert "would pass by chance" in printed.replace("\n", " ")
    again = principal_study(config(parts, dictionary=parts / "sae"))
    assert again == result


def test_groups_that_cannot_be_are_said_to_be_left_out(parts):
    result = principal_study(config(parts, label_field=None))
    assert len(result["left_out"]) == 2
    assert {g["group"] for g in result["groups"]} == {"component", "random in span", "random in span, by variance", "random"}
    assert all(row["label"] is None for row in result["directions"])


def test_bad_input_is_met_with_a_sentence(parts):
    for changes, message in (
        ({"fit_documents": 500}, "expected 549 documents of at least 12 tokens, found 120 among 121"),
        ({"length": 4}, "expected a length of 5 to 511 tokens, got 4"),
        ({"site": "resid_post.0", "dictionary": parts / "sae"}, "made for resid_post.1"),
        ({"prompts": 1}, "2 prompts"),
    ):
        with pytest.raises(InputError, match=message):
            principal_study(config(parts, **changes))
    assert not (parts / "out").exists()


def test_sequences_are_beginnings_of_different_documents(byte_lm, parts):
    text = TextConfig(text=(str(parts / "text.jsonl"),), label_field="domain")
    found = read_sequences(byte_lm, text, 100, 12, 3)
    assert found.ids_sp.shape == (100, 13)
    assert found.first == 5
    assert (found.ids_sp[:, 0] == byte_lm.bos_id).all()
    written = [json.loads(line) for line in (parts / "text.jsonl").read_text().splitlines()]
    label_of = {row["text"][:12]: row["domain"] for row in written if len(row["text"]) >= 12}
    read = byte_lm.tokenizer.batch_decode(found.ids_sp[:, 1:])
    assert len(set(read)) == 100
    assert [label_of[t] for t in read] == [found.labels[j] for j in found.label_s]
    part = found.part(10, 5)
    whole_spd = byte_lm.record(found.ids_sp, ["resid_post.1"])["resid_post.1"][10:15, 5:]
    torch.testing.assert_close(site_activations(byte_lm, part, "resid_post.1"), whole_spd, atol=1e-4, rtol=1e-4)
