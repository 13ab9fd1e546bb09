"""Active entries of an encoder, by whichever way is the fastest one here."""

from sae.encoding.choice import fastest
from sae.encoding.encoder import Encoder, Method

__all__ = ["Encoder", "Method", "fastest"]
