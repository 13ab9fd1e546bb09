"""The source's statements about a dictionary: in the names of its folders, in files beside it, in its metadata, in its gate."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from typing_extensions import NotRequired, TypedDict

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.gates import TopK
from sae.disk.reading import Number, read_json, read_tensors, require

FACTOR = 1.5
"""an L0 between the promised one divided and multiplied by this keeps the promise: another text has other features"""
L0_RANGES = {"small": (10.0, 20.0), "medium": (30.0, 60.0), "big": (90.0, 150.0)}
"""the ranges of Gemma Scope 2's l0_small, l0_medium and l0_big"""
MEASURED = {
    "l0": ("reconstruction", "l0"),
    "fvu": ("reconstruction", "fvu"),
    "cosine": ("reconstruction", "cosine"),
    "norm_ratio": ("reconstruction", "norm_ratio"),
    "loss_recovered": ("language_model", "loss_recovered"),
}
"""the place of each measure in the evaluation.json of `sae evaluate`"""


class Evaluation(TypedDict):
    """the parts of evaluation.json that are used here."""

    reconstruction: dict[str, Any]
    language_model: NotRequired[dict[str, Any] | None]


class Promise(NamedTuple):
    measure: str
    """l0, fvu, cosine, norm_ratio, loss_recovered or silent_share"""
    low: float
    high: float
    """equal to `low`, except for a range"""
    source: str
    """where the promise is made"""


class Promises(tuple[Promise, ...]):
    """The first promise of a measure is used."""

    def of(self, measure: str) -> Promise | None:
        return next((one for one in self if one.measure == measure), None)

    def broken_by(self, l0: float) -> bool:
        one = self.of("l0")
        return one is not None and not one.low / FACTOR <= l0 <= one.high * FACTOR


def promises(path: Path, dictionary: Dictionary, rows: int) -> Promises:
    """`rows`: on how many tokens features may fire, of which the share of silent ones depends.

    Raises `InputError` for a damaged file beside the dictionary.
    """
    found = [*in_metadata(dictionary.metadata), *in_names(path)]
    folder = path if path.is_dir() else path.parent
    if (folder / "evaluation.json").exists():
        found += in_evaluation(folder / "evaluation.json")
    if (folder / "sparsity.safetensors").exists():
        found += in_sparsity(folder / "sparsity.safetensors", dictionary.d_sae, rows)
    if isinstance(dictionary.gate, TopK):
        found.append(Promise("l0", 0.0, float(dictionary.gate.k), f"its gate, TopK of {dictionary.gate.k}"))
    return Promises(found)


def in_metadata(metadata: dict[str, Any]) -> Iterator[Promise]:
    promised = metadata.get("promised") or {}
    require(promised, dict[str, Number], "numbers by measure under promised in the dictionary's metadata")
    for measure, value in promised.items():
        yield Promise(measure, value, value, "its metadata")


def in_names(path: Path) -> Iterator[Promise]:
    for part in reversed(path.absolute().parts):
        if match := re.search(r"(?:^|[^a-z])l0[_-]?([0-9]+(?:\.[0-9]+)?)(?![0-9kx])", part, re.IGNORECASE):
            yield Promise("l0", float(match[1]), float(match[1]), f"the name {part}")
        elif match := re.search(r"(?:^|[^a-z])l0[_-](small|medium|big)(?![a-z])", part, re.IGNORECASE):
            yield Promise("l0", *L0_RANGES[match[1].lower()], f"the name {part}")


def in_evaluation(path: Path) -> Iterator[Promise]:
    said: Any = read_json(path, "a dictionary's evaluation.json", Evaluation)
    for measure, (part, key) in MEASURED.items():
        value = (said.get(part) or {}).get(key)
        if value is not None:
            yield Promise(measure, value, value, path.name)


def in_sparsity(path: Path, d_sae: int, rows: int) -> Iterator[Promise]:
    """SAELens' log10 of each feature's firing rate."""
    tensors, _ = read_tensors(path, "firing rates", {"sparsity": ("F16 BF16 F32 F64", "f")}, then="copy it again", f=d_sae)
    rate_f = 10.0 ** np.minimum(tensors["sparsity"].double().numpy(), 0.0)
    silent = float(((1 - rate_f) ** rows).mean())
    yield Promise("l0", float(rate_f.sum()), float(rate_f.sum()), path.name)
    yield Promise("silent_share", silent, silent, path.name)
