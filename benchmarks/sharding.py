"""A training step of several processes that share a dictionary's features, beside one process with as many threads: rows a second.

Each arm is `Sweep.step`, Adam and clipping included, on the same rows and weights; one arm computes at a time, in interleaved rounds.
Processes are started by torchrun, one thread each, and speak through gloo.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from objective import BenchmarkConfig, machine, spread
from report import spread_text
from rounds import ROOT, Worker

from sae.command_line import run
from sae.disk.writing import write_json

LR, STEPS = 1e-9, 1 << 30
WARM_UP = 3


@dataclass
class ShardingConfig:
    kinds: tuple[str, ...] = ("relu", "topk", "batchtopk", "jumprelu")
    """Kinds whose steps are timed."""
    d_in: int = 512
    """Width of the activations."""
    d_sae: int = 65_536
    """Features."""
    l0: int = 64
    """Active features of a row."""
    batch_size: int = 4096
    """Rows of a step."""
    processes: int = 2
    """Processes that share the dictionary, and threads of the one that does not."""
    rounds: int = 5
    """Interleaved rounds."""
    out: Path = Path("benchmarks/results/sharding.json")
    """File for the numbers."""


def sharding(config: ShardingConfig) -> None:
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(BenchmarkConfig(threads=config.processes), config.processes),
    }
    record |= {name: getattr(config, name) for name in ("d_in", "d_sae", "l0", "batch_size", "processes")} | {"kinds": {}}
    for kind in config.kinds:
        print(f"{kind}, F {config.d_sae:,}", flush=True)
        record["kinds"][kind] = measure(config, kind)
        write_json(config.out, record)
    print(markdown(record))


def measure(config: ShardingConfig, kind: str) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"one": [], "several": []}
    with ExitStack() as stack:
        arms = {name: stack.enter_context(arm(config, kind, several=name == "several")) for name in seconds}
        for worker in arms.values():
            worker.answer()
        for number in range(config.rounds + 1):
            for name, worker in arms.items():
                took = worker.ask("step")["seconds"]
                if number:  # the first is not counted
                    seconds[name].append(took)
        ends = {name: worker.ask("finish") for name, worker in arms.items()}
    ratios = [one / several for one, several in zip(seconds["one"], seconds["several"])]
    found = {
        name: {"ms": spread([1000 * s for s in own]), "rows_per_second": config.batch_size / median(own)} for name, own in seconds.items()
    }
    return found | {"ratio": spread(ratios), "l0": ends["one"]["l0"], "loss": [ends[name]["loss"] for name in seconds]}


@contextmanager
def arm(config: ShardingConfig, kind: str, *, several: bool) -> Iterator[Worker]:
    settings = {name: getattr(config, name) for name in ("d_in", "d_sae", "l0", "batch_size")} | {"kind": kind}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.processes}"] if several else []
    command = [sys.executable, *launcher, str(Path(__file__).resolve()), "--arm", json.dumps(settings)]
    env = os.environ | {"OMP_NUM_THREADS": "1" if several else str(config.processes), "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, env=env, text=True, stdin=pipe, stdout=pipe, stderr=log) as process,
    ):
        yield Worker(process, log)


def serve(settings: dict[str, Any]) -> None:
    """One process of an arm: the first reads questions, and the others do as it does."""
    from sae.dictionaries.dictionary import Dictionary
    from sae.kinds import KINDS
    from sae.objective import Workspace
    from sae.processes import Processes
    from sae.training.config import Recipe
    from sae.training.shard import Split, meshed
    from sae.training.sweep import Start, Sweep

    l0 = settings["l0"]
    swept = {"relu": {"l1": (1e-3,)}, "jumprelu": {"target_l0": (float(l0),), "threshold": 0.1}}
    kind: Any = KINDS[settings["kind"]](**swept.get(settings["kind"], {"k": (l0,)}))
    processes = Processes.from_environment()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with processes.together(), meshed(Split(processes.world, 1), "cpu", processes) as mesh:
        assert mesh is not None
        mine = mesh.features.part(settings["d_sae"])
        start = Dictionary.initial(settings["d_in"], settings["d_sae"], seed=0, decoder_norm=1.0, features=mine)
        x_bd = torch.randn(settings["batch_size"], settings["d_in"], generator=torch.Generator().manual_seed(1))
        if kind.swept != "k":  # every feature above the same quantile of a normal distribution
            share = torch.tensor(1 - l0 / settings["d_sae"], dtype=torch.float64)
            above = torch.distributions.Normal(0.0, 1.0).icdf(share)
            theta = 0.1 * settings["d_in"] ** 0.5 if settings["kind"] == "jumprelu" else 0.0
            start.b_enc_f.data.fill_(theta - float(above))
        recipe = Recipe(STEPS, LR, (0.9, 0.999), 0.0, 0.0, 1.0, STEPS)
        sweep = Sweep([Start(start)], kind, recipe, "auto", Workspace(mesh=mesh))
        del start
        number = STEPS // 2  # after every warm-up
        for _ in range(WARM_UP):
            result = sweep.step(x_bd, number)
        say(mesh, ready=True)
        while True:
            line = sys.stdin.readline().strip() if mesh.leads else ""
            question = mesh.every.numbers({"step": 1, "finish": 2}.get(line, 0))[0]
            if question == 0:
                return
            begin = perf_counter()
            result = sweep.step(x_bd, number) if question == 1 else result
            say(mesh, seconds=perf_counter() - begin, l0=float(result.l0[0]), loss=float(result.loss[0]))


def say(mesh: Any, **answer: Any) -> None:
    if mesh.leads:
        print(json.dumps(answer), flush=True)


def markdown(record: dict[str, Any]) -> str:
    about, n = record["machine"], record["processes"]
    head = ["kind", "L0", f"one process, {n} threads: ms", f"{n} processes: ms", "rows/s", f"rows/s of {n} / rows/s of one"]
    lines = [
        f"{about['cpu']}, torch {about['torch']}, {record['date']}, F {record['d_sae']:,}, d {record['d_in']}, b {record['batch_size']:,}"
    ]
    lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for kind, found in record["kinds"].items():
        rates = " and ".join(f"{found[name]['rows_per_second']:,.0f}" for name in ("one", "several"))
        times = [spread_text(found[name]["ms"], 0) for name in ("one", "several")]
        lines.append("| " + " | ".join([kind, f"{found['l0']:.0f}", *times, rates, spread_text(found["ratio"], 2)]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--arm"]:
        serve(json.loads(sys.argv[2]))
    else:
        run(sharding, ShardingConfig, "Time of a step of several processes that share a dictionary, beside one process.")
