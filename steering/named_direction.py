"""The direction that a command names: a vector file, a feature, two prompts, a concept, a component of neutral text, or a random one."""

from pathlib import Path
from typing import NamedTuple

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.concept import load_concept
from steering.dictionary import load_dictionary
from steering.directions.actadd import actadd, site_before_block
from steering.directions.diffmean import diffmean_of_texts
from steering.directions.feature import feature_direction
from steering.directions.pca import principal_directions_of_texts
from steering.directions.random import random_direction
from steering.strength.neutral import OTHERS
from steering.vector import SteeringVector

SPELLINGS = "a vector file, a feature's number, actadd:POSITIVE|NEGATIVE, diffmean:CONCEPT, pca:N or random:SEED"


class NamedDirection(NamedTuple):
    vector: SteeringVector
    dictionary: Dictionary | None
    """if one was given; it reads at the vector's place in the stream"""
    feature: int | None
    """if the direction is one of the dictionary"""


def named_direction(lm: LanguageModel, name: str, source: str | None = None, site: str | None = None) -> NamedDirection:
    """The direction spelled as `SPELLINGS` says; `source` is a dictionary, which a feature needs and whose site is the default.

    "actadd:Love|Hate" has a direction for each of its prompts' positions, at the input of a block. "diffmean:curse_words" is of all
    contrast texts of a concept, shipped or a .json file. Without a dictionary the default site is the middle block's resid_post. Raises
    `InputError` for other spellings, a concept without texts, and a dictionary of another site than the vector's file.
    """
    dictionary = None
    if source is not None:
        dictionary, site = load_dictionary(source, lm, site)
    chosen = site or f"resid_post.{lm.n_layers // 2}"
    kind, _, rest = name.partition(":")
    if name.isdecimal():
        if dictionary is None:
            raise InputError(f"expected --dictionary with the feature {name}, got none; give the dictionary that it belongs to")
        return NamedDirection(feature_direction(dictionary, int(name), 1.0, chosen), dictionary, int(name))
    if kind == "actadd":
        positive, bar, negative = rest.partition("|")
        if not bar:
            raise InputError(f"expected two prompts with | between them as actadd:POSITIVE|NEGATIVE, got {name!r}")
        return NamedDirection(actadd(lm, positive, negative, site_before_block(chosen, lm.n_layers)), dictionary, None)
    if kind == "diffmean":
        concept = load_concept(rest)
        if not concept.positive:
            raise InputError(f"expected a concept with positive and negative texts as diffmean:CONCEPT, but {rest!r} has none; add them")
        return NamedDirection(diffmean_of_texts(lm, concept.positive, concept.negative, chosen), dictionary, None)
    if kind in ("pca", "random") and rest.isdecimal():
        lm.width(chosen)
        if kind == "random":
            return NamedDirection(random_direction(lm.width(chosen), chosen, int(rest)), dictionary, None)
        return NamedDirection(principal_directions_of_texts(lm, OTHERS, chosen, max(1, int(rest)))[-1], dictionary, None)
    if not Path(name).is_file():
        raise InputError(f"expected {SPELLINGS} as --vector, got {name!r}")
    vector = SteeringVector.load(name)
    if dictionary is not None and chosen != vector.site:
        raise InputError(f"expected a dictionary of {vector.site}, where the vector is, got one of {chosen}; leave one of them out")
    return NamedDirection(vector, dictionary, None)
