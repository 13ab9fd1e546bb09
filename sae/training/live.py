"""Training without a cache: the model computes the activations as they are needed, pool after pool."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from sae.activations.harvest.settings import RecordingConfig
from sae.activations.live import LiveSource
from sae.activations.text.documents import text_files
from sae.disk.places import require_folder
from sae.training.config import RunConfig
from sae.training.trainer import train_on


@dataclass(kw_only=True)
class LiveTrainingConfig(RunConfig):
    """A training run on what the model computes."""

    live: RecordingConfig


def train_live(config: LiveTrainingConfig) -> list[Path]:
    """`train` on activations that are computed as they are needed, from the settings in `config.live`.

    With the same text, settings, machine and device, a run that was interrupted goes on bit for bit as if it had not been.
    """
    config.check()
    if not config.dry_run:
        require_folder(config.out)
    source = LiveSource(config.live)
    live = {k: v for k, v in asdict(config.live).items() if k not in ("device", "device_map")}
    live["text_bytes"] = [path.stat().st_size for path in text_files(config.live)]
    manifest = source.manifest
    decides = {"live": json.loads(json.dumps(live)), "fingerprint": manifest["model"]["fingerprint"]}
    if "models" in manifest:
        decides["fingerprints"] = {name: model["fingerprint"] for name, model in manifest["models"].items()}
    return train_on(source, config, [config], config.settings() | decides)
