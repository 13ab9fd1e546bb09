"""Change what a language model says by adding directions to its activations."""

from steering.intervention import DictionaryFeature, steered
from steering.vector import SteeringVector

__all__ = ["DictionaryFeature", "SteeringVector", "steered"]
