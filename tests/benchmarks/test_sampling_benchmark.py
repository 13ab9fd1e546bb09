"""The sampling benchmark on the bundled model."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_arm_is_measured(tmp_path):
    script = [sys.executable, ROOT / "benchmarks" / "sampling_speed.py", "--model", ROOT / "checkpoints" / "demo-lm"]
    few = ["--rows", "2", "--new-tokens", "3", "--rounds", "1", "--out", tmp_path / "numbers.json"]
    said = subprocess.run([*script, *few], check=True, capture_output=True, text=True, timeout=120).stdout
    arms = json.loads((tmp_path / "numbers.json").read_text())["arms"]
    assert len(arms) == 6
    assert all(arm["ms_per_token"]["median"] > 0 for arm in arms.values())
    assert all(name in said for name in arms)
