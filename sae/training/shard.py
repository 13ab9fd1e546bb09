"""One dictionary in several processes: how it is split, and that all processes have the same before they begin."""

import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch

from sae.activations.source import Source
from sae.errors import InputError
from sae.mesh import ALONE, Axis, Gone, Mesh
from sae.processes import Processes
from sae.training.config import RunConfig, TrainingConfig

SILENCE = timedelta(minutes=10)
"""without a message from another process before this one ends; a death on the same machine is noticed at once"""


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


@contextmanager
def meshed(config: TrainingConfig, processes: Processes) -> Iterator[Mesh]:
    """The processes' grid while the run lasts; only the one that leads prints.

    Raises `InputError` for a number of processes that the split does not have, and when another process ends.
    """
    split = Split.of(config.shard or "features", processes.world)
    if processes.world > 1 and config.shard is None:
        raise InputError(
            f"expected one process, or --shard features or rows, got {processes.world} processes without --shard; say how they share"
        )
    if split.processes != processes.world and not (config.dry_run and processes.world == 1):
        raise InputError(f"expected {split.processes} processes for --shard {config.shard}, got {processes.world}; start so many")
    if processes.world == 1:
        yield ALONE
        return
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    cuda = config.device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(config.device)
    grids: dict[str, DeviceMesh] = {}  # that of torch, which keeps connections open while it is anywhere
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        dist.init_process_group(backend, store=processes.store, rank=processes.rank, world_size=processes.world, timeout=SILENCE)
        grids["only"] = init_device_mesh("cuda" if cuda else "cpu", tuple(split), mesh_dim_names=split._fields)

        def group_of(name: str) -> Any:
            return grids["only"].get_group(name)

        i, j = divmod(processes.rank, split.rows)
        features, rows = (
            Axis(place, size, partial(group_of, name)) for place, size, name in zip((i, j), split, split._fields, strict=True)
        )
        mesh = Mesh(features, rows, Axis(processes.rank, processes.world))
        with nullcontext() if mesh.leads else redirect_stdout(open(os.devnull, "w")):
            yield mesh
    except Gone as error:
        raise InputError(
            f"another process of this run has ended ({str(error).partition('. ')[0]}); the same command goes on from the last checkpoint, "
            "and torchrun's --max-restarts gives it again"
        ) from None
    except BaseException:
        processes.fail()  # before the others notice, so that the sentence is this one's
        raise
    finally:
        grids.clear()
        if dist.is_initialized():
            dist.destroy_process_group()


def require_same(config: TrainingConfig, processes: Processes, source: Source) -> None:
    """Raises `InputError` where processes differ in what decides the result."""
    settings = {name: str(value) for name, value in config.settings().items()}
    machine = {"torch": torch.__version__, "processor": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    manifest = zlib.crc32(json.dumps(source.manifest, sort_keys=True).encode())
    processes.require_same(**settings, **machine, shard=config.shard, out=str(config.out), checksum_of_the_manifest=manifest)


def refuse_split(config: RunConfig, mesh: Mesh) -> None:
    """Raises `InputError` for a dictionary or batch that the processes cannot share equally, or a step that they cannot share."""
    if config.d_sae % mesh.every.size:
        raise InputError(f"expected --d-sae that divides by {mesh.every.size} processes, got {config.d_sae}; give another number")
    if config.batch_size % mesh.rows.size:
        raise InputError(f"expected --batch-size that divides by {mesh.rows.size} processes, got {config.batch_size}; give another number")
    if not mesh.alone and config.backend in ("reference", "triton"):
        raise InputError(f"expected the backend auto, dense or sparse with several processes, got {config.backend}; take auto")
