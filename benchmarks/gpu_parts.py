"""The parts of gpu.py that measure, each in its own process: every number is answered at once, so that no later fault loses it.

Without a GPU the same code runs at tiny sizes in Triton's interpreter, for which the clocks are the host's.

b rows (tokens) · d model width · f features
"""

import gc
import json
import os
import platform
import shutil
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import NormalDist, median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from answers import Answer, answering
from arms import ARMS, PEERS, Problem, forget_peak, memory, ours
from objective import spread
from torch import Tensor

TOLERANCE = {"float32": 1e-4, "tf32": 3e-3, "bfloat16": 2e-2}
"""relative error of loss and gradients against float64"""
AHEAD = 40_000_000
"""cycles for which the device is put to sleep, so that the host has queued a whole step before its first kernel starts"""


class Settings(NamedTuple):
    part: str
    device: str
    sizes: list[tuple[int, int]]
    """(d, F), the main one first"""
    precisions: list[str]
    rows: int
    """of a batch"""
    l0: float
    cached_rows: int
    """of the synthetic cache"""
    tokens: int
    """of a harvest"""
    seconds: float
    """of training"""
    work: str
    """folder for what is not kept"""
    out: str


def machine(s: Settings, answer: Answer) -> None:
    """What it is, and its two ceilings: bytes a second of a large copy, operations a second of a large product."""
    answer(python=platform.python_version(), torch=torch.__version__, cores=os.cpu_count(), compiler=shutil.which("g++"))
    if s.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        sizes = {"memory_gib": about.total_memory / 2**30, "l2_mib": about.L2_cache_size / 2**20}
        answer(gpu=about.name, multiprocessors=about.multi_processor_count, **sizes)
        query = "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu"
        if shutil.which("nvidia-smi"):
            said = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True)
            answer(nvidia_smi=said.stdout.strip() or said.stderr.strip())
    bytes_n = torch.empty(1 << (33 if s.device == "cuda" else 22), dtype=torch.uint8, device=s.device).random_()
    source, target = bytes_n.chunk(2)
    copied = timed(partial(target.copy_, source), s)
    answer(bandwidth_gb=len(bytes_n) / copied["ms"]["median"] / 1e6)
    n = 8192 if s.device == "cuda" else 64
    for precision in s.precisions:
        a, b = torch.randn(2, n, n, device=s.device, dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32)
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        product_s = timed(partial(torch.mm, a, b, out=torch.empty_like(a)), s)["ms"]["median"] / 1000
        answer(precision=precision, tflops=2 * n**3 / product_s / 1e12)


def exact(s: Settings, answer: Answer) -> None:
    """The kernels at the real sizes against float64: every block shape, lists that overflow, both orders of summation."""
    from sae.objective import Workspace, cuda, objective

    for number, (d, f) in enumerate(s.sizes):
        x_bd, weights = separated(s, d, f)
        truth = objective(x_bd, weights, 1.0, "reference")
        ways = [(block, True, 256) for block in cuda.BLOCKS] + [(cuda.BLOCKS[2], False, 256), (cuda.BLOCKS[2], True, 1)]
        for (block, deterministic, capacity), precision in product(ways if number == 0 else ways[2:3], s.precisions):
            cuda.encode.configs = [block]
            shape = {**block.kwargs, "num_warps": block.num_warps, "num_stages": block.num_stages}
            what = {"d": d, "f": f, "precision": precision, "block": shape, "deterministic": deterministic, "capacity": capacity}
            one(answer, what, against, truth, x_bd, weights, Workspace(precision, deterministic, capacity))


def against(truth: Any, x_bd: Tensor, weights: Any, workspace: Any) -> dict[str, Any]:
    from sae.objective import objective

    step = objective(x_bd, weights, 1.0, "triton", workspace)
    pairs = {"loss": (step.loss, truth.loss), **dict(zip(weights._fields, zip(step.gradients, truth.gradients)))}
    errors = {name: float((ours - exact).norm() / exact.norm()) for name, (ours, exact) in pairs.items()}
    same = torch.equal(step.fired_f, truth.fired_f)
    return {"errors": errors, "same_firing": same, "ok": same and all(e <= TOLERANCE[workspace.precision] for e in errors.values())}


def small(s: Settings, answer: Answer) -> None:
    """Every kind of step once, small enough for the memory and race checkers."""
    from sae.objective import Adam, Weights, Workspace, cuda, objective

    cuda.encode.configs = cuda.BLOCKS[-1:]
    x_bd, weights = separated(s, 24, 72, rows=40) if s.device == "cuda" else separated(s, *s.sizes[0])
    for precision, deterministic, capacity in (("bfloat16", True, 64), ("tf32", False, 64), ("float32", True, 1), ("float32", False, 1)):
        own = Weights(*(w.clone() for w in weights))
        workspace, adam = Workspace(precision, deterministic, capacity), Adam(own)
        for optimizer, clip in ((None, 0.0), (adam, 0.0), (adam, 1.0)):
            step = objective(x_bd, own, 1.0, "triton", workspace, optimizer, clip)
        answer(precision=precision, deterministic=deterministic, capacity=capacity, loss=float(step.loss))


def cases(s: Settings) -> list[tuple[tuple[int, int], str]]:
    """Everything at the main size, then the cheaper operands at the others."""
    others = sorted(product(s.sizes[1:], s.precisions), key=lambda case: s.precisions.index(case[1]))
    return [*product(s.sizes[:1], s.precisions), *others]


def steps(s: Settings, answer: Answer) -> None:
    """Our step and its kernels, beside the encoder product alone."""
    for size, precision in cases(s):
        what = {"d": size[0], "f": size[1], "precision": precision, "rows": s.rows}
        one(answer, {"arm": "encoder", **what}, measured, "encoder", s, size, precision)
        for deterministic, clip in product((True, False), (0.0, 1.0)):
            how = {"deterministic": deterministic, "clip": clip}
            one(answer, {"arm": "ours", **what, **how}, measured, "ours", s, size, precision, **how)


def rival(s: Settings, answer: Answer) -> None:
    """The step of another tool. sparsify's own trainer always uses tf32."""
    for size, precision in cases(s) if s.part != "sparsify" else product(s.sizes, ("tf32",)):
        torch.compiler.reset()
        what = {"arm": s.part, "d": size[0], "f": size[1], "precision": precision, "rows": s.rows}
        one(answer, what, measured, s.part, s, size, precision)


def cache(s: Settings, answer: Answer) -> None:
    """Sums of a few of 4,096 directions, on disk as a harvest would have left them."""
    import numpy as np
    from disk import repeated_tokens, write_cache

    d, pool = s.sizes[0][0], min(1 << 18, s.cached_rows)
    generator = torch.Generator(s.device).manual_seed(0)
    direction_nd = torch.nn.functional.normalize(torch.randn(4096, d, generator=generator, device=s.device))
    chosen = torch.randint(4096, (pool, 16), generator=generator, device=s.device)
    strength = torch.empty(pool, 16, device=s.device).exponential_(generator=generator)
    acts_nd = torch.nn.functional.embedding_bag(chosen, direction_nd, per_sample_weights=strength, mode="sum")
    acts_nd *= (d / 3 / acts_nd.square().sum(1).mean()).sqrt()  # the mean squared norm that is written beside it
    tokens = repeated_tokens([np.arange(1, 1000, dtype=np.int32)], s.cached_rows, context=1024, bos_id=None)
    sizes = {"pool_tokens": pool, "shard_tokens": 1 << 16}
    for written in write_cache(Path(s.work) / "cache", tokens, d, bos_id=None, acts_nd=acts_nd.half().cpu(), **sizes):
        answer(bytes=written.bytes, seconds=written.seconds)


def train(s: Settings, answer: Answer) -> None:
    """Real runs from that cache: with the settings by default for two thirds of the time, then with the fastest."""
    from sae.activations.cache import ActivationCache
    from sae.activations.cached import CachedSource
    from sae.activations.source import Batches
    from sae.training.config import TrainingConfig
    from sae.training.trainer import train_on

    folder, steps = Path(s.work) / "cache", 5000 if s.device == "cuda" else 3
    source = CachedSource(ActivationCache.open(folder))
    batches, draw = source.batches(s.rows, device=s.device), Batches.__next__
    next(batches)
    drawn = timed(lambda: next(batches), s)
    answer(what="the loader alone", rows_per_second=s.rows / drawn["ms"]["median"] * 1000, ms=drawn["ms"])
    fastest = {"precision": "bfloat16", "deterministic": False, "clip": 0.0} if s.device == "cuda" else {"clip": 0.0}
    for name, share, settings in (("defaults", 2 / 3, {}), ("fastest", 1 / 3, fastest)):
        draws: list[tuple[float, float]] = []  # begin and end
        stop = threading.Timer(share * s.seconds, os.kill, (os.getpid(), signal.SIGINT))

        def wait(batches: Batches) -> dict[str, Tensor]:
            if not draws:  # noqa: B023
                stop.start()  # noqa: B023
            start = time.perf_counter()
            batch = draw(batches)
            draws.append((start, time.perf_counter()))  # noqa: B023
            return batch

        sizes = {"d_sae": s.sizes[0][1], "steps": steps, "batch_size": s.rows, "log_every": 50 if s.device == "cuda" else 1}
        config = TrainingConfig(cache=folder, out=Path(s.work) / name, device=s.device, checkpoint_every=10**9, **sizes, **settings)
        with patch.object(Batches, "__next__", wait):
            try:
                train_on(source, config, config.settings())
            except KeyboardInterrupt:
                print("stopped, as planned")
            finally:
                stop.cancel()
        seconds = draws[-1][0] - draws[0][1]  # the first draw waits for the disk
        found = {"rows_per_second": s.rows * (len(draws) - 1) / seconds, "steps": len(draws), "seconds": seconds}
        lines = (config.out / "metrics.jsonl").read_text().splitlines()
        some = [json.loads(line) for line in lines[:: max(1, len(lines) // 10)]]
        answer(what=name, settings=settings, loader_share=sum(b - a for a, b in draws[1:-1]) / seconds, **found, metrics=some)


def harvest(s: Settings, answer: Answer) -> None:
    """The demo model on its own text, beside the bare forward pass."""
    from activations import BenchmarkConfig, measure_harvest

    folder = Path(s.work) / "harvest"
    folder.mkdir()
    answer(**measure_harvest(BenchmarkConfig(device=s.device, rivals=(), rounds=2, tokens=s.tokens), folder))


def profile(s: Settings, answer: Answer) -> None:
    """Two steps of each kind through torch's profiler: a table in profile.txt, and the timeline of the deterministic one."""
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if s.device == "cuda" else [])]
    by = "self_device_time_total" if s.device == "cuda" else "self_cpu_time_total"
    for deterministic, clip in ((True, 1.0), (False, 0.0)):
        step = ours(gaussian(s, s.sizes[0], "bfloat16")._replace(deterministic=deterministic, clip=clip)).step
        for _ in range(3):
            step()
        synchronize(s.device)
        with torch.profiler.profile(activities=activities) as found:
            for _ in range(2):
                step()
            synchronize(s.device)
        averages = found.key_averages()
        with open(Path(s.out) / "profile.txt", "a") as file:
            print(f"deterministic {deterministic}, clip {clip}, two steps\n{averages.table(sort_by=by, row_limit=40)}\n", file=file)
        if deterministic:
            found.export_chrome_trace(str(Path(s.out) / "trace.json.gz"))
        largest = sorted(averages, key=lambda event: -getattr(event, by))[:12]
        answer(deterministic=deterministic, clip=clip, ms={event.key[:80]: getattr(event, by) / 2000 for event in largest})


@torch.no_grad()
def gaussian(s: Settings, size: tuple[int, int], precision: str) -> Problem:
    """Normal rows and unit decoder rows: under this bias a pre-activation, normal too, is above zero `l0` times a row."""
    (d, f), generator = size, torch.Generator(s.device).manual_seed(0)
    x_bd = torch.randn(s.rows, d, generator=generator, device=s.device)
    W_fd = torch.nn.functional.normalize(torch.randn(f, d, generator=generator, device=s.device))
    bias_f = torch.full((f,), -NormalDist().inv_cdf(1 - s.l0 / f), device=s.device)
    zero_d = torch.zeros(d, device=s.device)
    return Problem(x_bd, W_fd, bias_f, W_fd.clone(), zero_d, l1=1.0, device=s.device, backend="triton", precision=precision)


def separated(s: Settings, d: int, f: int, rows: int = 1000) -> tuple[Tensor, Any]:
    """A batch whose rows are sums of a few decoder rows, with a bias half way, so that rounding decides about no entry; and weights."""
    from sae.objective import Weights

    generator, rows = torch.Generator(s.device).manual_seed(1), min(rows, s.rows)
    W_fd = torch.nn.functional.normalize(torch.randn(f, d, generator=generator, device=s.device))
    b_dec_d = torch.randn(d, generator=generator, device=s.device)
    chosen = torch.randint(f, (rows, max(1, d // 192)), generator=generator, device=s.device)
    strength = 3 + torch.rand(chosen.shape, generator=generator, device=s.device)
    x_bd = torch.nn.functional.embedding_bag(chosen, W_fd, per_sample_weights=strength, mode="sum") + b_dec_d
    return x_bd, Weights(W_fd, torch.full((f,), -1.5, device=s.device), W_fd.clone(), b_dec_d)


def one(answer: Answer, what: dict[str, Any], measure: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> None:
    """Answers with what was measured, or why it was not; then all its memory is free."""
    try:
        answer(**what, **measure(*args, **kwargs))
    except Exception as error:
        traceback.print_exc()
        answer(**what, error=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}")
    gc.collect()
    torch.cuda.empty_cache()


def measured(name: str, s: Settings, size: tuple[int, int], precision: str, **how: Any) -> dict[str, Any]:
    arm = ARMS[name](gaussian(s, size, precision)._replace(**how))
    found = timed(arm.step, s)
    if name == "ours":
        found["kernels"] = kernels(arm.step, s.device, rounds=min(5, found["count"]))
    return found | arm.check()


def timed(step: Callable[[], Any], s: Settings) -> dict[str, Any]:
    """Milliseconds of one call after another, and of calls queued ahead of the device; memory beyond what was held before.

    Weights and moments are several times the L2 cache, so that each step finds it cold.
    """
    held, _ = memory(s.device)
    seconds = []
    for _ in range(4 if s.device == "cuda" else 1):  # the first compiles and tunes
        start = time.perf_counter()
        step()
        synchronize(s.device)
        seconds.append(time.perf_counter() - start)
    count = max(3, min(40, int(0.3 / seconds[-1]))) if s.device == "cuda" else 1
    forget_peak(s.device)
    marks = [mark(s.device)]
    for _ in range(count):
        step()
        marks.append(mark(s.device))
    synchronize(s.device)
    _, peak = memory(s.device)
    ahead = [alone(step, s.device) for _ in range(min(count, 7))]
    return {
        "ms": spread([between(a, b) for a, b in pairwise(marks)]),
        "device_ms": spread(ahead),
        "count": count,
        "first_s": seconds[0],
        "peak_mib": (peak - held) / 2**20,
        "held_mib": held / 2**20,
    }


def alone(step: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda._sleep(AHEAD)
    start = mark(device)
    step()
    end = mark(device)
    synchronize(device)
    return between(start, end)


def kernels(step: Callable[[], Any], device: str, rounds: int) -> dict[str, float]:
    """Median milliseconds of every kernel, of the functions around them, and of what follows: clipping, and Adam's `step`."""
    from sae import objective as package
    from sae.objective import cuda

    found: dict[str, list[tuple[Any, Any]]] = {}

    def clocked(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = mark(device)
            result = call(*args, **kwargs)
            found.setdefault(name, []).append((start, mark(device)))
            return result

        return wrapper

    class Launches:
        def __init__(self, name: str, kernel: Any):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            return clocked(self.name, self.kernel[grid])

    names = ("encode", "decode", "scatter", "learn")
    around = [(cuda, n) for n in ("prepare", "encode_rows", "decode_rows", "learn_features")] + [(package, "clip"), (package.Adam, "step")]
    patches = [patch.object(cuda, name, Launches(name, getattr(cuda, name))) for name in names]
    patches += [patch.object(module, name, clocked(name, getattr(module, name))) for module, name in around]
    for active in patches:
        active.start()
    try:
        for _ in range(rounds):
            alone(clocked("whole", step), device)
    finally:
        for active in patches:
            active.stop()
    return {name: median(between(a, b) for a, b in pairs) for name, pairs in found.items()}


def mark(device: str) -> Any:
    """A moment on the device's clock, on a CPU on the host's."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Milliseconds."""
    return 1000 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


PARTS = {part.__name__: part for part in (machine, exact, cache, steps, train, harvest, profile)}
PARTS |= dict.fromkeys(("memcheck", "racecheck"), small) | dict.fromkeys(("eager", "compile", *PEERS[:3]), rival)


def serve(settings: dict[str, Any], answer: Answer) -> None:
    if settings["device"] == "cuda":
        torch.cuda.init()
    PARTS[settings["part"]](Settings(**settings), answer)


if __name__ == "__main__":
    answering(serve)
