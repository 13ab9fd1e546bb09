"""What of a text is stored: masks against brute force, norm outliers, 8 bits; and that each is the same after a kill."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_harvest import change, different, in_child
from transformers import GPT2Config, GPT2LMHeadModel

from sae.activations.cache import ActivationCache
from sae.activations.harvest.command import HarvestConfig, harvest
from sae.activations.harvest.plan import Masks, count_reasons, parse_positions
from sae.errors import InputError
from sae.model.language_model import LanguageModel

BOS, EOS, LOUD = 0, 1, 2
SITES = ("resid_pre.0", "resid_post.1")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """40 documents of 3 to 60 tokens, some of them ends of text or the one the model is loud at."""
    rng = np.random.default_rng(0)
    documents = [rng.choice(30, rng.integers(3, 60), p=[0, 0.1, 0.05] + [0.85 / 27] * 27) for _ in range(40)]
    path = tmp_path_factory.mktemp("text") / "text.safetensors"
    starts = torch.tensor(np.cumsum([0, *map(len, documents)]))
    save_file({"ids": torch.from_numpy(np.concatenate(documents)).int(), "document_starts": starts}, path)
    return path


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """Its embedding is a hundred times larger at LOUD, and then no longer fits float16 at the first site."""
    torch.manual_seed(0)
    size = dict(vocab_size=30, n_positions=24, n_embd=8, n_layer=3, n_head=2, bos_token_id=BOS, eos_token_id=EOS)
    model = GPT2LMHeadModel(GPT2Config(**size))
    with torch.no_grad():
        model.transformer.wte.weight[LOUD] = 1e5
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def config(model_folder, text, tmp_path) -> HarvestConfig:
    sizes = dict(tokens=1500, pool_tokens=400, shard_tokens=90, batch_tokens=120, held_out=0.2)
    return HarvestConfig(out=tmp_path / "cache", model=str(model_folder), text=(str(text),), sites=SITES, device="cpu", **sizes)


def stored(folder: Path, site: str) -> tuple[ActivationCache, torch.Tensor, torch.Tensor]:
    """The cache, and all its rows in the order of their positions."""
    cache = ActivationCache.open(folder, site)
    parts = [cache.read(shard) for split in ("train", "held_out") for shard in cache.shards(split)]
    acts, rows = (torch.cat(tensors) for tensors in zip(*parts))
    return cache, acts[rows.argsort()], rows.sort().values


def by_hand(cache: ActivationCache, model: str) -> dict[str, torch.Tensor]:
    """Every token's activations, one sequence at a time."""
    lm, tokens = LanguageModel.load(model, device="cpu"), cache.tokens
    found = []
    for start, stop in zip(tokens.sequence_starts, tokens.sequence_starts[1:]):
        found.append(lm.record(torch.from_numpy(np.array(tokens.ids[start:stop], dtype=np.int64))[None], SITES))
    return {site: torch.cat([f[site][0] for f in found]) for site in SITES}


@pytest.mark.parametrize("keep_bos", [False, True])
@pytest.mark.parametrize("skip_special", [False, True])
@pytest.mark.parametrize(("positions", "first", "last"), [(None, 0, 99), ("2:9", 2, 9), (":5", 0, 5), ("11:", 11, 99)])
def test_masks_leave_out_what_they_say(config, keep_bos, skip_special, positions, first, last):
    masked = change(config, keep_bos=keep_bos, skip_special=skip_special, positions=positions, dtype="bfloat16", max_norm_ratio=None)
    cache, _, rows = stored(harvest(masked), SITES[0])
    expected, counts = [], {"beginning_of_text": 0, "special_tokens": 0, "outside_positions": 0}
    tokens = cache.tokens
    for start, stop in zip(tokens.sequence_starts, tokens.sequence_starts[1:]):
        for position in range(start, stop):
            if tokens.ids[position] == BOS and not keep_bos:
                counts["beginning_of_text"] += 1
            elif tokens.ids[position] == EOS and skip_special:
                counts["special_tokens"] += 1
            elif not first <= position - start < last:
                counts["outside_positions"] += 1
            else:
                expected.append(position)
    assert rows.tolist() == expected
    left_out = cache.manifest["counts"]["left_out"]
    assert {name: left_out[name] for name in counts} == counts
    assert left_out["norm_outliers"] == 0
    assert cache.manifest["counts"]["rows"] == {split: cache.rows(split) for split in ("train", "held_out")}


def test_reasons_are_counted_the_same_however_many_at_once(config, monkeypatch):
    tokens = stored(harvest(change(config, dtype="bfloat16")), SITES[0])[0].tokens
    masks = Masks(BOS, (EOS, LOUD), 3, 11)
    whole = count_reasons(tokens, masks)
    monkeypatch.setattr("sae.activations.harvest.plan.COUNTED_AT_ONCE", 7)
    assert (count_reasons(tokens, masks) == whole).all()
    assert (whole.sum(-1) == np.diff(tokens.sequence_starts)).all()


@pytest.mark.parametrize("text", ["5", "5:5", "9:3", "-2:", "a:b", "1:2:3", "1.5:"])
def test_positions_that_are_no_window_are_refused(text):
    with pytest.raises(InputError, match="FIRST:LAST"):
        parse_positions(text)


def test_norm_outliers_of_any_site_are_left_out_at_all(config):
    """Float16 cannot hold them, so a harvest that keeps them fails."""
    one_pool = change(config, held_out=0.0, pool_tokens=10**6, max_norm_ratio=2.5)
    with pytest.raises(InputError, match=r"resid_pre\.0.*1e\+05.*bfloat16"):
        harvest(change(one_pool, max_norm_ratio=None, out=config.out.with_name("all")))
    cache, acts, rows = stored(harvest(one_pool), SITES[1])
    exact, ids = by_hand(cache, config.model), np.asarray(cache.tokens.ids)
    candidates = np.flatnonzero(ids != BOS)
    keep = np.ones(len(candidates), dtype=bool)
    for site in SITES:
        norms = exact[site][candidates].double().norm(dim=-1).numpy()
        keep &= norms <= 2.5 * np.sort(norms)[(len(norms) - 1) // 2]
    assert 0 < (~keep).sum() < 0.2 * len(keep)
    assert rows.tolist() == candidates[keep].tolist()
    torch.testing.assert_close(acts.float(), exact[SITES[1]][candidates[keep]], rtol=1e-3, atol=1e-3)
    assert stored(one_pool.out, SITES[0])[2].tolist() == rows.tolist()
    assert cache.manifest["counts"]["left_out"]["norm_outliers"] == (~keep).sum()
    assert cache.manifest["counts"]["rows"]["train"] == keep.sum()
    assert all(shard["rows"] <= config.shard_tokens for shard in cache.manifest["shards"])


@pytest.mark.parametrize("ratio", [None, 10.0, 2.5])
def test_massive_rows_are_named_in_one_line_whether_they_are_stored_or_not(config, capsys, ratio):
    """Rows, places and their share of the training rows' squared norm, against each pool's tokens by hand."""
    harvest(change(config, dtype="bfloat16", max_norm_ratio=ratio, pool_tokens=10**6))  # one pool for each split
    said = [line for line in capsys.readouterr().out.splitlines() if "norms above" in line]
    cache = ActivationCache.open(config.out, SITES[0])
    exact, ids, tokens = by_hand(cache, config.model), np.asarray(cache.tokens.ids), cache.tokens
    sequence = tokens.sequence_of(np.arange(len(ids)))
    split, offset = np.asarray(tokens.sequence_split)[sequence], np.arange(len(ids)) - np.asarray(tokens.sequence_starts)[sequence]
    massive = np.zeros(len(ids), bool)
    square = {site: exact[site].double().square().sum(-1).numpy() for site in SITES}
    for which in (0, 1):
        own = (split == which) & (ids != BOS)
        for site in SITES:
            massive[own] |= square[site][own] > (ratio or 10) ** 2 * np.sort(square[site][own])[(own.sum() - 1) // 2]
    found = cache.manifest["massive"]
    assert found["rows"] == {name: int((massive & (split == i)).sum()) for i, name in enumerate(("train", "held_out"))}
    assert found["rows"]["train"] > 10
    train = (split == 0) & (ids != BOS)
    for site in SITES:
        by_site = square[site][train & massive].sum() / square[site][train].sum()
        assert found["share_of_squared_norm"][site] == pytest.approx(by_site, rel=1e-4)
    places = sorted(((int((offset[massive] == p).sum()), -p) for p in set(offset[massive].tolist())), reverse=True)
    assert found["positions"] == [[-p, count] for count, p in places[:5]]
    assert len(said) == 1
    assert said[0].startswith(f"{massive.sum()} rows")
    assert ("--max-norm-ratio None keeps them" in said[0]) == (ratio is not None)
    assert ("--max-norm-ratio 10 leaves" in said[0]) == (ratio is None)
    stored_rows = sum(cache.rows(name) for name in ("train", "held_out"))
    assert stored_rows == (ids != BOS).sum() - (0 if ratio is None else massive.sum())
    assert cache.manifest["counts"]["left_out"]["norm_outliers"] == (0 if ratio is None else massive.sum())


def test_beginning_of_text_that_is_asked_for_is_stored_whatever_its_norm(config, model_folder, tmp_path):
    model = GPT2LMHeadModel.from_pretrained(model_folder)
    with torch.no_grad():
        model.transformer.wte.weight[[BOS, LOUD]] = model.transformer.wte.weight[[LOUD, BOS]]
    model.save_pretrained(tmp_path / "model")
    cache, _, rows = stored(harvest(change(config, model=str(tmp_path / "model"), dtype="bfloat16", keep_bos=True)), SITES[0])
    ids = np.asarray(cache.tokens.ids)
    assert rows.tolist() == list(range(len(ids)))
    assert cache.manifest["massive"]["rows"] == {"train": 0, "held_out": 0}


@pytest.mark.parametrize("changes", [{"max_norm_ratio": 2.5}, {"max_norm_ratio": 2.5, "dtype": "int8"}])
def test_killed_while_one_pool_is_written_and_the_next_recorded_it_ends_with_the_same_bytes(config, tmp_path, changes):
    whole = change(config, out=tmp_path / "whole", **changes)
    harvest(whole)
    for point in (6, 20, 33, 41):
        cut = change(config, out=tmp_path / f"killed{point}", **changes)
        assert os.WIFSIGNALED(in_child(cut, kill_at_sync=point))
        assert in_child(cut) == 0
        assert different(cut.out, whole.out) == [], point


def test_eight_bits_hold_the_rows_of_sixteen_in_half_the_bytes(config):
    eight, sixteen = (change(config, out=config.out / name, dtype=name, max_norm_ratio=2.5) for name in ("int8", "float16"))
    cache, acts, rows = stored(harvest(eight), SITES[1])
    _, exact, exact_rows = stored(harvest(sixteen), SITES[1])
    assert torch.equal(rows, exact_rows)
    step = exact.float().abs().amax(-1, keepdim=True) / 127
    assert ((acts.float() - exact.float()).abs() <= step * 0.51 + exact.float().abs() * 2.0**-10).all()
    squares = torch.cat([cache.read(shard)[0] for shard in cache.shards("train")]).double().square().sum(-1)
    assert cache.mean_squared_norm == pytest.approx(float(squares.mean()), rel=1e-12)
    sizes = [sum(p.stat().st_size - 8 * cache_rows(p) for p in (c.out / SITES[1]).glob("*")) for c in (eight, sixteen)]
    assert sizes[0] < sizes[1]


def cache_rows(path: Path) -> int:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return len(file.get_tensor("rows"))


@pytest.mark.parametrize("ratio", [0.5, float("nan"), -3.0])
def test_a_ratio_below_one_is_refused(config, ratio):
    with pytest.raises(InputError, match="--max-norm-ratio of at least 1"):
        harvest(change(config, max_norm_ratio=ratio))
