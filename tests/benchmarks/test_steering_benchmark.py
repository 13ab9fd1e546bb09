"""The benchmark of steered generation, on sizes so small that only its bookkeeping is tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--batches", 1, 3, "--prompt-tokens", 4, "--new-tokens", 3, "--rounds", 1, "--threads", 1, "--models", "checkpoints/demo-lm"]


def command(*flags: object) -> subprocess.CompletedProcess:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    script = [sys.executable, ROOT / "benchmarks" / "steering_speed.py"]
    return subprocess.run([*script, *map(str, flags)], capture_output=True, text=True, env=env, cwd=ROOT)


def test_every_arm_has_a_share_that_follows_from_its_time(tmp_path):
    out = tmp_path / "numbers.json"
    said = command(*TINY, "--out", out, "--markdown")
    assert said.returncode == 0, said.stderr
    assert "checkpoints/demo-lm (4 layers of 256" in said.stdout
    batches = json.loads(out.read_text())["checkpoints/demo-lm"]["batches"]
    assert list(batches) == ["1", "3"]
    for case in batches.values():
        operations = [f"{name}, {place} positions" for name in ("add", "rotate", "clamp", "ablate") for place in ("all", "generated")]
        assert list(case) == ["none", "none, again", "bare hook", *operations]
        for arm, values in case.items():  # one round, so that the ratio of medians is the median of ratios
            share = case["none"]["ms_per_token"]["median"] / values["ms_per_token"]["median"]
            assert values["share_of_speed"]["median"] == pytest.approx(share)
            assert f"| {arm} |" in said.stdout


def test_the_numbers_of_other_models_stay(tmp_path):
    out = tmp_path / "numbers.json"
    out.write_text(json.dumps({"another": {"kept": True}}))
    said = command(*TINY, "--batches", 1, "--out", out)
    assert said.returncode == 0, said.stderr
    assert json.loads(out.read_text())["another"] == {"kept": True}


def test_impossible_sizes_are_refused_in_a_sentence(tmp_path):
    for flags, sentence in ((["--rounds", 0], "at least 1"), (["--new-tokens", 300], "context of checkpoints/demo-lm")):
        said = command(*TINY, *flags, "--out", tmp_path / "numbers.json")
        assert said.returncode == 2
        assert sentence in said.stderr
        assert not (tmp_path / "numbers.json").exists()
