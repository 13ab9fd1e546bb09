"""Learn dictionaries of a language model's activations and look into them."""

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError

__all__ = ["Dictionary", "InputError"]
