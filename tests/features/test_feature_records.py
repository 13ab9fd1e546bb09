"""What is read from an index, against brute force."""

import json
import shutil

import numpy as np
import pytest

from sae.disk.checksum import crc32
from sae.disk.reading import read_tensors
from sae.disk.writing import write_tensors
from sae.errors import InputError
from sae.features.index.build import IndexConfig, build_index
from sae.features.index.reader import FeatureIndex


def sequences(index):
    return np.searchsorted(index.tokens["sequence_starts"], np.arange(len(index.tokens["ids"])), "right") - 1


def brute_top(index, column, n, per_document, before, after):
    """The greedy choice, by plain loops over all tokens."""
    of = sequences(index)
    document = np.asarray(index.tokens["sequence_document"])[of]
    covered, used, chosen = set(), {}, []
    for p in sorted(np.flatnonzero(column), key=lambda p: (-column[p], p)):
        window = [q for q in range(p - before, p + after + 1) if 0 <= q < len(column) and of[q] == of[p]]
        if len(chosen) < n and not covered & set(window) and used.get(document[p], 0) < per_document:
            covered |= set(window)
            used[document[p]] = used.get(document[p], 0) + 1
            chosen.append((p, window))
    return chosen


@pytest.mark.parametrize("j", [0, 4, 17])
@pytest.mark.parametrize(("n", "before", "after"), [(20, 24, 16), (200, 0, 0), (7, 40, 40)])
def test_top_contexts_equal_brute_force(world, dense, j, n, before, after):
    index = world.index
    contexts = index.top_contexts(j, n, before, after)
    expected = brute_top(index, dense[:, j], min(n, 32), 2, 24, 16)
    assert [c.position for c in contexts] == [p for p, _ in expected]
    of = sequences(index)
    for context, (position, _) in zip(contexts, expected):
        window = [q for q in range(position - before, position + after + 1) if 0 <= q < len(of) and of[q] == of[position]]
        np.testing.assert_array_equal(context.ids, index.tokens["ids"][window])
        np.testing.assert_array_equal(context.values, dense[window, j])
        assert window[context.centre] == position
        assert context.value == dense[position, j]
        label = index.tokens["document_label"][context.document]
        assert context.label == index.info["label_names"][label]


def test_random_contexts_are_a_fair_sample_of_firing_tokens(world, dense):
    firing = np.flatnonzero(dense[:, 17])
    drawn = [c.position for seed in range(60) for c in world.index.random_contexts(17, 20, seed, 2, 2)]
    assert set(drawn) <= set(firing)
    assert len({c.position for c in world.index.random_contexts(17, 20, 0, 2, 2)}) == 20  # without replacement
    thirds = np.histogram(np.searchsorted(firing, drawn), 3, (0, len(firing)))[0] / len(drawn)
    np.testing.assert_allclose(thirds, 1 / 3, atol=0.05)  # 1,200 draws: standard error 0.014
    assert [c.position for c in world.index.random_contexts(17, 5, 1)] == [c.position for c in world.index.random_contexts(17, 5, 1)]


def test_histogram_counts_every_activation_once(world, dense):
    edges, counts = world.index.histogram(17)
    values = dense[dense[:, 17] > 0, 17]
    assert counts.sum() == len(values)
    np.testing.assert_allclose(edges[1:] / edges[:-1], 2**0.25)
    for low, high, count in zip(edges[:-1], edges[1:], counts):
        assert count == ((values >= low) & (values < high)).sum()
    assert len(world.index.histogram(3)[1]) == 0


def test_top_tokens_are_shares_of_the_activation(world, dense):
    ids = np.asarray(world.index.tokens["ids"])
    mass = np.bincount(ids, dense[:, 17], 420)
    for token, share in world.index.top_tokens(17, 5):
        assert share == pytest.approx(mass[token] / mass.sum(), rel=1e-6)
    assert world.index.top_tokens(17, 1)[0][0] == mass.argmax()


def test_a_feature_that_never_fires_has_nothing_to_show(world):
    assert world.index.feature(3).columns["count"] == 0
    assert world.index.top_contexts(3) == world.index.random_contexts(3) == world.index.top_tokens(3) == []


@pytest.mark.parametrize("j", [-1, 40, 10**9])
def test_feature_out_of_range_is_one_sentence(world, j):
    with pytest.raises(InputError, match=rf"feature {j} does not exist: .* 0 to 39"):
        world.index.feature(j)


def test_buckets_are_octaves_with_samples_of_their_own(world, dense):
    index = world.index
    for j in (0, 3, 4, 17):
        column = dense[:, j]
        buckets = index.bucket_contexts(j)
        assert sum(bucket.count for bucket in buckets) == (column > 0).sum()
        for bucket in buckets:
            inside = np.flatnonzero((column >= bucket.low) & (column < bucket.high) & (column > 0))
            assert bucket.count == len(inside)
            assert len(bucket.contexts) == min(5, bucket.count)
            assert {c.position for c in bucket.contexts} <= set(inside)
            assert all(bucket.low <= c.value < bucket.high for c in bucket.contexts)
        assert [bucket.low for bucket in buckets] == sorted((bucket.low for bucket in buckets), reverse=True)
        assert all(bucket.high == 2 * bucket.low for bucket in buckets if bucket.low)
        fewer = index.bucket_contexts(j, 2)
        assert [[c.position for c in b.contexts] for b in fewer] == [[c.position for c in b.contexts[:2]] for b in buckets]


def test_percentile_is_the_share_of_activations_up_to_a_value(world, dense):
    fired = dense[dense[:, 17] > 0, 17]
    for value in (0, 0.25, 0.3, 1.0, 100):
        assert world.index.percentile(17, value) == (fired <= value).mean()
    assert np.isnan(world.index.percentile(3, 1.0))


def test_coactive_features_fire_on_the_same_tokens(world, dense):
    fires = dense > 0
    together = (fires[:, [17]] & fires).sum(0)
    together[17] = 0
    found = world.index.coactive(17, 12)
    assert len(found) == 12
    for hit, j in zip(found, np.lexsort((np.arange(40), -together))):
        assert hit == (j, together[j], together[j] / fires[:, 17].sum())
    assert world.index.coactive(3) == []


def test_cosine_neighbours_are_those_of_the_decoder(world):
    unit = world.dictionary.W_dec_fo / world.dictionary.W_dec_fo.norm(dim=-1, keepdim=True)
    cosines = (unit @ unit[17]).numpy()
    cosines[17] = -2
    found = world.index.cosine_neighbours(17, 15)
    np.testing.assert_allclose([c for _, c in found], np.sort(cosines)[::-1][:15], atol=1e-6)
    np.testing.assert_allclose(cosines[[j for j, _ in found]], [c for _, c in found], atol=1e-6)


def test_token_features_turn_top_tokens_about(world):
    index = world.index
    expected = {}
    for j in range(index.d_sae):
        for token, share in index.top_tokens(j, 10):
            expected.setdefault(token, []).append((-share, j))
    for token in range(430):
        assert index.token_features(token, 50) == [(j, -share) for share, j in sorted(expected.get(token, []))]
        assert index.token_features(token, 2) == index.token_features(token, 50)[:2]
    assert index.columns["top_token"].tolist() == [(index.top_tokens(j, 1) or [(-1, 0)])[0][0] for j in range(index.d_sae)]


@pytest.mark.parametrize(
    "name", ["top_contexts", "random_contexts", "bucket_contexts", "histogram", "top_tokens", "coactive", "lens_histogram"]
)
def test_every_reader_refuses_a_feature_out_of_range(world, name):
    for j in (-1, 40):
        with pytest.raises(InputError, match="does not exist"):
            getattr(world.index, name)(j)


def damaged_copy(world, folder, name, low):
    """The index with one byte of a file changed."""
    shutil.copytree(world.index.folder, folder)
    path = folder / f"{name}.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:low] + bytes([content[low] ^ 1]) + content[low:][1:])
    return folder


@pytest.mark.parametrize("name", ["columns", "records", "details", "token_features", "tokens", "sums"])
def test_a_flipped_bit_is_found(world, tmp_path, monkeypatch, name):
    folder = damaged_copy(world, tmp_path / "i", name, -1)
    with pytest.raises(InputError, match=rf"{name}.safetensors as it was written, but its checksum is another"):
        FeatureIndex.open(folder)
    monkeypatch.setattr("sae.features.index.opening.SMALL", 0)  # as for a large file
    FeatureIndex.open(folder)
    with pytest.raises(InputError, match="checksum is another"):
        FeatureIndex.open(folder, verify=True)


def test_an_index_of_an_earlier_version_opens_and_says_that_there_is_nothing_to_compare(world, tmp_path, capsys):
    shutil.copytree(world.index.folder, tmp_path / "i")
    info = json.loads((tmp_path / "i" / "index.json").read_text())
    del info["crc32"]
    (tmp_path / "i" / "index.json").write_text(json.dumps(info))
    assert FeatureIndex.open(tmp_path / "i").top_tokens(0) == world.index.top_tokens(0)
    assert capsys.readouterr().err == ""
    FeatureIndex.open(tmp_path / "i", verify=True)
    assert "no checksums to compare" in capsys.readouterr().err


def test_a_number_out_of_range_in_a_large_file_is_one_sentence(world, tmp_path, monkeypatch):
    shutil.copytree(world.index.folder, tmp_path / "i")
    monkeypatch.setattr("sae.features.index.opening.SMALL", 0)
    index = FeatureIndex.open(tmp_path / "i")
    j = int(np.argmax(index.columns["count"]))
    index.positions = index.positions.copy()
    index.positions[:] = 2**32 - 1
    with pytest.raises(InputError, match="out of range"):
        index.top_contexts(j)
    ids = world.index.tokens["ids"].copy()
    ids[:] = 10**6
    index = FeatureIndex.open(tmp_path / "i")
    index.tokens["ids"] = ids
    with pytest.raises(InputError, match="token ids below"):
        index.top_contexts(j)
    with pytest.raises(InputError, match=r"token ids below [0-9]+, got -1"):
        index.vocabulary.spelling(-1)


def test_a_token_beyond_the_vocabulary_asks_for_no_memory(world, tmp_path):
    """2^30 as an id once made a vocabulary of as many pieces: 8 GB."""
    shutil.copytree(world.cache, tmp_path / "c")
    path, manifest = tmp_path / "c" / "tokens" / "00000.safetensors", tmp_path / "c" / "manifest.json"
    before = crc32(path)
    tensors, _ = read_tensors(path, "tokens")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["ids"][5] = 1 << 30
    write_tensors(path, tensors)
    with pytest.raises(InputError, match="checksum is wrong"):
        build_index(IndexConfig(cache=tmp_path / "c", dictionary=world.dictionary_folder, out=tmp_path / "i", device="cpu"))
    manifest.write_text(manifest.read_text().replace(before, crc32(path)))
    with pytest.raises(InputError, match=r"token ids in .* from 0 to 419, but they go from 0 to 1073741824"):
        build_index(IndexConfig(cache=tmp_path / "c", dictionary=world.dictionary_folder, out=tmp_path / "i", device="cpu"))
    assert not (tmp_path / "i").exists()
