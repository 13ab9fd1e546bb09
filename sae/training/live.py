"""Training without a cache: the model computes the activations as they are needed, pool after pool."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sae.activations.harvest.command import device_of
from sae.activations.harvest.settings import RecordingConfig
from sae.activations.live import LiveSource, PoolSource, Production
from sae.activations.producers import FedSource, produce
from sae.activations.source import Ended
from sae.activations.text.documents import text_files
from sae.disk.places import require_folder
from sae.errors import InputError
from sae.mesh import ALONE, Mesh
from sae.pieces import one_voice
from sae.processes import Processes
from sae.training.config import RunConfig
from sae.training.cost import listed, report_run, size
from sae.training.ends import Ends
from sae.training.shard import Split, meshed, require_same, split_of_some
from sae.training.trainer import train_on


@dataclass(kw_only=True)
class LiveTrainingConfig(RunConfig):
    """A training run on activations that the model computes."""

    live: RecordingConfig


def train_live(config: LiveTrainingConfig) -> list[Path]:
    """`train` on activations that are computed as they are needed, from the settings in `config.live`.

    With the same text, settings, machine and device, an interrupted run continues bit for bit as if uninterrupted. Called in every
    process that torchrun started, the first one trains, or as many as `--shard` says, and the others run the model (see
    sae/activations/producers.py); when one of them fails, so do the others.
    """
    config.check()
    if not config.dry_run:
        require_folder(config.out)
    processes = Processes.from_environment()
    with processes.together(), flags_of_live():
        split = split_of_some(config, processes)
        live = {k: v for k, v in asdict(config.live).items() if k not in ("device", "device_map")}
        live["text_bytes"] = [path.stat().st_size for path in text_files(config.live)]
        if processes.world == 1:
            rows = LiveSource(config.live)
            folders = train_from(rows, config, live)
            if config.dry_run:
                report(config, rows, rows.production(), split, ALONE, producers=0)
            return folders
        recorded = {f"--live.{name.replace('_', '-')}": value for name, value in live.items() if name != "text_bytes"}
        require_same(config, processes, **recorded, text_bytes=live["text_bytes"], **config.settings())
        config = replace(config, device=processes.device(config.device))
        with meshed(split, config.device, processes) as mesh:
            if mesh is not None:
                try:
                    source = FedSource(processes, mesh.every)
                    folders = train_from(source, config, live, mesh)
                except Ended as ended:
                    raise ended.error from None
                if config.dry_run:
                    report(config, source, Production(**processes.hear("production")), split, mesh, source.producers)
                source.close()
            else:
                with nullcontext() if processes.rank == split.processes else one_voice(processes):
                    rows = LiveSource(replace(config.live, device=device_of(config.live, processes)))
                if config.dry_run and processes.rank == split.processes:
                    processes.tell("production", rows.production()._asdict())
                produce(rows, processes, split.processes)
                folders = []
        return folders


@contextmanager
def flags_of_live() -> Iterator[None]:
    """Inside, errors name the flags of `RecordingConfig` as this command has them: --live.sites instead of --sites."""
    names = "|".join(f.name.replace("_", "-") for f in fields(RecordingConfig))
    try:
        yield
    except InputError as error:
        raise InputError(re.sub(rf"--(?=({names})(?![\w-]))", "--live.", str(error))) from error


def train_from(source: PoolSource, config: LiveTrainingConfig, live: dict[str, Any], mesh: Mesh = ALONE) -> list[Path]:
    manifest = source.manifest
    decides = {"live": json.loads(json.dumps(live)), "fingerprint": manifest["model"]["fingerprint"]}
    if "models" in manifest:
        decides["fingerprints"] = {name: model["fingerprint"] for name, model in manifest["models"].items()}
    return train_on(source, config, config.settings() | decides, mesh)


def report(config: LiveTrainingConfig, source: PoolSource, making: Production, split: Split, mesh: Mesh, producers: int) -> None:
    """Prints the cost of the run; `producers`: processes that run the model, 0 if it is planned in one process."""
    ends, alone = Ends.of(source, config), split.processes == 1 and not producers
    lasts = f"a pool has {making.pool_rows:,} rows ({size(making.pool_bytes)}), enough for {making.pool_rows / config.batch_size:.3g} steps"
    held = making.memory if alone else {"two pools of rows": 2 * making.pool_bytes}
    trained, made = report_run(config, ends, split, mesh, held, lasts), making.rows_per_second
    measured = f"about {made:,.0f} rows/s, measured on a batch"
    if alone:
        print(f"the model: {measured}; one process that does both in turn: about {1 / (1 / trained + 1 / made):,.0f} rows/s")
        return
    print(f"each process that runs the model: {size(sum(making.memory.values()))} of memory ({listed(making.memory)}), {measured}")
    enough = math.ceil(trained / made)
    if not producers:
        print(f"{enough} of them would keep up with training")
    elif producers < enough:
        print(f"with {producers} of them the model is slower than training; {enough} would keep up")
    else:
        print(f"with {producers} of them the model keeps up with training" + f"; {enough} would be enough" * (enough < producers))
