"""Runs that continue from a dictionary: the same function at the start, what training made of it, and what is refused."""

import json
import shutil

import pytest
import torch
from test_training import cache, config_for  # noqa: F401  (a fixture)

from sae.activations.cache import ActivationCache
from sae.activations.cached import CachedSource
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.gates import Threshold, TopK
from sae.errors import InputError
from sae.training import train
from sae.training.ends import Ends
from sae.training.start import starting_point

SITE = "resid_post.0"


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):  # noqa: F811
    return train(config_for(cache, tmp_path_factory.mktemp("first") / "d", resample_every=0))[0]


def source_of(cache) -> CachedSource:  # noqa: F811
    return CachedSource(ActivationCache.open(cache))


@pytest.mark.parametrize("bias", ["at both ends", "none at the input", "another at the input"])
def test_a_run_starts_at_the_same_function(cache, trained, tmp_path, bias):  # noqa: F811
    d = Dictionary.load(trained)
    inputs = {"at both ends": d.b_dec_o, "none at the input": None, "another at the input": torch.randn_like(d.b_dec_o)}
    b_in_d = inputs[bias]
    whole = Dictionary(d.W_enc_fd, d.b_enc_f, d.W_dec_fo * 3, d.b_dec_o, b_in_d=b_in_d, metadata=d.metadata)
    whole.save(tmp_path / "d")
    x_bd = torch.randn(50, d.d_in, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    z_bf = (x_bd - (0 if b_in_d is None else b_in_d.double())) @ d.W_enc_fd.double().T + d.b_enc_f.double()
    expected_bd = z_bf.relu() @ (3 * d.W_dec_fo.double()) + d.b_dec_o.double()
    scale = 0.37
    config = config_for(cache, tmp_path / "out", init=tmp_path / "d")
    start, _ = starting_point(source_of(cache), Ends.of(source_of(cache), config), {SITE: scale}, config)
    torch.testing.assert_close(start(x_bd.float() * scale).double() / scale, expected_bd, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(start.norms(), torch.ones(d.d_sae))


def test_what_training_made_of_it_is_written(cache, trained, tmp_path, capsys):  # noqa: F811
    (folder,) = train(config_for(cache, tmp_path / "d", init=trained, lr=1e-3, l1_warmup=0.0, resample_every=0))
    record = json.loads((folder / "training.json").read_text())
    change, before, after = record["since_init"], Dictionary.load(trained), Dictionary.load(folder)
    x_bd = source_of(cache).first_rows(SITE).double()
    for one, name in ((before, "before"), (after, "after")):
        acts_bf = ((x_bd - one.b_dec_o.double()) @ one.W_enc_fd.double().T + one.b_enc_f.double()).relu()
        error_bd = acts_bf @ one.W_dec_fo.double() + one.b_dec_o.double() - x_bd
        assert change[name]["fvu"] == pytest.approx(float(error_bd.square().sum() / (x_bd - x_bd.mean(0)).square().sum()), rel=1e-3)
        assert change[name]["l0"] == pytest.approx(float((acts_bf > 0).sum() / len(x_bd)), rel=1e-2)
    cosine_f = torch.nn.functional.cosine_similarity(before.W_dec_fo, after.W_dec_fo)
    assert change["decoder_cosines"] == pytest.approx(cosine_f.tolist(), abs=1e-3)
    assert 0.5 < float(cosine_f.median()) < 0.9999
    assert f"FVU {change['after']['fvu']:.3g} (was {change['before']['fvu']:.3g})" in capsys.readouterr().out
    assert record["settings"]["init"] == str(trained)


def test_no_steps_to_speak_of_change_nothing(cache, trained, tmp_path):  # noqa: F811
    (folder,) = train(config_for(cache, tmp_path / "d", init=trained, lr=1e-12, l1_warmup=0.0, resample_every=0, steps=2))
    change = json.loads((folder / "training.json").read_text())["since_init"]
    assert change["after"] == pytest.approx(change["before"], rel=1e-3)
    assert min(change["decoder_cosines"]) > 0.999


def test_a_stopped_run_knows_the_dictionary_that_it_began_with(cache, trained, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(trained, tmp_path / "init")
    config = config_for(cache, tmp_path / "d", init=tmp_path / "init", steps=30)
    (whole,) = train(config_for(cache, tmp_path / "whole", init=tmp_path / "init", steps=30))
    import sae.training.trainer as trainer

    saved = trainer.Checkpoint.save

    def save_and_stop(self, *args):
        saved(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Checkpoint, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    other = Dictionary.load(trained)
    other.b_enc_f += 1
    other.save(tmp_path / "init")
    with pytest.raises(InputError, match="init_crc32"):
        train(config)
    shutil.rmtree(tmp_path / "init")
    shutil.copytree(trained, tmp_path / "init")
    (folder,) = train(config)
    assert (folder / "sae_weights.safetensors").read_bytes() == (whole / "sae_weights.safetensors").read_bytes()


def test_dictionaries_that_cannot_be_gone_on_from_are_refused(cache, trained, tmp_path):  # noqa: F811
    d = Dictionary.load(trained)
    size = d.d_sae

    def saved(name, **changes):
        parts = dict(gate=d.gate, b_in_d=d.b_in_d, metadata=d.metadata) | changes
        weights = [parts.pop(key, getattr(d, key)) for key in ("W_enc_fd", "b_enc_f", "W_dec_fo", "b_dec_o")]
        Dictionary(*weights, **parts).save(tmp_path / name)
        return tmp_path / name

    narrow = {"W_enc_fd": d.W_enc_fd[:, :8], "W_dec_fo": d.W_dec_fo[:, :8], "b_dec_o": d.b_dec_o[:8], "b_in_d": d.b_dec_o[:8]}
    cases = [
        (saved("topk", gate=TopK(3)), {}, "a gate that relu can continue with"),
        (saved("jumprelu", gate=Threshold(torch.full((size,), 0.1))), {}, "a gate that relu can continue with"),
        (saved("site", metadata=d.metadata | {"site": "resid_post.1"}), {}, "resid_post.1"),
        (saved("model", metadata=d.metadata | {"model_fingerprint": "0" * 12}), {}, "fingerprint"),
        (saved("narrow", **narrow), {}, "width"),
        (trained, {"d_sae": 41}, "--d-sae 40"),
        (trained, {"decoder_norm": 0.2}, "--decoder-norm"),
        (trained, {"b_dec": "mean"}, "--b-dec"),
    ]
    for init, changes, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            train(config_for(cache, tmp_path / "out", init=init, **changes))
        assert not (tmp_path / "out" / "training.json").exists()
