"""Qwen-Scope of Alibaba (arXiv 2605.11887): one `layerN.sae.pt` for each layer, in a repository whose name says the rest.

    acts = the k largest of W_enc x + b_enc, as they are      y = W_dec acts + b_dec

x is the residual stream after block N; no bias is subtracted first. The model cards' code takes no ReLU. The number of kept features is
only in the name, such as SAE-Res-Qwen3-8B-Base-W64K-L0_50. d width · f features
"""

import re
from functools import partial
from pathlib import Path

from sae.dictionaries.formats.tensors import Device, checked, name_of, read_weights, require_k
from sae.dictionaries.gates import BareTopK
from sae.dictionaries.parts import Layers, Parts
from sae.errors import InputError

FILES = "layerN.sae.pt"
FILE = re.compile(r"layer([0-9]+)\.sae\.pt")
SHAPES = {"W_enc": "f d", "b_enc": "f", "W_dec": "d f", "b_dec": "d"}


def recognises(path: Path) -> bool:
    return bool(numbered(path)) if path.is_dir() else FILE.fullmatch(path.name) is not None


def numbered(folder: Path) -> dict[int, Path]:
    """The files of all layers."""
    return dict(sorted((int(found[1]), file) for file in folder.glob("layer*.sae.pt") if (found := FILE.fullmatch(file.name))))


def load(path: Path, device: Device = "cpu") -> Parts | Layers:
    if path.is_dir():
        return {layer: partial(load_one, file, device) for layer, file in numbered(path).items()}
    return load_one(path, device)


def load_one(file: Path, device: Device) -> Parts:
    """Raises `InputError` for a file in a folder whose name is not that on the hub."""
    name = re.search(r"SAE-Res-([\w.-]+?)-W[0-9]+K-L0_([0-9]+)(?:/|$)", name_of(file.parent))
    layer = FILE.fullmatch(file.name)
    if name is None or layer is None:
        raise InputError(
            f"expected {file} in a folder with the name of its repository, such as SAE-Res-Qwen3-8B-Base-W64K-L0_50, because only that "
            "says how many features a token keeps; name the folder so"
        )
    w = {key: tensor.to(device) for key, tensor in checked(file, read_weights(file), SHAPES).items()}
    gate = BareTopK(require_k(f"the name of {file.parent}", "L0", int(name[2]), len(w["b_enc"])))
    facts = {"model_name": f"Qwen/{name[1]}", "site": f"resid_post.{int(layer[1])}"}
    return Parts(w["W_enc"], w["b_enc"], w["W_dec"].T.contiguous(), w["b_dec"], gate, facts)
