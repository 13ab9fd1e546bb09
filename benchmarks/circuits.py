"""Time and memory of scoring every edge of a model, as multiples of one forward and backward pass of the same batch.

Every round runs each arm once, in an order that turns round from one round to the next; multiples are taken within a round. The pass that
is the measure gives the gradient of the metric with respect to the embeddings, no weight's. Memory is what the process held at most beyond
what it held before, its tensors' on CUDA.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
from activation_report import table, where
from arms import forget_peak, held_now, memory
from objective import machine, spread
from report import spread_text
from torch import Tensor

from sae.command_line import run
from sae.disk.reading import read_json
from sae.disk.writing import write_json
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.progress import progress
from steering.circuits.finding.scores import STEPS, edge_scores
from steering.circuits.model_graph.engine import Engine
from steering.circuits.tasks.prompts import Prompts, make_prompts

HEADER = ["arm", "seconds", "of a forward and backward", "peak MiB"]
METHODS = ("eap", "eap-ig", "ceap")
PASS = "forward and backward"


@dataclass
class BenchmarkConfig:
    model: str = "runs/models/smollm2"
    """Folder or hub name; the numbers of other models stay in the file."""
    task: str = "ioi"
    """Task whose pairs are scored."""
    pairs: int = 32
    """Pairs, in one batch."""
    rounds: int = 3
    """Interleaved rounds, after one pass that is not counted."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device: cpu or cuda."""
    threads: int | None = None
    """Threads of torch. Default: one per core."""
    out: Path = Path("benchmarks/results/circuits.json")
    """File for the numbers."""


def benchmark(config: BenchmarkConfig) -> dict[str, Any]:
    """Measures, prints a table and writes the numbers; returns what is in the file."""
    if min(config.pairs, config.rounds, config.threads or 1) < 1:
        raise InputError("expected pairs, rounds and threads of at least 1")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("expected a CUDA device for --device cuda, found none; leave the flag out")
    torch.set_num_threads(config.threads or torch.get_num_threads())
    record = read_json(config.out, "this benchmark's numbers") if config.out.exists() else {}
    about = machine(config, torch.get_num_threads())
    lm = LanguageModel.load(config.model, device=config.device)
    engine, prompts = Engine(lm), make_prompts(lm, config.task, config.pairs)
    flags = {name: value for name, value in asdict(config).items() if name not in ("model", "out")}
    size = {"edges": engine.graph.n_edges, "pairs": len(prompts), "tokens": prompts.clean_np.shape[1], "dtype": f"{lm.dtype}"[6:]}
    found = {"machine": about, "date": date.today().isoformat(), "flags": flags, "size": size, "arms": measure(engine, prompts, config)}
    record[config.model] = found
    write_json(config.out, record)
    print("\n".join(lines(config.model, found)))
    return record


def measure(engine: Engine, prompts: Prompts, config: BenchmarkConfig) -> dict[str, Any]:
    def scored(method: str) -> Callable[[], object]:
        return lambda: edge_scores(engine, prompts.clean_np, prompts.corrupt_np, metric, prompts.clean_mask_np, method=method)

    def metric(logits_spv: Tensor) -> Tensor:
        return prompts.measure(logits_spv[:, -1])

    arms: dict[str, Callable[[], object]] = {PASS: lambda: forward_and_backward(engine.lm, prompts)}
    arms |= {method: scored(method) for method in METHODS}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    peaks: dict[str, list[float]] = {name: [] for name in arms}
    forward_and_backward(engine.lm, prompts)
    with progress("rounds", config.rounds, "rounds") as bar:
        for number in range(config.rounds):
            for name in list(arms)[:: -1 if number % 2 else 1]:
                held = held_now(config.device)
                forget_peak(config.device)
                start = time.perf_counter()
                arms[name]()
                if config.device == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
                peaks[name].append((memory(config.device)[1] - held) / 2**20)
            bar.advance(1)
    return {
        name: {
            "seconds": spread(own),
            "multiple": spread([s / one for s, one in zip(own, seconds[PASS])]),
            "peak_mib": max(peaks[name]),
        }
        for name, own in seconds.items()
    }


def forward_and_backward(lm: LanguageModel, prompts: Prompts) -> None:
    """One pass of the clean prompts and the gradient of their metric at the embeddings."""
    embedded: list[Tensor] = []

    def asks(value: Tensor) -> Tensor:
        embedded.append(value.detach().requires_grad_())
        return embedded[0]

    with torch.enable_grad(), lm.edited({"resid_pre.0": asks}):
        metric_n = prompts.measure(lm.logits(prompts.clean_np, prompts.clean_mask_np)[:, -1])
        torch.autograd.grad(metric_n.sum(), embedded)


def lines(name: str, found: dict[str, Any]) -> list[str]:
    size = found["size"]
    rows = [
        [arm, spread_text(values["seconds"], 2), spread_text(values["multiple"], 2), f"{values['peak_mib']:,.0f}"]
        for arm, values in found["arms"].items()
    ]
    said = (
        f"{name}, {size['edges']:,} edges, {size['pairs']} pairs of {found['flags']['task']} with {size['tokens']} tokens, {size['dtype']}"
    )
    return [f"{said}; eap-ig and ceap with {STEPS} steps; {found['flags']['rounds']} rounds; {where(found)}", "", *table(HEADER, rows)]


if __name__ == "__main__":
    run(benchmark, BenchmarkConfig, __doc__ or "")
