"""An explanation and the file of all of an index."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sae.disk.arrays import EXPLANATIONS
from sae.disk.reading import parse_json, read_bytes, require
from sae.disk.writing import atomic
from sae.errors import InputError
from sae.text_input import replace_surrogates

METHODS = ("token", "bigram", "pattern")
"""methods without a model, in the order of the file"""


class Explanation(NamedTuple):
    """One line of explanations.jsonl."""

    feature: int
    method: str
    """token, bigram, pattern, or model:NAME"""
    text: str
    """plain text, not HTML"""
    scores: dict[str, Any]
    """see docs/explanations.md; None if a score is not defined"""
    baselines: dict[str, Any]
    """the same scores of trivial predictions on the same tokens"""


def parse_explanation(line: bytes, what: str) -> Explanation:
    """Raises `InputError`, which starts with `what`, for a line that is not an explanation."""
    value = parse_json(line, what, dict[str, Any])
    require(value, Explanation, what)
    explanation = Explanation(**value)
    if replace_surrogates(f"{explanation.method} {explanation.text}")[1]:
        raise InputError(f"expected {what}, but it holds half of a surrogate pair, which is no character; repair it")
    return explanation


def read_explanations(index_folder: str | Path) -> dict[int, list[Explanation]]:
    """The explanations of every feature that has some; empty without the file. Raises `InputError` for an invalid line."""
    path = Path(index_folder) / EXPLANATIONS
    found: dict[int, list[Explanation]] = defaultdict(list)
    if path.exists():
        for number, line in enumerate(read_bytes(path, "explanations").splitlines(), 1):
            what = f"an explanation in line {number} of {path} (remove the line to continue)"
            explanation = parse_explanation(line, what)
            found[explanation.feature].append(explanation)
    return dict(found)


def write_explanations(index_folder: Path, new: Iterable[Explanation]) -> Path:
    """Puts `new` into the file, replacing lines of the same feature and method; the file is replaced completely or not at all."""
    lines = {(e.feature, e.method): e for some in read_explanations(index_folder).values() for e in some}
    lines |= {(e.feature, e.method): e for e in new}
    order = {method: i for i, method in enumerate(METHODS)}
    with atomic(index_folder / EXPLANATIONS) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for _, explanation in sorted(lines.items(), key=lambda item: (item[0][0], order.get(item[0][1], len(order)), item[0][1])):
            file.write(json.dumps(explanation._asdict(), ensure_ascii=False, allow_nan=False) + "\n")
    return index_folder / EXPLANATIONS
