"""Llama Scope of OpenMOSS (He et al. 2024, arXiv 2410.20526): `hyperparams.json` + `checkpoints/final.safetensors`.

Trained as a TopK that keeps what is largest by activation times decoder norm, on activations of mean norm √d; published to be used with
one threshold. In this order its authors (lm_saes, November 2024) take the norms s_in = √d / mean norm and s_out into the weights, make the
decoder's rows w_i of length 1, and compare with the threshold:

    b_E ← b_E / s_in      W_D ← W_D · s_in / s_out      b_D ← b_D / s_out
    W_E ← |w_i| W_E       b_E ← |w_i| b_E               W_D ← W_D / |w_i|
    acts = z where z > jump_relu_threshold, z = W_E x + b_E      y = W_D acts + b_D

llamascopium.py is what their tool became. d width · f features
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from sae.dictionaries.formats.tensors import (
    AGAIN,
    WHAT,
    Device,
    checked,
    name_of,
    read_weights,
    require_k,
    require_understood,
    unit_rows,
)
from sae.dictionaries.formats.transformer_lens import HOOK_NAMES, site_of_hook
from sae.dictionaries.gates import Gate, Threshold, TopK
from sae.dictionaries.parts import Parts
from sae.disk.foreign import read_torch
from sae.disk.reading import Count, Number, read_json
from sae.errors import InputError

CFG = "hyperparams.json"
FILES = f"{CFG} + checkpoints/final.safetensors"
WEIGHTS = tuple(f"{name}.{end}" for name in ("sae_weights", "checkpoints/pruned", "checkpoints/final") for end in ("safetensors", "pt"))
"""in the order in which the tool looks for them"""
SHAPES = {"encoder.weight": "f d", "encoder.bias": "f", "decoder.weight": "d f", "decoder.bias": "d"}
MODELS = {"Llama3_1-8B-Base": "meta-llama/Llama-3.1-8B", "Llama-Scope-R1-Distill": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"}
"""by a part of the names of the folders"""
KNOWN: dict[str, tuple[Any, ...]] = {
    "act_fn": ("relu", "topk", "jumprelu"),
    "use_decoder_bias": (True, False),
    "apply_decoder_bias_to_pre_encoder": (True, False),
    "sparsity_include_decoder_norm": (True, False),
    "use_glu_encoder": (False,),
}
"""values of each key that are understood, the tool's default first"""
# Facts on training and machine, on which the function does not depend
FACTS = {
    *("device", "dtype", "seed", "tp_size", "ddp_size", "sae_pretrained_name_or_path", "sae_from_pretrained_path", "strict_loading"),
    *("expansion_factor", "bias_init_method", "decoder_bias_init_method", "decoder_exactly_fixed_norm", "decoder_exactly_unit_norm"),
    *("init_decoder_norm", "init_encoder_norm", "init_encoder_with_decoder_transpose", "initial_k", "k_warmup_steps", "lp"),
    *("l1_coefficient", "l1_coefficient_warmup_steps", "use_batch_norm_mse", "use_ghost_grads"),
}


class Cfg(TypedDict):
    d_model: Count
    d_sae: Count
    hook_point_in: str
    hook_point_out: NotRequired[str | None]
    norm_activation: str
    top_k: NotRequired[Count]
    jump_relu_threshold: NotRequired[Number]
    dataset_average_activation_norm: NotRequired[dict[str, Number] | None]


class LanguageModel(TypedDict):
    """lm_config.json beside it"""

    model_name: str


def recognises(path: Path) -> bool:
    return home(path, CFG) is not None


def home(path: Path, cfg: str) -> Path | None:
    """The folder with the settings `cfg` and weights, of which `path` may name the file."""
    folder = path if path.is_dir() else path.parent.parent if path.parent.name == "checkpoints" else path.parent
    alone = path.is_dir() or path.relative_to(folder).as_posix() in WEIGHTS
    return folder if alone and (folder / cfg).is_file() and any((folder / name).is_file() for name in WEIGHTS) else None


def load(path: Path, device: Device = "cpu") -> Parts:
    folder = home(path, CFG)
    assert folder is not None
    said: dict[str, Any] = dict(read_json(folder / CFG, "Llama Scope's hyperparams.json", Cfg))
    require_understood(folder / CFG, said, KNOWN | {"norm_activation": ("dataset-wise", "inference")}, FACTS | set(Cfg.__annotations__))
    hook_in = said["hook_point_in"]
    hook_out = said.get("hook_point_out") or hook_in
    where, state = read_state(folder, path, device)
    biased = said["use_decoder_bias"]
    shapes = {name: shape for name, shape in SHAPES.items() if biased or name != "decoder.bias"}
    w = checked(where, state, shapes, d=said["d_model"], f=said["d_sae"])
    W_enc_fd, b_enc_f, W_dec_fd = w["encoder.weight"], w["encoder.bias"], w["decoder.weight"].T
    b_dec_d = w["decoder.bias"] if biased else torch.zeros_like(W_dec_fd[0])
    if said["norm_activation"] == "dataset-wise":
        s_in, s_out = scales(folder, said)
        b_enc_f, W_dec_fd, b_dec_d = b_enc_f / s_in, W_dec_fd * (s_in / s_out), b_dec_d / s_out
    subtracts = biased and said["apply_decoder_bias_to_pre_encoder"]
    if subtracts and hook_in != hook_out:
        raise InputError(f"{folder / CFG} takes the bias of {hook_out} off what it reads at {hook_in}, which is not understood")
    if said["sparsity_include_decoder_norm"]:
        W_enc_fd, b_enc_f, W_dec_fd = unit_rows(W_enc_fd, b_enc_f, W_dec_fd)
    gate = gate_of(folder, said, b_enc_f)
    facts = {"prepend_bos": True, **model_of(folder), **sites(folder / CFG, hook_in, hook_out)}
    facts |= {"promised": {"l0": said["top_k"]}} if said["act_fn"] == "topk" and "top_k" in said else {}
    return Parts(W_enc_fd, b_enc_f, W_dec_fd.contiguous(), b_dec_d, gate, facts, b_dec_d if subtracts else None)


def read_state(folder: Path, path: Path, device: Device) -> tuple[Path, dict[str, Tensor]]:
    """The file of weights, `path` itself or the first that the tool would look for, and its tensors."""
    where = path if path.is_file() else next(folder / name for name in WEIGHTS if (folder / name).is_file())
    if where.suffix == ".safetensors":
        return where, read_weights(where, device)
    state = read_torch(where, WHAT)
    inside = state.get("sae") if isinstance(state, dict) else None
    if not isinstance(inside, dict) or not all(isinstance(tensor, Tensor) for tensor in inside.values()):
        raise InputError(f"expected the tensors of a dictionary under 'sae' in {where}, found other things; {AGAIN}")
    return where, {str(name): tensor.to(device) for name, tensor in inside.items()}


def scales(folder: Path, said: dict[str, Any]) -> tuple[float, float]:
    """The factors by which training multiplied the input and output activations."""
    norms = said.get("dataset_average_activation_norm") or {}
    if not all(norms.get(end, 0) > 0 for end in ("in", "out")):
        raise InputError(f"expected dataset_average_activation_norm in {folder / CFG} with in and out above 0, found {norms}; {AGAIN}")
    return said["d_model"] ** 0.5 / norms["in"], said["d_model"] ** 0.5 / norms["out"]


def gate_of(folder: Path, said: dict[str, Any], b_enc_f: Tensor) -> Gate:
    theta = said.get("jump_relu_threshold", 0.0)
    if theta < 0:
        raise InputError(f"{folder / CFG} has jump_relu_threshold {theta}, where at least 0 is expected")
    if said["act_fn"] == "jumprelu" or (said["act_fn"] == "topk" and theta > 0):
        return Threshold(torch.full_like(b_enc_f, theta))
    return TopK(require_k(folder / CFG, "top_k", said.get("top_k"), len(b_enc_f))) if said["act_fn"] == "topk" else Threshold()


def model_of(folder: Path) -> dict[str, Any]:
    """The model's name, from the file beside it or the names of the folders."""
    if (folder / "lm_config.json").is_file():
        found: LanguageModel = read_json(folder / "lm_config.json", "the language model's lm_config.json", LanguageModel)
        return {"model_name": found["model_name"]}
    return next(({"model_name": model} for name, model in MODELS.items() if re.search(rf"(?:^|/){name}", name_of(folder))), {})


def sites(where: Path, hook_in: str, hook_out: str) -> dict[str, Any]:
    """Our names of its input site and, for a transcoder, its output site. Raises `InputError` for a hook that is not one of our sites."""
    found = {hook: site_of_hook(hook) for hook in (hook_in, hook_out)}
    for hook, site in found.items():
        if site is None:
            known = ", ".join(pattern.format("L") for pattern in HOOK_NAMES.values())
            raise InputError(f"{where} names the hook {hook!r}, which is none of the sites known here: {known}")
    return {"site": found[hook_in]} | ({} if hook_in == hook_out else {"site_out": found[hook_out]})
