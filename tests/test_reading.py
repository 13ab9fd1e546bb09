"""One reader for JSON and one for arrays: what fits comes back as it is, anything else is one sentence; checksums see every bit."""

import gzip
import json
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typing_extensions import NotRequired, TypedDict

from sae.disk import reading
from sae.disk.checksum import crc32, is_intact
from sae.disk.reading import Count, LongList, Number, layout, map_arrays, parse_json, read_gzip, read_json, read_tensors
from sae.disk.writing import write_tensors
from sae.errors import InputError


def test_a_small_file_that_unpacks_to_more_than_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LARGEST_UNPACKED", 1 << 20)
    path = tmp_path / "f.gz"
    path.write_bytes(gzip.compress(bytes(1 << 20)))
    assert read_gzip(path, "rows", "fetch it again") == bytes(1 << 20)
    for data, sentence in ((gzip.compress(bytes((1 << 20) + 1)), "unpacks to more than 1 MB; fetch"), (b"no gzip", "cannot be read")):
        path.write_bytes(data)
        with pytest.raises(InputError, match=f"expected rows in .*{sentence}"):
            read_gzip(path, "rows", "fetch it again")


def test_a_small_gzip_file_asks_for_little_memory(tmp_path):
    (tmp_path / "f.gz").write_bytes(gzip.compress(bytes(100)))
    tracemalloc.start()
    try:
        assert read_gzip(tmp_path / "f.gz", "rows", "fetch it again") == bytes(100)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


class Part(TypedDict):
    rows: Count
    names: LongList[str]


class Whole(TypedDict):
    part: Part
    value: Number | None
    more: NotRequired[bool]


GOOD: dict[str, Any] = {"part": {"rows": 3, "names": ["a", "b"]}, "value": 1, "unknown": [None]}


def test_what_fits_comes_back_as_it_is():
    assert parse_json(json.dumps(GOOD), "a thing", Whole) == GOOD
    assert parse_json(b"\xef\xbb\xbf[1]", "a thing") == [1]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("null", "expected a thing, but its content should be a valid dictionary, and is None"),
        ('{"part": {"names": []}, "value": 0}', "its 'part.rows' is missing"),
        ('{"part": {"rows": -1, "names": []}, "value": 0}', "its 'part.rows' should be greater than or equal to 0, and is -1"),
        ('{"part": {"rows": 3.0, "names": []}, "value": 0}', "its 'part.rows' should be a valid integer, and is 3.0"),
        ('{"part": {"rows": true, "names": []}, "value": 0}', "'part.rows' should be a valid integer"),
        ('{"part": {"rows": 1' + "0" * 400 + ', "names": []}, "value": 0}', "'part.rows' should be less than"),
        ('{"part": {"rows": 1, "names": ["a", null, 3]}, "value": 0}', "'part.names.1' should be a valid string, and is None"),
        ('{"part": {"rows": 1, "names": []}, "value": NaN}', "'value.* should be a finite number, and is nan"),
        ('{"part": {"rows": 1, "names": []}, "value": 1' + "0" * 5000 + "}", "not valid JSON"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        (b"\xff\xfe{", "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_json_that_does_not_fit_is_one_sentence(text, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        parse_json(text, "a thing", Whole)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["none", "folder", "loop", "a\0b", "n" * 300])
@pytest.mark.parametrize("read", [read_json, layout, map_arrays, read_tensors])
def test_a_path_that_is_no_file_is_one_sentence(tmp_path, name, read):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match=r"expected a thing at .*(does not exist|cannot be read|is damaged)"):
        read(tmp_path / name, "a thing")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["part", "rows", "names", "value"]), inner)))
def test_any_json_fits_or_is_refused(value):
    try:
        found = parse_json(json.dumps(value), "a thing", Whole)
    except InputError:
        return
    assert isinstance(found["part"]["rows"], int)
    assert all(isinstance(name, str) for name in found["part"]["names"])


SCHEMA = {"weights": ("F32 BF16", "f d"), "offsets": ("I64", "f+1"), "fixed": ("U8", "2")}


def arrays(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    made = {"weights": torch.ones(3, 4), "offsets": torch.arange(4), "fixed": torch.zeros(2, dtype=torch.uint8)} | changes
    return {name: tensor for name, tensor in made.items() if tensor is not None}


def test_arrays_that_fit_are_those_of_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, arrays(more=torch.ones(1)), {"k": "v"})
    mapped, metadata = map_arrays(path, "arrays", SCHEMA, d=4)
    tensors, same = read_tensors(path, "arrays", SCHEMA, f=3)
    assert metadata == same == {"k": "v", "crc32": metadata["crc32"]}
    for name, tensor in load_file(path).items():
        assert torch.equal(tensors[name], tensor)
        assert np.array_equal(mapped[name], tensor.numpy())


@pytest.mark.parametrize(
    ("changes", "sizes", "sentence"),
    [
        ({"weights": None}, {}, "expected the array 'weights' in .*, which has offsets, fixed"),
        ({"weights": torch.ones(3, 4).double()}, {}, r"'weights' in .* to be F32 or BF16 \[f, d\], but it is F64 \[3, 4\]"),
        ({"weights": torch.ones(3)}, {}, r"but it is F32 \[3\]"),
        ({"offsets": torch.arange(3)}, {}, r"'offsets' in .* to be I64 \[f\+1\] with f = 3, but it is I64 \[3\]"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, {}, "'offsets' in"),
        ({"fixed": torch.zeros(3, dtype=torch.uint8)}, {}, r"U8 \[2\], but it is U8 \[3\]"),
        ({}, {"d": 5}, "with d = 5"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path, changes, sizes, sentence):
    path = tmp_path / "a.safetensors"
    save_file(arrays(**changes), path)
    for read in (map_arrays, read_tensors):
        with pytest.raises(InputError, match=sentence):
            read(path, "arrays", SCHEMA, **sizes)


def header_file(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list, end: Any = 24, dtype: str = "F32", begin: Any = 0) -> dict:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


@pytest.mark.parametrize(
    "header",
    [
        *(entry([2.0, 3]), entry([-2, -3]), entry([True, 6]), entry(["2", 3]), entry([2, 3], 23), entry([2, 3], 48, begin=24)),
        *(entry([2, 3], None), entry([0, 10**30], 0), entry([0, 2**61, 2**61], 0), entry([1] * 70 + [6]), entry([2, 3], dtype="F7")),
        *(entry([6], 10**400), {"x": None}, {"x": []}, [], None, 7, "x", {"__metadata__": None}, {"__metadata__": {"a": 1}}),
        *({"x": {"dtype": ["F32"], "shape": [6], "data_offsets": [0, 24]}}, b"[" * 100_000, b'{"x": ' + b"9" * 5000 + b"}", b"\xff"),
    ],
    ids=lambda header: str(header)[:40],
)
def test_headers_that_make_no_sense_are_refused(tmp_path, header):
    path = header_file(tmp_path / "a.safetensors", header, bytes(24))
    for read in (layout, map_arrays, read_tensors):
        with pytest.raises(InputError, match="damaged or no safetensors file") as caught:
            read(path, "arrays")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("claimed", [20 * 10**9, 2**63, 2**64 - 1])
def test_a_header_said_to_be_larger_than_memory_is_not_read(tmp_path, claimed):
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as file:
        file.write(claimed.to_bytes(8, "little") + b"{}")
        if claimed < 10**11:
            file.truncate(8 + claimed)  # all holes: the size is as it says
    with pytest.raises(InputError, match="header is cut off"):
        layout(path, "arrays")


def test_the_checksum_is_that_of_the_bytes_with_its_digits_as_zeros(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, arrays(), {"step": "7", "settings": json.dumps({"crc32": "00000000"})})
    content, digits = path.read_bytes(), layout(path, "arrays")[1]["crc32"]
    assert content.count(digits.encode()) == 1
    assert int(digits, 16) == zlib.crc32(content.replace(digits.encode(), b"00000000"))
    assert is_intact(path) is True
    assert int(crc32(path), 16) == zlib.crc32(content)
    save_file(arrays(), path)
    assert is_intact(path) is None


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, arrays(), {"step": "7"})
    content = path.read_bytes()
    whole = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            tensors, metadata = read_tensors(path, "arrays")
        except InputError:
            continue
        # all that can happen unseen: the word crc32 itself is another, and the file seems to have no checksum
        assert "crc32" not in metadata
        assert metadata["step"] == "7"
        assert all(torch.equal(tensors[name], whole[name]) for name in whole)
