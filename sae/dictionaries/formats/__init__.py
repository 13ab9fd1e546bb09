"""Formats of dictionaries on disk, one row each. `load` finds the row of a folder or file; saelens.py is the one that is written too.

tensors.py is what the rows share.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sae.dictionaries.formats import (
    bussmann,
    circuit_tracer,
    crosscoder_learning,
    dictionary_learning,
    gemma_scope,
    kissane,
    openai,
    saelens,
    sparsify,
)
from sae.dictionaries.formats.tensors import Device, has
from sae.dictionaries.parts import Layers, Parts
from sae.errors import InputError

SHOWN = 12
"""files named in an error"""


class Format(NamedTuple):
    name: str
    files: str
    """by which it is known, as error sentences and the documentation show them"""
    recognises: Callable[[Path], bool]
    """whether this folder or file is of the format, by names of files and of what they hold. May raise `InputError` for a damaged one"""
    load: Callable[[Path, Device], Parts | Layers]
    """Raises `InputError` for whatever changes the function and is not understood"""


FORMATS = (
    Format("SAELens", f"{saelens.CFG} + {saelens.WEIGHTS}", has(saelens.WEIGHTS), saelens.load),
    Format("Gemma Scope", gemma_scope.PARAMS_1, gemma_scope.recognises_1, gemma_scope.load_1),
    Format("Gemma Scope 2", gemma_scope.PARAMS_2, gemma_scope.recognises_2, gemma_scope.load_2),
    Format("Gemma Scope 2, several layers", gemma_scope.LAYER_FILES, has(gemma_scope.LAYER_FILES), gemma_scope.load_layers),
    Format("circuit-tracer", "config.yaml + layer_0.safetensors or W_enc_0 and W_dec_0", circuit_tracer.recognises, circuit_tracer.load),
    Format("sparsify", sparsify.FILES, sparsify.recognises, sparsify.load),
    Format("dictionary_learning", dictionary_learning.FILES, dictionary_learning.recognises, dictionary_learning.load),
    Format("crosscoder_learning", crosscoder_learning.FILES, crosscoder_learning.recognises, crosscoder_learning.load),
    Format("crosscoders of Kissane and Nanda", kissane.FILES, kissane.recognises, kissane.load),
    Format("BatchTopK and Matryoshka of Bussmann", bussmann.FILES, bussmann.recognises, bussmann.load),
    Format("OpenAI", openai.FILES, openai.recognises, openai.load),
)


def format_of(path: Path) -> Format:
    """The row of a folder or file. Raises `InputError` where none or several know it."""
    if not path.exists():
        raise InputError(f"expected a dictionary in {path}, which does not exist; check its name")
    found, damage = [], None
    for row in FORMATS:
        try:
            found += [row] if row.recognises(path) else []
        except InputError as error:
            damage = damage or error
    if len(found) == 1:
        return found[0]
    if damage is not None and not found:
        raise damage
    if found:
        names = " and ".join(f"{row.name} ({row.files})" for row in found)
        raise InputError(f"expected one dictionary in {path}, found files of {names}; move one of them elsewhere")
    files = sorted(one.name + "/" * one.is_dir() for one in path.iterdir()) if path.is_dir() else [path.name]
    there = ", ".join(files[:SHOWN]) + (f" and {len(files) - SHOWN} more" if len(files) > SHOWN else "")
    known = "; ".join(f"{row.name}: {row.files}" for row in FORMATS)
    raise InputError(f"expected a dictionary in {path}, found no known format ({known}), but {there or 'nothing'}; check its name")


def load(path: Path, device: Device = "cpu") -> Parts | Layers:
    """What the dictionary, or each dictionary of a set, in the folder or file is made of. Raises `InputError` for none of the formats."""
    return format_of(path).load(path, device)
