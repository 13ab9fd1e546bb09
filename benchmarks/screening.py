"""Ways from rows to the list of active entries, side by side: time, and the share of entries that a bound leaves as candidates.

All ways run in one process, in interleaved rounds, on the same rows and weights; medians and ranges are over rounds, ratios within a round.
`prepare` is what a way does once for given weights: a training step pays it too, an index once.

b rows (tokens) · d model width · f features
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from objective import BenchmarkConfig, Case, machine, problem, spread
from report import describe, spread_text

from sae.activations.cache import ActivationCache
from sae.command_line import run
from sae.dictionaries.dictionary import Dictionary
from sae.disk.writing import write_json
from sae.encoding import METHODS, Encoder, Method
from sae.encoding.bounds import Bfloat16Features, Frame, frame_of
from sae.encoding.encoder import refuse_missing
from sae.encoding.int8 import Int8Features
from sae.entries import Buffers
from sae.errors import InputError
from sae.progress import progress


@dataclass
class ScreeningConfig:
    d_in: int = 512
    """Model width of a synthetic stream."""
    d_sae: tuple[int, ...] = (4096, 16_384)
    """Features, of initial weights."""
    l0: float = 64.0
    """Mean number of active features in a row, of initial weights."""
    batch_size: int = 4096
    """Rows."""
    stream: str = "synthetic"
    """"synthetic" for normally distributed activations, or the folder of an activation cache."""
    dictionary: Path | None = None
    """Folder of a dictionary trained on that cache, for its weights, size and firing. Default: initial weights."""
    methods: tuple[Method, ...] = METHODS
    """Ways to compare with `product`. bfloat16 takes many times as long on a processor without instructions for it."""
    rounds: int = 5
    """Interleaved rounds, after one that is not counted."""
    threads: int | None = None
    """Threads. Default: one per core."""
    device: str = "cpu"
    """cpu or cuda."""
    seed: int = 0
    """Seed of the rows and the weights."""
    out: Path | None = None
    """File for the numbers. Default: benchmarks/results/screening.json, with the dictionary's name in its name."""


@torch.no_grad()
def benchmark(config: ScreeningConfig) -> None:
    if config.dictionary and config.stream == "synthetic":
        raise InputError("expected the cache that --dictionary was trained on, got none; give it as --stream")
    torch.set_num_threads(config.threads or torch.get_num_threads())
    cache = None if config.stream == "synthetic" else ActivationCache.open(config.stream)
    dictionary = Dictionary.load(config.dictionary) if config.dictionary else None
    of = BenchmarkConfig(stream=config.stream, dictionary=config.dictionary, seed=config.seed)
    width = config.d_in if cache is None else cache.d_in
    cases = [
        Case(width, f, None if dictionary else config.l0, config.batch_size) for f in ([dictionary.d_sae] if dictionary else config.d_sae)
    ]
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(of, torch.get_num_threads()),
        "flags": flags,
        "cases": [],
    }
    out = config.out or Path("benchmarks/results") / f"screening{f'-{config.dictionary.resolve().name}' if config.dictionary else ''}.json"
    for case in cases:
        tensors = {name: value.to(config.device) for name, value in problem(of, case, cache, dictionary).items()}
        centred_bd = tensors["x_bd"] - tensors["b_dec_d"]
        record["cases"].append(case._asdict() | measured(config, centred_bd, tensors["W_enc_fd"], tensors["b_enc_f"]))
        write_json(out, record)
        print(table(case, record["cases"][-1]))
    print(f"written to {out}")


def measured(config: ScreeningConfig, x_bd: torch.Tensor, W_fd: torch.Tensor, b_f: torch.Tensor) -> dict[str, Any]:
    methods: list[Method] = ["product"]
    for method in dict.fromkeys(config.methods):
        try:
            refuse_missing(method, W_fd)
            methods += [method] if method != "product" else []
        except InputError as reason:
            print(f"{method} is left out: {reason}")
    encoders = {method: Encoder(method, W_fd, b_f, like_bd=x_bd) for method in methods}
    buffers, prepared = ({method: Buffers() for method in methods} for _ in range(2))
    out_bf = x_bd.new_empty(len(x_bd), len(W_fd))
    seconds: dict[str, dict[str, list[float]]] = {what: {} for what in ("encode", "prepare")}
    product: list[float] = []
    with progress("rounds", config.rounds + 1, "rounds") as bar:
        for turn in range(config.rounds + 1):
            once = [timed(x_bd, lambda: torch.addmm(b_f, x_bd, W_fd.T, out=out_bf))]
            for method in methods:
                encode = timed(x_bd, lambda method=method: encoders[method].entries(x_bd, buffers[method]))
                prepare = timed(x_bd, lambda method=method: Encoder(method, W_fd, b_f, buffers=prepared[method]))
                if turn:
                    seconds["encode"].setdefault(method, []).append(encode)
                    seconds["prepare"].setdefault(method, []).append(prepare)
            product += once if turn else []
            bar.advance(1)
    found: dict[str, Any] = {"product_ms": spread([1000 * s for s in product]), "methods": {}}
    for method in methods:
        own = seconds["encode"][method]
        found["methods"][method] = {
            "ms": spread([1000 * s for s in own]),
            "times_product": spread([s / p for s, p in zip(own, product)]),
            "times_today": spread([s / p for s, p in zip(own, seconds["encode"]["product"])]),
            "prepare_ms": spread([1000 * s for s in seconds["prepare"][method]]),
            "active": len(encoders[method].entries(x_bd, buffers[method]).row_n) / (len(x_bd) * len(W_fd)),
            "candidates": candidates(method, x_bd, W_fd, b_f),
        }
    return found


def timed(x_bd: torch.Tensor, work: Callable[[], Any]) -> float:
    start = perf_counter()
    work()
    if x_bd.is_cuda:
        torch.cuda.synchronize()
    return perf_counter() - start


def candidates(method: Method, x_bd: torch.Tensor, W_fd: torch.Tensor, b_f: torch.Tensor) -> dict[str, float]:
    """Share of entries whose bound is positive, with the frame of these rows and without a frame."""
    if method == "product" or method == "onednn":
        return {}
    shares = {}
    x_bd, frame = x_bd[:1024], frame_of(x_bd[:1024], W_fd)
    plain = Frame(torch.zeros_like(frame.centre_d), torch.ones_like(frame.scale_d), float(x_bd.abs().amax(1).median()))
    for name, one in (("framed", frame), ("not framed", plain)):
        features = (Bfloat16Features if method == "bfloat16" else Int8Features)(W_fd, b_f, 0.0, one)
        found = sum(int((bound_pb > 0).sum()) for _, bound_pb in features.upper_bounds(x_bd, None, Buffers()))
        shares[name] = found / (len(x_bd) * len(W_fd))
    return shares


def table(case: Case, found: dict[str, Any]) -> str:
    lines = [f"{describe(case._asdict())}; addmm alone {spread_text(found['product_ms'], 0)} ms", ""]
    lines += ["| way | ms to entries | x addmm | x today | prepare, ms | active | candidates (no frame) |", "|---|---|---|---|---|---|---|"]
    for method, one in found["methods"].items():
        shares = " ".join(
            f"{100 * share:.3f} %" if name == "framed" else f"({100 * share:.3f} %)" for name, share in one["candidates"].items()
        )
        times = [spread_text(one["ms"], 0), *(spread_text(one[name], 2) for name in ("times_product", "times_today"))]
        lines.append("| " + " | ".join([method, *times, spread_text(one["prepare_ms"], 1), f"{100 * one['active']:.3f} %", shares]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(benchmark, ScreeningConfig, __doc__ or "")
