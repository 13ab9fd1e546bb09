"""How well batches are shuffled, against counting by hand and against all batches there could be."""

from itertools import combinations

import numpy as np
import pytest
from handmade_cache import write_cache

from sae.activations.cache import ActivationCache
from sae.activations.cached import CachedSource
from sae.activations.shuffle import mixing, perfect_mixing, shuffle_quality
from sae.activations.text.tokens import Tokens

LENGTHS = (1, 3, 2, 30, 4, 7, 13, 20)
DOCUMENT = (0, 1, 1, 2, 3, 4, 5, 5)
"""of each sequence"""


def tokens_of(lengths=LENGTHS, document=DOCUMENT) -> Tokens:
    starts = np.concatenate([[0], np.cumsum(lengths)])
    labels = np.full(max(document) + 1, -1, np.int32)
    return Tokens(np.zeros(starts[-1], np.int32), starts, np.asarray(document), labels, np.zeros(len(lengths), np.uint8), [])


def by_hand(positions, lengths=LENGTHS, document=DOCUMENT) -> tuple[int, float]:
    """Distinct documents, and the share of pairs from one, by comparing every pair."""
    of_token = [d for length, d in zip(lengths, document) for _ in range(length)]
    found = [of_token[int(p)] for p in positions]
    pairs = [a == b for a, b in combinations(found, 2)]
    return len(set(found)), sum(pairs) / len(pairs)


def test_mixing_counts_documents_and_pairs():
    positions = np.random.default_rng(0).permutation(sum(LENGTHS))[:25]
    assert mixing(positions, tokens_of()) == pytest.approx(by_hand(positions))
    assert mixing(np.array([2]), tokens_of()) == (1, 0)


@pytest.mark.parametrize("rows", [(2, 1, 4, 2), (3, 3), (5,), (0, 2, 6)])
def test_a_perfect_shuffle_is_the_mean_of_all_batches_there_could_be(rows):
    tokens = tokens_of(rows, tuple(range(len(rows))))
    for batch_size in (2, 3, sum(rows)):
        every = [by_hand(batch, rows, range(len(rows))) for batch in combinations(range(sum(rows)), batch_size)]
        assert perfect_mixing(np.asarray(rows), batch_size) == pytest.approx(np.mean(every, axis=0))
    assert mixing(np.arange(sum(rows)), tokens) == pytest.approx(perfect_mixing(np.asarray(rows), sum(rows)))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_quality_of_a_cache_is_that_of_the_rows_its_batches_hold(tmp_path, dtype):
    cache = ActivationCache.open(write_cache(tmp_path / "cache", [30, 30, 20], dtype=dtype))
    cache.tokens = tokens_of()
    buffer_rows = 64  # two groups of an epoch
    found = shuffle_quality(cache, 10, batches=4, seed=3, buffer_rows=buffer_rows)
    reader = CachedSource(cache).batches(10, seed=3, buffer_bytes=buffer_rows * 3 * cache.dtype.itemsize)
    expected = []
    for number in (0, 2, 4, 6):  # of the epoch's eight
        reader.seek(number)
        expected.append(by_hand(next(reader)[cache.site][:, 0]))  # a row starts with its own token position
    assert found.measured == pytest.approx(np.mean(expected, axis=0))
    assert found.perfect == pytest.approx(perfect_mixing(np.array([1, 5, 30, 4, 7, 33]), 10))
    assert found.ratio.pairs == pytest.approx(found.measured.pairs / found.perfect.pairs)


def test_with_one_buffer_for_all_rows_batches_are_as_good_as_perfect(tmp_path):
    cache = ActivationCache.open(write_cache(tmp_path / "cache", [4000, 4000]))
    cache.tokens = tokens_of([8] * 1000, range(1000))
    found = shuffle_quality(cache, 500, batches=16)
    assert found.ratio.documents == pytest.approx(1, rel=0.02)
    assert found.ratio.pairs == pytest.approx(1, rel=0.2)  # about 110 pairs a batch


def test_every_buffer_has_of_each_shard_its_share(tmp_path):
    cache = ActivationCache.open(write_cache(tmp_path / "cache", [1024] * 8))
    cache.tokens = tokens_of([1024] * 8, range(8))
    for seed in range(3):
        found = shuffle_quality(cache, 1024, batches=8, seed=seed, buffer_rows=1024)  # eight whole buffers of 64 blocks
        assert found.ratio.pairs == pytest.approx(1, abs=0.02)  # blocks in an order of pure chance give 1.1
