"""One dictionary in several processes: how it is split, and a check that all processes have the same settings before they start."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae.device import device_named
from sae.errors import InputError
from sae.mesh import ALONE, Axis, Gone, Mesh
from sae.processes import Processes
from sae.training.config import RunConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SILENCE = timedelta(minutes=10)
"""time without a message from another process after which this one ends; a death on the same machine is noticed immediately"""


class Split(NamedTuple):
    features: int
    rows: int

    @classmethod
    def of(cls, shard: str, world: int) -> "Split":
        """From "features", "rows" or "features=4,rows=2". Raises `InputError` for other texts."""
        if shard in cls._fields:
            return cls(**{"features": 1, "rows": 1, shard: world})
        found = re.fullmatch(r"features=([1-9][0-9]*),rows=([1-9][0-9]*)", shard)
        if found is None:
            raise InputError(f"expected --shard features, rows, or both with numbers as in features=4,rows=2, got {shard!r}")
        return cls(int(found[1]), int(found[2]))

    @property
    def processes(self) -> int:
        return self.features * self.rows


def split_of_all(config: RunConfig, processes: Processes) -> Split:
    """How all processes share a dictionary. Raises `InputError` if their number does not fit `--shard`."""
    split = Split.of(config.shard or "features", processes.world)
    if processes.world > 1 and config.shard is None:
        raise InputError(
            f"expected one process, or --shard features or rows, got {processes.world} processes without --shard; say how they share"
        )
    if split.processes != processes.world and not (config.dry_run and processes.world == 1):
        raise InputError(f"expected {split.processes} processes for --shard {config.shard}, got {processes.world}; start so many")
    return split


def split_of_some(config: RunConfig, processes: Processes) -> Split:
    """How the first processes share a dictionary, by default one alone; the others have another task.

    Raises `InputError` if there are no others.
    """
    split = Split.of(config.shard or "features=1,rows=1", processes.world)
    alone = processes.world == 1 and (split.processes == 1 or config.dry_run)
    if split.processes >= processes.world and not alone:
        raise InputError(
            f"expected processes beside the {split.processes} that train, to run the model, got {processes.world} in all with "
            f"--shard {config.shard}; start more, or say how many train, as in --shard features=2,rows=1"
        )
    return split


@contextmanager
def meshed(split: Split, device: str, processes: Processes) -> Iterator[Mesh | None]:
    """The grid of the first processes while the run lasts, of which only the one that leads prints; None in those outside it.

    All of torch's processes can send to each other meanwhile. Raises `InputError` when another process ends.
    """
    if processes.world == 1:
        yield ALONE
        return
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    place = device_named(device)
    if cuda := place.type == "cuda":
        torch.cuda.set_device(place.index or 0)
    grids: dict[str, DeviceMesh] = {}  # that of torch, which keeps connections open while it is anywhere
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        dist.init_process_group(backend, store=processes.store, rank=processes.rank, world_size=processes.world, timeout=SILENCE)
        for names, shape in ((split._fields, tuple(split)), (("every",), (split.processes,))):
            grids |= dict.fromkeys(names, init_device_mesh(place.type, shape, mesh_dim_names=names))
        if processes.rank >= split.processes:
            yield None
        else:
            mesh = grid_of(processes.rank, split, lambda name: grids[name].get_group(name))
            with nullcontext() if mesh.leads else redirect_stdout(open(os.devnull, "w")):
                yield mesh
    except Gone as error:
        raise InputError(
            f"another process of this run has ended ({str(error).partition('. ')[0]}); the same command continues from the last "
            "checkpoint, and torchrun's --max-restarts runs it again"
        ) from None
    except BaseException:
        processes.fail()  # before the others notice, so that the sentence is this one's
        raise
    finally:
        grids.clear()
        if dist.is_initialized():
            dist.destroy_process_group()


def grid_of(rank: int, split: Split, group_of: Callable[[str], Any]) -> Mesh:
    i, j = divmod(rank, split.rows)
    places = {"features": (i, split.features), "rows": (j, split.rows), "every": (rank, split.processes)}
    return Mesh(**{name: Axis(*place, partial(group_of, name)) for name, place in places.items()})


def require_same(config: RunConfig, processes: Processes, *, one_result: bool = True, **settings: Any) -> None:
    """Raises `InputError` where processes differ in what decides the result: these settings, the code, the kind of machine.

    If they do not compute one result together, other machines only change last digits: a line names them.
    """
    machine = {"processor": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    together = machine | {"log_every": config.log_every, "checkpoint_every": config.checkpoint_every} if one_result else {}
    processes.require_same(**settings, shard=config.shard, out=str(config.out), torch=torch.__version__, **together)
    if not one_result:
        say_other_machines(processes, ", ".join(f"{name} {value}" for name, value in machine.items()))


def say_other_machines(processes: Processes, machine: str) -> None:
    processes.tell(f"machine {processes.rank}", machine)
    if not processes.leads:
        return
    ranks_of: dict[str, list[str]] = {}
    for rank in range(processes.world):
        ranks_of.setdefault(processes.hear(f"machine {rank}"), []).append(str(rank))
    if len(ranks_of) > 1:
        differ = "; ".join(f"{', '.join(ranks)}: {machine}" for machine, ranks in ranks_of.items())
        print(
            f"processes run on different machines ({differ}): the last digits of a run depend on the process that trains it, also after it "
            "was resumed"
        )


def refuse_split(config: RunConfig, mesh: Mesh) -> None:
    """Raises `InputError` for a dictionary or batch that the processes cannot share equally, or a step that they cannot share."""
    if config.d_sae % mesh.every.size:
        raise InputError(f"expected --d-sae that divides by {mesh.every.size} processes, got {config.d_sae}; give another number")
    if config.batch_size % mesh.rows.size:
        raise InputError(f"expected --batch-size that divides by {mesh.rows.size} processes, got {config.batch_size}; give another number")
    if not mesh.alone and config.backend in ("reference", "triton"):
        raise InputError(f"expected the backend auto, dense or sparse with several processes, got {config.backend}; take auto")
