"""Per-layer transcoders carried to circuit-tracer: the folder of weights that its replacement model opens."""

from dataclasses import dataclass
from pathlib import Path

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.formats.circuit_tracer_writer import CONFIG, save_set
from sae.disk.folders import fresh_folder
from sae.disk.places import require_folder


@dataclass(kw_only=True)
class TranscodersConfig:
    dictionaries: tuple[Path, ...]
    """Transcoders, one for each block of the model, in any order."""
    out: Path
    """Folder to write; an older set is replaced."""
    model_name: str | None = None
    """Name of the model in TransformerLens. Default: the name in the transcoders."""


def export_transcoders(config: TranscodersConfig) -> None:
    """Raises `InputError` for what circuit-tracer cannot compute, and for layers that are missing or do not go together."""
    require_folder(config.out)
    with fresh_folder(config.out, CONFIG, "set of transcoders") as folder:
        n = save_set((Dictionary.load(path).parts() for path in config.dictionaries), folder, config.model_name)
    print(f"wrote layers 0 to {n - 1} into {config.out}; circuit-tracer needs every block of the model, and an absolute path")
