"""The benchmark of the feature index, on sizes so small that only its bookkeeping is tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sae.activations.harvest.command import HarvestConfig, harvest

ROOT = Path(__file__).resolve().parents[2]


def test_reads_of_a_small_synthetic_index_are_measured_and_nothing_stays(tmp_path):
    sizes = ["--features", 300, "--corpus", 20_000, "--dense", 3, "--dense-count", 5000, "--mean-count", 20, "--reads", 3, "--threads", 1]
    flags = [*sizes, "--parts", "read", "--work", tmp_path / "work", "--out", tmp_path / "numbers.json"]
    command = [sys.executable, ROOT / "benchmarks" / "features.py", *map(str, flags)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if "leave the memory" in said.stderr:
        pytest.skip("this disk is memory itself")
    assert said.returncode == 0, said.stderr
    found = json.loads((tmp_path / "numbers.json").read_text())["read"]
    for kind in ("any", "dense"):
        for state in ("cold", "warm"):
            assert 0 < found[f"{kind}_{state}_ms"]["p50"] <= found[f"{kind}_{state}_ms"]["p95"]
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.soak
def test_build_page_and_export_are_measured_on_a_small_cache(tmp_path):
    model = ROOT / "checkpoints" / "demo-lm"
    text, cache = (str(model / "tokens.safetensors"),), tmp_path / "cache"
    harvest(HarvestConfig(text=text, out=cache, model=str(model), sites=("resid_post.2",), tokens=2000, device="cpu"))
    flags = ["--parts", "build", "page", "export", "--cache", cache, "--tokens", 2000, "--rounds", 1, "--reads", 5]
    command = [sys.executable, ROOT / "benchmarks" / "features.py", *flags, "--work", tmp_path / "work", "--out", tmp_path / "numbers.json"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    said = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=environment)
    assert said.returncode == 0, said.stderr
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert found["build"]["times_encode"]["median"] > 0
    assert found["page"]["requests"] == 5
    assert 5 < found["page"]["mean_kb"] < 100  # pages, not refusals
    assert found["export"]["seconds_per_10000"]["median"] > 0
    assert list((tmp_path / "work").iterdir()) == []


def test_sizes_of_zero_are_refused(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "features.py"), "--rounds", "0", "--out", str(tmp_path / "numbers.json")]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert said.returncode == 2
    assert "at least 1" in said.stderr
