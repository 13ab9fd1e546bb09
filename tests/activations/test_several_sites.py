"""Several sites of the same rows: what is dealt out together belongs to one token, from a cache and live."""

import tempfile
from pathlib import Path

import pytest
import torch
from handmade_cache import SITE, write_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from live_world import make_world
from safetensors.torch import load_file, save_file

from sae.activations.cache import ActivationCache
from sae.activations.cached import BLOCKS_PER_BUFFER, CachedSource
from sae.activations.harvest.command import HarvestConfig, harvest
from sae.activations.harvest.settings import RecordingConfig
from sae.activations.live import LiveSource
from sae.errors import InputError

OTHER, NARROW, WIDE = "mlp_out.0", 3, 5
SITES = ("resid_pre.1", "head_out.1")


def opened(folder: Path, *sites: str) -> CachedSource:
    return CachedSource(*(ActivationCache.open(folder, site) for site in sites))


@settings(max_examples=20, deadline=None)
@given(
    shards=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    batch_size=st.integers(5, 60),
    block_rows=st.integers(1, 3),
    world=st.integers(1, 3),
    data=st.data(),
)
def test_rows_of_two_sites_of_a_cache_are_those_of_one_token_in_the_order_of_one_site(shards, batch_size, block_rows, world, data):
    seed, rank = data.draw(st.integers(0, 9)), data.draw(st.integers(0, world - 1))
    with tempfile.TemporaryDirectory() as name:
        folder = write_cache(Path(name), shards, NARROW, more_sites={OTHER: WIDE})
        stored = {}  # site -> token position -> row, read from the files by safetensors itself
        for site in (SITE, OTHER):
            files = [load_file(path) for path in sorted((folder / site).iterdir())]
            stored[site] = {int(r): row_d for file in files for r, row_d in zip(file["rows"], file["activations"])}
        share = dict(seed=seed, rank=rank, world=world)
        both, alone = opened(folder, SITE, OTHER), opened(folder, SITE)
        assert (both.widths, both.rows) == ({SITE: NARROW, OTHER: WIDE}, sum(shards))
        batches = both.batches(batch_size, buffer_bytes=block_rows * 4 * (NARROW + WIDE) * BLOCKS_PER_BUFFER, **share)
        one_site = alone.batches(batch_size, buffer_bytes=block_rows * 4 * NARROW * BLOCKS_PER_BUFFER, **share)
        count = 3 * sum(shards) // (world * batch_size) + 2
        drawn = [next(batches) for _ in range(count)]
        for batch in drawn:
            positions = batch[SITE][:, 0].int().tolist()
            for site in (SITE, OTHER):
                assert torch.equal(batch[site], torch.stack([stored[site][r] for r in positions]))
            assert torch.equal(next(one_site)[SITE], batch[SITE])
        batches.seek(position := data.draw(st.integers(0, count - 1)))
        again = next(batches)
    assert all(torch.equal(again[site], drawn[position][site]) for site in (SITE, OTHER))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict:
    return make_world(tmp_path_factory.mktemp("source")) | {"sites": SITES}


@pytest.fixture(scope="module")
def cached(world, tmp_path_factory) -> CachedSource:
    folder = harvest(HarvestConfig(**world, out=tmp_path_factory.mktemp("source") / "cache", shard_tokens=150))
    return opened(folder, *SITES)


@pytest.fixture(params=["cached", "live"])
def source(request, world, cached) -> CachedSource | LiveSource:
    return cached if request.param == "cached" else LiveSource(RecordingConfig(**world))


def test_both_sources_deal_out_what_was_recorded_of_the_same_tokens(source, cached):
    caches = cached.caches.values()
    pairs = set()  # what brute force reads: the rows of one token at both sites
    for shards in zip(*(cache.shards("train") for cache in caches)):
        (first_nd, first_positions), (second_nd, second_positions) = (cache.read(shard) for cache, shard in zip(caches, shards))
        assert torch.equal(first_positions, second_positions)
        pairs |= set(zip(map(tuple, first_nd.float().tolist()), map(tuple, second_nd.float().tolist())))
    assert source.widths == dict.fromkeys(SITES, 16)
    assert source.rows == cached.rows
    batches = source.batches(64, seed=2, device="cpu")
    drawn = [next(batches) for _ in range(2 * source.rows // 64 + 2)]
    dealt = [row for batch in drawn for row in zip(*(map(tuple, batch[site].tolist()) for site in SITES))]
    assert set(dealt[: source.rows]) == set(dealt) == pairs
    for position in (len(drawn) - 1, 0, source.rows // 64, 3):
        batches.seek(position)
        again = next(batches)
        assert all(torch.equal(again[site], drawn[position][site]) for site in SITES)


def test_both_sources_know_each_site(source):
    epoch = next(source.batches(source.rows, seed=0, device="cpu"))
    for site in SITES:
        squares = epoch[site].double().square().sum(-1)
        assert source.mean_squared_norm(site) == pytest.approx(float(squares.mean()), rel=0.05)
        rows = set(map(tuple, epoch[site].tolist()))
        assert set(map(tuple, source.first_rows(site).float().tolist())) <= rows
        assert source.about_massive(site) is None
    assert source.mean_squared_norm(SITES[0]) != source.mean_squared_norm(SITES[1])


def test_one_site_and_several_give_a_live_run_the_same_rows(world):
    both = LiveSource(RecordingConfig(**world)).batches(80, seed=4, device="cpu")
    for site in SITES:
        alone = LiveSource(RecordingConfig(**{**world, "sites": (site,)})).batches(80, seed=4, device="cpu")
        for position in (0, 1, 30, 70):
            both.seek(position)
            alone.seek(position)
            assert torch.equal(next(both)[site], next(alone)[site])


def test_massive_rows_of_one_site_have_the_same_stand_ins_at_all(world):
    source = LiveSource(RecordingConfig(**{**world, "max_norm_ratio": 1.15}))
    for number, pool in enumerate(source.pools):
        first_nd, second_nd = (rows_nd.float().tolist() for rows_nd in source.pool_rows(number).values())
        assert len(first_nd) == len(second_nd) == pool.rows
        assert len(set(map(tuple, first_nd))) < pool.rows
        partner: dict = {}
        assert all(partner.setdefault(tuple(first), second) == second for first, second in zip(first_nd, second_nd))


def test_a_shard_that_is_damaged_at_one_site_is_left_out_at_all(tmp_path, capsys):
    write_cache(tmp_path, [30, 30, 30], NARROW, more_sites={OTHER: WIDE})
    path = tmp_path / OTHER / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    source = CachedSource(*(ActivationCache.open(tmp_path, site, skip_damaged=True) for site in (SITE, OTHER)))
    assert "00001.safetensors" in capsys.readouterr().err
    assert source.rows == 60
    epoch = next(source.batches(60))
    assert sorted(epoch[SITE][:, 0].int().tolist()) == [*range(30), *range(60, 90)]
    assert torch.equal(epoch[SITE][:, 0], epoch[OTHER][:, 0])


def test_sites_of_different_caches_are_refused(tmp_path):
    folders = [write_cache(tmp_path / name, [30], NARROW, more_sites={OTHER: WIDE}) for name in ("a", "b")]
    with pytest.raises(InputError, match="sites of one cache"):
        CachedSource(ActivationCache.open(folders[0], SITE), ActivationCache.open(folders[1], OTHER))


def test_sites_whose_rows_are_of_other_tokens_are_refused(tmp_path):
    folder = write_cache(tmp_path, [20, 30], NARROW, more_sites={OTHER: WIDE})
    path = folder / OTHER / "00001.safetensors"
    stored = load_file(path)
    save_file(stored | {"rows": stored["rows"].flip(0)}, path)
    both = opened(folder, SITE, OTHER).batches(10)
    with pytest.raises(InputError, match=r"expected rows of the same tokens at every site, but the shard 00001 .* at mlp_out.0"):
        next(both)
    assert next(opened(folder, OTHER).batches(10))[OTHER].shape == (10, WIDE)
