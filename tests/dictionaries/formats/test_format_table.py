"""Which format a folder is of, and the sentences for what is none, or two, or damaged."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.formats import FORMATS
from sae.dictionaries.formats.tensors import checked, name_of, names_in, read_weights
from sae.errors import InputError

SHAPES = {"W": "d f", "b": "f"}


def refused(path, message):
    with pytest.raises(InputError, match=message) as error:
        Dictionary.load(path)
    assert "\n" not in str(error.value)


def test_a_folder_that_nobody_knows(tmp_path):
    for k in range(14):
        (tmp_path / f"f{k:02}").write_text("")
    refused(tmp_path, r"found no known format \(SAELens: cfg.json \+ sae_weights.safetensors; .*\), but f00, f01, .*, f11 and 2 more;")
    refused(tmp_path / "f03", "but f03; check its name")
    refused(tmp_path / "other", "other, which does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "but nothing; check its name")


def test_a_folder_of_two_formats(tmp_path):
    for name in ("params.npz", "sae_weights.safetensors"):
        (tmp_path / name).write_text("")
    refused(tmp_path, r"found files of SAELens \(.*\) and Gemma Scope \(params.npz\); move one of them")


@pytest.mark.parametrize("file", ["params.npz", "params.safetensors"])
def test_a_file_that_is_cut_off(tmp_path, file):
    shapes = {"w_enc": (3, 4), "b_enc": (4,), "w_dec": (4, 3), "b_dec": (3,), "threshold": (4,)}
    if file.endswith("npz"):
        np.savez(tmp_path / file, **{name: np.ones(shape) for name, shape in shapes.items()})
    else:
        save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / file)
    assert Dictionary.load(tmp_path).d_sae == 4
    data = (tmp_path / file).read_bytes()
    for end in (0, 7, len(data) // 2, len(data) - 1):
        (tmp_path / file).write_bytes(data[:end])
        refused(tmp_path, "params")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": None}, "W, b in .* lacks b"),
        ({"c": torch.ones(2)}, "holds c beside W, b, s"),
        ({"b": torch.ones(5)}, r"expected b in .* of shape \[f\] with f = 4, found \[5\]"),
        ({"s": torch.ones(4, 2)}, r"expected s in .* of shape \[f, 1\] with f = 4, found \[4, 2\]"),
        ({"W": torch.ones(4)}, r"W in .* of shape \[d, f\], found \[4\]"),
        ({"b": torch.ones(4, dtype=torch.long)}, "b in .* of floating point, found torch.int64"),
        ({"b": torch.tensor([0, 1, torch.inf, 2])}, "b in .* NaN or infinity"),
        ({"W": torch.full((3, 4), torch.nan)}, "W in .* NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    tensors = {"W": torch.ones(3, 4), "b": torch.ones(4)} | change
    with pytest.raises(InputError, match=message):
        checked(tmp_path, {name: tensor for name, tensor in tensors.items() if tensor is not None}, SHAPES, {"s": "f 1"})


def test_the_widest_dtype_is_taken_for_all(tmp_path):
    tensors = {"W": torch.ones(3, 4, dtype=torch.bfloat16), "b": torch.ones(4, dtype=torch.float16)}
    assert {tensor.dtype for tensor in checked(tmp_path, tensors, SHAPES).values()} == {torch.float32}
    tensors["b"] = tensors["b"].bfloat16()
    assert {tensor.dtype for tensor in checked(tmp_path, tensors, SHAPES, d=3).values()} == {torch.bfloat16}


def test_tensors_of_every_kind_of_file(tmp_path):
    tensors = {"a": torch.randn(3, 4), "k": torch.tensor(7)}
    save_file(tensors, tmp_path / "x.safetensors")
    np.savez(tmp_path / "x.npz", **tensors)
    torch.save(tensors, tmp_path / "x.pt")
    torch.save(tensors, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    for ending in ("safetensors", "npz", "pt", "pth"):
        found = read_weights(tmp_path / f"x.{ending}")
        assert names_in(tmp_path / f"x.{ending}") == found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_names_of_paths(tmp_path):
    inside = tmp_path / "models--google--gemma-scope-2b" / "snapshots" / "0a1b"
    assert name_of(inside / "layer_1" / "params.npz") == "google/gemma-scope-2b/layer_1/params.npz"
    assert name_of(inside) == "google/gemma-scope-2b"
    assert name_of(tmp_path / "x") == (tmp_path / "x").as_posix()


def test_rows_have_names_of_their_own():
    assert len({row.name for row in FORMATS}) == len(FORMATS)


def test_the_documentation_shows_the_table():
    script = runpy.run_path(str(Path(__file__).resolve().parents[3] / "scripts" / "formats_table.py"))
    text = script["PAGE"].read_text(encoding="utf-8")
    assert text == script["page"](text), "python scripts/formats_table.py writes the table again"
