"""The benchmark of ways to encode, on sizes so small that only its bookkeeping is tested."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from encoders import HERE

from sae.errors import InputError

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "screening.py"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return runpy.run_path(str(SCRIPT))
    finally:
        sys.path.remove(str(SCRIPT.parent))


def test_every_way_finds_the_same_share_of_active_entries(script, tmp_path, capsys):
    config = script["ScreeningConfig"](d_in=64, d_sae=(1000,), l0=10, batch_size=96, rounds=2, threads=1, out=tmp_path / "out.json")
    script["benchmark"](config)
    (case,) = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert case["methods"].keys() == set(HERE)
    for method, one in case["methods"].items():
        assert one["active"] == pytest.approx(0.01, rel=0.01)
        assert one["times_today"]["median"] > 0
        for share in one["candidates"].values():
            assert one["active"] <= share < 3 * one["active"]
        assert bool(one["candidates"]) == (method in ("bfloat16", "int8"))
    assert "| bfloat16 |" in capsys.readouterr().out


def test_a_dictionary_without_its_cache_is_refused(script, tmp_path):
    with pytest.raises(InputError, match="expected the cache that --dictionary was trained on, got none; give it as --stream"):
        script["benchmark"](script["ScreeningConfig"](dictionary=tmp_path))
