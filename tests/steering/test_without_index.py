"""Steering with a feature's number alone: where the maximum activation comes from, and absolute activations."""

import json

import pytest
import torch
from test_steer import SILENT, config_of, parts  # noqa: F401

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.neuronpedia import Posted
from sae.errors import InputError
from sae.features.exports.command import ExportConfig, export_features
from sae.features.index.reader import FeatureIndex
from sae.model.language_model import LanguageModel
from steering.parts import load_steering_parts
from steering.steer import steer
from steering.studies.strengths import strengths


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
    assert f"reaches at most {highest:.4g}" in said
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
