"""The benchmark of the training step, on sizes so small that only its bookkeeping is tested: the same work in all arms, right ratios."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sae.activations.cache import ActivationCache
from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "objective.py"
PEERS = ROOT / ".peers" / "bin" / "python"
RIVALS = ["eager", "eager_tuned", *(["compile"] if shutil.which("g++") else [])]
TINY = ["--d-in", "16", "--d-sae", "64", "--l0", "4", "--batch-size", "32", "--rounds", "1", "--threads", "1"]


def command(*flags: object, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, flags)], capture_output=True, text=True, env=os.environ | env, cwd=ROOT)


@pytest.fixture(scope="module")
def script():
    """What objective.py and the modules beside it define."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return runpy.run_path(str(SCRIPT))
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def modules(script):
    return {name: sys.modules[name] for name in ("arms", "rounds", "report")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark") / "numbers.json"
    said = command(*TINY, "--rivals", *RIVALS, "--peak-tflops", 0.1, "--bandwidth", 20, "--markdown", "--out", out)
    assert said.returncode == 0, said.stderr
    return json.loads(out.read_text()), said.stdout


def reference(tensors: dict[str, torch.Tensor], l1: float) -> tuple[float, float]:
    """Loss and L0 in float64, written out."""
    x, W_enc, b_enc, W_dec, b_dec = (tensors[n].double() for n in ("x_bd", "W_enc_fd", "b_enc_f", "W_dec_fd", "b_dec_d"))
    acts = ((x - b_dec) @ W_enc.T + b_enc).clamp(min=0)
    error = (acts @ W_dec + b_dec - x).square().sum(1).mean()
    return float(error + l1 * (acts * W_dec.norm(dim=1)).sum(1).mean()), float((acts > 0).sum(1).double().mean())


def test_all_arms_did_the_same_work_and_it_is_that_of_the_formula(script, tiny):
    case = tiny[0]["cases"][0]
    config = script["BenchmarkConfig"](d_in=(16,), d_sae=(64,), l0=(4.0,), batch_size=32)
    loss, l0 = reference(script["problem"](config, script["Case"](16, 64, 4.0, 32), None, None), 1.0)
    assert case["left_out"] == {}
    losses = {name: arm["loss"] for name, arm in case["arms"].items() if name != "encoder"}
    assert losses == {name: pytest.approx(loss, rel=1e-5) for name in ("ours", *RIVALS)}
    assert case["l0"] == pytest.approx(l0) == pytest.approx(4, rel=0.05)


def test_ratios_and_rates_follow_from_the_times(tiny):
    case = tiny[0]["cases"][0]
    ms = {name: arm["ms"]["median"] for name, arm in case["arms"].items()}
    for name, arm in case["arms"].items():  # one round, so that the ratio of medians is the median of ratios
        assert arm["times_encoder"]["median"] == pytest.approx(ms[name] / ms["encoder"])
        assert arm["times_ours"]["median"] == pytest.approx(ms[name] / ms["ours"])
        assert arm["tokens_per_second"] == pytest.approx(32 / ms[name] * 1000)
        assert 0 <= arm["peak_mib"] < arm["total_mib"]
    # by hand: 2·32·16·(64 + 4·L0) operations; 3 tensors of 2·64·16 floats read and written, and a batch of 32·16 floats read
    assert case["floor_ms"]["operations"] == pytest.approx(2 * 32 * 16 * (64 + 4 * case["l0"]) / 0.1e12 * 1e3)
    assert case["floor_ms"]["bytes"] == pytest.approx((3 * 2 * 2048 * 4 + 512 * 4) / 20e9 * 1e3)


def test_the_record_says_where_it_was_measured_and_the_markdown_has_every_arm(tiny):
    record, said = tiny
    assert record["machine"]["torch"] == torch.__version__
    assert record["machine"]["threads"] == 1
    assert record["flags"]["l0"] == [4.0]
    rows = [line for line in said.splitlines() if line.startswith("| 16 | 64 |")]
    assert [row.split("|")[5].strip() for row in rows] == [arm["label"] for arm in record["cases"][0]["arms"].values()]
    assert len(rows) == 2 + len(RIVALS)


def test_an_arm_that_cannot_run_is_left_out_with_its_reason(tmp_path):
    said = command(*TINY, "--rivals", "compile", "--out", tmp_path / "n.json", PATH="", CXX="none")
    assert said.returncode == 0, said.stderr
    case = json.loads((tmp_path / "n.json").read_text())["cases"][0]
    assert set(case["arms"]) == {"encoder", "ours"}
    assert "C++ compiler" in case["left_out"]["compile"]
    assert "torch.compile is left out" in said.stdout


@pytest.mark.peers
@pytest.mark.timeout(280)
def test_the_other_tools_compute_the_same_loss(tmp_path):
    if not PEERS.exists():
        pytest.skip("no environment .peers; make bench-peers creates it")
    said = command(*TINY, "--rivals", "saelens", "dictionary_learning", "sparsify", "--out", tmp_path / "n.json")
    assert said.returncode == 0, said.stderr
    case = json.loads((tmp_path / "n.json").read_text())["cases"][0]
    assert case["left_out"] == {}
    for name in ("saelens", "dictionary_learning"):
        assert case["arms"][name]["loss"] == pytest.approx(case["arms"]["ours"]["loss"], rel=1e-5)
    assert case["arms"]["sparsify"]["ms"]["median"] > 0


def test_another_loss_or_no_room_is_a_reason_to_leave_an_arm_out(modules):
    rounds = modules["rounds"]
    rounds.refuse_other_loss("cpu", {"loss": 100.0}, {"loss": 100.05})
    for loss in (101.0, float("nan")):
        with pytest.raises(rounds.ArmFailed, match="not the same work"):
            rounds.refuse_other_loss("cpu", {"loss": 100.0}, {"loss": loss})
    rounds.refuse_too_large("cpu", 32, 64)
    with pytest.raises(rounds.ArmFailed, match="GiB free"):
        rounds.refuse_too_large("cpu", 1 << 20, 1 << 20)


def test_peak_memory_sees_what_was_held_for_a_moment(modules):
    arms = modules["arms"]
    arms.forget_peak("cpu")
    before, _ = arms.memory("cpu")
    torch.ones(32 << 20).sum()
    _, peak = arms.memory("cpu")
    assert 120 << 20 < peak - before < 200 << 20  # 32 Mi floats
    arms.forget_peak("cpu")
    assert arms.memory("cpu")[1] < peak - (60 << 20)


def test_a_real_stream_keeps_the_dictionarys_own_firing(script, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "activations"))
    from handmade_cache import write_cache

    cache = ActivationCache.open(write_cache(tmp_path / "cache", [40, 24], d_in=8))
    dictionary = Dictionary.initial(8, 32, seed=3, decoder_norm=0.7)
    torch.nn.init.normal_(dictionary.b_enc_f, generator=torch.Generator().manual_seed(0))
    dictionary.requires_grad_(False)
    config = script["BenchmarkConfig"](stream=str(tmp_path / "cache"))
    tensors = script["problem"](config, script["Case"](8, 32, None, 16), cache, dictionary)
    scale = (8 / cache.mean_squared_norm) ** 0.5
    raw_bd = tensors["x_bd"] / scale
    _, l0 = reference(tensors, 1.0)
    assert l0 == pytest.approx(float((dictionary.encode(raw_bd) > 0).sum(1).float().mean()))
    in_units = Dictionary.autoencoder(*(tensors[n] for n in ("W_enc_fd", "b_enc_f", "W_dec_fd", "b_dec_d")))
    torch.testing.assert_close(in_units(tensors["x_bd"]), dictionary(raw_bd) * scale, rtol=1e-4, atol=1e-5)


def test_growth_spans_what_it_promises(script):
    config = script["BenchmarkConfig"](growth=True)
    cases = script["cases"](config, None, None)
    along_f = [c for c in cases if c.d_in == 64]
    assert (along_f[0].d_sae, along_f[-1].d_sae) == (4096, 1_048_576)
    assert [c.l0 for c in cases if c.d_in == 512] == [16, 32, 64, 128, 256, 512, 2048, 8192]
    assert script["arms_of"](config) == ["encoder", "ours", "compile"]
    names = {script["default_out"](script["BenchmarkConfig"](**flags)).name for flags in ({}, {"growth": True}, {"stream": "a/cache"})}
    assert names == {"objective.json", "objective-growth.json", "objective-cache.json"}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (dict(rounds=0), "at least 1, got 0"),
        (dict(batch_size=0), "at least 1, got 0"),
        (dict(l0=(5000.0,)), "no larger than --d-sae"),
        (dict(l0=(0.0,)), "above 0"),
        (dict(growth=True, d_sae=(64,)), "--growth has sizes of its own"),
        (dict(stream="runs/cache", d_in=(8,)), "leave out --d-in"),
        (dict(stream="/nowhere/cache"), "does not exist"),
        (dict(dictionary=Path("d")), "--dictionary needs the cache"),
        (dict(stream="c", dictionary=Path("d"), l0=(4.0,)), "no --l0"),
        (dict(backend="triton"), "--device cuda for --backend triton"),
    ],
)
def test_flags_that_cannot_be_used_get_a_sentence(script, flags, sentence):
    with pytest.raises(InputError, match=sentence):
        script["benchmark"](script["BenchmarkConfig"](**flags))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_ends_with_a_sentence():
    said = command("--device", "cuda")
    assert said.returncode == 2
    assert said.stderr.startswith("error: expected a CUDA GPU")
    assert "Traceback" not in said.stderr
