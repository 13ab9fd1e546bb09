"""What circuit-tracer reads: sets of transcoders (`layer_0.safetensors`, …) and cross-layer transcoders (`W_enc_0.safetensors`,
`W_dec_0.safetensors`, …), with a `config.yaml` that says where they read and write, and perhaps that the files lie elsewhere.

Of one layer:  acts = gate(z),  z = W_enc x + b_enc;  y = acts W_dec + b_dec (+ W_skip x)
Cross-layer (Ameisen et al. 2025): layer i writes to all layers l ≥ i,  ŷ_l = Σ_{i ≤ l} acts_i W_dec_i[:, l − i] + b_dec_l
The gate is ReLU, z · 1[z > threshold], or the k largest of z without a ReLU.

f features · d width that is read · o width that is written at a site · n layers that are written
"""

import re
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from sae.dictionaries.formats.releases import gemma_scope
from sae.dictionaries.formats.tensors import AGAIN, FLOATS, WHAT, Device, checked, name_of, read_weights
from sae.dictionaries.formats.transformer_lens import HOOK_NAMES
from sae.dictionaries.gates import BareTopK, Gate, Threshold
from sae.dictionaries.parts import Layers, Parts
from sae.disk.foreign import read_yaml
from sae.disk.hub import fetch
from sae.disk.reading import layout, require_arrays
from sae.errors import InputError

CONFIG = "config.yaml"
THRESHOLD = "activation_function.threshold"
# TransformerLens' hooks of a block, which circuit-tracer keeps for its other backends
HOOKS = {pattern.removeprefix("blocks.{}."): kind for kind, pattern in HOOK_NAMES.items()} | {"mlp.hook_out": "mlp_out"}
CRV = "crv-8b-instruct-transcoders"  # says topk without a k; circuit-tracer itself takes 128


class Settings(TypedDict):
    model_kind: Literal["transcoder_set", "cross_layer_transcoder"]
    model_name: str
    feature_input_hook: str
    feature_output_hook: str
    transcoders: NotRequired[list[str] | None]
    activation: NotRequired[Literal["relu", "topk"] | None]
    k: NotRequired[int | None]


def recognises(path: Path) -> bool:
    return path.is_dir() and any(any(path.glob(name)) for name in (CONFIG, "layer_*.safetensors", "W_enc_*.safetensors"))


def load(path: Path, device: Device = "cpu") -> Layers:
    """By layer. If the file of a layer is missing, the error is raised when the layer is first used."""
    said: Settings = read_yaml(path / CONFIG, "circuit-tracer's settings", Settings)
    hooks = said["feature_input_hook"], said["feature_output_hook"]
    if not HOOKS.keys() >= set(hooks) or (hooks[1] == "mlp.hook_out" and "gemma" in said["model_name"].lower()):
        raise InputError(f"{path / CONFIG} names the hooks {' and '.join(hooks)}; known are {', '.join(HOOKS)}, of Gemma not mlp.hook_out")
    kinds = HOOKS[hooks[0]], HOOKS[hooks[1]]
    facts = {key: value for key, value in said.items() if key not in ("feature_input_hook", "feature_output_hook", "transcoders")}
    listed = said.get("transcoders")
    if said["model_kind"] == "cross_layer_transcoder":
        n = len(listed) if listed else written(path)
        load_one = partial(load_listed_cross, path, listed) if listed else partial(load_cross, path, n)
        return {i: partial(load_one, i, kinds, facts, device) for i in range(n)}
    files = listed or [f"layer_{i}.safetensors" for i in range(1 + max(numbered(path, "layer_*.safetensors")))]
    return {i: partial(load_one_layer, path, file, i, kinds, facts, device) for i, file in enumerate(files)}


def numbered(path: Path, pattern: str) -> list[int]:
    """The layers with files. Raises `InputError` if there is none."""
    found = [int(file.stem.rpartition("_")[2]) for file in path.glob(pattern) if file.stem.rpartition("_")[2].isdecimal()]
    if not found:
        raise InputError(f"expected files {pattern} in {path}, or a list of transcoders in its {CONFIG}; {AGAIN}")
    return found


def written(path: Path) -> int:
    """How many layers a cross-layer transcoder has."""
    i = numbered(path, "W_dec_*.safetensors")[0]
    file = path / f"W_dec_{i}.safetensors"
    return i + require_arrays(layout(file, WHAT, AGAIN)[0], {f"W_dec_{i}": (FLOATS, "f n o")}, str(file), AGAIN)["n"]


def local(path: Path, file: str) -> Path:
    """A file as config.yaml names it: on the hub, or from its own folder on."""
    return fetch(file) if file.startswith("hf://") else path / file


def load_one_layer(path: Path, name: str, i: int, kinds: tuple[str, str], facts: dict[str, Any], device: Device) -> Parts:
    file = local(path, name)
    metadata = facts | {"site": f"{kinds[0]}.{i}", "site_out": f"{kinds[1]}.{i}"}
    if file.name in (gemma_scope.PARAMS_1, gemma_scope.PARAMS_2):
        parts = (gemma_scope.load_1 if file.name == gemma_scope.PARAMS_1 else gemma_scope.load_2)(file, device)
        for key in ("site", "site_out"):
            if parts.metadata.get(key, metadata[key]) != metadata[key]:
                raise InputError(f"{path / CONFIG} says {key} {metadata[key]} of {name}, whose own names say {parts.metadata[key]}")
        return parts._replace(metadata=parts.metadata | metadata)
    tensors = read_weights(file, device)
    k = tensors.pop("k", None)
    shapes = {"W_enc": "f d", "b_enc": "f", "W_dec": "f o", "b_dec": "o"}
    w = checked(file, tensors, shapes, {THRESHOLD: "f", "W_skip": "o d"})
    gate = gate_of(file, facts, None if k is None else int(k), w.get(THRESHOLD))
    return Parts(w["W_enc"], w["b_enc"], w["W_dec"], w["b_dec"], gate, metadata, W_skip_od=w.get("W_skip"))


def gate_of(file: Path, facts: dict[str, Any], k: int | None, theta_f: Tensor | None) -> Gate:
    """Raises `InputError` if config.yaml and the file contradict each other, and for thresholds below 0."""
    activation = facts.get("activation")
    ks = {one for one in (k, facts.get("k"), 128 if CRV in name_of(file) else None) if one is not None}
    if (activation is not None and theta_f is not None) or len(ks) != (activation == "topk"):
        there = f"{'no' if theta_f is None else 'a'} threshold and k {' or '.join(map(str, sorted(ks))) or 'nowhere'}"
        raise InputError(f"the config.yaml of {file} has activation {activation!r}, but there is {there}; leave what is right")
    if theta_f is not None and bool((theta_f < 0).any()):
        raise InputError(f"{file} has thresholds below 0, with which circuit-tracer keeps negative values; that is not supported here")
    return BareTopK(ks.pop()) if ks else Threshold(theta_f)


def load_cross(path: Path, n: int, i: int, kinds: tuple[str, str], facts: dict[str, Any], device: Device) -> Parts:
    file = path / f"W_enc_{i}.safetensors"
    tensors = read_weights(file, device) | read_weights(path / f"W_dec_{i}.safetensors", device)
    tensors = {re.sub(f"_{i}$", "", name): tensor for name, tensor in tensors.items()}
    w = checked(file, tensors, {"W_enc": "f d", "b_enc": "f", "W_dec": "f n o", "b_dec": "o"}, {"threshold": "f"}, n=n - i)
    gate = gate_of(file, facts, None, w.get("threshold"))
    b_dec_o = torch.nn.functional.pad(w["b_dec"], (0, (n - i - 1) * len(w["b_dec"])))  # of its own layer alone
    metadata = facts | {"site": f"{kinds[0]}.{i}", "site_out": [f"{kinds[1]}.{layer}" for layer in range(i, n)]}
    return Parts(w["W_enc"], w["b_enc"], w["W_dec"].flatten(1), b_dec_o, gate, metadata)


def load_listed_cross(path: Path, files: list[str], i: int, kinds: tuple[str, str], facts: dict[str, Any], device: Device) -> Parts:
    """Of Gemma Scope 2."""
    return gemma_scope.load_layer(local(path, files[i]), i, list(range(len(files))), kinds, facts, device)
