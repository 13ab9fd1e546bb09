"""Active entries of an encoder, by the fastest method on this machine."""

from sae.encoding.choice import fastest
from sae.encoding.encoder import METHODS, Encoder, Method

__all__ = ["METHODS", "Encoder", "Method", "fastest"]
