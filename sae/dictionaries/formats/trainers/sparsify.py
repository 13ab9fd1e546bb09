"""EleutherAI's sparsify: a folder with `cfg.json` + `sae.safetensors` for each hookpoint, in the folder of a run with its `config.json`.

A hookpoint is a module of the model. An autoencoder reads the module's output; a transcoder reads its input and predicts what it
outputs. With x̄ = x − b_dec for an autoencoder and x̄ = x for a transcoder (sparsify 1.3.3, sparse_coder.py and fused_encoder.py):

    z = relu(x̄ W_encᵀ + b_enc)      acts = the k largest z, or of groupmax the largest z in each of k equal blocks
    y = acts W_dec + b_dec (+ x W_skipᵀ)

Transcoders of before February 2025 do subtract b_dec; their cfg.json does not mention transcoding, and the run's does.
d width · f features
"""

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, TypedDict

from sae.dictionaries.formats.modules import ends_of_module
from sae.dictionaries.formats.tensors import Device, checked, file_at, read_weights
from sae.dictionaries.gates import AbsTopK, Gate, GroupMax, TopK
from sae.dictionaries.parts import Layers, Parts
from sae.disk.reading import Count, read_json
from sae.errors import InputError

CFG, WEIGHTS, RUN = "cfg.json", "sae.safetensors", "config.json"
FILES = f"{CFG} + {WEIGHTS}, or a run's folder of such folders"
SHAPES = {"encoder.weight": "f d", "encoder.bias": "f", "W_dec": "f d", "b_dec": "d"}


class Cfg(TypedDict):
    d_in: Count
    k: NotRequired[Count]
    num_latents: NotRequired[Count]
    expansion_factor: NotRequired[Count]
    activation: NotRequired[str]
    signed: NotRequired[bool]
    """of 2024: the k largest by absolute value"""
    transcode: NotRequired[bool]
    skip_connection: NotRequired[bool]
    normalize_decoder: NotRequired[bool]
    multi_topk: NotRequired[bool]


class Run(TypedDict):
    """The run's settings; a file with neither key belongs to another tool."""

    model: NotRequired[str]
    sae: NotRequired[dict[str, Any]]
    transcode: NotRequired[bool]
    """before February 2025; since then in cfg.json"""


def recognises(path: Path) -> bool:
    return file_at(path, WEIGHTS) is not None or bool(path.is_dir() and hookpoints(path))


def hookpoints(run: Path) -> list[str]:
    """Folders of single dictionaries in a run's folder: "layers.5", and with several seeds "layers.5/seed1"."""
    return sorted(file.parent.relative_to(run).as_posix() for pattern in ("*", "*/seed*") for file in run.glob(f"{pattern}/{WEIGHTS}"))


def load(path: Path, device: Device = "cpu") -> Parts | Layers:
    if file := file_at(path, WEIGHTS):
        return load_one(file.absolute().parent, device)
    found = hookpoints(path)
    layers = {int(match[0]): name for name in found if (match := re.search(r"(?<=\.)[0-9]+(?=\.|$)", name))}
    kinds = {re.sub(r"(?<=\.)[0-9]+(?=\.|$)", "N", name, count=1) for name in found}
    if len(kinds) != 1 or len(layers) != len(found):
        raise InputError(f"expected one hookpoint in the run {path}, or the same in several layers, found {', '.join(found)}; choose one")
    return {layer: partial(load_one, (path / layers[layer]).absolute(), device) for layer in sorted(layers)}


def load_one(folder: Path, device: Device) -> Parts:
    cfg = read_json(folder / CFG, "a dictionary's cfg.json", Cfg)
    if unknown := sorted(set(cfg) - set(Cfg.__annotations__)):
        raise InputError(
            f"{folder / CFG} has {', '.join(unknown)}, which may change what the dictionary computes and is not supported here"
        )
    home = folder.parent if re.fullmatch(r"seed[0-9]+", folder.name) else folder
    run = read_run(home.parent / RUN)
    d_sae = cfg.get("num_latents") or cfg["d_in"] * cfg.get("expansion_factor", 32)
    skip = {"W_skip": "d d"} if cfg.get("skip_connection") else {}
    w = checked(folder / WEIGHTS, read_weights(folder / WEIGHTS, device), {**SHAPES, **skip}, d=cfg["d_in"], f=d_sae)
    b_in_d = None if cfg.get("transcode") else w["b_dec"]
    gate, facts = gate_of(folder / CFG, cfg, d_sae), facts_of(home, folder, cfg, run)
    return Parts(w["encoder.weight"], w["encoder.bias"], w["W_dec"], w["b_dec"], gate, facts, b_in_d, w.get("W_skip"))


def read_run(path: Path) -> Run:
    run: Run = read_json(path, "the run's config.json", Run) if path.is_file() else {}
    return run if "sae" in run and "model" in run else {}


def gate_of(where: Path, cfg: Cfg, d_sae: int) -> Gate:
    k, activation = cfg.get("k", 32), cfg.get("activation", "topk")
    if not 1 <= k <= d_sae:
        raise InputError(f"{where} has k {k}, where 1 to {d_sae} is possible")
    if activation == "topk":
        return (AbsTopK if cfg.get("signed") else TopK)(k)
    if activation != "groupmax" or cfg.get("signed"):
        raise InputError(f"{where} has activation {activation!r}, which is not understood; expected topk or groupmax, the latter unsigned")
    if d_sae % k:
        raise InputError(f"{where} has k {k} and {d_sae} features, which make no equal groups, as groupmax has")
    return GroupMax(k)


def facts_of(home: Path, folder: Path, cfg: Cfg, run: Run) -> dict[str, Any]:
    """Sites and model. Raises `InputError` for a transcoder whose module's ends are no sites."""
    hookpoint, model = home.name, run.get("model")
    facts: dict[str, Any] = {"hookpoint": hookpoint} | ({"seed": folder.name} if folder != home else {})
    facts |= {} if model is None else {"model_name": model}
    into, out = ends_of_module(hookpoint, model)
    if model is None and out is not None and not out.startswith("resid"):
        print(
            f"no {RUN} beside {home} names the model: {hookpoint} is taken as {out}, which holds unless a norm follows it", file=sys.stderr
        )
    if not cfg.get("transcode", run.get("transcode")):
        return facts | ({} if out is None else {"site": out})
    if into is None or out is None:
        raise InputError(
            f"the transcoder in {folder} goes from the input to the output of {hookpoint} in {model or 'an unnamed model'}, "
            "which are not both among the sites known here"
        )
    return facts | {"site": into, "site_out": out}
