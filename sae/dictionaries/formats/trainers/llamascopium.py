"""Llamascopium of OpenMOSS, also called lm-saes and Language-Model-SAEs, since 2025: `config.json` + `sae_weights.safetensors`.

Llama Scope's dictionaries for DeepSeek-R1-Distill-Llama-8B are in an early form of it, whose tensors have other names. With the mean norms
of training in the file, s_in = √d / mean norm and s_out (1 where norm_activation is "inference"), or s = √d / |x| of each token:

    z = s_in x W_E + b_E      acts = act(z |w_i|) / |w_i|, where sparsity_include_decoder_norm      y = (acts W_D + b_D) / s_out

act is ReLU, z where z > exp(log_jumprelu_threshold), or the top_k largest. Of a TopK the rows w_i of W_D get length 1 here, and the
activations are multiplied by the old lengths. d width · f features
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from sae.dictionaries.formats.releases.llama_scope import home, model_of, read_state, sites
from sae.dictionaries.formats.tensors import (
    AGAIN,
    Device,
    checked,
    require_k,
    require_understood,
    row_norms,
    unit_rows,
)
from sae.dictionaries.frames import Frame
from sae.dictionaries.gates import Gate, Threshold, TopK
from sae.dictionaries.parts import Parts
from sae.disk.reading import Count, Number, read_json
from sae.errors import InputError

CFG = "config.json"
FILES = f"{CFG} with expansion_factor + sae_weights.safetensors"
NORM = "dataset_average_activation_norm."
"""and the hook, names a mean norm among the tensors"""
THRESHOLD = "activation_function.log_jumprelu_threshold"
SHAPES = {"W_E": "d f", "b_E": "f", "W_D": "f d", "b_D": "d"}
EARLY = {
    "encoder.weight": "W_E",
    "encoder.bias": "b_E",
    "decoder.weight": "W_D",
    "decoder.bias": "b_D",
    "log_jumprelu_threshold": THRESHOLD,
}
"""names of before June 2025; matrices are the other way round"""
KNOWN: dict[str, tuple[Any, ...]] = {
    "act_fn": ("relu", "jumprelu", "topk", "batchtopk"),
    "norm_activation": ("dataset-wise", "token-wise", "inference"),
    "use_decoder_bias": (True, False),
    "apply_decoder_bias_to_pre_encoder": (False, True),
    "sparsity_include_decoder_norm": (True, False),
    "use_glu_encoder": (False,),
}
"""values of each key that are understood, the tool's default first"""
# Facts on training and machine; a jump_relu_threshold is only used when activations of a TopK are compared with it instead
FACTS = {
    *("sae_type", "device", "dtype", "sae_pretrained_name_or_path", "strict_loading", "use_triton_kernel", "promote_act_fn_dtype"),
    *("sparsity_threshold_for_triton_spmm_kernel", "jumprelu_threshold_window", "jump_relu_threshold", "force_unit_decoder_norm"),
    *("sparsity_threshold_for_csr", "jumprelu_threshold_grad_scale", "circuit_tracing_mode", "n_devices", "skip_bos"),
    *("use_auxk", "k_aux", "aux_coefficient", "dead_threshold"),
}


class Cfg(TypedDict):
    d_model: Count
    expansion_factor: Number
    hook_point_in: str
    hook_point_out: NotRequired[str]
    top_k: NotRequired[Count]


class Kind(TypedDict):
    """config.json of any of the tool's kinds"""

    sae_type: NotRequired[Any]


def recognises(path: Path) -> bool:
    folder = home(path, CFG)
    if folder is None or (folder / "cfg.json").is_file():  # SAELens
        return False
    said: Any = read_json(folder / CFG, "a dictionary's config.json")
    return isinstance(said, dict) and {"d_model", "expansion_factor", "norm_activation"} <= set(said)


def load(path: Path, device: Device = "cpu") -> Parts:
    folder = home(path, CFG)
    assert folder is not None
    where = folder / CFG
    kind = read_json(where, "Llamascopium's config.json", Kind).get("sae_type", "sae")
    if kind != "sae":
        raise InputError(f"{where} is of sae_type {kind!r}, which is not known here; expected 'sae', an autoencoder or a transcoder")
    said: dict[str, Any] = dict(read_json(where, "Llamascopium's config.json", Cfg))
    require_understood(where, said, KNOWN, FACTS | set(Cfg.__annotations__))
    hook_in = said["hook_point_in"]
    hook_out = said.setdefault("hook_point_out", hook_in)
    weights, state = read_state(folder, path, device)
    norms = {name.removeprefix(NORM): state.pop(name) for name in list(state) if name.startswith(NORM)}
    w = weights_of(weights, state, said)
    s_in, s_out = scales(weights, said, norms) if said["norm_activation"] == "dataset-wise" else (1.0, 1.0)
    W_enc_fd, b_enc_f, W_dec_fd, b_dec_d = w["W_E"].T, w["b_E"], w["W_D"], w["b_D"]
    subtracts = said["apply_decoder_bias_to_pre_encoder"]
    b_in_d = b_dec_d / s_in if subtracts else None
    if "topk" in said["act_fn"] and said["sparsity_include_decoder_norm"]:
        W_enc_fd, b_enc_f, W_dec_fd = unit_rows(W_enc_fd, b_enc_f, W_dec_fd)
    gate = gate_of(where, said, w)
    frame = frame_of(where, said)
    facts = {"prepend_bos": True, **model_of(folder), **sites(where, hook_in, hook_out)}
    scaled = (W_enc_fd * s_in).contiguous(), b_enc_f, W_dec_fd / s_out, b_dec_d / s_out
    return Parts(*scaled, gate, facts, b_in_d, frame=frame)


def weights_of(where: Path, state: dict[str, Tensor], said: dict[str, Any]) -> dict[str, Tensor]:
    """With today's names; a missing bias of the decoder is 0."""
    if "encoder.weight" in state:
        state = {EARLY.get(name, name): tensor.T if tensor.dim() == 2 else tensor for name, tensor in state.items()}
    shapes = {name: shape for name, shape in SHAPES.items() if name != "b_D" or said["use_decoder_bias"]}
    shapes |= {THRESHOLD: "f"} if said["act_fn"] == "jumprelu" else {}
    w = checked(where, state, shapes, d=said["d_model"], f=int(said["d_model"] * said["expansion_factor"]))
    return w if "b_D" in w else w | {"b_D": torch.zeros_like(w["W_D"][0])}


def scales(where: Path, said: dict[str, Any], norms: dict[str, Tensor]) -> tuple[float, float]:
    """The factors by which training multiplied the input and output activations."""
    hooks = [said["hook_point_in"], said["hook_point_out"]]
    found = [float(norms[hook]) if hook in norms and norms[hook].numel() == 1 else 0.0 for hook in hooks]
    if not all(0 < norm < float("inf") for norm in found):
        names = " and ".join(dict.fromkeys(NORM + hook for hook in hooks))
        raise InputError(f"expected {names} in {where}, each one number above 0, because of norm_activation 'dataset-wise'; {AGAIN}")
    return said["d_model"] ** 0.5 / found[0], said["d_model"] ** 0.5 / found[1]


def gate_of(where: Path, said: dict[str, Any], w: dict[str, Tensor]) -> Gate:
    if said["act_fn"] == "jumprelu":
        theta_f = w[THRESHOLD].exp()
        return Threshold(theta_f / row_norms(w["W_D"]).to(theta_f) if said["sparsity_include_decoder_norm"] else theta_f)
    if said["act_fn"] == "relu":
        return Threshold()
    k = require_k(where, "top_k", said.get("top_k"), len(w["b_E"]))
    if said["act_fn"] == "batchtopk":
        print(f"{where} keeps {k} features of a token in the mean over a batch; here each token keeps its {k} largest", file=sys.stderr)
    return TopK(k)


def frame_of(where: Path, said: dict[str, Any]) -> Frame | None:
    """Raises `InputError` for a transcoder whose output is in units of the norm of its target."""
    if said["norm_activation"] != "token-wise":
        return None
    if said["hook_point_in"] != said["hook_point_out"]:
        raise InputError(f"{where} has norm_activation 'token-wise', for which a transcoder's output needs the norm of its target")
    return Frame("constant_norm_rescale")
