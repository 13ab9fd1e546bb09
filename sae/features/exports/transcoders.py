"""Exports per-layer transcoders to circuit-tracer: the folder of weights that its replacement model opens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sae.dictionaries.formats.trainers.circuit_tracer import CONFIG
from sae.dictionaries.formats.trainers.circuit_tracer_writer import save_set
from sae.dictionaries.parts import Parts
from sae.dictionaries.source import read
from sae.disk.folders import fresh_folder
from sae.disk.places import require_folder


@dataclass(kw_only=True)
class TranscodersConfig:
    dictionaries: tuple[str, ...]
    """Folders, files or hub names of transcoders, one for each block of the model in any order, or of a whole set."""
    out: Path
    """Folder to write; an older set is replaced."""
    model_name: str | None = None
    """Name of the model in TransformerLens. Default: the name in the transcoders."""


def export_transcoders(config: TranscodersConfig) -> None:
    """Raises `InputError` for transcoders that circuit-tracer cannot compute, and for layers that are missing or do not go together."""
    require_folder(config.out)
    with fresh_folder(config.out, CONFIG, "set of transcoders") as folder:
        n = save_set(transcoders(config.dictionaries), folder, config.model_name)
    print(f"wrote layers 0 to {n - 1} into {config.out}; circuit-tracer needs every block of the model, and an absolute path")


def transcoders(sources: Sequence[str]) -> Iterator[Parts]:
    """Yields one after another, so that one at a time is in memory."""
    for source in sources:
        found = read(source)
        yield from [found] if isinstance(found, Parts) else (opened() for opened in found.values())
