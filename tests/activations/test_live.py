"""Live activations are a cache's, in another order, and the trainer cannot tell."""

import json
import re
from collections import Counter

import pytest
import torch
from live_world import SITE, make_world
from safetensors.torch import load_file

from sae.activations.cache import ActivationCache
from sae.activations.harvest.command import HarvestConfig, harvest
from sae.activations.harvest.settings import RecordingConfig
from sae.activations.live import LiveSource
from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.evaluation import EvaluationConfig, evaluate
from sae.kinds import ReLU
from sae.training import TrainingConfig, train
from sae.training.checkpoint import Checkpoint
from sae.training.live import LiveTrainingConfig, train_live

KIND = ReLU(l1=(0.2,), resample_every=15)
RUN = dict(kind=KIND, d_sae=40, steps=80, batch_size=64, lr=3e-3, log_every=10, checkpoint_every=20, device="cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict:
    return make_world(tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="module")
def cache(world, tmp_path_factory) -> ActivationCache:
    return ActivationCache.open(harvest(HarvestConfig(**world, out=tmp_path_factory.mktemp("live") / "cache", shard_tokens=150)))


def sorted_rows(rows_nd: torch.Tensor) -> list[list[float]]:
    return sorted(rows_nd.float().tolist())


def test_each_epoch_gives_the_rows_of_the_cache_exactly_once(world, cache):
    live = LiveSource(RecordingConfig(**world))
    stored = torch.cat([cache.read(shard)[0] for shard in cache.shards("train")])
    assert live.rows == len(stored)
    assert len(live.pools) > 2
    batches = live.batches(70, seed=3, device="cpu")
    drawn = torch.cat([next(batches)[SITE] for _ in range(-(-2 * len(stored) // 70))])
    first, second = drawn[: len(stored)], drawn[len(stored) : 2 * len(stored)]
    assert sorted_rows(first) == sorted_rows(second) == sorted_rows(stored)
    assert not torch.equal(first, second)
    assert batches.batches_per_epoch == len(stored) / 70
    assert live.widths == {cache.site: cache.d_in}
    facts = {key: cache.manifest[key] for key in ("model", "dataset", "context", "prepend_bos")}
    assert facts == {key: json.loads(json.dumps(live.manifest))[key] for key in facts}


def test_the_scale_is_that_of_the_first_pool(world, cache):
    live = LiveSource(RecordingConfig(**world))
    epoch = live.batches(len(live.first_rows(SITE)), seed=0, device="cpu")
    assert live.mean_squared_norm(SITE) == pytest.approx(float(next(epoch)[SITE].double().square().sum(-1).mean()), rel=1e-6)
    assert live.mean_squared_norm(SITE) == pytest.approx(cache.mean_squared_norm, rel=0.05)


@pytest.mark.parametrize("ratio", [1.15, None])
def test_other_rows_of_the_pool_stand_in_for_massive_ones(world, tmp_path, ratio):
    settings = {**world, "max_norm_ratio": ratio}
    cache = ActivationCache.open(harvest(HarvestConfig(**settings, out=tmp_path / "cache")))
    stored = torch.cat([cache.read(shard)[0] for shard in cache.shards("train")]).float()
    live = LiveSource(RecordingConfig(**settings))
    batches = live.batches(50, seed=0, device="cpu")
    drawn = torch.cat([next(batches)[SITE] for _ in range(-(-live.rows // 50))])[: live.rows]
    left_out = cache.manifest["massive"]["rows"]["train"]
    assert left_out > 10 if ratio else left_out == 0
    assert live.rows == len(stored) + left_out
    once, twice = (Counter(map(tuple, rows_nd.tolist())) for rows_nd in (stored, drawn))
    assert set(once) == set(twice)
    assert (twice - once).total() == left_out
    assert not once - twice
    said = live.about_massive(SITE)
    assert ("--max-norm-ratio None" in said) if ratio else (said is None)
    batches.seek(2)  # back to pools that were computed before
    assert torch.equal(next(batches)[SITE], drawn[100:150])


def test_seek_continues_like_an_uninterrupted_run(world):
    one = LiveSource(RecordingConfig(**world)).batches(90, seed=1, device="cpu")
    uninterrupted = [next(one)[SITE] for _ in range(60)]
    other = LiveSource(RecordingConfig(**world)).batches(90, seed=1, device="cpu")
    for position in (0, 31, 5, 59, 5, 58):
        other.seek(position)
        assert torch.equal(next(other)[SITE], uninterrupted[position])
        assert other.position == position + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(sites=()), "--sites"),
        (dict(max_norm_ratio=0.5), "max-norm-ratio"),
        (dict(pool_tokens=0), "pool-tokens"),
    ],
)
def test_what_cannot_be_done_is_refused(world, changes, message):
    with pytest.raises(InputError, match=message):
        LiveSource(RecordingConfig(**{**world, **changes}))


def live(world, out, **changes) -> LiveTrainingConfig:
    return LiveTrainingConfig(out=out, live=RecordingConfig(**world), **(RUN | changes))


def test_training_takes_one_site(world, tmp_path):
    with pytest.raises(InputError, match=r"one site to train on, got resid_post\.0 resid_post\.1"):
        train_live(live({**world, "sites": ("resid_post.0", "resid_post.1")}, tmp_path / "two"))


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"sites": ()}, ["--live.sites"]),
        ({"text": ()}, ["--live.text", "--live.dataset"]),
        ({"tokens": 1}, ["--live.tokens"]),
        ({"dataset_split": "test"}, ["--live.dataset-split", "--live.dataset", "--live.text"]),
        ({"seed": -1}, ["--live.seed"]),
    ],
)
def test_errors_name_the_flags_that_training_has(world, tmp_path, changes, flags):
    with pytest.raises(InputError) as refused:
        train_live(live({**world, **changes}, tmp_path / "sae"))
    assert re.findall(r"--[\w.-]+", str(refused.value)) == flags


def test_a_stopped_live_run_continues_bit_for_bit(world, tmp_path, monkeypatch):
    train_live(live(world, tmp_path / "whole"))

    def save_then_stop(checkpoint, sweep, step, save=Checkpoint.save):
        save(checkpoint, sweep, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            train_live(live(world, tmp_path / "parts"))
    with pytest.raises(InputError, match="live"):
        train_live(live({**world, "seed": 1}, tmp_path / "parts"))
    train_live(live(world, tmp_path / "parts"))
    whole, parts = (load_file(tmp_path / name / "sae_weights.safetensors") for name in ("whole", "parts"))
    assert all(whole[name].equal(parts[name]) for name in whole)


def test_a_live_run_is_as_good_as_one_on_a_cache_and_is_evaluated_on_what_it_held_out(world, tmp_path):
    cache = harvest(HarvestConfig(**world, out=tmp_path / "cache"))
    (from_cache,) = train(TrainingConfig(cache=cache, out=tmp_path / "cached", **RUN))
    (from_live,) = train_live(live(world, tmp_path / "live"))
    a, b = (evaluate(EvaluationConfig(folder, cache, sequences=0))["reconstruction"] for folder in (from_cache, from_live))
    assert b["fvu"] == pytest.approx(a["fvu"], rel=0.1)
    assert b["l0"] == pytest.approx(a["l0"], rel=0.1)
    said, theirs = (Dictionary.load(folder).metadata for folder in (from_live, from_cache))
    assert said == theirs
    other = harvest(HarvestConfig(**{**world, "seed": 1}, out=tmp_path / "other"))
    with pytest.raises(InputError, match="holds out other documents"):
        evaluate(EvaluationConfig(from_live, other, sequences=0))
    settings = json.loads((from_live / "training.json").read_text())["settings"]
    assert settings["live"]["sites"] == ["resid_post.0"]
    assert "cache" not in settings
