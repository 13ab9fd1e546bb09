"""Formats of dictionaries on disk: one row each. `load` finds the row of a folder; saelens.py is the one that is written too."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from sae.dictionaries.formats import saelens
from sae.dictionaries.parts import Parts
from sae.errors import InputError


class Format(NamedTuple):
    name: str
    has: tuple[str, ...]
    """files by which a folder of this format is known"""
    load: Callable[[Path, str | torch.device], Parts]


FORMATS = (Format("SAELens", (saelens.CFG, saelens.WEIGHTS), saelens.load),)


def load(folder: Path, device: str | torch.device = "cpu") -> Parts:
    """What the dictionary in `folder` is made of. Raises `InputError` for a folder of none of the formats."""
    if not folder.exists():
        raise InputError(f"expected a dictionary in the folder {folder}, which does not exist; check its name")
    for row in FORMATS:
        if any((folder / name).exists() for name in row.has):
            return row.load(folder, device)
    known = "; ".join(f"{row.name}: {' and '.join(row.has)}" for row in FORMATS)
    raise InputError(f"expected a dictionary in {folder}, but no files of a known format are there ({known}); check the folder's name")
