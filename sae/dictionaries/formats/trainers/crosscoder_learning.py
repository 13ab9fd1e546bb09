"""Crosscoders of crosscoder_learning, the fork of dictionary_learning: `model_final.pt` or `model.safetensors` + `config.json`.

    x̄_p = (x_p − mean_p) · scale_p, where there is a normaliser      z = Σ_p x̄_p W_e[p] + b_e
    CrossCoder             acts = relu(z)
    BatchTopKCrossCoder    acts = relu(z) where relu(z) · c > threshold
    y_p = (acts W_d[p] + b_d[p]) / (scale_p + 1e-8) + mean_p

c is made of the lengths of a feature's decoder rows at all places. A decoupled one has a threshold, and a c, for each place: a feature
may be active at one place only, so here it becomes as many features as there are places, feature p · F + i for its feature i at place p.
Their code normalises the input of a decoupled one twice, in training too. d width · f features · p places
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.dictionaries.formats.tensors import Device, checked
from sae.dictionaries.formats.trainers.dictionary_learning import CROSSCODERS, NORMALISER, class_of, facts_of, find, normalised, read_state
from sae.dictionaries.gates import Threshold
from sae.dictionaries.parts import Parts
from sae.errors import InputError

FILES = "model_final.pt or model.safetensors + config.json"
SHAPES = {"encoder.weight": "e d f", "encoder.bias": "f", "decoder.weight": "p f d", "decoder.bias": "p d"}
CODES = {1: "CROSSCODER", 2: "SAE", 3: "MIXED", 4: "NONE", 5: "DECOUPLED"}
"""how c is made, by number in the file and by name in config.json"""


def recognises(path: Path) -> bool:
    files = find(path)
    return files is not None and class_of(files) in CROSSCODERS


def load(path: Path, device: Device = "cpu") -> Parts:
    files = find(path)
    assert files is not None  # as `recognises` found
    where, settings, thresholded = files.weights, files.settings, class_of(files) == "BatchTopKCrossCoder"
    state, factor = read_state(where)
    if factor is not None:
        raise InputError(f"{where} is a backup of dictionary_learning, which backs up no crosscoder; expected the tensors alone")
    normaliser = {name: state.pop(name) for name in NORMALISER if name in state}
    code = code_of(where, settings, state.pop("code_normalization_id", None))
    theta, _ = (state.pop(name, None) if thresholded else None for name in ("threshold", "k"))  # k is of training
    if settings.get("latent_processor") is not None:
        raise InputError(f"the crosscoder in {where} has a latent_processor, which is code and not in the file")
    w = {key: tensor.to(device) for key, tensor in checked(where, state, SHAPES).items()}
    places, d_sae, d = w["decoder.weight"].shape
    W_enc_fd = encoder(where, settings, w["encoder.weight"], places).permute(2, 0, 1).reshape(d_sae, places * d)
    W_dec_fo = w["decoder.weight"].transpose(0, 1).reshape(d_sae, places * d)
    facts = facts_of(files)
    facts |= {"site": [facts.get("site")] * places}
    parts = Parts(W_enc_fd, w["encoder.bias"], W_dec_fo, w["decoder.bias"].flatten(), Threshold(), facts)
    if thresholded:
        lengths_pf = w["decoder.weight"].norm(dim=-1)
        parts = with_thresholds(where, parts, code, theta, scales(code, lengths_pf, settings))
    return normalised(where, parts, normaliser, places, 1 + (thresholded and code == "DECOUPLED")) if normaliser else parts


def code_of(where: Path, settings: Mapping[str, Any], number: Tensor | None) -> str:
    """How c is made. Raises `InputError` where file and config.json differ; files of the first versions, which say nothing, sum lengths."""
    named = str(settings.get("code_normalization") or "").upper()
    numbered = "" if number is None else CODES.get(int(number), f"number {int(number)}")
    if named and numbered and named != numbered:
        raise InputError(f"the crosscoder in {where} has code_normalization {named} in its config.json and {numbered} in its tensors")
    if (code := named or numbered or CODES[1]) not in CODES.values():
        raise InputError(f"the crosscoder in {where} has code_normalization {code}, expected one of {', '.join(CODES.values())}")
    return code


def encoder(where: Path, settings: Mapping[str, Any], W_enc_edf: Tensor, places: int) -> Tensor:
    """With zeros for the places that are written but not read (encoder_layers), [p, d, f]."""
    layers = settings.get("encoder_layers") or list(range(places))
    if not isinstance(layers, list) or len(layers) != len(W_enc_edf) or len(set(layers) & set(range(places))) != len(layers):
        raise InputError(
            f"the crosscoder in {where} reads {len(W_enc_edf)} of {places} places, and its encoder_layers are {layers}; "
            f"expected the numbers of those that are read, from 0 to {places - 1}"
        )
    W_enc_pdf = W_enc_edf.new_zeros(places, *W_enc_edf.shape[1:])
    W_enc_pdf[layers] = W_enc_edf
    return W_enc_pdf


def scales(code: str, lengths_pf: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """c, [f], or [p, f] of a decoupled one."""
    length_f, sum_f = lengths_pf.norm(dim=0), lengths_pf.sum(dim=0)
    if code == "MIXED":
        return length_f * settings.get("code_normalization_alpha_sae", 1.0) + sum_f * settings.get("code_normalization_alpha_cc", 0.1)
    return {"CROSSCODER": sum_f, "SAE": length_f, "NONE": torch.ones_like(sum_f), "DECOUPLED": lengths_pf}[code]


def with_thresholds(where: Path, parts: Parts, code: str, theta: Tensor | None, c: Tensor) -> Parts:
    """relu(z) · c > threshold is z > threshold / c; no feature whose c is 0 is ever active."""
    shape = c.shape[:-1]
    if theta is None or theta.shape != shape or not bool((theta >= 0).all()):
        found = "none" if theta is None else theta.tolist()
        raise InputError(f"expected a threshold of at least 0 in {where}, for {code}, found {found}; a finished crosscoder has one")
    theta_f = torch.where(c > 0, theta.to(c).unsqueeze(-1) / c, torch.finfo(c.dtype).max).flatten()
    if code != "DECOUPLED":
        return parts._replace(gate=Threshold(theta_f))
    places, d_sae = c.shape
    W_dec_fpd = parts.W_dec_fo.unflatten(-1, (places, -1))
    W_dec_pfpd = W_dec_fpd.new_zeros(places, *W_dec_fpd.shape)
    for p in range(places):
        W_dec_pfpd[p, :, p] = W_dec_fpd[:, p]
    return parts._replace(
        W_enc_fd=parts.W_enc_fd.repeat(places, 1),
        b_enc_f=parts.b_enc_f.repeat(places),
        W_dec_fo=W_dec_pfpd.reshape(places * d_sae, -1),
        gate=Threshold(theta_f),
        metadata=parts.metadata | {"decoupled": d_sae},
    )
