"""Effects of steering on every feature: against rollouts read one by one, noise that must not count, and the command on a tiny model."""

import json

import numpy as np
import pytest
import torch

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.model.sampling import Sampling
from sae.statistics import data_and_resamples
from steering.directions.random import random_direction
from steering.directions.targeted import Effects
from steering.intervention import steered
from steering.studies.effect_map import EffectConfig, effect_map
from steering.studies.effects import Effect, Rollouts, aim_difference, effect, feature_rows
from steering.vector import SteeringVector

SITE = "resid_post.1"
PROMPTS = ("ab", "a longer one")
SAMPLING = Sampling(max_new_tokens=6, seed=4)


@pytest.fixture(scope="module")
def dictionary() -> Dictionary:
    made = Dictionary.initial(32, 48, seed=1).requires_grad_(False)
    made.metadata = {"site": SITE}
    return made


def made(difference_rf: torch.Tensor, rounds: int = 400) -> Effect:
    return Effect(1.0, difference_rf, data_and_resamples(len(difference_rf), np.random.default_rng(0), rounds))


def test_rollouts_are_read_by_the_unsteered_model_up_to_their_end(byte_lm, dictionary):
    vector = 40 * random_direction(32, SITE, 1)
    found_rf = Rollouts(byte_lm, dictionary, PROMPTS, 3, SAMPLING).activations([(vector, 1.0)])
    ids_sp, mask_sp = (x.repeat_interleave(3, dim=0) for x in byte_lm.encode(PROMPTS))
    with steered(byte_lm, [(vector, 1.0)]):
        whole_rp = byte_lm.generate(ids_sp, mask_sp, max_new_tokens=6, seed=4)
    for found_f, whole_p, mask_p in zip(found_rf, whole_rp, mask_sp):
        row_p = torch.cat([whole_p[: len(mask_p)][mask_p.bool()], whole_p[len(mask_p) :]])  # without padding
        new = whole_p[len(mask_p) :].tolist()
        kept = new.index(0) + 1 if 0 in new else 6  # token 0 ends a text
        h_pd = byte_lm.record(row_p[None], [SITE])[SITE][0, int(mask_p.sum()) :][:kept]
        torch.testing.assert_close(found_f, dictionary.encode(h_pd).mean(0), atol=1e-4, rtol=1e-4)


def test_a_direction_acts_on_its_own_rows_alone(byte_lm, dictionary):
    own_r = torch.tensor([0.0, 1, 0, 1, 0, 0])
    vector = 40 * random_direction(32, SITE, 1)
    plain_rf = Rollouts(byte_lm, dictionary, PROMPTS, 3, SAMPLING).activations([])
    found_rf = Rollouts(byte_lm, dictionary, PROMPTS, 3, SAMPLING).activations([(vector, own_r)])
    assert ((found_rf != plain_rf).any(1) == own_r.bool()).all()


def test_no_steering_has_no_effect_and_some_has_the_mean_difference(byte_lm, dictionary):
    vector = random_direction(32, SITE, 1)
    y_f, low_f, high_f = effect(Rollouts(byte_lm, dictionary, PROMPTS, 3, SAMPLING), vector, 0.0).map()
    assert not y_f.any()
    assert not low_f.any()
    assert not high_f.any()
    found = effect(Rollouts(byte_lm, dictionary, PROMPTS, 3, SAMPLING), vector, 60.0)
    steered_rf = Rollouts(byte_lm, dictionary, PROMPTS, 3, SAMPLING).activations([(vector, 60.0)])
    plain_rf = Rollouts(byte_lm, dictionary, PROMPTS, 3, SAMPLING).activations([])
    torch.testing.assert_close(found.map()[0], steered_rf.mean(0) - plain_rf.mean(0), atol=1e-5, rtol=0)


def test_intervals_of_the_map_are_about_two_standard_errors():
    x_rf = 3 * torch.randn(300, 5, generator=torch.Generator().manual_seed(0)) + 2
    y_f, low_f, high_f = made(x_rf, 1000).map()
    torch.testing.assert_close(y_f, x_rf.mean(0))
    torch.testing.assert_close((high_f - low_f) / 2, 1.96 * x_rf.std(0) / 300**0.5, rtol=0.1, atol=0)


def test_noise_does_not_count_as_an_effect_on_others():
    generator = torch.Generator().manual_seed(0)
    squared = []
    for _ in range(200):
        noise_rf = torch.randn(10, 40, generator=generator)
        squared.append(float(((noise_rf.sum(0)[1:] ** 2) - (noise_rf[:, 1:] ** 2).sum(0)).sum() / 90))
        assert made(noise_rf, 2).others(0)[0] == pytest.approx(max(squared[-1], 0) ** 0.5, abs=1e-3)
    assert abs(np.mean(squared)) < 0.25  # while the squared mean would be 39/10
    constant_rf = torch.tensor([[1.0, 3.0, 4.0]]).expand(10, 3)
    assert made(constant_rf).others(0) == pytest.approx(np.full(401, 5.0))
    assert made(constant_rf).on(0) == pytest.approx(np.ones(401))


def test_difference_of_two_directions_is_paired():
    noise_rf = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    one, other = made(noise_rf + torch.tensor([3.0, 0, 0, 0])), made(noise_rf)
    found = aim_difference(one, other, 0)
    for key in ("value", "low", "high"):  # the noise that both share is gone
        assert found.feature[key] == pytest.approx(3, abs=1e-5)
        assert found.others[key] == pytest.approx(0, abs=1e-6)


@pytest.fixture
def parts(byte_lm, dictionary, tmp_path):
    byte_lm.model.save_pretrained(tmp_path / "lm")
    byte_lm.tokenizer.save_pretrained(tmp_path / "lm")
    dictionary.save(tmp_path / "sae")
    rng = np.random.default_rng(0)
    texts = ("".join(rng.choice(list("abcdefgh "), 20)) for _ in range(1010))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return tmp_path


def config(parts, **changes):
    known = {"model": str(parts / "lm"), "dictionary": parts / "sae", "text": (str(parts / "text.jsonl"),), "device": "cpu"}
    small = {"prompts": PROMPTS, "samples": 4, "new_tokens": 5, "calibration_documents": 4, "length": 8, "top": 3}
    return EffectConfig(**{**known, **small, **changes})


def test_the_command_fits_aims_and_maps(parts, dictionary, capsys):
    file = parts / "effects.safetensors"
    result = effect_map(config(parts, feature=(3, 7), fit=8, effects=file, out=parts / "out.json"))
    assert json.loads((parts / "out.json").read_text()) == json.loads(json.dumps(result))
    assert [m["name"] for m in result["maps"]] == ["feature 3", "feature 7", "targeted 3", "targeted 7"]
    assert all(m["reached"] for m in result["maps"])
    effects = Effects.load(file)
    assert effects.M_df.shape == (32, 48)
    assert len(effects.provenance["features"]) == effects.provenance["directions"] == 8
    aimed = result["aims"][0]
    assert aimed["difference"]["feature"]["value"] == pytest.approx(
        aimed["targeted"]["feature"]["value"] - aimed["row"]["feature"]["value"]
    )
    raised = result["maps"][0]["raised"]
    assert [r["effect"]["value"] for r in raised] == sorted((r["effect"]["value"] for r in raised), reverse=True)
    assert "targeted" in capsys.readouterr().out
    once, again = (effect_map(config(parts, feature=(3, 7), effects=file)) for _ in range(2))
    assert once == again
    assert [m["name"] for m in once["maps"]] == [m["name"] for m in result["maps"]]


def test_a_saved_vector_is_mapped(parts, dictionary):
    row = feature_rows(dictionary, [3])[0]
    SteeringVector.at(SITE, 5 * row.direction_d).save(parts / "v.safetensors")
    of_vector, of_feature = (effect_map(config(parts, **w))["maps"][0] for w in ({"vector": parts / "v.safetensors"}, {"feature": (3,)}))
    assert of_vector["coefficient"] == pytest.approx(of_feature["coefficient"], rel=1e-4)
    assert of_vector["feature"] is None


def test_tokens_of_features_at_the_heads_are_read_through_the_output_projection(parts, byte_lm, dictionary):
    dictionary.metadata["site"] = "head_out.1"
    dictionary.save(parts / "heads")
    entry = effect_map(config(parts, dictionary=parts / "heads", feature=(3,)))["maps"][0]["raised"][0]
    transformer = byte_lm.model.transformer
    row_d = dictionary.W_dec_fo[entry["feature"]] @ transformer.h[1].attn.c_proj.weight
    lens_v = byte_lm.model.lm_head.weight @ ((row_d - row_d.mean()) * transformer.ln_f.weight)
    assert entry["tokens"] == [byte_lm.tokenizer.decode([i]) for i in lens_v.topk(5).indices.tolist()]


def test_bad_input_is_met_with_a_sentence(parts):
    Effects(torch.ones(32, 9), torch.ones(9), SITE, {}).save(parts / "other.safetensors")
    for changes, message in (
        ({}, "got none; say what to steer with"),
        ({"feature": (48,)}, "feature 48 does not exist"),
        ({"feature": (1,), "fit": 8}, "expected --effects"),
        ({"feature": (1,), "effects": parts / "other.safetensors"}, "effects of a dictionary like"),
        ({"fit": 500, "effects": parts / "e.safetensors"}, "expected 500 features that fire"),
    ):
        with pytest.raises(InputError, match=message):
            effect_map(config(parts, **changes))
    assert not (parts / "e.safetensors").exists()
