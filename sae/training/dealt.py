"""The runs of a plan in one process or several: distributed by cost, each with its own checkpoint, so that any number can resume.

A run's result depends only on the plan: the rows of a step are the same for all runs, in any process.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae.activations.cached import CachedSource
from sae.disk.reading import layout, read_json
from sae.disk.writing import remove_leftovers
from sae.errors import InputError
from sae.mesh import Mesh
from sae.pieces import holding
from sae.processes import Processes
from sae.training.checkpoint import THEN, Checkpoint, Record
from sae.training.config import RunConfig
from sae.training.deal import deal, load_of
from sae.training.ends import Ends
from sae.training.metrics import start_wandb
from sae.training.part import Part, together
from sae.training.status import Row, Status
from sae.training.sweep import Sweep
from sae.training.trainer import loop, require_own


class Left(NamedTuple):
    """The point from which an incomplete run continues."""

    run: int
    first: int
    """steps done"""
    encoder: int
    """number of its encoder in the checkpoint: runs with different encoders are not one sweep; -1 at the start"""


class RunOf:
    """The dictionaries of one run in a sweep, for its checkpoint."""

    def __init__(self, sweep: Sweep, ks: slice):
        self.sweep, self.ks, self.recipe, self.mesh = sweep, ks, sweep.recipe, sweep.mesh

    def gather(self) -> None:
        self.sweep.gather()

    def states(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        split, whole = self.sweep.states()
        shared = ("plan",)
        mine = {name: tensor if tensor.ndim == 0 or name in shared else tensor[self.ks] for name, tensor in whole.items()}
        return {name: tensor[self.ks] for name, tensor in split.items()}, mine


class DealtPart(Part):
    """A part whose runs have separate checkpoints, and which reports their status."""

    def __init__(
        self, runs: Sequence[RunConfig], first: int, source: CachedSource, device: torch.device, settings: dict[str, Any], mesh: Mesh
    ):
        super().__init__(runs, source, device, mesh)
        self.first, self.checkpoints = (
            first,
            [(Checkpoint(run.out, settings), RunOf(self.sweep, ks)) for run, ks in zip(runs, slices(runs))],
        )

    def watch(self, status: Status, out: Path) -> None:
        self.status, self.names = status, [str(folder.relative_to(out)) for folder in self.folders]

    def report(self, step: int, state: str) -> None:
        if not self.mesh.leads:
            return
        for name, line in zip(self.names, self.lines):
            numbers = (line["loss"], line["l0"], line["tokens_per_second"]) if line else ()
            self.status.report(name, Row(self.status.rows[name].rank, step, state, *numbers))

    def log(self, done: int) -> None:
        super().log(done)
        self.report(done, "training")
        self.status.show()


class Checkpoints:
    """The checkpoints of several parts, used instead of one `Checkpoint`."""

    def __init__(self, parts: Sequence[DealtPart]):
        self.parts = parts

    def save(self, sweeps: Sequence[Sweep], step: int) -> None:
        for part in self.parts:
            for checkpoint, run in part.checkpoints:
                checkpoint.save([run], step)

    def kept(self) -> str:
        """The part of an error message that says what is left after a failure."""
        return "the runs' last checkpoints are untouched"


def slices(runs: Sequence[RunConfig]) -> list[slice]:
    """The dictionaries of each run in a sweep."""
    found, begin = [], 0
    for run in runs:
        found.append(slice(begin, begin + len(run.kind.values)))
        begin = found[-1].stop
    return found


def train_dealt(
    source: CachedSource,
    plan: RunConfig,
    runs: list[RunConfig],
    settings: dict[str, Any],
    device: torch.device,
    processes: Processes,
    mesh: Mesh,
) -> None:
    """Begins or resumes the runs that are not complete, and finishes them: dealt to the processes, or each of them shared by a mesh."""
    with holding(processes, plan.out, lambda: clear(plan, runs, settings)):
        if processes.leads:
            processes.tell("left", what_is_left(runs, settings))
        left = [Left(*one) for one in processes.hear("left")]
        loads = [load_of(runs[one.run], Ends.of(source, runs[one.run]), one.first) for one in left]
        ranks = deal(loads, processes.world) if mesh.alone else [None] * len(left)
        status = Status(processes, plan.out, plan.steps, rows_of(plan, runs, left, ranks))
        mine = [one for one, rank in zip(left, ranks) if rank in (processes.rank, None)]
        if mine:
            train_mine(source, plan, runs, mine, settings, device, status, mesh)
        elif not left and processes.leads:
            print(f"{plan.out} is already complete; --restart trains it again")
        for _ in processes.wait_for_all():
            status.show()
        status.show(print_now=True)


def clear(plan: RunConfig, runs: list[RunConfig], settings: dict[str, Any]) -> None:
    """Removes outdated files. Raises `InputError` for a run's folder that holds something else."""
    for run in runs:
        require_own(run)  # of every run, before anything is removed
    for run in runs:
        if run.out.exists():
            remove_leftovers(run.out)
        if plan.restart and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:  # torchrun's own restarts go on
            Checkpoint(run.out, settings).remove()
            for folder in run.folders():
                (folder / "training.json").unlink(missing_ok=True)


def what_is_left(runs: list[RunConfig], settings: dict[str, Any]) -> list[Left]:
    """The incomplete runs. Raises `InputError` for runs with other settings."""
    left = []
    for number, run in enumerate(runs):
        checkpoint, folders = Checkpoint(run.out, settings), run.folders()
        if all((folder / "training.json").exists() for folder in folders):
            checkpoint.refuse_other(read_json(folders[0] / "training.json", "a run's training.json", Record)["settings"])
            checkpoint.remove()  # a kill may have come between the two last steps
        else:
            left.append(Left(number, *state_of(checkpoint.path)))
    return left


def state_of(path: Path) -> tuple[int, int]:
    """Steps done and the encoder's number; the checkpoint is checked when it is restored."""
    if not path.exists():
        return 0, -1
    metadata = layout(path, "a checkpoint", THEN)[1]
    try:
        with safe_open(path, "pt") as file:
            return int(metadata["step"]), int(file.get_tensor("encoder"))
    except (KeyError, ValueError, SafetensorError) as error:
        raise InputError(f"expected a checkpoint at {path}, but it is damaged ({error}); {THEN}") from None


def rows_of(plan: RunConfig, runs: list[RunConfig], left: list[Left], ranks: Sequence[int | None]) -> dict[str, Row]:
    going = {one.run: Row(rank, one.first, "waiting") for one, rank in zip(left, ranks)}
    done = Row(None, plan.steps, "done")
    return {str(folder.relative_to(plan.out)): going.get(number, done) for number, run in enumerate(runs) for folder in run.folders()}


def watched(batches: Iterator[dict[str, Tensor]], status: Status) -> Iterator[dict[str, Tensor]]:
    """The batches; no more after another process has failed."""
    for batch in batches:
        status.advance()
        yield batch


def train_mine(
    source: CachedSource,
    plan: RunConfig,
    runs: list[RunConfig],
    mine: list[Left],
    settings: dict[str, Any],
    device: torch.device,
    status: Status,
    mesh: Mesh,
) -> None:
    """Trains the runs of this process, on one stream of batches; runs that are behind train first, until they are level with the next."""
    parts: list[DealtPart] = []
    for first, encoder in sorted({(one.first, one.encoder) for one in mine}):
        for group in together([runs[one.run] for one in mine if (one.first, one.encoder) == (first, encoder)]):
            part = DealtPart(group, first, source, device, settings, mesh)
            for checkpoint, run in part.checkpoints:
                checkpoint.restore([run])
            if not first:
                part.choose_encoder()
            part.watch(status, plan.out)
            part.report(first, "waiting")
            parts.append(part)
    sites = {site for part in parts for site in part.ends.sites}
    batches = CachedSource(*source.caches.values(), dealt=sorted(sites)).batches(plan.batch_size, seed=plan.seed, device=device)
    starts = sorted({part.first for part in parts})
    batches.seek(starts[0])
    rows = watched(batches, status)
    if resumed := [start for start in starts if start]:
        print(f"resuming after step {resumed[0]:,}" + "; other runs begin" * (not starts[0]))
    wandb_run = start_wandb(plan.wandb if mesh.leads else "off", plan.wandb_project, plan.out, settings)
    try:
        for part in parts:
            part.open_logs(part.first, wandb_run, plan.out)
        for start, until in zip(starts, [*starts[1:], plan.steps]):
            level = [part for part in parts if part.first <= start]
            loop(level, rows, Checkpoints(level), start, plan, until, shown=status.processes.leads)
    finally:
        for part in parts:
            for log in part.logs:
                log.close()
        if wandb_run is not None:
            wandb_run.finish()
    for part in parts:
        part.finish(settings)
        if mesh.leads:
            for checkpoint, _ in part.checkpoints:
                checkpoint.remove()
        part.report(plan.steps, "done")
