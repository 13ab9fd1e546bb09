"""Attention autoencoders of Kissane, Krzyzanowski and others (2024) in GPT-2 small: `N.pt` + `N_cfg.json`.

They read z, the outputs of all heads side by side, which the output projection takes (ckkissane/attention-output-saes, autoencoder.py):

    acts = relu((z − b_dec) W_enc + b_enc)      y = acts W_dec + b_dec

Training took z from TransformerLens, which folds what the bias of the values adds to z into a bias after it (fold_value_biases). The model
itself has that in z, and the files lack it. d width · f features
"""

from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, TypedDict

from sae.dictionaries.formats.releases.kissane import dimensions, files
from sae.dictionaries.formats.tensors import Device, checked, read_weights, require_value
from sae.dictionaries.formats.transformer_lens import FOLDED, site_of_hook, tell_folded
from sae.dictionaries.gates import Threshold
from sae.dictionaries.parts import Parts
from sae.disk.reading import Count, read_json
from sae.errors import InputError

FILES = "N.pt + N_cfg.json with act_name"
SHAPES = {"W_enc": "d f", "b_enc": "f", "W_dec": "f d", "b_dec": "d"}
MODELS = {"gpt2-small": "gpt2"}
"""names on the hub of models that TransformerLens calls otherwise"""


class Cfg(TypedDict):
    act_name: str
    act_size: Count
    dict_size: Count
    concat_heads: NotRequired[bool]
    model_name: NotRequired[str]
    seq_len: NotRequired[Count]


def recognises(path: Path) -> bool:
    return dimensions(path) == 2


def load(path: Path, device: Device = "cpu") -> Parts:
    """Raises `InputError` for another site, or one head alone."""
    weights, cfg_path = files(path)
    cfg = read_json(cfg_path, "a dictionary's settings", Cfg)
    site = site_of_hook(cfg["act_name"]) or ""
    if not site.startswith("head_out."):
        raise InputError(f"{cfg_path} has act_name {cfg['act_name']!r}, which is not known here; expected blocks.L.attn.hook_z")
    require_value(cfg_path, "concat_heads", cfg.get("concat_heads", True), (True,))
    w = checked(weights, read_weights(weights), SHAPES, d=cfg["act_size"], f=cfg["dict_size"])
    w = {key: tensor.to(device) for key, tensor in w.items()}
    tell_folded(weights, site)
    facts: dict[str, Any] = {"site": site, "prepend_bos": True, "model_from_pretrained_kwargs": {FOLDED: True}}
    facts |= {"context_size": cfg["seq_len"]} if "seq_len" in cfg else {}
    facts |= {"model_name": MODELS.get(cfg["model_name"], cfg["model_name"])} if "model_name" in cfg else {}
    return Parts(w["W_enc"].T.contiguous(), w["b_enc"], w["W_dec"], w["b_dec"], Threshold(), facts, w["b_dec"])
