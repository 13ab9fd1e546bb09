"""Training without a cache: the model computes the activations as they are needed, pool after pool."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sae.activations.live import LiveActivations
from sae.activations.settings import RecordingConfig
from sae.activations.text import text_files
from sae.disk.places import require_folder
from sae.training.config import TrainingConfig
from sae.training.trainer import train_on


@dataclass(kw_only=True)
class LiveTrainingConfig(TrainingConfig):
    """A training run without the cache and its site, and what to record instead."""

    cache: Path = field(init=False, default=Path())
    site: str | None = field(init=False, default=None)
    verify: bool = field(init=False, default=False)
    live: RecordingConfig
    fingerprint: str = field(init=False, default="")
    """of the model, so that a run does not go on with another one"""

    def settings(self) -> dict:
        live = {k: v for k, v in asdict(self.live).items() if k not in ("device", "device_map")}
        live["text_bytes"] = [path.stat().st_size for path in text_files(self.live)]
        own = {k: v for k, v in super().settings().items() if k not in ("cache", "site")}
        return own | {"live": json.loads(json.dumps(live))}


def train_live(config: LiveTrainingConfig) -> list[Path]:
    """`train` on activations that are computed as they are needed, from the settings in `config.live`.

    With the same text, settings, machine and device, a run that was interrupted goes on bit for bit as if it had not been.
    """
    config.check()
    if not config.dry_run:
        require_folder(config.out)
    source = LiveActivations(config.live)
    config.fingerprint = source.manifest["model"]["fingerprint"]
    return train_on(source, config)
