"""Bussmann's BatchTopK and Matryoshka dictionaries (github.com/bartbussmann, BatchTopK and matryoshka_sae): `sae.pt` + `config.json`.

    x̄ = (x − mean) / (std + 1e-5), of the token's own width, where input_unit_norm
    vanilla     acts = relu((x̄ − b_dec) W_enc + b_enc)
    topk        acts = the k largest of relu((x̄ − b_dec) W_enc), without b_enc
    batchtopk, global-matryoshka-topk      acts = (x̄ − b_dec) W_enc where above one threshold, without b_enc
    jumprelu    acts = x̄ W_enc + b_enc where above exp(log_threshold), without taking b_dec off
    y = (acts W_dec + b_dec) · std + mean

A batchtopk of the first repository has no threshold: its k is one of a whole batch. d width · f features
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from sae.dictionaries.formats.tensors import AGAIN, Device, checked, file_at, read_weights, require_value
from sae.dictionaries.formats.transformer_lens import site_of_hook
from sae.dictionaries.frames import Frame
from sae.dictionaries.gates import Gate, Threshold, TopK
from sae.dictionaries.parts import Parts
from sae.disk.reading import Count, read_json
from sae.errors import InputError

CONFIG, WEIGHTS = "config.json", "sae.pt"
FILES = f"{CONFIG} + {WEIGHTS}"
SHAPES = {"W_enc": "d f", "b_enc": "f", "W_dec": "f d", "b_dec": "d"}
TYPES = ("vanilla", "topk", "batchtopk", "jumprelu", "globalmatryoshkatopk")


class Config(TypedDict):
    sae_type: str
    act_size: Count
    dict_size: Count
    input_unit_norm: NotRequired[bool]
    top_k: NotRequired[Count]
    hook_point: NotRequired[str]
    model_name: NotRequired[str]
    seq_len: NotRequired[Count]


def recognises(path: Path) -> bool:
    return file_at(path, WEIGHTS) is not None


def load(path: Path, device: Device = "cpu") -> Parts:
    path = path.parent if path.is_file() else path
    config = read_json(path / CONFIG, "a dictionary's config.json", Config)
    name = config["sae_type"].replace("-", "").replace("_", "")
    require_value(path / CONFIG, "sae_type", name, TYPES)
    state = read_weights(path / WEIGHTS)
    theta = state.pop("threshold", None) if name in ("batchtopk", "globalmatryoshkatopk") else None
    shapes = SHAPES | ({"jumprelu.log_threshold": "f"} if name == "jumprelu" else {})
    w = checked(path / WEIGHTS, state, shapes, d=config["act_size"], f=config["dict_size"])
    w = {key: tensor.to(device) for key, tensor in w.items()}
    if "topk" in name:
        w["b_enc"] = torch.zeros_like(w["b_enc"])
    gate = gate_of(path, name, w, theta, config)
    b_in_d = None if name == "jumprelu" else w["b_dec"]
    frame = Frame("layer_norm") if config.get("input_unit_norm", False) else None
    return Parts(w["W_enc"].T.contiguous(), w["b_enc"], w["W_dec"], w["b_dec"], gate, facts_of(path, config), b_in_d, frame=frame)


def gate_of(path: Path, name: str, w: dict[str, Tensor], theta: Tensor | None, config: Config) -> Gate:
    if name == "vanilla":
        return Threshold()
    if name == "jumprelu":
        return Threshold(w["jumprelu.log_threshold"].exp())
    k, d_sae = config.get("top_k", 0), config["dict_size"]
    if not 1 <= k <= d_sae:
        raise InputError(f"{path / CONFIG} has top_k {k}, where 1 to {d_sae} is possible")
    if name == "topk":
        return TopK(k)
    if theta is None:
        print(f"{path / WEIGHTS} has no threshold, so each token keeps its {k} largest activations, not the batch", file=sys.stderr)
        return TopK(k)
    if theta.dim() != 0 or not bool(theta.isfinite()):
        raise InputError(f"expected one number as threshold in {path / WEIGHTS}, found {theta.tolist()}; {AGAIN}")
    return Threshold(torch.full_like(w["b_enc"], float(theta)))


def facts_of(path: Path, config: Config) -> dict[str, Any]:
    keys = {"sae_type": "sae_type", "hook_point": "hook_name", "model_name": "model_name", "seq_len": "context_size"}
    facts = {ours: config[theirs] for theirs, ours in keys.items() if theirs in config}  # type: ignore[literal-required]
    site = site_of_hook(config.get("hook_point", ""))
    return facts | ({} if site is None else {"site": site})
