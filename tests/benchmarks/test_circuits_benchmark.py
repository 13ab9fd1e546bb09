"""The circuits benchmark on the bundled model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_arm_is_a_multiple_of_the_pass(tmp_path):
    script = [sys.executable, ROOT / "benchmarks" / "circuits.py", "--model", ROOT / "checkpoints" / "demo-lm", "--task", "agreement"]
    few = ["--pairs", "2", "--rounds", "1", "--threads", "1", "--out", tmp_path / "numbers.json"]
    said = subprocess.run([*script, *few], check=True, capture_output=True, text=True, timeout=200).stdout
    (found,) = json.loads((tmp_path / "numbers.json").read_text()).values()
    arms, one = found["arms"], found["arms"]["forward and backward"]["seconds"]["median"]
    assert list(arms) == ["forward and backward", "eap", "eap-ig", "ceap"]
    assert found["size"]["edges"] == 1519
    for name, arm in arms.items():
        assert arm["multiple"]["median"] == pytest.approx(arm["seconds"]["median"] / one)
        assert f"| {name} |" in said
