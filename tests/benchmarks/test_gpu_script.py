"""The script for a machine with a GPU: its dry run leaves every part's numbers, whatever becomes of the other parts."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"
TIMES = {"ms", "device_ms", "first_s", "peak_mib", "held_mib"}


@pytest.fixture(scope="module")
def script():
    """What gpu.py defines, with the modules beside it."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return runpy.run_path(str(SCRIPT))
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def dry(script, tmp_path_factory):
    """A dry run in which one part fails and one hangs, before all others."""
    out, main, plan = tmp_path_factory.mktemp("gpu") / "results", script["main"], script["plan"]
    Part, python = script["Part"], sys.executable
    broken = Part("broken", [python, "-c", "print('{\"half\": 1}', flush=True); raise ValueError('on purpose')"], 60)
    hanging = Part("hanging", [python, "-c", "print('{\"half\": 1}', flush=True); import time; time.sleep(600)"], 3)
    absent = Part("absent", ["/nowhere/compute-sanitizer"], 60, together=True)
    main.__globals__["plan"] = lambda options, work: [broken, hanging, absent, *plan(options, work)]
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        main(["--dry-run", "--out", str(out), "--parts", "exact", "memcheck", "cache", "machine", "steps", "train", "profile"])
    finally:
        sys.path.remove(str(SCRIPT.parent))
        main.__globals__["plan"] = plan
    return out, json.loads((out / "results.json").read_text())["parts"]


def test_what_fails_hangs_or_is_not_there_is_recorded_and_stops_nothing(dry):
    parts = dry[1]
    assert parts["broken"]["state"] == "failed with code 1"
    assert "ValueError: on purpose" in parts["broken"]["last_lines"]
    assert parts["hanging"]["state"] == "too slow: stopped after 3 s"
    assert parts["broken"]["answers"] == parts["hanging"]["answers"] == [{"half": 1}]
    assert parts["absent"]["state"].startswith("not started: ")
    assert {name: parts[name]["state"] for name in parts.keys() - {"broken", "hanging", "absent"}} == dict.fromkeys(
        ("exact", "memcheck", "cache", "machine", "steps", "train", "profile"), "ok"
    )


def test_every_part_leaves_its_numbers(dry):
    answers = {name: part["answers"] for name, part in dry[1].items()}
    assert len(answers["exact"]) == 7
    assert all(a["ok"] and 0 < a["errors"]["W_enc_fd"] < 2e-2 for a in answers["exact"])
    assert {a["capacity"] for a in answers["exact"]} == {1, 256}
    assert [(a["deterministic"], a["capacity"]) for a in answers["memcheck"]] == [(True, 64), (False, 64), (True, 1), (False, 1)]
    arms = [(a["arm"], a.get("deterministic"), a.get("clip")) for a in answers["steps"]]
    assert arms == [("encoder", None, None), *(("ours", deterministic, clip) for deterministic in (True, False) for clip in (0.0, 1.0))]
    assert all(a.keys() >= TIMES for a in answers["steps"])
    for a in answers["steps"][1:]:
        kernels = a["kernels"]
        assert kernels.keys() >= {"prepare", "encode", "decode", "learn", "encode_rows", "decode_rows", "learn_features", "whole"}
        assert ("scatter" in kernels) == (not a["deterministic"])
        assert ("clip" in kernels) == ("step" in kernels) == bool(a["clip"])
        assert kernels["encode"] <= kernels["encode_rows"] <= kernels["whole"]
    assert [a["what"] for a in answers["train"]] == ["the loader alone", "defaults", "fastest"]
    for a in answers["train"][1:]:
        assert a["steps"] == 3
        assert 0 <= a["loader_share"] < 1
        assert a["metrics"][0]["l0"] > 0
    assert [a["deterministic"] for a in answers["profile"]] == [True, False]


def test_the_folder_is_small_flat_and_has_the_table(dry):
    out, parts = dry
    assert {path.name for path in out.iterdir()} == {"table.md", "results.json", "logs.txt", "profile.txt", "trace.json.gz"}
    assert sum(path.stat().st_size for path in out.iterdir()) < 16 << 20
    table = (out / "table.md").read_text()
    assert all(f"| {name} | {part['seconds']} | {part['state']} |" in table for name, part in parts.items())
    assert "7 of 7 cases within tolerance" in table
    assert "ours, not deterministic, clipped" in table
    assert "Training, defaults: " in table


def test_the_floor_is_the_product_plus_the_bytes_of_weights_and_moments(script):
    """By hand, for 8,192 rows of 768 and 32,768 features at 790 TFLOP/s and 4,300 GB/s: about 0.8 ms."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        steps = runpy.run_path(str(SCRIPT.with_name("gpu_table.py")))["steps"]
    finally:
        sys.path.remove(str(SCRIPT.parent))
    time = {name: {"median": 1.0, "min": 1.0, "max": 1.0} for name in ("ms", "device_ms")}
    answer = {"arm": "encoder", "d": 768, "f": 32_768, "precision": "bfloat16", "rows": 8192, "l0": 50.0, "peak_mib": 0.0, **time}
    floor, encoder = steps([answer], {"bandwidth_gb": 4300.0}, {"bfloat16": 790.0})
    product, moved = 2 * 8192 * 768 * (32_768 + 4 * 50) / 790e12, (2 * 3 * 2 * 4 * 32_768 * 768 + 4 * 8192 * 768) / 4300e9
    assert float(floor[4]) == pytest.approx(1000 * (product + moved), abs=1e-3) == pytest.approx(0.8, abs=0.03)
    assert encoder[6] == f"{1 / (1000 * (product + moved)):.2f}"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--dry-run", "--parts", "stpes"], "expected names of parts, got stpes"),
        (["--dry-run", "--minutes", "0"], "expected --minutes above 0, got 0"),
        pytest.param([], "expected a CUDA GPU, but torch", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ],
)
def test_flags_that_cannot_be_used_get_a_sentence_and_cost_no_file(script, tmp_path, capsys, flags, sentence):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(SystemExit, match="2"):
        script["main"]([*flags, "--out", str(tmp_path)])
    assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.soak
def test_the_whole_dry_run(script, tmp_path):
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        script["main"](["--dry-run", "--out", str(tmp_path / "out")])
    finally:
        sys.path.remove(str(SCRIPT.parent))
    parts = json.loads((tmp_path / "out" / "results.json").read_text())["parts"]
    absent = {name for name, part in parts.items() if part["state"] != "ok"}
    assert absent <= {"saelens", "dictionary_learning", "sparsify"}, "only other tools may be missing"
    assert parts["eager"]["answers"][0]["loss"] == pytest.approx(parts["steps"]["answers"][1]["loss"], rel=3e-2)
    assert set(parts["harvest"]["answers"][0]["arms"]) == {"bare", "harvest"}
