"""Copies a dictionary of any format, or a set of them, into folders of SAELens' layout, the only layout that is written."""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tyro.conf import Positional

from sae.dictionaries.formats import format_of
from sae.dictionaries.formats.saelens.cfg import CFG
from sae.dictionaries.formats.saelens.files import save
from sae.dictionaries.gates import Threshold
from sae.dictionaries.parts import Parts
from sae.dictionaries.source import locate, read, weights_crc32
from sae.disk.folders import fresh_folder
from sae.disk.mapped import is_mapped, require_room
from sae.disk.places import require_folder
from sae.errors import InputError


@dataclass
class ImportConfig:
    source: Positional[str]
    """Folder, file or hub name of a dictionary, or of a set of them."""
    out: Path | None = None
    """Folder to write; an existing dictionary in it is replaced. A set gets one folder for each layer."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number format of the weights. Default: that of the source."""
    dry_run: bool = False
    """Only print what is found; nothing is written."""


def import_dictionary(config: ImportConfig) -> None:
    """Raises `InputError` for a source that cannot be read, or that the layout cannot hold."""
    if config.out is None and not config.dry_run:
        raise InputError("expected --out, the folder to write, or --dry-run; give one of them")
    if config.out is not None:
        require_folder(config.out)
    found = read(config.source)
    layers = None if isinstance(found, Parts) else found
    first = found if isinstance(found, Parts) else next(iter(found.values()))()
    print_table(config, describe(config.source, first, None if layers is None else list(layers)))
    if config.dry_run or config.out is None:
        return
    if layers is None:
        with fresh_folder(config.out, CFG, "dictionary") as folder:
            save(converted(config, first), folder)
    else:
        with fresh_folder(config.out, f"layer_{min(layers)}/{CFG}", "set of dictionaries") as folder:
            for layer, load in layers.items():
                save(converted(config, load()), folder / f"layer_{layer}")
    print(f"wrote {config.out}")


def converted(config: ImportConfig, parts: Parts) -> Parts:
    """In the requested number format, and with a note of its source."""
    path, _ = locate(config.source)
    came_from = {"source": config.source, "format": format_of(path).name, "weights_crc32": weights_crc32(config.source, [parts])}
    parts = parts._replace(metadata=parts.metadata | {"imported": came_from})
    if config.dtype is None:
        return parts
    to = getattr(torch, config.dtype)
    if is_mapped(parts.W_dec_fo) and to != parts.W_dec_fo.dtype:
        numbers = parts.W_enc_fd.numel() + parts.W_dec_fo.numel()
        require_room(numbers * to.itemsize, f"the dictionary in {config.source} as {config.dtype}")
    tensors: dict[str, Any] = {name: value.to(to) for name, value in parts._asdict().items() if isinstance(value, torch.Tensor)}
    return parts._replace(gate=copy.deepcopy(parts.gate).to(to), **tensors)


def describe(source: str, parts: Parts, layers: list[int] | None) -> dict[str, str]:
    """A description of the dictionary, row by row; for a set, of its first layer."""
    (f, d), o, gate = parts.W_enc_fd.shape, parts.W_dec_fo.shape[1], parts.gate
    path, _ = locate(source)
    kind = type(gate).__name__ + (f"({gate.extra_repr()})" if gate.extra_repr() else "")
    if isinstance(gate, Threshold):
        kind = "ReLU" if gate.theta_f is None else "JumpReLU"
    kind += " " + ("crosscoder" if len(parts.reads) > 1 else "transcoder" if parts.is_transcoder else "autoencoder")
    extras = [
        *(["takes a bias off its input"] if parts.b_in_d is not None else []),
        *(["with a skip matrix"] if parts.W_skip_od is not None else []),
    ]
    known = ("site", "site_out", "promised")
    rows = {
        "format": format_of(path).name,
        "path": str(path),
        "layers": "" if layers is None else f"{len(layers)} dictionaries, {layers[0]} to {layers[-1]}; below, layer {layers[0]}",
        "kind": ", ".join([kind, *extras]),
        "features": f"{f:,}",
        "reads": places(parts.reads, d),
        "writes": places(parts.writes, o),
        "frame": "none" if parts.frame is None else parts.frame.kind,
        "dtype": str(parts.W_dec_fo.dtype).removeprefix("torch."),
        "promised": ", ".join(f"{name} {value}" for name, value in parts.metadata.get("promised", {}).items()),
    }
    facts = {key: str(value) for key, value in parts.metadata.items() if key not in known and value is not None}
    return {name: text for name, text in rows.items() if text} | facts


def places(ports: tuple, width: int) -> str:
    sites = [port.site or "a site that it does not name" for port in ports]
    return f"{', '.join(sites)}, {width:,} wide"


def print_table(config: ImportConfig, rows: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=config.source, show_header=False)
    for name, text in rows.items():
        table.add_row(name, text)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
