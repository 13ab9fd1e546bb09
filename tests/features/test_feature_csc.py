"""The sparse matrix on disk equals scipy's and numpy's, however it is cut into chunks, runs and blocks."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csc_matrix

from sae.disk.arrays import open_arrays
from sae.features.index.csc import MAX_FEATURES, Spool, merge, statistics


@st.composite
def matrices(draw):
    rows, features = draw(st.integers(1, 30)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dense = rng.random((rows, features)).astype(np.float32) * 10.0 ** rng.integers(-3, 4)
    return np.where(rng.random((rows, features)) < draw(st.floats(0, 1)), dense, 0).astype(np.float32), rng


@settings(max_examples=40, deadline=None)
@given(matrices(), st.integers(1, 40), st.integers(1, 60), st.integers(1, 9))
def test_spool_and_merge_equal_scipy(matrix, run_entries, block_entries, chunk):
    dense, rng = matrix
    rows, features = dense.shape
    order = rng.permutation(rows)  # a cache's rows come shuffled
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spool = Spool(folder, features, run_entries)
        for low in range(0, rows, chunk):
            positions = order[low : low + chunk]
            row, feature = np.nonzero(dense[positions])
            spool.add(positions, row, feature, dense[positions][row, feature])
        spool.flush()
        blocks = [statistics(block) for _, block in merge(spool.paths, features, folder / "records.safetensors", block_entries)]
        records = {name: np.array(array) for name, array in open_arrays(folder / "records.safetensors").items()}

    expected = csc_matrix(dense)
    np.testing.assert_array_equal(records["offsets"], expected.indptr)
    np.testing.assert_array_equal(records["positions"], expected.indices)
    np.testing.assert_array_equal(records["values"], expected.data.astype(np.float16))

    columns = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    halves = dense.astype(np.float16).astype(np.float64)
    np.testing.assert_array_equal(columns["count"], (dense > 0).sum(0))
    np.testing.assert_array_equal(columns["max"], halves.max(0))
    np.testing.assert_allclose(columns["sum"], halves.sum(0), rtol=1e-12)
    fires = dense.any(0)
    np.testing.assert_array_equal(columns["top_position"][fires], halves.argmax(0)[fires])
    assert (columns["top_position"][~fires] == -1).all()


def test_no_activations_at_all(tmp_path):
    spool = Spool(tmp_path, 3)
    spool.add(np.arange(5), *np.zeros((2, 0), np.int64), np.zeros(0, np.float32))
    spool.flush()
    list(merge(spool.paths, 3, tmp_path / "records.safetensors"))
    assert open_arrays(tmp_path / "records.safetensors")["offsets"].tolist() == [0, 0, 0, 0]


def test_rows_without_activations_leave_room_for_the_next(tmp_path):
    spool = Spool(tmp_path, 5)
    none = (*np.zeros((2, 0), np.int64), np.zeros(0, np.float32))
    for part in range(3):
        spool.add(np.arange(part << 23, (part + 1) << 23), *none)
    spool.add(np.array([25_165_825]), np.array([0]), np.array([2]), np.array([1.5], np.float32))
    spool.flush()
    list(merge(spool.paths, 5, tmp_path / "records.safetensors"))
    records = open_arrays(tmp_path / "records.safetensors")
    assert records["offsets"].tolist() == [0, 0, 0, 1, 1, 1]
    assert records["positions"].tolist() == [25_165_825]


def test_the_largest_dictionary_keeps_its_last_feature(tmp_path):
    spool = Spool(tmp_path, MAX_FEATURES)
    spool.add(np.arange(2), np.arange(2), np.array([0, MAX_FEATURES - 1]), np.ones(2, np.float32))
    spool.flush()
    assert open_arrays(spool.paths[0])["offsets"][[0, 1, -2, -1]].tolist() == [0, 1, 1, 2]


def test_values_beyond_half_precision_are_cut_and_counted_and_tiny_ones_kept_as_zero(tmp_path):
    spool = Spool(tmp_path, 1)
    spool.add(np.arange(3), np.arange(3), np.zeros(3, np.int64), np.array([1e6, 1e-12, 2.0], np.float32))
    spool.flush()
    list(merge(spool.paths, 1, tmp_path / "records.safetensors"))
    assert spool.clipped == 1
    assert open_arrays(tmp_path / "records.safetensors")["values"].tolist() == [65504.0, 0.0, 2.0]
