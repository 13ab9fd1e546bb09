"""Time of a whole training step of every kind, Adam included, beside other tools' steps, as multiples of the encoder product alone.

Every arm runs in its own process on the same batch and weights; one computes at a time, in interleaved rounds. Medians and ranges are
over rounds, those of ratios over ratios within a round. All but ours have glibc's allocator tuned to keep freed memory.
"""

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from kind_arms import CHOOSING
from objective import BenchmarkConfig, Case, machine, problem, spread
from quality_report import LABELS, TRAINERS
from report import spread_text
from rounds import PEERS_PYTHON, TUNED, ArmFailed, Worker, refuse_too_large, started

from sae.activations.cache import ActivationCache
from sae.command_line import run
from sae.dictionaries.dictionary import Dictionary
from sae.disk.reading import read_json
from sae.disk.writing import write_json, write_tensors
from sae.errors import InputError

POSITIVE = 4
"""positive pre-activations of a row in units of k, for kinds that choose the k largest: in training there are always more than they keep"""
NAMES = LABELS | {"encoder": "encoder product alone", "sparsify": "sparsify"}


@dataclass
class KindsConfig:
    kinds: tuple[str, ...] = tuple(TRAINERS)
    """Kinds whose steps are timed."""
    d_in: int = 512
    """Width of the activations."""
    d_sae: tuple[int, ...] = (4096, 16_384)
    """Features."""
    stream: str = "synthetic"
    """"synthetic" for normally distributed activations, or the folder of an activation cache, with --dictionary."""
    dictionary: str | None = None
    """Folder of a dictionary trained on that cache, for its weights and sizes."""
    k: int = 64
    """L0 of every kind."""
    batch_size: int = 4096
    """Rows of a step."""
    rounds: int = 5
    """Interleaved rounds, after one that is not counted."""
    threads: int = 2
    """Threads of every arm."""
    out: Path = Path("benchmarks/results/kinds.json")
    """File for the numbers; a size and kind that is in it is not measured again."""


def kinds(config: KindsConfig) -> None:
    about = BenchmarkConfig(threads=config.threads)
    record: dict[str, Any] = {"date": date.today().isoformat(), "machine": machine(about, config.threads), "cases": []}
    if config.out.exists():
        record["cases"] = read_json(config.out, "a kinds.json of this benchmark")["cases"]
    cache = None if config.stream == "synthetic" else ActivationCache.open(config.stream)
    dictionary = Dictionary.load(config.dictionary) if config.dictionary else None
    if (cache is None) != (dictionary is None):
        raise InputError("expected --stream and --dictionary together, got one of them; give both, or neither for synthetic activations")
    d_in, sizes = (dictionary.d_in, (dictionary.d_sae,)) if dictionary else (config.d_in, config.d_sae)
    for d_sae in sizes:
        for kind in config.kinds:
            case = {
                "d_in": d_in,
                "d_sae": d_sae,
                "k": config.k,
                "batch_size": config.batch_size,
                "kind": kind,
                "stream": Path(config.stream).name,
            }
            if any(case.items() <= found.items() for found in record["cases"]):
                continue
            print(f"{kind}, F {d_sae:,}", flush=True)
            l0 = float(config.k * (POSITIVE if kind in CHOOSING else 1))
            tensors = problem(about, Case(d_in, d_sae, l0, config.batch_size), cache, dictionary)
            record["cases"].append(case | measure(config, kind, tensors))
            write_json(config.out, record)
    print(markdown(record))


def tools_of(kind: str) -> list[str]:
    peers = [*TRAINERS[kind], *(["sparsify"] if kind == "topk" else [])]
    if not PEERS_PYTHON.exists():
        print("no .peers environment: the other tools are left out (make bench-peers creates it)")
        peers = ["ours"]
    return ["encoder", *peers]


def measure(config: KindsConfig, kind: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """Raises `InputError` when the encoder product or our step fails; another arm is left out, with the reason."""
    seconds: dict[str, list[float]] = {}
    ends: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = Path(folder) / "problem.safetensors"
        write_tensors(path, tensors)
        shared = {
            "device": "cpu",
            "backend": "auto",
            "l1": 1.0,
            "threads": config.threads,
            "problem": str(path),
            "kind": kind,
            "k": config.k,
            "synthetic": config.stream == "synthetic",
        }
        workers: dict[str, Worker] = {}

        def ask(tool: str, question: str | None) -> dict[str, Any]:
            """None waits for what it says first."""
            try:
                return workers[tool].answer() if question is None else workers[tool].ask(question)
            except ArmFailed as reason:
                if tool in ("encoder", "ours"):
                    raise InputError(f"{NAMES[tool]} failed, so the others have nothing to be compared with: {reason}") from None
                print(f"  {NAMES[tool]} is left out: {reason}", flush=True)
                left_out[tool] = str(reason)
                seconds.pop(tool, None)
                del workers[tool]
                return {}

        for tool in tools_of(kind):
            if tool not in ("encoder", "ours"):
                refuse_too_large("cpu", config.batch_size, tensors["b_enc_f"].shape[0])
            env = {name: value for name, value in os.environ.items() if name not in TUNED}
            env |= {} if tool in ("encoder", "ours") else TUNED
            peers = tool not in ("encoder", "ours")
            workers[tool] = stack.enter_context(
                started("kind_arms.py", {"tool": tool, "kind": kind, "k": config.k, **shared}, env, peers=peers)
            )
            seconds[tool] = []
            ask(tool, None)
        for number in range(config.rounds + 1):
            for tool in list(workers):
                took = ask(tool, "step").get("seconds")
                if number and took is not None:  # the first is not counted
                    seconds[tool].append(took)
        for tool in list(workers):
            ends[tool] = ask(tool, "finish")
    encoder = seconds["encoder"]
    arms = {
        tool: {
            "ms": spread([1000 * s for s in own]),
            "times_encoder": spread([s / e for s, e in zip(own, encoder)]),
            "times_ours": spread([s / o for s, o in zip(own, seconds["ours"])]) if "ours" in seconds else None,
            "peak_mib": (ends[tool]["peak"] - ends[tool]["held"]) / 2**20,
            **{name: ends[tool][name] for name in ("l0", "version", "encoder") if name in ends[tool]},
        }
        for tool, own in seconds.items()
    }
    return {"arms": arms, "left_out": left_out}


def markdown(record: dict[str, Any]) -> str:
    about = record["machine"]
    head = ["F", "kind", "tool", "ms", "multiple of the encoder product", "this / ours", "peak MiB"]
    lines = [f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}, {record['date']}", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case in record["cases"]:
        for tool, arm in case["arms"].items():
            ours = spread_text(arm["times_ours"], 2) if arm["times_ours"] else ""
            name = " ".join([NAMES[tool], *([arm["version"]] if "version" in arm else [])])
            ratios = spread_text(arm["times_encoder"], 2), ours
            cells = [f"{case['d_sae']:,}", case["kind"], name, spread_text(arm["ms"], 0), *ratios, f"{arm['peak_mib']:,.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(kinds, KindsConfig, __doc__ or "")
