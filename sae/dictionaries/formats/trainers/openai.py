"""OpenAI's autoencoders of GPT-2 small: one `.pt` for each layer and location, `gpt2-small/{location}_{version}/autoencoders/{layer}.pt`.

    x̄ = (x − mean) / (std + 1e-5), of the token's own width, for TopK alone
    acts = act(W_e (x̄ − pre_bias) + latent_bias)      y = (W_d acts + pre_bias) · std + mean

act is ReLU or TopK (sparse_autoencoder/model.py; locations: paths.py and README.md). d width · f features
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sae.dictionaries.formats.tensors import Device, checked, name_of, names_in, require_value
from sae.dictionaries.frames import Frame
from sae.dictionaries.gates import Gate, Threshold, TopK
from sae.dictionaries.parts import Layers, Parts
from sae.disk.foreign import read_torch
from sae.errors import InputError

FILES = "N.pt with pre_bias and latent_bias, or a folder of them"
SHAPES = {"pre_bias": "d", "encoder.weight": "f d", "latent_bias": "f", "decoder.weight": "d f"}
STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
"""of the features in training, on which the function does not depend"""
SITES = {
    "mlp_post_act": "mlp_act",
    "resid_delta_attn": "attn_out",
    "resid_delta_mlp": "mlp_out",
    "resid_post_attn": "resid_mid",
    "resid_post_mlp": "resid_post",
}


def recognises(path: Path) -> bool:
    one = next(iter(numbered(path).values()), path)
    return one.is_file() and one.suffix == ".pt" and {"pre_bias", "latent_bias"} <= names_in(one)


def numbered(folder: Path) -> dict[int, Path]:
    """The files of all layers."""
    return dict(sorted((int(file.stem), file) for file in folder.glob("*.pt") if file.stem.isdecimal()))


def load(path: Path, device: Device = "cpu") -> Parts | Layers:
    return load_one(path, device) if path.is_file() else {i: partial(load_one, file, device) for i, file in numbered(path).items()}


def load_one(path: Path, device: Device) -> Parts:
    state = dict(read_torch(path, "a dictionary's weights"))
    name, settings = state.pop("activation", "ReLU"), state.pop("activation_state_dict", {})
    require_value(path, "activation", name, ("ReLU", "TopK"))
    for key, value in settings.items() if isinstance(settings, Mapping) else ():  # which some files repeat beside the weights
        require_value(path, f"activation.{key}", state.pop(f"activation.{key}", value), (value,))
    weights = {key: value for key, value in state.items() if key not in STATISTICS}
    if foreign := sorted(str(key) for key, value in weights.items() if not isinstance(value, Tensor)):
        raise InputError(f"{path} holds {', '.join(foreign)}, which may change what the dictionary computes and is not supported here")
    w = {key: tensor.to(device) for key, tensor in checked(path, weights, SHAPES).items()}
    gate = topk(path, settings, len(w["latent_bias"])) if name == "TopK" else Threshold()
    frame = Frame("layer_norm") if name == "TopK" else None
    W_dec_fd = w["decoder.weight"].T.contiguous()
    return Parts(w["encoder.weight"], w["latent_bias"], W_dec_fd, w["pre_bias"], gate, facts_of(path), w["pre_bias"], frame=frame)


def topk(path: Path, settings: object, d_sae: int) -> Gate:
    k = settings.get("k") if isinstance(settings, Mapping) else None
    if not isinstance(settings, Mapping) or type(k) is not int or not 1 <= k <= d_sae:
        raise InputError(f"expected activation_state_dict with k from 1 to {d_sae} in {path}, found {settings!r}")
    require_value(path, "postact_fn", settings.get("postact_fn"), ("ReLU",))
    return TopK(k)


def facts_of(path: Path) -> dict[str, Any]:
    """Site and model, as far as the path states them."""
    match = re.search(rf"(?:(gpt2)-small/)?({'|'.join(SITES)})(?:_v\w+)?/autoencoders/([0-9]+)\.pt$", name_of(path))
    if not match:
        return {}
    return ({"model_name": match[1]} if match[1] else {}) | {"site": f"{SITES[match[2]]}.{int(match[3])}"}
