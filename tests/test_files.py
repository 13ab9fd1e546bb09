"""Files are complete or absent, and errors are sentences."""

import json
import resource
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sae.disk.checksum import crc32
from sae.disk.reading import read_json
from sae.disk.streamed import Streamed, in_order, write_streamed
from sae.disk.writing import atomic, remove_leftovers, require_free_space, write_json, write_tensors
from sae.errors import InputError


def test_a_failure_while_writing_leaves_what_was_there(tmp_path):
    path = tmp_path / "f.json"
    write_json(path, [1])
    with pytest.raises(RuntimeError, match="half way"), atomic(path) as temporary:  # noqa: PT012 (the failure is inside)
        temporary.write_text("half")
        raise RuntimeError("half way")
    assert json.loads(path.read_text()) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_numbers_that_json_cannot_hold_become_null_and_paths_text(tmp_path):
    write_json(tmp_path / "f.json", {"a": [1.0, float("nan"), (float("inf"), Path("x"))], "b": True, "c": np.float64("nan")})
    assert json.loads((tmp_path / "f.json").read_text()) == {"a": [1.0, None, [None, "x"]], "b": True, "c": None}


def test_tensors_come_back_and_others_may_read_the_file(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    write_tensors(tmp_path / "t.safetensors", tensors, {"k": "v"})
    back = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(tensors[k], back[k]) for k in tensors)
    (tmp_path / "plain").touch()
    assert (tmp_path / "t.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_tensors_written_in_parts_give_the_same_bytes(tmp_path):
    tensors = {"wide": torch.randn(7, 3), "a": torch.randn(5), "empty": torch.zeros(0, 4), "d": torch.randn(3, dtype=torch.float64)}
    tensors |= {"half": torch.randn(6, 2).half(), "b": torch.randn(3, 2).bfloat16(), "n": torch.arange(4), "one": torch.tensor(2.5)}
    write_tensors(tmp_path / "whole", tensors)
    parts = {name: Streamed(tensors[name].dtype, tuple(tensors[name].shape), pieces(tensors[name])) for name in in_order(tensors)}
    write_streamed(tmp_path / "parts", parts, {})
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()


def pieces(tensor):
    return [tensor[:1], tensor[1:]] if tensor.ndim else [tensor]


def test_a_write_the_disk_refuses_leaves_nothing(tmp_path):
    """A file size limit stands for the full disk; nothing under the final name, no temporary file."""
    code = f"""
import resource, signal, torch
from pathlib import Path
from sae.disk.writing import write_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, {resource.RLIM_INFINITY}))
write_tensors(Path({str(tmp_path)!r}) / "t.safetensors", {{"a": torch.zeros(100_000)}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert not (tmp_path / "t.safetensors").exists()
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_crc32_is_the_checksum_of_the_bytes(tmp_path):
    data = bytes(range(256)) * 40_000
    (tmp_path / "f").write_bytes(data)
    assert int(crc32(tmp_path / "f"), 16) == zlib.crc32(data)


def test_messages(tmp_path):
    with pytest.raises(InputError, match=r"expected a manifest at .*, which does not exist"):
        read_json(tmp_path / "none.json", "a manifest")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        read_json(tmp_path / "bad.json", "a manifest")
    with pytest.raises(InputError, match=r"the cache needs about .* GB but .* GB free"):
        require_free_space(tmp_path / "not" / "yet", 10**18, "the cache")
    require_free_space(tmp_path, 1, "the cache")


def test_tensors_that_share_memory_are_written_each(tmp_path):

    base = torch.arange(12.0).view(3, 4)
    given = {"one": base, "same": base, "row": base[1], "transposed": base.T}
    write_tensors(tmp_path / "t.safetensors", given)
    found = load_file(tmp_path / "t.safetensors")
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) for name in given)
