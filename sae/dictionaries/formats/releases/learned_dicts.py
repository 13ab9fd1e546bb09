"""Dictionaries of Cunningham et al. 2023 (arXiv 2309.08600; HoagyC/sparse_coding): `learned_dicts.pt`, or a `.pt` of one of its objects.

The files hold objects of the tool's classes, of which only attributes are read; no code is run. With e the encoder's rows, made of
length 1 where norm_encoder, and those of the decoder made of length 1:

    TiedSAE       x̄ = (R (x − t)) · s      acts = relu(e x̄ + b)      y = Rᵀ (acts E / s) + t, E the encoder's rows of length 1
    UntiedSAE     acts = relu(e x + b)      y = acts D

t, R and s are center_trans, center_rot and center_scale, which older files lack. Training took the activations from TransformerLens, whose
stream has no mean over the width. d width · f features
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.dictionaries.formats.tensors import AGAIN, WHAT, Device, checked, name_of, row_norms
from sae.dictionaries.frames import Frame
from sae.dictionaries.gates import Threshold
from sae.dictionaries.parts import Choice, Layers, Parts
from sae.disk.foreign import Record, read_torch
from sae.errors import InputError

NAME = "learned_dicts.pt"
FILES = f"{NAME}, or a .pt of one TiedSAE or UntiedSAE"
CLASSES = ("autoencoders.learned_dict.TiedSAE", "autoencoders.learned_dict.UntiedSAE")
SHAPES = {"encoder": "f d", "encoder_bias": "f"}
CENTRING = {"center_trans": "d", "center_rot": "d d", "center_scale": "d"}
FACTS = ("n_feats", "activation_size", "device")
SITES = {"residual": "resid_post", "resid": "resid_post", "mlp": "mlp_act", "mlpout": "mlp_out"}
"""by the names of the folders, such as tied_residual_l2_r4"""
CENTRED = ("resid_post", "mlp_out")


def recognises(path: Path) -> bool:
    if path.is_dir() or path.name == NAME:
        return (path / NAME).is_file() or path.name == NAME
    return path.suffix == ".pt" and bool(set(CLASSES) & classes_in(path))


def classes_in(file: Path) -> set[str]:
    """The classes other than tensors in the file, found without reading it; none for a damaged one."""
    try:
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # torch raises many kinds of errors for invalid bytes
        return set()


def load(path: Path, device: Device = "cpu") -> Parts | Layers:
    """Raises `InputError` for objects of other classes."""
    file = path / NAME if path.is_dir() else path
    value: Any = read_torch(file, WHAT, CLASSES)
    pairs = value if isinstance(value, list) else [(value, {})]
    if not pairs or not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], Record) for pair in pairs):
        raise InputError(f"expected objects with their settings, or one object, of {' or '.join(CLASSES)} in {file}; {AGAIN}")
    if len(pairs) == 1:
        return load_one(file, pairs[0][0], pairs[0][1], device)
    found = Choice({i: partial(load_one, file, one, said, device) for i, (one, said) in enumerate(pairs)})
    found.facts = tuple(", ".join(f"{key} {value}" for key, value in said.items()) for _, said in pairs)
    return found


def load_one(file: Path, record: Record, said: dict[str, Any], device: Device) -> Parts:
    kind, state = type(record).__name__, {key: value for key, value in vars(record).items() if key not in FACTS}
    normed = state.pop("norm_encoder", None) if kind == "TiedSAE" else False
    if type(normed) is not bool:
        raise InputError(
            f"expected norm_encoder of a TiedSAE in {file} to be true or false, found {normed!r}, so its function is not known"
        )
    if foreign := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise InputError(f"{file} holds {', '.join(foreign)}, which may change what the dictionary computes and is not supported here")
    tied = kind == "TiedSAE"
    w = checked(file, state, SHAPES if tied else SHAPES | {"decoder": "f d"}, CENTRING if tied else {})
    w = {key: tensor.to(device) for key, tensor in w.items()}
    E_fd, W_dec_fd = w["encoder"], unit(w["encoder" if tied else "decoder"])
    W_enc_fd = W_dec_fd if normed else E_fd
    if "center_scale" in w:
        W_enc_fd, W_dec_fd = W_enc_fd * w["center_scale"], W_dec_fd / w["center_scale"]
    if "center_rot" in w:
        W_enc_fd, W_dec_fd = W_enc_fd @ w["center_rot"], W_dec_fd @ w["center_rot"]
    if not W_dec_fd.isfinite().all():
        raise InputError(f"center_scale in {file} holds 0, by which nothing can be divided; {AGAIN}")
    shift_d = w.get("center_trans")
    facts = site_of(file) | ({"settings_of_training": said} if said else {})
    frame = Frame("centred") if str(facts.get("site", "")).partition(".")[0] in CENTRED else None
    b_dec_d = torch.zeros_like(E_fd[0]) if shift_d is None else shift_d
    return Parts(W_enc_fd, w["encoder_bias"], W_dec_fd, b_dec_d, Threshold(), facts, shift_d, frame=frame)


def unit(rows_fd: Tensor) -> Tensor:
    return (rows_fd / row_norms(rows_fd)[:, None]).to(rows_fd)


def site_of(file: Path) -> dict[str, Any]:
    """The site, as far as the folders' names state it."""
    found = re.search(rf"(?:^|[/_])({'|'.join(SITES)})_l([0-9]+)_r[0-9.]+/", name_of(file))
    return {"site": f"{SITES[found[1]]}.{int(found[2])}"} if found else {}
