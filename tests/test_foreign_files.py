"""Files of torch, numpy and yaml that cannot be used, or that want to run code: one sentence each, and nothing runs."""

import io
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from sae.disk.foreign import read_npz, read_torch, read_yaml
from sae.errors import InputError


class Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def refused(read, path, message):
    with pytest.raises(InputError, match=message) as error:
        read(path, "some weights")
    assert "\n" not in str(error.value)


def test_a_file_of_torch_that_wants_to_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "b": Runs()}, tmp_path / "x.pt")
    refused(read_torch, tmp_path / "x.pt", r"x.pt holds more than tensors, numbers and texts \(posix.mkdir\), .* would run code")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
def test_a_damaged_file_of_torch(tmp_path, new):
    path = tmp_path / "x.pt"
    value = {"a": torch.arange(1000), "k": 3, "of": {"name": "x"}, "list": [torch.ones(2)]}
    torch.save(value, path, _use_new_zipfile_serialization=new)
    found = read_torch(path, "some weights")
    assert torch.equal(found.pop("a"), value.pop("a"))
    assert str(found) == str(value)
    data = path.read_bytes()
    for cut in (b"", b"x" * 500, data[:100], data[: len(data) // 2], data[:-20]):
        path.write_bytes(cut)
        refused(read_torch, path, "x.pt, but it is cut off or no file of torch.save")
    refused(read_torch, tmp_path / "y.pt", "y.pt, which does not exist")


def test_tensors_that_are_more_than_the_file_holds(tmp_path):
    for name, tensor in (("sparse", torch.eye(3).to_sparse()), ("stretched", torch.ones(1).expand(10**9, 10**5))):
        torch.save({"inside": [{"a": tensor}]}, tmp_path / name)
        refused(read_torch, tmp_path / name, "sparse or stretched")


def test_arrays_of_numpy(tmp_path):
    arrays = {
        "rows": np.arange(12.0).reshape(3, 4),
        "columns": np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
        "one": np.float64(3),
        "none": np.zeros((0, 4)),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        found = read_npz(tmp_path / "x.npz", "some weights")
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype


def test_arrays_that_are_not_compressed_stay_on_the_disk(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros((1000, 5000), dtype=np.float32))
    tracemalloc.start()
    array = read_npz(tmp_path / "x.npz", "some weights")["a"]
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    array[3] = 1  # of our own
    assert not read_npz(tmp_path / "x.npz", "some weights")["a"].any()


def test_arrays_that_cannot_be_used(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.array([Runs()], dtype=object))
    refused(read_npz, path, "a.npy in .*x.npz holds Python objects")
    np.savez_compressed(path, a=np.zeros(10**6))
    refused(read_npz, path, "more than 32 times its size")
    np.savez(path, a=np.ones(1000))
    data = path.read_bytes()
    for cut in (b"", b"x" * 500, data[:-30]):
        path.write_bytes(cut)
        refused(read_npz, path, "x.npz, but it cannot be read")
    content = io.BytesIO()
    np.save(content, np.ones(10))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", content.getvalue()[:-8])
    refused(read_npz, path, "size of a.npy is not what its header says")
    refused(read_npz, tmp_path / "y.npz", "which does not exist")


def test_yaml(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: 1\nb: [x, hf://y]\n")
    assert read_yaml(path, "settings", dict[str, object]) == {"a": 1, "b": ["x", "hf://y"]}
    for text, message in (
        ("a: [1", "x.yaml, but it cannot be read"),
        ("a: !!python/object/apply:os.mkdir [ran]", "x.yaml, but it cannot be read"),
        ("- 1", "should be a valid dictionary"),
        ("x: " + "1" * (1 << 20), "1,048,579 bytes"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_yaml(path, "settings", dict[str, object])
