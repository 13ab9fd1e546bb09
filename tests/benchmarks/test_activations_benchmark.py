"""The benchmark of the activation cache, on sizes so small that only its bookkeeping is tested."""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sae.activations.cache import ActivationCache
from sae.activations.text.tokens import Tokens
from sae.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "activations.py"
TINY = ["--tokens", 1500, "--pool-tokens", 600, "--cache-tokens", 3000, "--width", 16, "--batch-size", 64, "--rounds", 1, "--threads", 1]
TINY += ["--shuffle-pools", 500, 1000, "--shuffle-widths", 512]


def command(*flags: object) -> subprocess.CompletedProcess:
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, SCRIPT, *map(str, flags)], capture_output=True, text=True, env=env, cwd=ROOT)


@pytest.fixture(scope="module")
def disk():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        runpy.run_path(str(SCRIPT))
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return sys.modules["disk"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    said = command(*TINY, "--rivals", "full", "--work", folder / "work", "--out", folder / "numbers.json", "--markdown")
    assert said.returncode == 0, said.stderr
    assert list((folder / "work").iterdir()) == []
    return json.loads((folder / "numbers.json").read_text()), said.stdout


@pytest.mark.soak
def test_every_number_is_finite_and_ratios_follow_from_the_rates(tiny):
    record, _ = tiny
    arms = record["harvest"]["arms"]
    assert list(arms) == ["bare", "harvest", "full"]
    for arm in arms.values():  # one round, so that the ratio of medians is the median of ratios
        rate = arm["tokens_per_second"]["median"]
        assert rate > 0
        assert arm["times_bare"]["median"] == pytest.approx(rate / arms["bare"]["tokens_per_second"]["median"])
        assert arm["tokens"] == 1500
    for state in ("cold", "warm"):
        found = record["disk"][state]
        assert found["ratio"]["median"] == pytest.approx(found["mb_per_second"]["median"] / found["dd_mb_per_second"]["median"])
    assert record["disk"]["write"]["ratio"]["min"] > 0
    assert all(math.isfinite(value) for case in record["shuffle"]["cases"] for value in case.values())


@pytest.mark.soak
def test_sizes_are_those_of_the_format(tiny):
    record, _ = tiny
    assert 520 < record["harvest"]["bytes_per_row"] < 600  # 256 halves and a position, and a header for a few hundred rows
    assert 0 < record["harvest"]["padding_share"] < 0.5
    assert 0 < record["disk"]["bytes"] - 3000 * (2 * 16 + 8) * 0.98 < 3000  # but for beginnings of text, and headers
    cases = record["shuffle"]["cases"]
    assert [case["pool_tokens"] for case in cases] == [500, 1000]
    for case in cases:  # a buffer for all rows
        assert case["documents_ratio"] == pytest.approx(1, abs=0.1)


@pytest.mark.soak
def test_the_markdown_has_every_arm_and_says_where_it_was_measured(tiny):
    record, said = tiny
    tables = said[said.index("written to") :]
    for arm in record["harvest"]["arms"].values():
        assert f"| {arm['label']} |" in tables
    assert tables.count(f"torch {torch.__version__}") == 3


@pytest.mark.soak
def test_other_parts_keep_their_numbers_and_absent_peers_are_named(tmp_path):
    (tmp_path / "numbers.json").write_text(json.dumps({"harvest": {"kept": True}}))
    flags = [*TINY, "--parts", "shuffle", "--work", tmp_path / "work", "--out", tmp_path / "numbers.json"]
    said = command(*flags)
    assert said.returncode == 0, said.stderr
    record = json.loads((tmp_path / "numbers.json").read_text())
    assert record["harvest"] == {"kept": True}
    assert record["shuffle"]["tokens"] == 3000
    assert command(*flags, "--rounds", 0).returncode == 2


@pytest.mark.peers
@pytest.mark.timeout(280)
def test_saelens_harvests_the_same_amount_of_text(tmp_path):
    if not (ROOT / ".peers" / "bin" / "python").exists():
        pytest.skip("no environment .peers; make bench-peers creates it")
    flags = [*TINY, "--tokens", 9000, "--parts", "harvest", "--rivals", "saelens", "--work", tmp_path, "--out", tmp_path / "numbers.json"]
    said = command(*flags)
    assert said.returncode == 0, said.stderr
    found = json.loads((tmp_path / "numbers.json").read_text())["harvest"]
    assert found["left_out"] == {}
    assert found["arms"]["saelens"]["tokens"] == 8192  # one batch of 64 whole contexts of 128
    assert 512 < found["arms"]["saelens"]["bytes_per_token"] < 600


def test_a_synthetic_cache_is_a_whole_one_whose_rows_are_all_tokens_but_beginnings(disk, tmp_path):
    documents = [np.arange(1, 12), np.arange(1, 4)]
    tokens = disk.repeated_tokens(documents, 200, context=8, bos_id=0)
    assert isinstance(tokens, Tokens)
    assert len(tokens.ids) == 200
    written = list(disk.write_cache(tmp_path / "cache", tokens, 4, bos_id=0, pool_tokens=60, shard_tokens=25))
    cache = ActivationCache.open(tmp_path / "cache")
    assert cache.verify() == []
    rows = np.concatenate([cache.read(shard)[1].numpy() for shard in cache.shards("train")])
    assert sorted(rows) == np.flatnonzero(tokens.ids != 0).tolist()
    assert sum(pool.bytes for pool in written) == sum(path.stat().st_size for path in (tmp_path / "cache" / disk.SITE).iterdir())


def test_dd_and_the_page_cache(disk, tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(os.urandom(1 << 20))
    assert disk.in_memory(path) == 1
    assert 0 < disk.dd(path, str(tmp_path / "copy"), "conv=fdatasync") < 10
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()
    refused = False
    try:
        disk.forget([path])
    except InputError:  # a temporary folder in memory
        refused = True
    assert refused == (disk.in_memory(path) > 0.01)
