"""Training without a cache: the model computes the activations as they are needed, pool after pool."""

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sae.activations.harvest.command import device_of
from sae.activations.harvest.settings import RecordingConfig
from sae.activations.live import LiveSource, PoolSource
from sae.activations.producers import FedSource, produce
from sae.activations.text.documents import text_files
from sae.disk.places import require_folder
from sae.mesh import ALONE, Mesh
from sae.pieces import one_voice
from sae.processes import Processes
from sae.training.config import RunConfig
from sae.training.shard import meshed, require_same, split_of_some
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
    with processes.together():
        split = split_of_some(config, processes)
        live = {k: v for k, v in asdict(config.live).items() if k not in ("device", "device_map")}
        live["text_bytes"] = [path.stat().st_size for path in text_files(config.live)]
        if processes.world == 1:
            return train_from(LiveSource(config.live), config, live)
        require_same(config, processes, live=live, **config.settings())
        config = replace(config, device=processes.device(config.device))
        with meshed(split, config.device, processes) as mesh:
            if mesh is not None:
                source = FedSource(processes, split.processes)
                folders = train_from(source, config, live, mesh)
                source.close()
            else:
                with nullcontext() if processes.rank == split.processes else one_voice(processes):
                    rows = LiveSource(replace(config.live, device=device_of(config.live, processes)))
                produce(rows, processes, split.processes)
                folders = []
        return folders


def train_from(source: PoolSource, config: LiveTrainingConfig, live: dict[str, Any], mesh: Mesh = ALONE) -> list[Path]:
    manifest = source.manifest
    decides = {"live": json.loads(json.dumps(live)), "fingerprint": manifest["model"]["fingerprint"]}
    if "models" in manifest:
        decides["fingerprints"] = {name: model["fingerprint"] for name, model in manifest["models"].items()}
    return train_on(source, config, config.settings() | decides, mesh)
