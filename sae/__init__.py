"""Learn dictionaries of a language model's activations and look into them."""

from sae.dictionary import SparseAutoencoder
from sae.errors import InputError

__all__ = ["InputError", "SparseAutoencoder"]
