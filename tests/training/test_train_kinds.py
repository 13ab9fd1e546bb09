"""Training of every kind from a cache: exact resume, what is saved, transcoders and crosscoders, continuing from a dictionary."""

import json
from dataclasses import fields, replace

import pytest
import torch
from test_training import WEIGHTS, cache, contents  # noqa: F401 (a fixture)

from sae.activations.cache import ActivationCache
from sae.activations.harvest.command import HarvestConfig, harvest
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.gates import AbsTopK, Threshold, TopK
from sae.errors import InputError
from sae.evaluation.toy import recovery, toy
from sae.kinds import KINDS, BatchTopK, JumpReLU, Kind, Matryoshka, ReLU
from sae.objective import Workspace
from sae.training import TrainingConfig, train
from sae.training.config import Recipe
from sae.training.sweep import Start, Sweep


def small(name: str) -> Kind:
    options = {"k": (4, 7), "resample_every": 15, "l1": (1.0, 4.0), "target_l0": (4.0, 7.0), "prefixes": (10, 20), "bandwidth": 0.05}
    return KINDS[name](**{field.name: options[field.name] for field in fields(KINDS[name]) if field.name in options})


def alone(kind: Kind) -> Kind:
    """With the first of its values."""
    return replace(kind, **{kind.swept: kind.values[:1]})


def config_of(kind, cache, out, **changes):  # noqa: F811
    settings = dict(d_sae=40, steps=60, batch_size=128, lr=3e-3, log_every=10, checkpoint_every=20, dead_steps=5, device="cpu")
    return TrainingConfig(kind=kind, cache=cache, out=out, **(settings | changes))


@pytest.mark.parametrize("name", KINDS)
def test_an_interrupted_run_ends_with_the_same_bits(name, cache, tmp_path, monkeypatch):  # noqa: F811
    whole = train(config_of(small(name), cache, tmp_path / "whole"))
    step, config = Sweep.step, config_of(small(name), cache, tmp_path / "cut")

    def interrupted(self, x_bd, number, y_bo=None):
        if number == 47:
            raise RuntimeError("power cut")
        return step(self, x_bd, number, y_bo)

    monkeypatch.setattr(Sweep, "step", interrupted)
    with pytest.raises(RuntimeError):
        train(config)
    monkeypatch.undo()
    for one, other in zip(whole, train(config)):
        assert contents(one) == contents(other)
        assert one.name == other.name


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_dictionary_does_on_raw_activations_what_was_trained(name, cache, tmp_path):  # noqa: F811
    """FVU on held-out rows by a formula written here, and the gate of the kind."""
    kind = small(name)
    (folder,) = train(config_of(alone(kind), cache, tmp_path / "d", steps=250, lr=1e-2))
    d = Dictionary.load(folder)
    gate = {"topk": TopK, "abstopk": AbsTopK}.get(name, Threshold)
    assert type(d.gate) is gate
    opened = ActivationCache.open(cache)
    x_bd = opened.read(opened.shards("held_out")[0])[0].double()
    z_bf = (x_bd - d.b_in_d.double()) @ d.W_enc_fd.double().T + d.b_enc_f.double()
    if gate is Threshold:
        theta_f = torch.zeros(d.d_sae) if d.gate.theta_f is None else d.gate.theta_f
        acts_bf = z_bf * (z_bf > theta_f)
    else:
        size_bf = z_bf.abs() if gate is AbsTopK else z_bf
        kept_bk = size_bf.topk(4).indices
        acts_bf = torch.zeros_like(z_bf).scatter(1, kept_bk, z_bf.gather(1, kept_bk))
        acts_bf = acts_bf if gate is AbsTopK else acts_bf.relu()
    x_hat_bd = acts_bf @ d.W_dec_fo.double() + d.b_dec_o.double()
    fvu = float((x_hat_bd - x_bd).square().sum() / (x_bd - x_bd.mean(0)).square().sum())
    _, lines = contents(folder)
    assert fvu == pytest.approx(lines[-1]["fvu"], rel=0.5)
    assert fvu < 0.75 * lines[0]["fvu"]
    assert Dictionary.load(folder).metadata["trained"]["kind"] == name


def test_the_threshold_of_a_batch_keeps_k_of_held_out_rows(cache, tmp_path):  # noqa: F811
    (folder,) = train(config_of(BatchTopK(k=(5,)), cache, tmp_path / "d", steps=200))
    d, record = Dictionary.load(folder), json.loads((folder / "training.json").read_text())["threshold"]
    opened = ActivationCache.open(cache)
    x_bd = opened.read(opened.shards("held_out")[0])[0].float()
    l0 = float((d.encode(x_bd) > 0).sum()) / len(x_bd)
    assert l0 == pytest.approx(5, abs=0.02)
    assert record["held_out"]
    assert record["rows"] == len(x_bd)
    assert record["running"] == pytest.approx(record["exact"], rel=0.5)


@pytest.fixture(scope="module")
def sites(cache, tmp_path_factory):  # noqa: F811
    """A cache of three sites of one model."""
    out = tmp_path_factory.mktemp("sites") / "cache"
    text, model = (str(cache.parent / "text.jsonl"),), str(cache.parent / "lm")
    reads = ("mlp_in.1", "mlp_out.1", "resid_post.0")
    harvest(HarvestConfig(text=text, model=model, out=out, sites=reads, context=32, tokens=8000))
    return out


@pytest.mark.parametrize(("name", "skip"), [("relu", False), ("topk", True), ("batchtopk", True), ("jumprelu", False)])
def test_a_transcoder_writes_what_the_mlp_writes(sites, tmp_path, name, skip):
    kind = small(name)
    changes = dict(reads=("mlp_in.1",), writes=("mlp_out.1",), skip=skip, steps=400, lr=1e-2)
    (folder,) = train(config_of(alone(kind), sites, tmp_path / "d", **changes))
    d = Dictionary.load(folder)
    assert (d.site, d.site_out, d.b_in_d) == ("mlp_in.1", "mlp_out.1", None)
    assert (d.W_skip_od is not None) == skip
    x_bd, y_bd = (ActivationCache.open(sites, site) for site in ("mlp_in.1", "mlp_out.1"))
    x_bd, y_bd = (one.read(one.shards("held_out")[0])[0].float() for one in (x_bd, y_bd))
    fvu = float((d(x_bd) - y_bd).square().sum() / (y_bd - y_bd.mean(0)).square().sum())
    _, lines = contents(folder)
    assert fvu < 0.5
    assert fvu == pytest.approx(lines[-1]["fvu"], rel=0.6)


@pytest.mark.parametrize("name", ["relu", "batchtopk"])
def test_a_crosscoder_reads_and_writes_several_sites(sites, tmp_path, name):
    reads = ("resid_post.0", "mlp_out.1")
    kind = small(name)
    (folder,) = train(config_of(alone(kind), sites, tmp_path / "d", reads=reads, steps=400, lr=1e-2))
    d = Dictionary.load(folder)
    assert [port.site for port in d.reads] == list(reads)
    parts = [ActivationCache.open(sites, site) for site in reads]
    x_bd = torch.cat([one.read(one.shards("held_out")[0])[0].float() for one in parts], dim=-1)
    for site, part_bd in zip(reads, x_bd.split(16, dim=-1)):  # each in its own units, so that neither drowns the other
        error_bd = d.split(d(x_bd))[site] - part_bd
        assert error_bd.square().sum() < 0.6 * (part_bd - part_bd.mean(0)).square().sum()
    if name == "relu":
        assert d.norms() == pytest.approx(torch.ones(40).numpy(), rel=1e-4)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "gated"])
def test_every_kind_goes_on_from_what_it_saved(name, cache, tmp_path):  # noqa: F811
    kind = alone(small(name))
    (folder,) = train(config_of(kind, cache, tmp_path / "d", steps=200))
    tuned = config_of(kind, cache, tmp_path / "tuned", init=folder, steps=1, lr=1e-9)
    (again,) = train(tuned)
    change = json.loads((again / "training.json").read_text())["since_init"]
    assert change["after"]["fvu"] == pytest.approx(change["before"]["fvu"], rel=2e-2)
    assert min(change["decoder_cosines"]) > 0.99


@pytest.mark.parametrize(("name", "found"), [("topk", 0.9), ("batchtopk", 0.9), ("matryoshka", 0.6), ("jumprelu", 0.9), ("gated", 0.9)])
def test_true_features_are_recovered(name, found):
    """Data whose features are known, 5 of 64 active; recall of the best cosines above what random directions have (0.4)."""
    data, d = toy(d=32, g=64, active=3.0), 32
    scale = (d / data.mean_squared_norm) ** 0.5
    options = {"k": (3,), "target_l0": (3.0,), "l1": (1.5,), "bandwidth": 0.02}
    kind = KINDS[name](**{field.name: options[field.name] for field in fields(KINDS[name]) if field.name in options})
    recipe = Recipe(steps=1500, lr=5e-3, betas=(0.9, 0.999), lr_warmup=0.01, lr_decay=0.3, clip=1.0, dead_steps=100)
    start = Dictionary.initial(d, 128, seed=0, decoder_norm=1.0)
    sweep = Sweep([Start(start)], kind, recipe, "auto", Workspace())
    generator = torch.Generator().manual_seed(1)
    for step in range(recipe.steps):
        x_bd = data.sample(256, generator) * scale
        sweep.step(x_bd, step)
        if recipe.resamples_after(step, min(300, kind.resamples_every())):
            sweep.resample(x_bd, step, 0)
    assert recovery(data.truth_gd, sweep.dictionary(0).W_dec_fo).mmcs > found


BAD = [
    (dict(reads=("resid_post.9",)), "resid_post.9"),
    (dict(reads=("mlp_in.1",), writes=("mlp_in.1",)), "--writes that differ"),
    (dict(), "none was named"),
    (dict(reads=("mlp_in.1",), skip=True), "--skip is for transcoders"),
    (dict(reads=("mlp_in.1", "mlp_in.1")), "--reads takes different sites"),
    (dict(reads=("mlp_in.1",), kind=BatchTopK(k=(41,))), "--k must be from 1 to the number of features, 40, got 41"),
    (dict(reads=("mlp_in.1",), kind=Matryoshka(k=(4,))), "divides by 16"),
    (dict(reads=("mlp_in.1",), kind=JumpReLU(target_l0=(0.0,))), "--target-l0"),
    (dict(reads=("mlp_in.1",), kind=BatchTopK(k=(4,)), decoder_norm=0.3), "leave it out"),
]


@pytest.mark.parametrize(("changes", "sentence"), BAD)
def test_settings_that_cannot_be_meant_are_refused(sites, tmp_path, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        train(config_of(changes.get("kind", ReLU()), sites, tmp_path / "d", **{k: v for k, v in changes.items() if k != "kind"}))
    assert not (tmp_path / "d" / WEIGHTS).exists()
