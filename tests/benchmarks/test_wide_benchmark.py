"""The benchmark of wide dictionaries, on one so small that only its bookkeeping is tested."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.soak
def test_every_part_is_measured_and_nothing_stays(tmp_path):
    sizes = ["--features", 4096, "--width", 64, "--tokens", 300, "--l0", 20, "--threads", 1, "--work", tmp_path / "work"]
    command = [sys.executable, ROOT / "benchmarks" / "wide_dictionary.py", *sizes]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    said = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=environment)
    if "leave the memory" in said.stderr:
        pytest.skip("this disk is memory itself")
    assert said.returncode == 0, said.stderr
    rows = [line.split(" | ") for line in said.stdout.splitlines() if line.startswith("| ")][1:]
    names = ["opening and steering with one feature", "indexing", "opening an index and one page", "20 more pages"]
    assert [row[0].removeprefix("| ") for row in rows] == names
    assert all(float(row[1]) > 0 and float(row[3].replace(",", "")) > 50 for row in rows)
    assert list((tmp_path / "work").iterdir()) == []
