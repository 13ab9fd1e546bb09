"""Crosscoders of Kissane and of Nanda: `cc_weights.pt` + `cfg.json`, or `N.pt` + `N_cfg.json`; p places are read at once.

    acts = relu(Σ_p x_p W_enc[p] + b_enc)      y_p = acts W_dec[:, p] + b_dec[p]

The places are two models at one site (crosscoder-model-diff-replication), or all layers of one model (Crosscoders). Training multiplies
its input at each place by √d / the mean norm there. The files lack these factors, so the dictionary takes activations that are
multiplied already; `Dictionary.folded` applies the factors. d width · f features
"""

import sys
from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, TypedDict

from sae.dictionaries.formats.tensors import Device, checked, names_in, read_weights
from sae.dictionaries.formats.transformer_lens import site_of_hook
from sae.dictionaries.gates import Threshold
from sae.dictionaries.parts import Parts
from sae.disk.reading import Count, read_json

WEIGHTS, CFG = "cc_weights.pt", "cfg.json"
FILES = f"{WEIGHTS} + {CFG}, or N.pt + N_cfg.json"
SHAPES = {"W_enc": "p d f", "b_enc": "f", "W_dec": "f p d", "b_dec": "p d"}


class Cfg(TypedDict):
    dict_size: NotRequired[Count]
    d_in: NotRequired[Count]
    hook_point: NotRequired[str]
    site: NotRequired[str]
    model_name: NotRequired[str]
    seq_len: NotRequired[Count]


def files(path: Path) -> tuple[Path, Path]:
    """The weights and the settings beside them."""
    if path.is_dir():
        return path / WEIGHTS, path / CFG
    return path, path.with_name(CFG if path.name == WEIGHTS else f"{path.stem}_cfg.json")


def recognises(path: Path) -> bool:
    weights, _ = files(path)
    return weights.is_file() if weights.name == WEIGHTS else dimensions(path) == 3


def dimensions(path: Path) -> int | None:
    """Number of dimensions of the encoder in a file `N.pt` that has its settings beside it; None for anything else."""
    weights, cfg = files(path)
    if weights.name == WEIGHTS or weights.suffix != ".pt" or not cfg.is_file() or "W_enc" not in names_in(weights):
        return None
    W_enc = read_weights(weights).get("W_enc")
    return None if W_enc is None else W_enc.dim()


def load(path: Path, device: Device = "cpu") -> Parts:
    weights, cfg_path = files(path)
    cfg = read_json(cfg_path, "a crosscoder's settings", Cfg)
    sizes = {size: cfg[key] for size, key in (("d", "d_in"), ("f", "dict_size")) if key in cfg}  # type: ignore[literal-required]
    w = {key: tensor.to(device) for key, tensor in checked(weights, read_weights(weights), SHAPES, **sizes).items()}
    print(
        f"{weights} takes activations multiplied at each place by √d / their mean norm there; the factors are not in it: "
        "give them to Dictionary.folded",
        file=sys.stderr,
    )
    places = len(w["b_dec"])
    W_enc_fd, W_dec_fd = w["W_enc"].flatten(0, 1).T.contiguous(), w["W_dec"].flatten(1)
    return Parts(W_enc_fd, w["b_enc"], W_dec_fd, w["b_dec"].flatten(), Threshold(), facts_of(cfg, places))


def facts_of(cfg: Cfg, places: int) -> dict[str, Any]:
    """Of two models the one hook is named, of all layers its kind."""
    hooks = [cfg["hook_point"]] * places if "hook_point" in cfg else [f"blocks.{i}.hook_{cfg.get('site')}" for i in range(places)]
    facts = {"hook_name": "hook_point", "model_name": "model_name", "context_size": "seq_len"}
    found = {ours: cfg[theirs] for ours, theirs in facts.items() if theirs in cfg}  # type: ignore[literal-required]
    return found | {"site": [site_of_hook(hook) for hook in hooks]}
