"""SAELens' folder, read strictly: what would change the function, or what the function reads, is refused by name.

Since version 6 cfg.json is short, with facts on model and training under `metadata`; before, all keys stood side by side, in version 2 the
whole run's settings. d model width · f features
"""

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from sae.errors import InputError
from sae.reading import read_json, read_tensors
from sae.sites import parse_site

WEIGHTS = "sae_weights.safetensors"
CFG = "cfg.json"

# TransformerLens' names of our sites, which SAELens and its readers expect in cfg.json
HOOK_NAMES = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "head_out": "blocks.{}.attn.hook_z",
}

OLDER_NAMES = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}

# Values with which SAELens computes relu((x - b_dec) W_enc + b_enc) W_dec + b_dec at one site of the model; or without the first b_dec
PLAIN: dict[str, tuple[Any, ...]] = {
    "architecture": ("standard",),
    "activation_fn": ("relu", None),
    "activation_fn_kwargs": ({}, None),
    "normalize_activations": ("none", False, None),
    "reshape_activations": ("none", "hook_z", None),
    "rescale_acts_by_decoder_norm": (False, None),
    "k": (None,),
    "use_error_term": (False, None),
    "apply_b_dec_to_input": (True, False),
    "finetuning_scaling_factor": (True, False, None),  # what it multiplies by is among the weights
    "hook_head_index": (None,),
    "hook_name_out": (None,),
    "hook_head_index_out": (None,),
    "dtype": tuple(f"{prefix}{name}" for name in ("float32", "float64", "float16", "bfloat16") for prefix in ("", "torch.")),
}

# Facts on text, training and machine, on which the function does not depend
FACTS = {
    *("d_in", "d_sae", "device", "metadata"),
    *("model_name", "model_class_name", "model_from_pretrained_kwargs", "hook_name", "hook_layer", "hf_hook_name", "neuronpedia_id"),
    *("context_size", "prepend_bos", "exclude_special_tokens", "seqpos_slice", "dataset_path", "dataset_trust_remote_code"),
    *("sae_lens_version", "sae_lens_training_version"),
    *("l1_coefficient", "lp_norm", "l1_warm_up_steps", "decoder_init_norm", "noise_scale", "mse_loss_normalization", "use_ghost_grads"),
    *("normalize_sae_decoder", "decoder_orthogonal_init", "decoder_heuristic_init", "init_encoder_as_decoder_transpose"),
}

# TransformerLens' arguments that leave the activations of our sites as the model of Hugging Face has them
SAME_ACTIVATIONS = {"fold_ln", "center_unembed", "dtype", "torch_dtype", "device", "n_devices", "trust_remote_code"}
SAME_EXCEPT_HEADS = {"fold_value_biases", "refactor_factored_attn_matrices"}


class Cfg(TypedDict):
    """cfg.json as far as it has a form; what the keys may say is decided below."""

    metadata: NotRequired[dict[str, Any] | None]


class Contents(NamedTuple):
    """Of a folder that is understood as a whole."""

    weights: dict[str, Tensor]
    """W_enc [d, f], b_enc [f], W_dec [f, d], b_dec [d]"""
    subtracts_b_dec: bool
    """b_dec is taken off the input"""
    metadata: dict[str, Any]
    """every other fact, and under "site" our name of the hook where the folder names one"""


def site_of_hook(hook: str) -> str | None:
    """Our name of one of TransformerLens' hooks; None for a hook that is none of our sites."""
    for kind, pattern in HOOK_NAMES.items():
        before, after = map(re.escape, pattern.split("{}"))
        if match := re.fullmatch(f"{before}(0|[1-9][0-9]*){after}", hook):
            return f"{kind}.{match[1]}"
    return None


def hook_of_site(site: str | None) -> str | None:
    kind, _, layer = (site or "").partition(".")
    return HOOK_NAMES[kind].format(layer) if kind in HOOK_NAMES else None


def read_folder(folder: Path, device: str | torch.device) -> Contents:
    """Raises `InputError` naming the key or tensor for anything but a whole dictionary with a plain ReLU on one of our sites."""
    cfg = read_json(folder / CFG, "a dictionary's cfg.json", Cfg)
    weights, _ = read_tensors(folder / WEIGHTS, "a dictionary's weights", device=device, then="copy or train the dictionary again")
    values = merge(folder, cfg)
    require_plain(folder, cfg, values)
    require_whole(folder, values, weights)
    facts = {key: value for key, value in values.items() if key not in {*PLAIN, "d_in", "d_sae", "device"}}
    site = find_site(folder, values)
    require_raw_activations(folder, values, site)
    return Contents(weights, values.get("apply_b_dec_to_input", True), facts | ({"site": site} if site else {}))


def merge(folder: Path, cfg: dict[str, Any]) -> dict[str, Any]:
    """All keys side by side under their newest names. Raises `InputError` where two places say different things."""
    values: dict[str, Any] = {}
    metadata = cfg.get("metadata") or {}
    for key, value in [*cfg.items(), *metadata.items()]:
        key = OLDER_NAMES.get(key, key)
        if key == "metadata":
            continue
        if key in values and values[key] != value:
            raise InputError(f"{folder / CFG} says two things of {key}, {values[key]!r} and {value!r}; leave the right one")
        values[key] = value
    return values


def require_plain(folder: Path, cfg: dict[str, Any], values: dict[str, Any]) -> None:
    """Raises `InputError` naming a key with which the function is another one, or that nobody has decided about.

    The many settings of an old run, with which cfg.json is open-ended, are named on stderr instead.
    """
    for key, plain in PLAIN.items():
        value = values.get(key, plain[0])
        if not any(value == one and isinstance(value, type(one)) for one in plain):
            expected = " or ".join("nothing" if one is None else repr(one) for one in plain)
            raise InputError(
                f"the dictionary in {folder} has {key} {value!r}, and with it another function than the ones that can be read, "
                f"a plain ReLU on raw activations; expected {expected}"
            )
    unknown = sorted({OLDER_NAMES.get(key, key) for key in cfg} - {*PLAIN, *FACTS})
    if unknown and "metadata" in cfg:
        raise InputError(f"{folder / CFG} has {', '.join(unknown)}, which may change what the dictionary computes and is not known here")
    if unknown:
        print(f"{folder / CFG} has settings of an old training run, taken as mere facts: {', '.join(unknown)}", file=sys.stderr)


def require_whole(folder: Path, values: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Raises `InputError` unless there are the four tensors, no others, of the sizes in cfg.json, floating point and finite."""
    d, f = (values.get(key) for key in ("d_in", "d_sae"))
    shapes = {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,)}
    missing = [key for key in ("d_in", "d_sae") if key not in values] + [name for name in shapes if name not in weights]
    if missing:
        raise InputError(f"the dictionary in {folder} lacks {', '.join(missing)}; a whole one has {CFG} and {WEIGHTS} as they were saved")
    for key in ("d_in", "d_sae"):
        if type(values[key]) is not int or values[key] < 1:
            raise InputError(f"{folder / CFG} has {key} {values[key]!r}, where a whole number of at least 1 is expected")
    scale_f = weights.pop("scaling_factor", None)  # SAELens before version 6 always saved one, of ones where there was no fine-tuning
    if (values.get("finetuning_scaling_factor") and scale_f is None) or (scale_f is not None and not bool((scale_f == 1).all())):
        raise InputError(
            f"the dictionary in {folder} multiplies its activations by a scaling_factor from fine-tuning; fold that into W_dec first"
        )
    unknown = sorted(set(weights) - set(shapes))
    if unknown:
        raise InputError(f"{folder / WEIGHTS} holds {', '.join(unknown)} beside {', '.join(shapes)}, so it is no plain ReLU dictionary")
    for name, shape in shapes.items():
        tensor = weights[name]
        if tuple(tensor.shape) != shape:
            raise InputError(f"{name} in {folder} has shape {tuple(tensor.shape)} where cfg.json asks for {shape}")
        if not tensor.is_floating_point() or tensor.dtype != weights["W_dec"].dtype:
            raise InputError(f"expected floating-point tensors of one dtype in {folder / WEIGHTS}, got {name} of {tensor.dtype}")
        if not all(bool(end.isfinite()) for end in tensor.aminmax()):  # host sync; NaN is both ends
            raise InputError(f"{name} in {folder} holds NaN or infinity; copy or train the dictionary again")


def find_site(folder: Path, values: dict[str, Any]) -> str | None:
    """Our name of where it reads; None where the folder does not tell. Raises `InputError` for a hook or site that is not known here."""
    hook, site = values.get("hook_name"), values.get("site")
    if site is not None:
        site = str(parse_site(str(site)))
    if hook is None:
        return site
    layer = values.get("hook_layer")
    found = site_of_hook(str(hook).replace("{layer}", str(layer)))  # as in SAELens 1
    if found is None:
        raise InputError(
            f"the dictionary in {folder} reads the hook {hook!r}, which is none of the sites known here: "
            + ", ".join(pattern.format("L") for pattern in HOOK_NAMES.values())
        )
    for name, other in (("site", site), ("hook_layer", layer)):
        if other not in (None, found, int(found.rpartition(".")[2])):
            raise InputError(f"the dictionary in {folder} says hook {hook!r} and {name} {other!r}, which differ; leave the right one")
    return found


def require_raw_activations(folder: Path, values: dict[str, Any], site: str | None) -> None:
    """Raises `InputError` where the model's weights were changed on loading so that the site has other values than in Hugging Face's."""
    at_heads = site is not None and site.startswith("head_out")
    if values.get("reshape_activations") == "hook_z" and site is not None and not at_heads:
        raise InputError(f"the dictionary in {folder} has reshape_activations 'hook_z', but reads {site}; leave the right one")
    same = SAME_ACTIVATIONS | (set() if at_heads else SAME_EXCEPT_HEADS)
    given = values.get("model_from_pretrained_kwargs") or {}
    if not isinstance(given, dict):
        raise InputError(f"{folder / CFG} has model_from_pretrained_kwargs {given!r}, where an object is expected")
    changing = [key for key, value in given.items() if key not in same and value not in (None, False)]
    if changing:
        raise InputError(
            f"the dictionary in {folder} was trained on a model loaded with model_from_pretrained_kwargs {', '.join(changing)}, "
            "whose activations are not those of the model as it is; such a dictionary cannot be read"
        )
