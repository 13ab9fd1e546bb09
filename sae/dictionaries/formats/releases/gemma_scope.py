"""Gemma Scope 1 (`params.npz`) and 2 (`params.safetensors`) of Google DeepMind: JumpReLU, no normalisation, b_dec not subtracted first.

    acts = relu(z) · 1[z > threshold],  z = x W_enc + b_enc;  y = acts W_dec + b_dec (+ x affine_skip_connection)

Lieberum et al. 2024 (arXiv 2408.05147). Only the names of its folders, or config.json of version 2, state which site a dictionary reads.
Version 2 has dictionaries of several layers too, in one file for each layer: cross-layer transcoders and weakly causal crosscoders. Both
read at their own layer i and write there and at all later ones, w_dec [f, n, o], of which the entries before i are not used.
d width that is read · f features · o width that is written at a site · n sites
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from sae.dictionaries.formats.tensors import (
    AGAIN,
    FLOATS,
    WHAT,
    Device,
    checked,
    file_at,
    name_of,
    read_weights,
    require_value,
)
from sae.dictionaries.gates import Threshold
from sae.dictionaries.parts import Layers, Parts
from sae.disk.reading import layout, read_json, require_arrays
from sae.errors import InputError

PARAMS_1, PARAMS_2, LAYER_FILES = "params.npz", "params.safetensors", "params_layer_*.safetensors"
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


# of a dictionary of several layers, where it reads and writes
KINDS = {"clt": ("mlp_in", "mlp_out"), "crosscoder": ("resid_post", "resid_post")}


class Config(TypedDict):
    architecture: str
    model_name: str
    type: NotRequired[str]
    l0: NotRequired[float]
    hf_hook_point_in: str
    hf_hook_point_out: NotRequired[str | None]
    affine_connection: NotRequired[bool]


def recognises_1(path: Path) -> bool:
    return file_at(path, PARAMS_1) is not None


def load_1(path: Path, device: Device = "cpu") -> Parts:
    """Version 1. The embeddings' dictionaries were trained before Gemma multiplies embeddings by √d, and read resid_pre.0 after it."""
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
    """Version 2, with or without its config.json."""
    file = path if path.is_file() else path / PARAMS_2
    w = checked(file, read_weights(file, device), SHAPES, {SKIP: "d o"})
    said, metadata = read_config(file.parent, SKIP in w), facts(file)
    if said:
        metadata |= {"model_name": model_of(said["model_name"]), "site": site_of(file, said["hf_hook_point_in"])}
        if out := said.get("hf_hook_point_out"):
            metadata["site_out"] = site_of(file, out)
    elif found := re.search(r"/(resid_post|attn_out|mlp_out|transcoder)(?:_all)?/layer_([0-9]+)_", name_of(file)):
        kind, layer = found.groups()
        transcoder = {"site": f"mlp_in.{layer}", "site_out": f"mlp_out.{layer}"}
        metadata |= transcoder if kind == "transcoder" else {"site": f"{SITES_2[kind]}.{layer}"}
    return parts(w, metadata | promised(said))


def read_config(folder: Path, affine: bool) -> Config | None:
    """config.json, if there is one. Raises `InputError` for another architecture, or where it does not say whether there is a skip."""
    path = folder / "config.json"
    if not path.exists():
        return None
    said: Config = read_json(path, "Gemma Scope's config.json", Config)
    require_value(path, "architecture", said["architecture"], ("jump_relu",))
    require_value(path, "affine_connection", said.get("affine_connection", False), (affine,))
    return said


def facts(file: Path) -> dict[str, Any]:
    """Facts from the names of version 2."""
    model = re.search(r"gemma-scope-2-(\w+)-(pt|it)", name_of(file))
    return {"prepend_bos": True} | ({"model_name": model_of(f"gemma-3-{model[1]}-{model[2]}")} if model else {})


def model_of(name: str) -> str:
    """The model's name on the hub, of which some files have an older one; the pretrained one of 270m is called so without -pt."""
    name = name.removeprefix("google/").replace("gemma-v3", "gemma-3")
    return "google/" + (name.removesuffix("-pt") if "270m" in name else name)


def promised(said: Config | None) -> dict[str, Any]:
    return {"promised": {"l0": float(said["l0"])}} if said and "l0" in said else {}


def load_layers(path: Path, device: Device = "cpu") -> Layers:
    """A cross-layer transcoder or a weakly causal crosscoder, by its input layers."""
    files = {int(file.stem.rpartition("_")[2]): file for file in path.glob(LAYER_FILES)}
    first = next(iter(files.values()))
    places, _ = layout(first, WHAT, AGAIN)
    sizes = require_arrays(places, {"w_dec": (FLOATS, "f n o")}, str(first), AGAIN)
    said = read_config(path, SKIP in places)
    kind = said["type"] if said and "type" in said else next((kind for kind in KINDS if f"/{kind}/" in name_of(first)), "")
    layers = list(range(sizes["n"]))
    if kind == "crosscoder":
        stated = said["hf_hook_point_in"] if said else name_of(first)
        found = re.search(r"layers\.\{([0-9,]+)\}|/layer_([0-9_]+)_width", stated)
        layers = [int(layer) for layer in re.findall("[0-9]+", found[0])] if found else []
    if kind not in KINDS or len(layers) != sizes["n"]:
        raise InputError(f"expected config.json in {path}, or folder names, to say of which {sizes['n']} layers this is; {AGAIN}")
    metadata = facts(first) | ({"model_name": model_of(said["model_name"])} if said else {}) | promised(said)
    every = {i: path / LAYER_FILES.replace("*", str(i)) for i in range(len(layers))}
    return {layers[i]: partial(load_layer, file, i, layers, KINDS[kind], metadata, device) for i, file in every.items()}


def load_layer(file: Path, i: int, layers: list[int], kinds: tuple[str, str], metadata: dict[str, Any], device: Device) -> Parts:
    """The part that reads at layer `layers[i]`."""
    n = len(layers)
    w = checked(file, read_weights(file, device), SHAPES | {"w_dec": "f n o"}, {SKIP: "d o"}, n=n)
    f, _, o = w["w_dec"].shape
    w["w_dec"] = w["w_dec"].reshape(f, n * o)[:, i * o :]
    w["b_dec"] = torch.nn.functional.pad(w["b_dec"], (0, (n - 1 - i) * o))
    sites = {"site": f"{kinds[0]}.{layers[i]}", "site_out": [f"{kinds[1]}.{layer}" for layer in layers[i:]]}
    return parts(w, metadata | sites)


def site_of(where: Path, hook: str) -> str:
    """Our name of one of Hugging Face's modules. Raises `InputError` for any other."""
    found = re.fullmatch(r"(?:language_model\.)?model\.(?:language_model\.)?layers\.([0-9]+)\.(.+)", hook)
    if found is None or found[2] not in HOOKS:
        known = ", ".join(f"model.layers.L.{one}" for one in HOOKS)
        raise InputError(f"the config.json beside {where} names the hook point {hook!r}, which is none of {known}")
    return f"{HOOKS[found[2]]}.{found[1]}"


def promised_l0(file: Path) -> dict[str, Any]:
    found = re.search(r"average_l0_([0-9.]+)/", name_of(file))
    return {"promised": {"l0": float(found[1])}} if found else {}


def parts(w: dict[str, Tensor], metadata: dict[str, Any]) -> Parts:
    W_skip_od = w[SKIP].T if SKIP in w else None  # turned on the disk's map, so that nothing is copied
    return Parts(w["w_enc"].T, w["b_enc"], w["w_dec"], w["b_dec"], Threshold(w["threshold"]), metadata, W_skip_od=W_skip_od)
