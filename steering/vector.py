"""A direction at a site of a model, with where it came from.

d width of the site
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.errors import InputError
from sae.files import write_tensors

FORMAT = "steering-vector-1"


@dataclass(frozen=True)
class SteeringVector:
    """What coefficient 1 adds at `site`; `2 * vector` and `vector + other` make new ones."""

    site: str
    """for example "resid_post.2" """
    direction_d: Tensor
    """float32 [d], in the model's own units"""
    provenance: dict[str, Any] = field(default_factory=dict)
    """how it was made; plain JSON values"""

    def __post_init__(self) -> None:
        if self.direction_d.ndim != 1 or not torch.isfinite(self.direction_d).all():  # host sync
            raise InputError(f"expected a steering direction of finite numbers in one row, got shape {tuple(self.direction_d.shape)}")
        object.__setattr__(self, "direction_d", self.direction_d.detach().float())

    @property
    def norm(self) -> float:
        return self.direction_d.norm().item()  # host sync

    def __mul__(self, factor: float) -> "SteeringVector":
        if not math.isfinite(factor):
            raise InputError(f"expected a finite factor for a steering vector, got {factor}")
        return SteeringVector(self.site, factor * self.direction_d, {"factor": factor, "of": self.provenance})

    __rmul__ = __mul__

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        if (self.site, self.direction_d.shape) != (other.site, other.direction_d.shape):
            raise InputError(
                f"expected two steering vectors of one site and width to add, got {self.site} {tuple(self.direction_d.shape)} "
                f"and {other.site} {tuple(other.direction_d.shape)}"
            )
        return SteeringVector(self.site, self.direction_d + other.direction_d, {"sum": [self.provenance, other.provenance]})

    def save(self, path: str | Path) -> None:
        """One safetensors file, with site and provenance in its metadata."""
        metadata = {"format": FORMAT, "site": self.site, "provenance": json.dumps(self.provenance)}
        write_tensors(Path(path), {"direction": self.direction_d.cpu()}, metadata)  # host sync

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVector":
        """Raises `InputError` unless `path` is a whole file that `save` wrote."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                metadata, keys = file.metadata() or {}, list(file.keys())
                if metadata.get("format") != FORMAT or keys != ["direction"]:
                    raise InputError(f"expected a steering vector ({FORMAT}) in {path}, got a file with {', '.join(keys) or 'nothing'}")
                return cls(metadata["site"], file.get_tensor("direction"), json.loads(metadata["provenance"]))
        except FileNotFoundError:
            raise InputError(f"expected a steering vector at {path}, which does not exist; check the path") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"expected a steering vector at {path}, but it is no whole safetensors file ({error})") from None
