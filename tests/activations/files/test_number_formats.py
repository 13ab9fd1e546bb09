"""Number formats: the bound on what 8 bits lose, files that safetensors itself reads, and readers that know the format."""

import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade_cache import write_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from sae.activations.cache import ActivationCache
from sae.activations.cached import CachedSource
from sae.activations.files.number_formats import FORMATS, decode, encode, row_bytes, shard_layout, write_shard
from sae.errors import InputError


def rows_of(seed: int, rows: int, width: int, exponent: float) -> torch.Tensor:
    """Rows of very different sizes, the first of zeros."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** (exponent * torch.randn(rows, 1, generator=generator, dtype=torch.float64)).clamp(-6, 4)
    values = (torch.randn(rows, width, generator=generator, dtype=torch.float64) * sizes).clamp(-65504, 65504)
    values[0] = 0
    return values.float()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 40), st.floats(0, 4))
def test_eight_bits_are_off_by_at_most_half_a_step(seed, rows, width, exponent):
    acts = rows_of(seed, rows, width, exponent)
    stored = encode(acts, "int8")
    assert (stored["activations"].dtype, stored["scale"].dtype) == (torch.int8, torch.float32)
    read, exact = decode(stored).double(), acts.double()
    step = exact.abs().amax(-1, keepdim=True) / 127
    to_half = exact.abs() * 2.0**-11 + 2.0**-25  # rounding to float16, below its normal range too
    assert ((read - exact).abs() <= step * (0.5 + 1e-4) * (1 + 2.0**-11) + to_half).all()
    if width > 1 and rows > 1:  # the bound means something: four bits would not keep it
        coarse = (acts / step.float().clamp(min=1e-30) / 16).round() * 16 * step.float()
        assert rows * width < 30 or (coarse.double() - exact).abs().max() > step.max() * 0.5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_float_formats_round_as_torch_does(dtype):
    acts = rows_of(0, 5, 7, 1.0)
    assert torch.equal(decode(encode(acts, dtype)), acts.to(getattr(torch, dtype)))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.integers(1, 30), st.integers(1, 9), st.data())
def test_a_written_shard_is_what_safetensors_reads(dtype, rows, width, data):
    acts, positions = rows_of(rows, rows, width, 1.0), torch.arange(rows) * 3 + 2**40
    order = np.array(data.draw(st.lists(st.integers(0, rows - 1), unique=True)), dtype=np.int64)
    stored = encode(acts, dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new" / "00000.safetensors"
        entry = write_shard(path, dtype, stored, positions, order)
        content = path.read_bytes()
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    assert entry == {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
    assert found.keys() == {"rows", *stored} == shard_layout(dtype, rows, width).keys()
    assert found["rows"].tolist() == positions[order].tolist()
    assert all(torch.equal(found[name], stored[name][order]) for name in stored)
    assert sum(value.nbytes for value in found.values()) == len(order) * row_bytes(dtype, width)


def eight_bit_cache(folder: Path, dtype: str = "int8") -> torch.Tensor:
    """Written with safetensors alone, as the document says; returns the exact rows, in the order of their positions."""
    acts = rows_of(3, 500, 6, 0.5)
    shards = []
    for number, part in enumerate(torch.arange(500).split(200)):
        scale = acts[part].abs().amax(-1) / 127
        steps = torch.where(scale[:, None] > 0, acts[part] / scale[:, None], 0).round().to(torch.int8)
        path = folder / "resid_post.0" / f"{number:05d}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"activations": steps, "scale": scale, "rows": part.clone()}, path)
        content = path.read_bytes()
        entry = {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
        shards.append({"name": path.stem, "split": "train", "rows": len(part), "files": {"resid_post.0": entry}})
    write_manifest(folder, dtype, {"resid_post.0": {"d_in": 6, "mean_squared_norm": 1.0}}, shards, [])
    return acts


def test_eight_bits_are_read_like_any_other_format(tmp_path):
    acts = eight_bit_cache(tmp_path)
    cache = ActivationCache.open(tmp_path)
    bound = acts.abs().amax(-1, keepdim=True) * (0.501 / 127 + 2.0**-11)
    for shard in cache.shards("train"):
        read, rows = cache.read(shard)
        assert read.dtype == cache.dtype == torch.float16
        assert ((read.float() - acts[rows]).abs() <= bound[rows]).all()
        block = torch.empty(7, 6, dtype=cache.dtype)
        cache.read_block(shard, 40, block)
        assert torch.equal(block, read[40:47])
    batch = torch.cat([next(CachedSource(cache).batches(250))[cache.site] for _ in range(2)])
    assert batch.dtype == torch.float32
    (tmp_path / "float").mkdir()
    eight_bit_cache(tmp_path / "float", "float16")
    with pytest.raises(InputError, match=r"00000\.safetensors.*the manifest says"):  # the manifest names another format
        ActivationCache.open(tmp_path / "float")


def test_an_unknown_format_is_refused(tmp_path):
    eight_bit_cache(tmp_path, "int4")
    with pytest.raises(InputError, match=r"'dtype' should be 'float16'.* is 'int4'"):
        ActivationCache.open(tmp_path)
