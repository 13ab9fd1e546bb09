"""Directions at sites of a model, with their origin.

d width of the site · p positions
"""

import io
import json
import math
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sae.disk.reading import one_sentence, parse_json, read_tensors
from sae.disk.writing import atomic, write_tensors
from sae.errors import InputError
from sae.model.opening.fingerprint import COMPILED
from sae.model.sites import parse_site

if TYPE_CHECKING:
    from sae.model.language_model import LanguageModel

FORMAT = "steering-vector-2"
FORMAT_1 = "steering-vector-1"  # one tensor "direction", its site in the metadata
ARCHITECTURE = "controlvector"  # what repeng and llama.cpp call their gguf files


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """What coefficient 1 adds at each site; `2 * vector`, `one + other`, `one - other` make new ones."""

    directions: dict[str, Tensor]
    """site, such as "resid_post.2" -> float32 [d], the same at every position, or [p, d], one for each of the first p positions"""
    provenance: dict[str, Any] = field(default_factory=dict)
    """how it was made: method, model, data, seed ...; plain JSON values"""

    def __post_init__(self) -> None:
        if not isinstance(self.directions, Mapping):
            raise InputError(f'expected directions such as {{"resid_post.2": tensor}}, got {type(self.directions).__name__}')
        if not self.directions:
            raise InputError("expected a steering vector with a direction at one site at least, got none")
        for site, direction in self.directions.items():
            parse_site(site)
            if not isinstance(direction, Tensor) or direction.is_complex():
                raise InputError(f"expected a steering direction at {site} as a real tensor, got {type(direction).__name__}")
            shape = tuple(direction.shape)
            if len(shape) not in (1, 2) or 0 in shape or not torch.isfinite(direction.float()).all():  # host sync
                raise InputError(f"expected a steering direction of finite numbers, [d] or [p, d], at {site}, got shape {shape}")
        own = {site: d.detach().to(torch.float32, copy=True) for site, d in self.directions.items()}  # the caller's may change
        object.__setattr__(self, "directions", own)
        object.__setattr__(self, "provenance", deepcopy(self.provenance))

    @classmethod
    def at(cls, site: str, direction: Tensor, provenance: dict[str, Any] | None = None) -> "SteeringVector":
        """A vector at one site."""
        return cls({site: direction}, provenance or {})

    @property
    def site(self) -> str:
        """The only site; `InputError` for a vector at several."""
        if len(self.directions) > 1:
            raise InputError(f"expected a steering vector at one site, got one at {', '.join(self.directions)}")
        return next(iter(self.directions))

    @property
    def direction_d(self) -> Tensor:
        """The only direction, [d]; `InputError` for several sites or one direction per position."""
        direction = self.directions[self.site]
        if direction.ndim == 2:
            raise InputError(f"expected one direction for all positions at {self.site}, got one for each of {len(direction)}")
        return direction

    @property
    def norm(self) -> float:
        """Norm of all numbers together, over sites and positions."""
        return torch.stack([d.double().square().sum().cpu() for d in self.directions.values()]).sum().sqrt().item()  # host sync

    def unit(self) -> "SteeringVector":
        """The same divided by its norm. Raises `InputError` for a zero vector."""
        if not self.norm > 0:
            raise InputError("expected a steering vector that is not zero, to bring its norm to 1")
        return self._each(lambda direction: (direction.double() / self.norm).float(), {"unit": self.provenance})

    def __mul__(self, factor: float) -> "SteeringVector":
        if not math.isfinite(factor):
            raise InputError(f"expected a finite factor for a steering vector, got {factor}")
        return self._each(lambda direction: factor * direction, {"factor": factor, "of": self.provenance})

    __rmul__ = __mul__

    def __neg__(self) -> "SteeringVector":
        return -1 * self

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        """Sites are united; if both have a direction at a site, it must have one shape."""
        return self._with(other, 1, "sum")

    def __sub__(self, other: "SteeringVector") -> "SteeringVector":
        return self._with(other, -1, "difference")

    def project_out(self, other: "SteeringVector") -> "SteeringVector":
        """Without its component along `other`, at each of its sites: v − (v·u)u with u = other/‖other‖, per position where it has those.

        Raises `InputError` where `other` has no direction, another shape, or a zero one.
        """
        directions = {}
        for site, direction in self.directions.items():
            along = other.directions.get(site)
            if along is None or along.shape not in (direction.shape, direction.shape[-1:]):
                got = "none" if along is None else f"shape {tuple(along.shape)}"
                raise InputError(f"expected a direction at {site} to project out of shape {tuple(direction.shape)}, got {got}")
            length = along.double().norm(dim=-1, keepdim=True)
            if not (length > 0).all():  # host sync
                raise InputError(f"expected a direction to project out at {site}, got a zero one, which has no component along it")
            u = along.double().to(direction.device) / length.to(direction.device)
            wide = direction.double()
            directions[site] = (wide - (wide * u).sum(-1, keepdim=True) * u).float()
        return SteeringVector(directions, {"of": self.provenance, "projected_out": other.provenance})

    def save(self, path: str | Path) -> None:
        """One safetensors file: a tensor per site, format and provenance in its metadata."""
        metadata = {"format": FORMAT, "provenance": json.dumps(self.provenance)}
        write_tensors(Path(path), {site: d.cpu() for site, d in self.directions.items()}, metadata)  # host sync

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVector":
        """Raises `InputError` unless `path` is a complete file that `save` wrote."""
        tensors, metadata = read_tensors(Path(path), "a steering vector")
        known = metadata.get("format"), "provenance" in metadata
        if known == (FORMAT, True) or (known == (FORMAT_1, True) and "site" in metadata and list(tensors) == ["direction"]):
            provenance = parse_json(metadata["provenance"], f"the provenance of {path}", dict[str, Any])
            if any(not tensor.is_floating_point() for tensor in tensors.values()):
                raise InputError(f"expected directions of floats in {path}, got {', '.join(str(t.dtype) for t in tensors.values())}")
            return cls(tensors if known[0] == FORMAT else {metadata["site"]: tensors["direction"]}, provenance)
        raise InputError(f"expected a steering vector ({FORMAT}) in {path}, got a file with {', '.join(tensors) or 'nothing'}")

    def to_gguf(self, path: str | Path, model_type: str) -> None:
        """The control vector file of repeng and llama.cpp; `model_type` is the model's `config.model_type`.

        `direction.L` is what is added to the output of block L counted from 0, our `resid_post.L`: both readers agree on that, but
        llama.cpp accepts only L ≥ 1. Only one direction per site at `resid_post` can be written; else `InputError`. Needs gguf.
        """
        gguf = _gguf()
        layers = {}
        for site, direction in self.directions.items():
            kind, layer = parse_site(site)
            if kind != "resid_post" or direction.ndim != 1:
                raise InputError(f"gguf holds one direction for all positions at resid_post, got {site} {tuple(direction.shape)}")
            layers[layer] = direction.cpu().numpy()  # host sync
        with atomic(Path(path)) as temporary:
            writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
            writer.add_string(f"{ARCHITECTURE}.model_hint", model_type)
            writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(layers))
            writer.add_uint32(f"{ARCHITECTURE}.layer_base", 0)  # our own keys; the other readers pass over them
            writer.add_string(f"{ARCHITECTURE}.provenance", json.dumps(self.provenance))
            for layer in sorted(layers):
                writer.add_tensor(f"direction.{layer}", layers[layer])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()

    @classmethod
    def from_gguf(cls, path: str | Path, *, layer_base: int = 0) -> "SteeringVector":
        """Reads a control vector file; `direction.L` becomes `resid_post.(L − layer_base)`.

        repeng and llama.cpp count from 0; give `layer_base=1` for a file whose writer called the first block 1. Raises `InputError`
        for any other file. Needs the package gguf.
        """
        gguf = _gguf()
        if not Path(path).exists():
            raise InputError(f"expected a gguf file at {path}, which does not exist; check the path")
        with one_sentence(f"a gguf file at {path}"):
            reader = _strict_reader(gguf)(path)

        def text(key: str) -> str | None:
            found = reader.get_field(key)
            return None if found is None else bytes(found.parts[-1]).decode("utf-8", "replace")

        tensors = {t.name.removeprefix("direction."): t for t in reader.tensors if t.name.startswith("direction.")}
        numbers = all(re.fullmatch("0|[1-9][0-9]{0,5}", layer) and int(layer) >= layer_base for layer in tensors)
        if text("general.architecture") != ARCHITECTURE or not tensors or not numbers:
            named = ", ".join(t.name for t in reader.tensors[:3]) or "no tensor"
            raise InputError(f"expected a control vector with direction.{layer_base} and higher in {path}, got one with {named}")
        if any(t.data.dtype.kind != "f" for t in tensors.values()):
            raise InputError(f"expected directions in {path} in float32 or float16, got them quantised")
        arrays = {int(layer): np.array(tensor.data, np.float32) for layer, tensor in tensors.items()}
        directions = {f"resid_post.{layer - layer_base}": torch.from_numpy(array) for layer, array in arrays.items()}
        provenance = {"method": "gguf", "model_type": text(f"{ARCHITECTURE}.model_hint")}
        own = text(f"{ARCHITECTURE}.provenance")
        return cls(directions, parse_json(own, f"the provenance of {path}", dict[str, Any]) if own else provenance)

    def to_lm_eval(self, path: str | Path, lm: "LanguageModel", coefficient: float = 1.0) -> None:
        """The .pt file of lm-evaluation-harness' model type `steered` (`--model_args pretrained=...,steer_path=...`), added everywhere.

        A mapping of module name to plain values and one tensor, which also loads with `weights_only=True`. The tool's only other form,
        a csv that names a dictionary, always carries a bias, which its action "add" refuses (release 0.4.13), so .pt is the way.
        Its early releases add the last site's vector at all sites: use one site with them. The tool hooks outputs of modules, so
        inputs of modules (resid_pre.0, head_out, mlp_in, ...) or parts of an output cannot be written, nor can directions per
        position; those raise `InputError`.
        """
        if Path(path).suffix != ".pt":
            raise InputError(f"lm-evaluation-harness knows the file by its ending .pt, got {path}")
        names = {module: name.replace(COMPILED, "") for name, module in lm.model.base_model.named_modules()}
        config: dict[str, dict[str, Any]] = {}
        for site, direction in self.directions.items():
            if direction.ndim != 1 or len(direction) != lm.width(site):
                raise InputError(f"expected one direction of width {lm.width(site)} at {site}, got shape {tuple(direction.shape)}")
            kind, layer = parse_site(site)
            before = f"resid_post.{layer - 1}"  # what flows into a block is what the one before it gave
            place = lm.place(before if kind == "resid_pre" and layer > 0 else site)
            if not place.is_output or place.view is not None or names[place.module] in config:
                raise InputError(f"lm-evaluation-harness adds at the output of modules, once at each, which {site} is not; choose another")
            settings = {"steering_coefficient": float(coefficient), "action": "add", "bias": None, "head_index": None}
            config[names[place.module]] = {"steering_vector": direction.cpu().clone(), **settings}  # host sync
        with atomic(Path(path)) as temporary:
            torch.save(config, whole := io.BytesIO())  # torch's own writer does not tell why it failed
            temporary.write_bytes(whole.getbuffer())

    def _each(self, change: Callable[[Tensor], Tensor], provenance: dict[str, Any]) -> "SteeringVector":
        return SteeringVector({site: change(direction) for site, direction in self.directions.items()}, provenance)

    def _with(self, other: "SteeringVector", sign: int, word: str) -> "SteeringVector":
        directions = dict(self.directions)
        for site, direction in other.directions.items():
            mine = directions.get(site)
            if mine is not None and mine.shape != direction.shape:
                shapes = f"{tuple(mine.shape)} and {tuple(direction.shape)}"
                raise InputError(f"expected two steering vectors of one shape at {site} to combine, got {shapes}")
            directions[site] = sign * direction if mine is None else mine + sign * direction.to(mine.device)
        return SteeringVector(directions, {word: [self.provenance, other.provenance]})


def _strict_reader(gguf: Any) -> Any:
    """The package's reader with a check of the length: for a truncated file it would read as far as a number in the file says."""

    class Reader(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, **order: Any) -> np.ndarray:
            found = super()._get(offset, dtype, count, **order)
            if len(found) != count:
                raise ValueError("it is cut off")
            return found

    return Reader


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise InputError("gguf files need the package gguf, which is not installed; run pip install gguf") from None
    return gguf
