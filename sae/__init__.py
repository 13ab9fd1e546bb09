"""Learn dictionaries of a language model's activations and look into them."""

from sae.dictionaries.bundle import Bundle, load
from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.model.language_model import LanguageModel

__version__ = "0.1.0"
__all__ = ["Bundle", "Dictionary", "InputError", "LanguageModel", "__version__", "load"]
