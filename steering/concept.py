"""What to steer towards: a concept's contrast texts, words, prompt pairs and label, read from its file.

A concept is a JSON file, see docs/concepts.md; `steering/concepts/` has those of the package.
"""

import sys
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sae.disk.reading import read_json
from sae.errors import InputError
from sae.text_input import replace_surrogates_in, text_list
from steering.strength.measure import read_words

SHIPPED = Path(__file__).with_name("concepts")


@dataclass(frozen=True)
class Concept:
    name: str
    description: str = ""
    positive: tuple[str, ...] = ()
    """texts that show the concept"""
    negative: tuple[str, ...] = ()
    """texts that do not; if there are as many, the n-th has the same subject as the n-th positive one"""
    words: tuple[str, ...] = ()
    """words and phrases that are counted, with every inflected form listed"""
    prompt_pairs: tuple[tuple[str, str], ...] = ()
    """pairs of prompts for ActAdd: with and without the concept"""
    prompt: str | None = None
    """the text that plain prompting puts before a prompt"""
    label: str | None = None
    """label of a corpus whose documents show the concept"""

    def __post_init__(self) -> None:
        for name in ("positive", "negative", "words"):
            text_list(getattr(self, name), name)


def shipped_concepts() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def load_concept(name_or_path: str) -> Concept:
    """A shipped concept by name, one from a .json file, or "label:DOMAIN": the documents of a corpus that have this label.

    Raises `InputError` for a name that is not shipped, and for a file that is damaged, has other keys or nothing to steer towards.
    """
    if name_or_path.startswith("label:"):
        return _checked(Concept(name_or_path, f"documents labelled {name_or_path[6:]}", label=name_or_path[6:]), "the name")
    path = Path(name_or_path)
    if path.suffix != ".json":
        path = SHIPPED / f"{name_or_path}.json"
        if name_or_path not in shipped_concepts():
            raise InputError(
                f"expected a concept, one of {', '.join(shipped_concepts())}, a path to a .json file, or label: and a label "
                f"of the corpus, got {name_or_path!r}"
            )
    value, halves = replace_surrogates_in(read_json(path, "a concept"))
    if halves:
        print(f"halves of surrogate pairs in {path}, which are no characters, are now U+FFFD ({halves:,})", file=sys.stderr)
    return _parse(value, path)


def _parse(value: Any, path: Path) -> Concept:
    """The object of a concept's file. "words" may be {"file": PATH}, a list with one word a line, relative to the concept's file."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise InputError(f'expected an object with a "name" in the concept\'s file {path}; add it')
    known = {field.name for field in fields(Concept)}
    if unknown := sorted(set(value) - known):
        raise InputError(f"expected the keys {', '.join(sorted(known))} in {path}, got {unknown[0]!r}; remove it")
    given = {key: entry for key, entry in value.items() if entry is not None}
    words = given.get("words")
    if isinstance(words, dict):
        if list(words) != ["file"] or not isinstance(words["file"], str):
            raise InputError(f'expected "words" in {path} to be a list or {{"file": PATH}}, got {words}')
        given["words"] = read_words(path.parent / words["file"])
    for key in ("positive", "negative", "words"):
        given[key] = tuple(_strings(given.get(key, []), key, path))
    pairs = given.get("prompt_pairs", [])
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise InputError(f'expected "prompt_pairs" in {path} to be a list of lists of two prompts')
    given["prompt_pairs"] = tuple((a, b) for a, b in (_strings(pair, "prompt_pairs", path, empty=True) for pair in pairs))
    for key in ("description", "prompt", "label"):
        if not isinstance(given.get(key, ""), str):
            raise InputError(f'expected "{key}" in {path} to be text or null, got {given[key]!r}')
    return _checked(Concept(**given), str(path))


def _strings(value: Any, key: str, path: Path, empty: bool = False) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) and (empty or text.strip()) for text in value):
        raise InputError(f'expected "{key}" in {path} to be a list of texts that are not empty')
    return value


def _checked(concept: Concept, where: str) -> Concept:
    if not (concept.positive or concept.negative or concept.words or concept.prompt_pairs or concept.label):
        raise InputError(f"expected positive and negative texts, words, prompt_pairs or a label in {where}, found none: an empty concept")
    if bool(concept.positive) != bool(concept.negative):
        raise InputError(f"expected positive and negative texts in {where}, but one side is empty; add texts to it")
    texts = concept.positive + concept.negative
    if len(set(texts)) < len(texts):
        twice, _ = Counter(texts).most_common(1)[0]
        raise InputError(f"expected every text of {where} once, so that none is both learned from and tested on, got {twice!r} twice")
    return concept
