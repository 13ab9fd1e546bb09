"""Steering with a feature's number alone: where the maximum activation comes from, and absolute activations."""

import json

import pytest
import torch
from test_steer import SILENT, config_of, parts  # noqa: F401

from sae.activations.cache import ActivationCache
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.gates import AbsTopK
from sae.dictionaries.neuronpedia import Posted
from sae.errors import InputError
from sae.features.exports.command import ExportConfig, export_features
from sae.features.index.build import IndexConfig, build_index
from sae.features.index.reader import FeatureIndex
from sae.model.language_model import LanguageModel
from steering.parts import load_steering_parts
from steering.steer import compare_texts, steer
from steering.studies.strengths import strengths
from steering.vector import SteeringVector


def without(parts, **settings):  # noqa: F811
    config = config_of(parts, **({"feature": "3"} | settings))
    config.index = None
    config.dictionary, config.model = str(parts / "sae"), str(parts / "model")
    return config


def test_an_absolute_activation_needs_no_maximum(parts, capsys):  # noqa: F811
    highest = float(FeatureIndex.open(parts / "index").feature(3).columns["max"])
    known = steer(config_of(parts, feature="3", strength=2.0))
    report = steer(without(parts, activation=2 * highest))
    assert (report["max_activation"], report["strength"]) == (None, None)
    for side in ("unsteered", "steered"):
        assert report[side] == known[side]
    assert report["activation"] == known["activation"]
    printed = " ".join(capsys.readouterr().out.split()).rpartition("feature 3 at")[2]
    assert f"an activation of {2 * highest:.3g}" in printed
    assert "maximum" not in printed
    assert steer(config_of(parts, feature="3", activation=2 * highest))["steered"] == known["steered"]


def test_the_maximum_is_found_on_a_text(parts, tmp_path, capsys):  # noqa: F811
    """Against Hugging Face's own hidden states of the first 20 lines."""
    lines = [json.loads(line)["text"] for line in (parts / "text.jsonl").read_text().splitlines()][:20]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    lm, dictionary = LanguageModel.load(str(parts / "model"), device="cpu"), Dictionary.load(parts / "sae")
    ids = [lm.tokenizer(line)["input_ids"] for line in lines]
    found = load_steering_parts(without(parts, text=(str(tmp_path / "some.jsonl"),)))
    said = capsys.readouterr().err
    highest, fires = 0.0, 0
    for line in ids:
        part = torch.tensor([[lm.bos_id, *(i for i in line if i != lm.bos_id)]])
        x_pd = lm.model(part, output_hidden_states=True).hidden_states[1][0, 1:]
        z_p = (x_pd.double() @ dictionary.W_enc_fd[3].double() + dictionary.b_enc_f[3]).relu()
        highest, fires = max(highest, float(z_p.max())), fires + int((z_p > 0).sum())
    assert found.max_activation == pytest.approx(highest, rel=1e-5)
    assert f"is {highest:.4g}: it fires" in said
    assert f"fires on {fires} of" in said
    assert torch.allclose(found.vector.direction_d, found.max_activation * dictionary.W_dec_fo[3])


def test_the_maximum_of_an_export_of_neuronpedia(parts, tmp_path):  # noqa: F811
    export_features(ExportConfig(index=parts / "index", out=tmp_path / "export", format="neuronpedia"))
    known = steer(config_of(parts, feature="3", strength=-1.5))
    report = steer(without(parts, strength=-1.5, neuronpedia=tmp_path / "export"))
    assert report == known
    with pytest.raises(InputError, match=r"expected feature 9 in .* none of its 1 files"):
        steer(without(parts, feature="9", neuronpedia=tmp_path / "export"))
    with pytest.raises(InputError, match=r"expected maxActApprox above 0 of feature \d+"):
        steer(without(parts, feature=str(SILENT), neuronpedia=tmp_path / "export"))


def test_a_feature_that_is_strongest_below_zero(parts, tmp_path, capsys):  # noqa: F811
    """Strength 1 adds its strongest activation, with its sign: from an index, and found on a text."""
    plain = Dictionary.load(parts / "sae")
    dictionary = Dictionary(plain.W_enc_fd, plain.b_enc_f, plain.W_dec_fo, plain.b_dec_o, metadata=plain.metadata, gate=AbsTopK(3))
    dictionary.save(tmp_path / "sae")
    build_index(IndexConfig(cache=parts / "cache", dictionary=tmp_path / "sae", out=tmp_path / "index", device="cpu"))
    cache = ActivationCache.open(parts / "cache", "resid_post.0")
    x_nd = torch.cat([cache.read(shard)[0] for split in ("train", "held_out") for shard in cache.shards(split)]).float()
    acts_nf = dictionary.encode(x_nd).detach()
    strongest_f = acts_nf.gather(0, acts_nf.abs().argmax(0, keepdim=True))[0]
    assert strongest_f[:SILENT].min() < 0 < strongest_f[:SILENT].max()
    for feature in (int(strongest_f[:SILENT].argmin()), int(strongest_f[:SILENT].argmax())):
        strongest = strongest_f[feature].item()
        config = config_of(parts, feature=str(feature))
        config.index = tmp_path / "index"
        report = steer(config)
        assert report["max_activation"] == report["activation"] == pytest.approx(strongest, rel=1e-3)
        printed = " ".join(capsys.readouterr().out.split())
        assert f"1 x its maximum activation ({strongest:.3g}): an activation of {strongest:.3g}," in printed
        lm = LanguageModel.load(str(parts / "model"), device="cpu")
        by_hand = SteeringVector.at("resid_post.0", report["max_activation"] * dictionary.W_dec_fo[feature])
        assert compare_texts(lm, by_hand, 1.0, config)["steered"] == report["steered"]
        unindexed = without(parts, feature=str(feature), text=(str(parts / "text.jsonl"),))
        unindexed.dictionary = str(tmp_path / "sae")
        assert load_steering_parts(unindexed).max_activation * strongest > 0
    export_features(ExportConfig(index=tmp_path / "index", out=tmp_path / "export", format="neuronpedia"))
    unindexed.text, unindexed.neuronpedia = (), tmp_path / "export"
    with pytest.raises(InputError, match="without negative activations for --neuronpedia"):
        steer(unindexed)


def test_strengths_are_measured_without_an_index(parts):  # noqa: F811
    from steering.studies.strengths import StrengthsConfig

    config = StrengthsConfig(
        dictionary=str(parts / "sae"), model=str(parts / "model"), feature="3", text=(str(parts / "text.jsonl"),), strengths=(1.0,),
        prompts=("the cat",), samples=2, device="cpu",
    )  # fmt: skip
    assert [row.direction for row in strengths(config)] == ["none", "feature", "random"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(feature="gpt2-small/6-res-jb"), "a feature's number at the end"),
        (dict(feature="three"), "expected a URL of Neuronpedia"),
        (dict(feature="8"), "features 0 to 7"),
        (dict(feature=None, search="damn"), "--search looks in an index"),
        (dict(feature=str(SILENT), text=("text.jsonl",)), "does not on any of its"),
        (dict(text=("a",), neuronpedia="b"), "--neuronpedia and --text"),
        (dict(strength=1.0, activation=2.0), "--strength or --activation"),
        (dict(activation=float("inf")), "finite strength"),
        (dict(site="resid_post.1"), "made for resid_post.0"),
    ],
)
def test_unusable_settings_without_an_index(parts, monkeypatch, settings, sentence):  # noqa: F811
    monkeypatch.chdir(parts)
    with pytest.raises(InputError, match=sentence):
        steer(without(parts, **settings))


def test_flags_of_an_index_and_of_none_do_not_mix(parts):  # noqa: F811
    with pytest.raises(InputError, match="--text is for steering without an index"):
        steer(config_of(parts, feature="3", text=("a",)))
    with pytest.raises(InputError, match="leave out --index to use that dictionary"):
        steer(config_of(parts, feature="gpt2-small/6-res-jb/3"))
    config = without(parts)
    config.dictionary = None
    with pytest.raises(InputError, match="expected --index, or --dictionary and --model"):
        steer(config)


def test_a_posted_feature_is_steered_though_its_dictionary_names_the_model_otherwise(parts, tmp_path, monkeypatch, capsys):  # noqa: F811
    """As SAELens' "gpt2-small" is openai-community/gpt2 on the hub."""
    dictionary = Dictionary.load(parts / "sae")
    facts = {key: value for key, value in dictionary.metadata.items() if not key.startswith("model_")} | {"model_name": "gpt2-small"}
    Dictionary.of(dictionary.parts()._replace(metadata=facts)).save(tmp_path / "sae")
    monkeypatch.setattr("steering.parts.posted", lambda name: Posted(str(parts / "model"), str(tmp_path / "sae"), 3))
    config = without(parts, feature="https://www.neuronpedia.org/gpt2-small/6-res-jb/3", activation=5.0)
    config.dictionary = config.model = None
    assert steer(config)["steered"] == steer(without(parts, activation=5.0))["steered"]
    assert "it names gpt2-small" in capsys.readouterr().err
