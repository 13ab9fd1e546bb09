"""Gemma Scope 1 (`params.npz`) and 2 (`params.safetensors`) of Google DeepMind: JumpReLU, no normalisation, b_dec not taken off the input.

    acts = relu(z) · 1[z > threshold],  z = x W_enc + b_enc;  y = acts W_dec + b_dec (+ x affine_skip_connection)

Lieberum et al. 2024 (arXiv 2408.05147). Where a dictionary reads stands in the names of its folders alone, or in config.json of version 2.
d width that is read · f features · o width that is written
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from sae.dictionaries.formats.tensors import Device, checked, file_at, name_of, read_weights, require_value
from sae.dictionaries.gates import Threshold
from sae.dictionaries.parts import Parts
from sae.disk.reading import read_json
from sae.errors import InputError

PARAMS_1, PARAMS_2 = "params.npz", "params.safetensors"
SHAPES = {"w_enc": "d f", "b_enc": "f", "w_dec": "f o", "b_dec": "o", "threshold": "f"}
SKIP = "affine_skip_connection"

SITES_1 = {"res": "resid_post", "mlp": "mlp_out", "att": "head_out"}
SITES_2 = {"resid_post": "resid_post", "attn_out": "head_out", "mlp_out": "mlp_out"}
# Hugging Face's modules as config.json names them, below model.layers.L
HOOKS = {
    "output": "resid_post",
    "self_attn.o_proj.input": "head_out",
    "post_feedforward_layernorm.output": "mlp_out",
    "pre_feedforward_layernorm.output": "mlp_in",
}


class Config(TypedDict):
    architecture: str
    model_name: str
    hf_hook_point_in: str
    hf_hook_point_out: NotRequired[str | None]
    affine_connection: NotRequired[bool]


def recognises_1(path: Path) -> bool:
    return file_at(path, PARAMS_1) is not None


def load_1(path: Path, device: Device = "cpu") -> Parts:
    """Of version 1. The embeddings' dictionaries were trained before Gemma multiplies embeddings by √d, and read resid_pre.0 after it."""
    file = path if path.is_file() else path / PARAMS_1
    tensors = {name.lower(): tensor for name, tensor in read_weights(file, device).items()}
    if "scaling_factor" in tensors and not bool((tensors.pop("scaling_factor") == 1).all()):
        raise InputError(f"{file} has a scaling_factor other than 1, which is not understood")
    w = checked(file, tensors, SHAPES)
    found = re.search(r"gemma-scope-(\w+)-(pt|it)-(res|mlp|att|transcoders)", name_of(file))
    layer = re.search(r"layer_([0-9]+)/", name_of(file))
    metadata: dict[str, Any] = promised_l0(file) | {"prepend_bos": True}
    if found:
        metadata["model_name"] = f"google/gemma-2-{found[1]}" + ("-it" if found[2] == "it" else "")
    if found and found[3] == "res" and "/embedding/" in name_of(file):
        root = w["w_enc"].shape[0] ** 0.5
        w |= {"w_enc": w["w_enc"] / root, "w_dec": w["w_dec"] * root, "b_dec": w["b_dec"] * root}
        metadata["site"] = "resid_pre.0"
    elif found and layer and found[3] == "transcoders":
        metadata |= {"site": f"mlp_in_nogain.{layer[1]}", "site_out": f"mlp_out.{layer[1]}"}
    elif found and layer:
        metadata["site"] = f"{SITES_1[found[3]]}.{layer[1]}"
    return parts(w, metadata)


def recognises_2(path: Path) -> bool:
    return file_at(path, PARAMS_2) is not None


def load_2(path: Path, device: Device = "cpu") -> Parts:
    """Of version 2, with or without its config.json."""
    file = path if path.is_file() else path / PARAMS_2
    w = checked(file, read_weights(file, device), SHAPES, {SKIP: "d o"})
    metadata: dict[str, Any] = {"prepend_bos": True}
    model = re.search(r"gemma-scope-2-(\w+)-(pt|it)", name_of(file))
    if model:
        metadata["model_name"] = f"google/gemma-3-{model[1]}-{model[2]}"
    if (config := file.parent / "config.json").exists():
        said = read_json(config, "Gemma Scope's config.json", Config)
        require_value(config, "architecture", said["architecture"], ("jump_relu",))
        require_value(config, "affine_connection", said.get("affine_connection", False), (SKIP in w,))
        metadata |= {"model_name": said["model_name"], "site": site_of(config, said["hf_hook_point_in"])}
        if out := said.get("hf_hook_point_out"):
            metadata["site_out"] = site_of(config, out)
    elif found := re.search(r"/(resid_post|attn_out|mlp_out|transcoder)(?:_all)?/layer_([0-9]+)_", name_of(file)):
        kind, layer = found.groups()
        transcoder = {"site": f"mlp_in.{layer}", "site_out": f"mlp_out.{layer}"}
        metadata |= transcoder if kind == "transcoder" else {"site": f"{SITES_2[kind]}.{layer}"}
    return parts(w, metadata)


def site_of(where: Path, hook: str) -> str:
    """Our name of one of Hugging Face's modules. Raises `InputError` for any other."""
    found = re.fullmatch(r"(?:language_model\.)?model\.(?:language_model\.)?layers\.([0-9]+)\.(.+)", hook)
    if found is None or found[2] not in HOOKS:
        raise InputError(f"{where} names the hook point {hook!r}, which is none of {', '.join(f'model.layers.L.{h}' for h in HOOKS)}")
    return f"{HOOKS[found[2]]}.{found[1]}"


def promised_l0(file: Path) -> dict[str, Any]:
    found = re.search(r"average_l0_([0-9.]+)/", name_of(file))
    return {"promised": {"l0": float(found[1])}} if found else {}


def parts(w: dict[str, Tensor], metadata: dict[str, Any]) -> Parts:
    W_skip_od = w[SKIP].T.contiguous() if SKIP in w else None
    gate = Threshold(w["threshold"])
    return Parts(w["w_enc"].T.contiguous(), w["b_enc"], w["w_dec"], w["b_dec"], gate, metadata, W_skip_od=W_skip_od)
