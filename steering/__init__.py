"""Change what a language model says by adding directions to its activations."""

from steering.intervention import steered
from steering.vector import SteeringVector

__all__ = ["SteeringVector", "steered"]
