"""Active entries of an encoder, by whichever way is the fastest one here."""

from sae.encoding.choice import fastest
from sae.encoding.encoder import METHODS, Encoder, Method

__all__ = ["METHODS", "Encoder", "Method", "fastest"]
