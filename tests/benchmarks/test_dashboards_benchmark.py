"""Our index beside the real SAEDashboard, on a text so small that only what both say is looked at, not the time they take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def command(*flags: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, ROOT / "benchmarks" / "dashboards.py", *map(str, flags)]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.peers
@pytest.mark.timeout(280)
def test_saedashboard_finds_what_we_find_and_its_folder_is_read_and_written_field_for_field(tmp_path):
    if not (ROOT / ".peers" / "bin" / "python").exists():
        pytest.skip("no environment .peers with SAEDashboard; make bench-peers creates it")
    said = command("--tokens", 12_600, "--rounds", 1, "--work", tmp_path / "work", "--out", tmp_path / "numbers.json")
    assert said.returncode == 0, said.stderr
    found = json.loads((tmp_path / "numbers.json").read_text())
    agreement = found["agreement"]
    assert agreement["features"] == 256
    assert agreement["density_difference"] < 3 / 12_600  # an activation on the edge of 0, where activations are stored in half precision
    assert agreement["max_relative_difference"] < 0.02
    assert agreement["folder_rewritten_the_same"]
    assert agreement["fields_the_same"]
    assert list((tmp_path / "work").iterdir()) == []


def test_sizes_of_zero_are_refused(tmp_path):
    said = command("--rounds", 0, "--out", tmp_path / "numbers.json")
    assert said.returncode == 2
    assert "at least 1" in said.stderr
