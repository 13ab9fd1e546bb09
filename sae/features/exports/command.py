"""Exports of features: a folder of pages that opens from file://, and the formats of Neuronpedia, SAEDashboard, circuit-tracer."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from sae.disk.folders import fresh_folder
from sae.disk.mapped import is_mapped, require_room
from sae.disk.places import require_folder
from sae.errors import InputError
from sae.features.index.reader import FeatureIndex

if TYPE_CHECKING:
    from sae.features.explanations.explanation import Explanation

MARKERS = {"neuronpedia": "source.jsonl", "neuronpedia-upload": "upload-0.json", "saedashboard": "run_settings.json"}
TAKES = {
    "features": ("static", *MARKERS),
    "notes": ("static",),
    "processes": ("static",),
    "model_id": (*MARKERS, "circuit-tracer"),
    "source_set": (*MARKERS, "circuit-tracer"),
    "creator": ("neuronpedia",),
    "dictionary": ("neuronpedia", "saedashboard"),
}


@dataclass(kw_only=True)
class ExportConfig:
    index: Path
    """Folder that `sae index` wrote."""
    out: Path
    """Folder to write; an older export of the same format is replaced. For circuit-tracer, the layer is added to those in the folder."""
    format: Literal["static", "neuronpedia", "neuronpedia-upload", "saedashboard", "circuit-tracer"] = "static"
    """What to write. static: pages that open from file://. neuronpedia: its export. neuronpedia-upload: requests of its batch upload."""
    features: tuple[int, ...] = ()
    """Only these features. Default: all."""
    notes: Path | None = None
    """Database of labels, stars and notes to show (static). Default: notes.sqlite beside the index, if it exists."""
    processes: int | None = None
    """Processes that render pages (static). Default: the number of cores."""
    model_id: str | None = None
    """Name of the model in the export. Default: its folder's name."""
    source_set: str | None = None
    """Name of the set of dictionaries in the export, for example res-4k. Default: made from site and width."""
    creator: str | None = None
    """Your user id at Neuronpedia (neuronpedia). Default: "local"."""
    dictionary: str | None = None
    """Folder, file or hub name of the index's dictionary: its decoder rows are written as steering vectors (neuronpedia, saedashboard)."""


def export_features(config: ExportConfig) -> None:
    """Raises `InputError` for flags that the format does not use, and if the format cannot express the index."""
    from sae.features.explanations.explanation import read_explanations

    for name, formats in TAKES.items():
        if getattr(config, name) not in (None, ()) and config.format not in formats:
            raise InputError(f"--{name.replace('_', '-')} has no use with --format {config.format}; it is for {', '.join(formats)}")
    require_folder(config.out)
    index = FeatureIndex.open(config.index, verify=True)
    features = list(config.features or range(index.d_sae))
    for j in features:
        index.feature(j)
    if len(set(features)) < len(features):
        raise InputError("expected every feature once, but --features names one twice")
    explanations = read_explanations(config.index)
    if config.format == "static":
        _static(config, index, features, explanations)
    else:
        _interchange(config, index, features, explanations)


def _static(config: ExportConfig, index: FeatureIndex, features: Sequence[int], explanations: "dict[int, list[Explanation]]") -> None:
    from sae.features.exports.static import export_static
    from sae.features.notes import Notes

    known = {}
    if config.notes is not None and not config.notes.exists():
        raise InputError(f"expected a database of notes at {config.notes}, which does not exist; check its name")
    if config.notes is not None or (index.folder.resolve().parent / "notes.sqlite").exists():
        notes = Notes.open(config.notes, index)
        known = notes.all()
        notes.close()
    path = export_static(index, config.out, features, notes=known, explanations=explanations, processes=config.processes)
    print(f"open {path}")


def _interchange(config: ExportConfig, index: FeatureIndex, features: Sequence[int], explanations: "dict[int, list[Explanation]]") -> None:
    from sae.features.exports.circuit_tracer import write_circuit_tracer
    from sae.features.exports.neuronpedia import write_neuronpedia, write_uploads
    from sae.features.exports.saedashboard import names_of, write_saedashboard

    names = names_of(index, config.model_id, config.source_set)
    rows = None if config.dictionary is None else vectors(index, config.dictionary)
    if index.negative is not None:
        print(
            f"some activations are below 0; {config.format} gets them with their signs, but its viewer may show only others",
            file=sys.stderr,
        )
    if config.format == "circuit-tracer":
        write_circuit_tracer(index, config.out, names)
    else:
        with fresh_folder(config.out, MARKERS[config.format], "export") as folder:
            if config.format == "neuronpedia":
                write_neuronpedia(index, folder, features, names, explanations, config.creator or "local", rows)
            elif config.format == "neuronpedia-upload":
                write_uploads(index, folder, features, names, explanations)
            else:
                write_saedashboard(index, folder, features, names, rows)
    print(f"wrote {names.model} {names.source} into {config.out}")


def vectors(index: FeatureIndex, source: str) -> np.ndarray:
    """Decoder rows [f, d] of the index's dictionary. Raises `InputError` for one whose vectors differ from token to token."""
    dictionary = index.dictionary(source)
    if dictionary.frame is not None and dictionary.frame.kind != "centred":
        raise InputError(
            f"the dictionary in {source} normalises every token ({dictionary.frame.kind}), so that no feature has one vector to "
            "steer with; leave out --dictionary"
        )
    if is_mapped(dictionary.W_dec_fo):
        require_room(4 * dictionary.W_dec_fo.numel(), "all decoder rows at once")
    return dictionary.W_dec_fo.float().numpy()
