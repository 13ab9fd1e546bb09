"""Arms side by side: each in its own process, one computing at a time, in interleaved rounds."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from arms import LABELS, PEERS, SYSTEM_ALLOCATOR
from torch import Tensor

from sae.disk.writing import write_tensors
from sae.errors import InputError
from sae.progress import progress

ROOT = Path(__file__).resolve().parents[1]
PEERS_PYTHON = ROOT / ".peers" / "bin" / "python"
TUNED = {"MALLOC_MMAP_THRESHOLD_": "17179869184", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}
DENSE_TENSORS = 4
"""[b, f] tensors in float32 that a dense step holds at least; an arm that has no room for them is left out"""
SAME_LOSS = {"cpu": 1e-3, "cuda": 3e-2}
"""relative difference up to which two arms have computed the same thing; bfloat16 on CUDA"""


class ArmFailed(Exception):
    """Why an arm could not be measured."""


class Measured(NamedTuple):
    seconds: dict[str, list[float]]
    """of a step, for every arm that went through, a number for each round"""
    ends: dict[str, dict[str, Any]]
    """memory, and what else an arm reported at its end"""
    left_out: dict[str, str]
    """the others, and why"""


class Worker(NamedTuple):
    process: subprocess.Popen[str]
    log: IO[str]

    def ask(self, question: str) -> dict[str, Any]:
        """Raises `ArmFailed` with the reason when the arm cannot continue."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            print(question, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise ArmFailed(f"its process ended with code {self.process.wait()} {self.log.read()[-500:]}".strip())
        answer = json.loads(line)
        if "error" in answer:
            raise ArmFailed(answer["error"])
        return answer


@contextmanager
def worker(arm: str, settings: dict[str, Any]) -> Iterator[Worker]:
    env = {name: value for name, value in os.environ.items() if name not in TUNED}
    if arm not in SYSTEM_ALLOCATOR:
        env |= TUNED
    with started("arms.py", {"arm": arm, **settings}, env, peers=arm in PEERS) as process:
        yield process


@contextmanager
def started(script: str, settings: dict[str, Any], env: Mapping[str, str], *, peers: bool) -> Iterator[Worker]:
    """A script of this folder that answers lines of JSON, in our environment or the peers'."""
    python = str(PEERS_PYTHON) if peers else sys.executable
    command = [python, str(ROOT / "benchmarks" / script), json.dumps(settings)]
    pipe = subprocess.PIPE
    with (
        suppress(BrokenPipeError),  # of an arm that died
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, env={**env, "PYTHONPATH": str(ROOT)}, text=True, stdin=pipe, stdout=pipe, stderr=log) as process,
    ):
        yield Worker(process, log)  # then its standard input closes, at which it ends


def measure(arms: list[str], tensors: dict[str, Tensor], settings: dict[str, Any], rounds: int) -> Measured:
    """`settings` of all arms: device, threads, backend, l1. An arm that fails is left out with the reason.

    Raises `InputError` when it is the encoder product or our step, without which there is nothing to compare.
    """
    measured = Measured({arm: [] for arm in arms}, {}, {})
    rows, features = len(tensors["x_bd"]), len(tensors["b_enc_f"])
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        problem = Path(folder) / "problem.safetensors"
        write_tensors(problem, tensors)
        workers: dict[str, Worker] = {}
        for arm in arms:
            with leaving_out(arm, measured):
                if arm not in ("encoder", "ours"):
                    refuse_too_large(settings["device"], rows, features)
                print(f"  starting {LABELS[arm]}", flush=True)
                workers[arm] = stack.enter_context(worker(arm, settings | {"problem": str(problem)}))
                workers[arm].answer()
        with progress("rounds", rounds + 1, "rounds") as bar:
            for round_number in range(rounds + 1):
                for arm in [a for a in arms if a not in measured.left_out]:
                    with leaving_out(arm, measured):
                        seconds = workers[arm].ask("step")["seconds"]
                        if round_number:  # the first is not counted
                            measured.seconds[arm].append(seconds)
                bar.advance(1)
        for arm in [a for a in arms if a not in measured.left_out]:
            with leaving_out(arm, measured):
                measured.ends[arm] = workers[arm].ask("finish")
                refuse_other_loss(settings["device"], measured.ends.get("ours", {}), measured.ends[arm])
    return measured


@contextmanager
def leaving_out(arm: str, measured: Measured) -> Iterator[None]:
    try:
        yield
    except ArmFailed as reason:
        if arm in ("encoder", "ours"):
            raise InputError(f"{LABELS[arm]} failed, so the others have nothing to be compared with: {reason}") from None
        print(f"  {LABELS[arm]} is left out: {reason}", flush=True)
        measured.left_out[arm] = str(reason)
        for kept in (measured.seconds, measured.ends):
            kept.pop(arm, None)


def refuse_too_large(device: str, rows: int, features: int) -> None:
    """Raises `ArmFailed` rather than let a dense step run the machine out of memory."""
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    needed = DENSE_TENSORS * 4 * rows * features
    if needed > 0.75 * free:
        raise ArmFailed(f"its [b, f] tensors need about {needed / 2**30:.1f} GiB of the {free / 2**30:.1f} GiB free")


def refuse_other_loss(device: str, ours: dict[str, Any], arm: dict[str, Any]) -> None:
    if "loss" in ours and "loss" in arm and not abs(arm["loss"] - ours["loss"]) <= SAME_LOSS[device] * abs(ours["loss"]):
        raise ArmFailed(f"its loss is {arm['loss']:.6g} where ours is {ours['loss']:.6g}: not the same work")
