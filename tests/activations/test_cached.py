"""Batches: every row once per epoch, and the same ones wherever reading begins."""

import tempfile
from pathlib import Path

import pytest
import torch
from handmade_cache import SITE, write_cache
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.activations.cache import ActivationCache
from sae.activations.cached import BLOCKS_PER_BUFFER, CachedSource
from sae.activations.source import Batches
from sae.errors import InputError

WIDTH = 3
ROW_BYTES = WIDTH * 4
SHARDS = st.lists(st.integers(1, 90), min_size=1, max_size=6)
BUFFERS = st.integers(1, 3).map(lambda block_rows: block_rows * ROW_BYTES * BLOCKS_PER_BUFFER)


def numbers(batches: Batches, count: int) -> list[int]:
    """The rows of the next `count` batches, each known by its first entry."""
    return [int(value) for _ in range(count) for value in next(batches)[SITE][:, 0]]


@settings(max_examples=40, deadline=None)
@given(shards=SHARDS, batch_size=st.integers(1, 100), buffer=BUFFERS, seed=st.integers(0, 9))
def test_each_epoch_gives_every_row_exactly_once(shards, batch_size, buffer, seed):
    with tempfile.TemporaryDirectory() as folder:
        cache = ActivationCache.open(write_cache(Path(folder), shards, WIDTH))
        batches = CachedSource(cache).batches(batch_size, seed=seed, buffer_bytes=buffer)
        total = sum(shards)
        drawn = numbers(batches, -(-3 * total // batch_size))
    for epoch in range(3):
        assert sorted(drawn[epoch * total : (epoch + 1) * total]) == list(range(total))
    assert batches.batches_per_epoch == pytest.approx(total / batch_size)
    assert len({tuple(drawn[i * total : (i + 1) * total]) for i in range(3)}) == 3 or total < 8  # a new order each time


@settings(max_examples=40, deadline=None)
@given(shards=SHARDS, batch_size=st.integers(1, 100), buffer=BUFFERS, data=st.data())
def test_seek_continues_like_an_uninterrupted_reader(shards, batch_size, buffer, data):
    with tempfile.TemporaryDirectory() as folder:
        cache = ActivationCache.open(write_cache(Path(folder), shards, WIDTH))
        count = -(-3 * sum(shards) // batch_size) + 2
        uninterrupted = [
            next(b)[SITE] for b in [CachedSource(cache).batches(batch_size, seed=7, buffer_bytes=buffer)] for _ in range(count)
        ]
        reader = CachedSource(cache).batches(batch_size, seed=7, buffer_bytes=buffer)
        for position in data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=5)):
            reader.seek(position)
            assert torch.equal(next(reader)[SITE], uninterrupted[position])
            assert reader.position == position + 1


@settings(max_examples=40, deadline=None)
@given(shards=SHARDS, batch_size=st.integers(1, 20), buffer=BUFFERS, world=st.integers(1, 5), data=st.data())
def test_ranks_share_each_epoch_without_overlap(shards, batch_size, buffer, world, data):
    total, epochs = sum(shards), 2 * world
    with tempfile.TemporaryDirectory() as folder:
        cache = ActivationCache.open(write_cache(Path(folder), shards, WIDTH))
        readers = [CachedSource(cache).batches(batch_size, seed=3, buffer_bytes=buffer, rank=r, world=world) for r in range(world)]
        steps = -(-(epochs * total // world + 2) // batch_size)
        drawn = [numbers(reader, steps) for reader in readers]
        position = data.draw(st.integers(0, steps - 1))
        for reader, rows in zip(readers, drawn):
            reader.seek(position)
            assert numbers(reader, 1) == rows[position * batch_size : (position + 1) * batch_size]
    begun = [0] * world
    for epoch in range(epochs):
        shares = []
        for rank in range(world):
            part = (rank + epoch) % world  # rows [total part / world, total (part + 1) / world) of the epoch
            end = begun[rank] + total * (part + 1) // world - total * part // world
            shares.append(drawn[rank][begun[rank] : end])
            begun[rank] = end
        assert sorted(row for share in shares for row in share) == list(range(total))
        assert max(begun) - min(begun) <= 1


def test_steps_of_ranks_are_disjoint_and_mix_shards_as_one_reader_does(tmp_path):
    cache = ActivationCache.open(write_cache(tmp_path, [1000] * 20, WIDTH))
    options = dict(batch_size=50, buffer_bytes=50 * ROW_BYTES * BLOCKS_PER_BUFFER)  # buffers of 3,200 of 20,000 rows
    readers = [CachedSource(cache).batches(rank=rank, world=4, **options) for rank in range(4)]
    assert readers[0].batches_per_epoch == 100
    for _ in range(100):
        step = [row for reader in readers for row in numbers(reader, 1)]
        assert len(set(step)) == 200
        assert len({row // 1000 for row in step}) >= 15  # as a single reader's batches of 200, see above
    with pytest.raises(InputError, match="rank from 0 to 3"):
        CachedSource(cache).batches(10, rank=4, world=4)


def test_seek_reads_nothing_itself(tmp_path):
    cache = ActivationCache.open(write_cache(tmp_path, [400] * 20, WIDTH))
    batches = CachedSource(cache).batches(50, buffer_bytes=10 * ROW_BYTES * BLOCKS_PER_BUFFER)
    (cache.folder / "resid_post.1/00000.safetensors").unlink()
    batches.seek(1_000_000)  # millions of epochs away, and a file missing: nothing is read before a batch is drawn
    assert batches.position == 1_000_000


def test_a_batch_mixes_shards(tmp_path):
    cache = ActivationCache.open(write_cache(tmp_path, [1000] * 20, WIDTH))
    batches = CachedSource(cache).batches(200, buffer_bytes=50 * ROW_BYTES * BLOCKS_PER_BUFFER)  # a buffer of 3,200 of 20,000 rows
    shards = [{number // 1000 for number in numbers(batches, 1)} for _ in range(20)]
    assert min(map(len, shards)) >= 15  # a perfect shuffle gives 20, a reader of one shard after another 1 to 4


def test_seeds_and_splits_differ(tmp_path):
    cache = ActivationCache.open(write_cache(tmp_path, [50, 50, 30], WIDTH, held_out=(2,)))
    first, again, other = (numbers(CachedSource(cache).batches(20, seed=seed), 5) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(numbers(CachedSource(cache).batches(30, split="held_out"), 1)) == list(range(100, 130))


def test_batches_have_the_dtype_asked_for(tmp_path):
    cache = ActivationCache.open(write_cache(tmp_path, [40], 5, dtype="bfloat16"))
    batch = next(CachedSource(cache).batches(8, dtype=torch.float64))[SITE]
    assert batch.dtype == torch.float64
    assert batch.shape == (8, 5)


@pytest.mark.parametrize(("batch_size", "split", "message"), [(0, "train", "batch size"), (4, "held_out", "no"), (4, "test", "split")])
def test_unusable_requests_are_refused(tmp_path, batch_size, split, message):
    cache = ActivationCache.open(write_cache(tmp_path, [10]))
    with pytest.raises(InputError, match=message):
        CachedSource(cache).batches(batch_size, split=split)


def test_a_shard_that_shrinks_while_reading_is_named(tmp_path):
    cache = ActivationCache.open(write_cache(tmp_path, [100]))
    batches = CachedSource(cache).batches(100)
    path = tmp_path / "resid_post.1/00000.safetensors"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InputError, match=r"00000\.safetensors"):
        next(batches)
