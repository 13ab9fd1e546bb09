"""A cache's description, against brute force on one with planted outliers."""

import json

import numpy as np
import pytest
import torch
from handmade_cache import SITE, write_cache
from safetensors.torch import load_file, save_file

from sae.activations.cache import ActivationCache
from sae.activations.describe import DescribeConfig, describe_cache, show_facts
from sae.activations.imports.command import ImportConfig, import_activations
from sae.errors import InputError

WIDTH = 32


def fill(folder, shard_rows: list[int]) -> torch.Tensor:
    """Normal rows in a cache of one sequence; dimensions 3 (its mean) and 17 (its spread) and rows 5 and 40 stand out. Returns all rows."""
    write_cache(folder, shard_rows, WIDTH)
    x = torch.randn(sum(shard_rows), WIDTH, generator=torch.Generator().manual_seed(0))
    x[:, 3] += 9
    x[:, 17] *= 20
    x[[5, 40]] *= 50 / torch.linalg.vector_norm(x[[5, 40]], dim=-1, keepdim=True) * 20
    for number, part in enumerate(x.split(shard_rows)):
        path = folder / SITE / f"{number:05d}.safetensors"
        save_file({**load_file(path), "activations": part.contiguous()}, path)
    return x


def test_numbers_are_those_of_brute_force(tmp_path, capsys):
    x = fill(tmp_path, [120, 80]).double()
    said = describe_cache(DescribeConfig(cache=tmp_path, json=True))
    assert json.loads(capsys.readouterr().out) == said
    assert said["sampled_rows"] == 200
    norms = sorted(row.norm().item() for row in x)
    assert said["norms"]["0.0"] == pytest.approx(norms[0], rel=1e-6)
    assert said["norms"]["0.5"] == pytest.approx((norms[99] + norms[100]) / 2, rel=1e-6)
    assert said["norms"]["1.0"] == pytest.approx(norms[-1], rel=1e-6)
    found = {row["dimension"]: row for row in said["outlier_dimensions"]}
    std, mean = x.std(0, correction=0), x.mean(0)
    assert set(found) == {d for d in range(WIDTH) if max(abs(mean[d]), std[d]) > 6 * std.median()}
    assert {3, 17} <= set(found)
    assert found[17]["std"] == pytest.approx(std[17].item(), rel=1e-5)
    assert found[3]["mean"] == pytest.approx(mean[3].item(), rel=1e-5)
    massive = said["massive_activations"]
    assert massive["rows"] == 2 == len(massive["tokens"])
    assert {token["id"] for token in massive["tokens"]} == {5, 40} == {place["position"] for place in massive["positions"]}
    files = list((tmp_path / SITE).iterdir())
    assert said["bytes_per_row"] == sum(path.stat().st_size for path in files) / 200


def test_a_sample_is_drawn_from_every_shard(tmp_path):
    fill(tmp_path, [300, 100])
    said = describe_cache(DescribeConfig(cache=tmp_path, rows=80))
    assert said["sampled_rows"] == 80
    cache = ActivationCache.open(tmp_path)
    from sae.activations.describe import sample_rows

    x_nd, positions_n = sample_rows(cache, 80)
    assert positions_n.tolist() == [*range(60), *range(300, 320)]
    assert x_nd.shape == (80, WIDTH)


def test_the_tables_name_what_stands_out(tmp_path, capsys):
    fill(tmp_path, [120, 80])
    describe_cache(DescribeConfig(cache=tmp_path))
    said = capsys.readouterr()
    for part in (SITE, "handmade", "200 train", "2 rows have a norm above 10 times the median"):
        assert part in said.out
    assert "without texts" in said.err  # the handmade cache names a model that is nowhere


def test_of_very_many_labels_a_few_are_named(tmp_path, capsys):
    fill(tmp_path, [120, 80])
    facts = describe_cache(DescribeConfig(cache=tmp_path))
    capsys.readouterr()
    show_facts(facts | {"labels": [f"label{i}" for i in range(5000)]})
    said = " ".join(capsys.readouterr().out.split())
    assert "4,980 more" in said
    assert len(said) < 3000


def test_a_cache_without_text_or_rows_says_so(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.ones((50, 4), dtype=np.float32))
    out = import_activations(ImportConfig(source=(tmp_path / "x.npy",), out=tmp_path / "c", site="resid_post.0"))
    said = describe_cache(DescribeConfig(cache=out))
    assert said["massive_activations"] == {"rows": 0, "largest_over_median": 1.0, "tokens": None, "positions": None}
    assert "without texts" in capsys.readouterr().err
    with pytest.raises(InputError, match="no"):
        describe_cache(DescribeConfig(cache=write_cache(tmp_path / "held", [5], held_out=(0,))))
    with pytest.raises(InputError, match="--rows"):
        describe_cache(DescribeConfig(cache=out, rows=0))
