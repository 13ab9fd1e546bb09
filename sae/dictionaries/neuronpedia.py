"""Neuronpedia's names of models, dictionaries ("sources") and features, as in its URLs, and their names on the hub.

https://www.neuronpedia.org/gemma-2-2b/12-gemmascope-res-16k/10004 feature 10004 of a source; gemma-2-2b/… is its short form
"""

import json
import re
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from sae.errors import InputError

URL = re.compile(r"https?://(?:www\.)?neuronpedia\.org/([^?#]*)(?:[?#].*)?", re.IGNORECASE)
NUMBER = re.compile(r"\\{([0-9]+)\\}")


class Posted(NamedTuple):
    model: str
    """on the hub"""
    dictionary: str
    """on the hub, as `locate` takes it"""
    feature: int | None


def posted(name: str) -> Posted:
    """Model, dictionary and feature of a URL of Neuronpedia, or of model/source or model/source/feature.

    Raises `InputError` for another name, a source of neurons, and a source that is not in the list of this package.
    """
    url = URL.fullmatch(name)
    parts = (url[1] if url else name).strip("/").split("/")
    if len(parts) not in (2, 3) or not all(parts) or not re.fullmatch(r"[0-9]{1,9}", parts[2] if len(parts) == 3 else "0"):
        raise InputError(
            f"expected a URL of Neuronpedia or model/source/feature, such as gemma-2-2b/12-gemmascope-res-16k/10004, got {name!r}"
        )
    model, source = parts[:2]
    if model not in sources():
        raise InputError(
            f"expected one of Neuronpedia's models {', '.join(sources())}, got {model!r}; give --dictionary and --model instead"
        )
    layer, _, kind = source.partition("-")
    if not kind:
        raise InputError(f"{name} names neurons of MLP {layer}, not a dictionary; name a source such as 12-gemmascope-res-16k")
    entry = sources()[model]
    dictionary = _expanded(entry["sets"], kind, layer)
    if dictionary is None:
        raise InputError(
            f"expected one of Neuronpedia's sources of {model} LAYER-{', LAYER-'.join(entry['sets'])}, got {source!r}; "
            "give --dictionary and --model instead"
        )
    return Posted(entry["model"], dictionary, int(parts[2]) if len(parts) == 3 else None)


def _expanded(sets: dict[str, Any], kind: str, layer: str) -> str | None:
    """The dictionary of a kind and layer. A kind may hold numbers that its dictionary's name repeats, such as __l0-{0}."""
    for pattern, name in sets.items():
        if found := re.fullmatch(NUMBER.sub("([0-9]+)", re.escape(pattern)), kind):
            name = name if isinstance(name, str) else name.get(layer)
            return name and name.format(*found.groups(), layer=layer)
    return None


@cache
def sources() -> dict[str, dict[str, Any]]:
    """The 2,441 of SAELens' list (6.54.12) that have a name there: per model its name on the hub, and per kind of source the
    dictionary's, for all layers alike or for each."""
    return json.loads(files("sae.dictionaries").joinpath("neuronpedia.json").read_text())
