"""saprmarks' dictionary_learning: `ae.pt` + `config.json`, whose "trainer" names the class; also the SAEs of its fork crosscoder_learning.

| class | z | acts | y |
|---|---|---|---|
| AutoEncoder | W_e (x − bias) + b_e | z where z > 0 | W_d acts + bias |
| AutoEncoderNew | W_e x + b_e | z where z > 0 | W_d acts + b_d |
| GatedAutoEncoder | W_e (x − b_d) | relu(exp(r_mag) z + b_mag) where z + b_gate > 0 | W_d acts + b_d |
| JumpReluAutoEncoder | x W_enc + b_enc | z where z > threshold | acts W_dec + b_dec |
| AutoEncoderTopK | W_e (x − b_dec) + b_e | the k largest z | W_d acts + b_dec |
| BatchTopKSAE | W_e (x − b_dec) + b_e | z where z > one threshold | W_d acts + b_dec |
| MatryoshkaBatchTopKSAE | (x − b_dec) W_enc + b_enc | z where z > one threshold | acts W_dec + b_dec |

Their loader scales the decoder rows of an AutoEncoder to length 1, as this one does. A trained file takes raw activations; a backup of an
unfinished training takes them divided by its norm_factor, which is folded in here. d width · f features
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from sae.dictionaries.formats.modules import ends_of_module
from sae.dictionaries.formats.tensors import AGAIN, WHAT, Device, checked, name_of, read_weights, row_norms, unit_rows
from sae.dictionaries.gates import Gate, Threshold, TopK, gated
from sae.dictionaries.parts import Parts
from sae.disk.foreign import read_torch
from sae.disk.reading import Number, read_json, require
from sae.errors import InputError

CONFIG, RESULTS = "config.json", "eval_results.json"
FILES = f"ae.pt + {CONFIG}"
BACKUP = {"step", "ae", "optimizer", "config", "norm_factor"}

LINEAR = {"encoder.weight": "f d", "encoder.bias": "f", "decoder.weight": "d f"}
MATRICES = {"W_enc": "d f", "b_enc": "f", "W_dec": "f d", "b_dec": "d"}
GATED = {"decoder_bias": "d", "encoder.weight": "f d", "decoder.weight": "d f", **dict.fromkeys(("r_mag", "gate_bias", "mag_bias"), "f")}


class Class(NamedTuple):
    shapes: dict[str, str]
    trainers: tuple[str, ...]
    """trainers of this class, with the names of all versions"""
    buffers: frozenset[str] = frozenset()
    """in addition to the weights"""


CLASSES = {
    "AutoEncoder": Class({"bias": "d", **LINEAR}, ("StandardTrainer", "StandardTrainerAprilUpdate", "PAnnealTrainer")),
    "AutoEncoderNew": Class({**LINEAR, "decoder.bias": "d"}, ("StandardTrainerNew", "PAnnealTrainerNew")),
    "GatedAutoEncoder": Class(GATED, ("GatedSAETrainer", "GatedAnnealTrainer", "GatedTrainerNew")),
    "JumpReluAutoEncoder": Class({**MATRICES, "threshold": "f"}, ("JumpReluTrainer", "TrainerJumpRelu")),
    "AutoEncoderTopK": Class({**LINEAR, "b_dec": "d"}, ("TopKTrainer", "TrainerTopK"), frozenset({"k", "threshold"})),
    "BatchTopKSAE": Class({**LINEAR, "b_dec": "d"}, ("BatchTopKTrainer", "TrainerBatchTopK"), frozenset({"k", "threshold"})),
    "MatryoshkaBatchTopKSAE": Class(MATRICES, ("MatryoshkaBatchTopKTrainer",), frozenset({"k", "threshold", "group_sizes"})),
}
CROSSCODERS = {"CrossCoder": "CrossCoderTrainer", "BatchTopKCrossCoder": "BatchTopKCrossCoderTrainer"}
"""those of crosscoder_learning.py and what trains them"""
TRAINED = {trainer: name for name, kind in CLASSES.items() for trainer in kind.trainers} | {one: name for name, one in CROSSCODERS.items()}
NORMALISER = ("activation_mean", "activation_std", "activation_global_scale", "target_rms")
"""buffers of crosscoder_learning; NaN where nothing is normalised"""

MODULES = {"resid_post": "", "resid_out": "", "mlp_out": ".mlp", "attn_out": ".attn", "attention_out": ".attn"}
SUBMODULE = re.compile(rf"(?<![a-z_])({'|'.join(MODULES)})_?layer_?([0-9]+)(?![0-9])")


class Settings(TypedDict):
    dict_class: NotRequired[str]
    trainer_class: NotRequired[str]
    k: NotRequired[int]
    layer: NotRequired[int | str | None]
    lm_name: NotRequired[str | None]
    submodule_name: NotRequired[str | None]


class Buffer(TypedDict):
    ctx_len: NotRequired[int]
    io: NotRequired[str]
    """which end of the module is read, or for a transcoder both"""


class Config(TypedDict):
    trainer: NotRequired[Settings]
    buffer: NotRequired[Buffer]


class Results(TypedDict):
    l0: NotRequired[Number]
    frac_variance_explained: NotRequired[Number]
    frac_recovered: NotRequired[Number]
    """of the loss, against zero ablation"""


class Files(NamedTuple):
    weights: Path
    settings: Mapping[str, Any]
    """of the trainer; in a folder from the hub, the whole config.json"""
    buffer: Mapping[str, Any]


def find(path: Path) -> Files | None:
    """The weights in a folder, or the file itself, and the content of its config.json; None if nothing shows that it is of this family."""
    names = ("ae.pt", "model_final.pt", "model.safetensors")
    alone = path.is_file() and path.suffix in (".pt", ".safetensors")
    weights = path if alone else next((path / name for name in names if (path / name).is_file()), None)
    if weights is None:
        return None
    folder = weights.parent.parent if weights.parent.name == "checkpoints" else weights.parent
    what = "a dictionary's config.json"
    config = read_json(folder / CONFIG, what) if (folder / CONFIG).is_file() else None
    if not isinstance(config, dict) or not ("trainer" in config or {"activation_dim", "dict_size"} <= set(config)):
        return Files(weights, {}, {}) if weights.name == "ae.pt" else None
    require(config, Config, f"{what} at {folder / CONFIG}")
    settings = config.get("trainer", config)
    require(settings, Settings, f"{what} at {folder / CONFIG}")
    return Files(weights, settings, config.get("buffer", {}))


def class_of(files: Files) -> str:
    """By the settings, else by the tensors; "" if neither shows it. Raises `InputError` if the settings contradict each other."""
    # Matryoshka was misspelt until January 2025
    named, trainer = (files.settings.get(key, "").replace("Matroyshka", "Matryoshka") for key in ("dict_class", "trainer_class"))
    trained = TRAINED.get(trainer, "")
    if named and trained and named != trained:
        raise InputError(
            f"the dictionary in {files.weights.parent} has dict_class {named!r} and trainer_class {trainer!r}, which trains {trained!r}; "
            "leave the right one"
        )
    if named or trained:
        return named or trained
    state = read_state(files.weights)[0]
    if "encoder.weight" in state and state["encoder.weight"].dim() == 3:
        return "BatchTopKCrossCoder" if "threshold" in state else "CrossCoder"
    fitting = [name for name, kind in CLASSES.items() if set(state) - set(NORMALISER) == set(kind.shapes) | kind.buffers]
    return fitting[0] if len(fitting) == 1 else ""


def read_state(weights: Path) -> tuple[dict[str, Tensor], float | None]:
    """The tensors; of a backup also its norm_factor."""
    if weights.suffix == ".safetensors":
        return read_weights(weights), None
    value: Any = read_torch(weights, WHAT)
    factor = None
    if isinstance(value, Mapping) and "ae" in value:
        factor = value.get("norm_factor")
        if set(value) != BACKUP or type(factor) is not float or not 0 < factor < float("inf"):
            raise InputError(f"expected {', '.join(sorted(BACKUP))} in the backup {weights}, found {', '.join(map(str, value))}; {AGAIN}")
        value = value["ae"]
    if not isinstance(value, Mapping) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise InputError(f"expected the tensors of one dictionary in {weights}, found other things; {AGAIN}")
    return {str(name).replace("_orig_mod.", ""): tensor for name, tensor in value.items()}, factor  # which torch.compile puts before


def recognises(path: Path) -> bool:
    files = find(path)
    return files is not None and class_of(files) not in CROSSCODERS


def load(path: Path, device: Device = "cpu") -> Parts:
    files = find(path)
    name = "" if files is None else class_of(files)
    if files is None or name not in CLASSES:
        raise InputError(f"{path} holds a dictionary of class {name or 'unknown'}, expected one of {', '.join(CLASSES)}")
    kind, (state, factor) = CLASSES[name], read_state(files.weights)
    buffers = {key: state.pop(key) for key in kind.buffers if key in state}
    normaliser = {key: state.pop(key) for key in NORMALISER if key in state} if name == "BatchTopKSAE" else {}
    w = {key: tensor.to(device) for key, tensor in checked(files.weights, state, kind.shapes).items()}
    if factor is not None:
        print(f"{files.weights} is the backup of a training that was not finished", file=sys.stderr)
        w = {key: tensor * factor if tensor.dim() == 1 and key != "r_mag" else tensor for key, tensor in w.items()}
    parts = fold(name, w, facts_of(files))
    if kind.buffers:
        parts = parts._replace(gate=gate_of(files, name, buffers, parts.b_enc_f, factor or 1.0))
    return normalised(files.weights, parts, normaliser) if normaliser else parts


def fold(name: str, w: dict[str, Tensor], facts: dict[str, Any]) -> Parts:
    W_enc_fd = w["W_enc"].T.contiguous() if "W_enc" in w else w["encoder.weight"]
    W_dec_fd = w["W_dec"] if "W_dec" in w else w["decoder.weight"].T.contiguous()
    b_enc_f = next(w[key] for key in ("b_enc", "encoder.bias", "mag_bias") if key in w)
    b_dec_d = next(w[key] for key in ("bias", "decoder_bias", "b_dec", "decoder.bias") if key in w)
    gate = Threshold(w.get("threshold"))
    if name == "GatedAutoEncoder":
        W_enc_fd, gate = gated(W_enc_fd, w["r_mag"], w["mag_bias"], w["gate_bias"])
    if name == "AutoEncoder" and not torch.allclose(norm_f := row_norms(W_dec_fd), torch.ones_like(norm_f)):
        W_enc_fd, b_enc_f, W_dec_fd = unit_rows(W_enc_fd, b_enc_f, W_dec_fd)
    b_in_d = None if name in ("AutoEncoderNew", "JumpReluAutoEncoder") else b_dec_d
    return Parts(W_enc_fd, b_enc_f, W_dec_fd, b_dec_d, gate, facts, b_in_d)


def gate_of(files: Files, name: str, buffers: dict[str, Tensor], b_enc_f: Tensor, factor: float) -> Gate:
    """Of the three classes that keep a number of features: by itself, or by the threshold that training found for it."""
    said = sorted({int(k) for k in (buffers.get("k"), files.settings.get("k")) if k is not None})
    sizes, theta = buffers.get("group_sizes"), buffers.get("threshold")
    if len(said) != 1 or not 1 <= said[0] <= len(b_enc_f):
        found = " and ".join(map(str, said)) or "none"
        raise InputError(f"expected one k from 1 to {len(b_enc_f)} in {files.weights} and its {CONFIG}, found {found}")
    k = said[0]
    if sizes is not None and (sizes.dim() != 1 or int(sizes.sum()) != len(b_enc_f)):
        raise InputError(f"expected group_sizes in {files.weights} that add up to {len(b_enc_f)} features, found {sizes.tolist()}; {AGAIN}")
    if theta is not None and (theta.dim() != 0 or not bool(theta.isfinite())):
        raise InputError(f"expected one number as threshold in {files.weights}, found {theta.tolist()}; {AGAIN}")
    if name == "AutoEncoderTopK":
        return TopK(k)
    if theta is None or theta < 0:
        print(f"{files.weights} has no threshold yet, so each token keeps its {k} largest activations", file=sys.stderr)
        return TopK(k)
    return Threshold(torch.full_like(b_enc_f, float(theta) * factor))


def facts_of(files: Files) -> dict[str, Any]:
    """Its source and, where the file names them, its sites. Raises `InputError` for a transcoder between other than sites."""
    settings, buffer = files.settings, files.buffer
    model, submodule, layer = settings.get("lm_name") or None, settings.get("submodule_name"), settings.get("layer")
    match = SUBMODULE.search(submodule or name_of(files.weights))
    stated = ("dict_class", "trainer_class", "submodule_name", "layer")
    facts = {key: settings[key] for key in stated if settings.get(key) not in (None, "")}
    facts |= {} if model is None else {"model_name": model}
    facts |= {"context_size": buffer["ctx_len"]} if "ctx_len" in buffer else {}
    facts |= promised(files.weights.with_name(RESULTS))
    if match and layer not in (None, "") and str(layer) != match[2]:
        raise InputError(f"the dictionary in {files.weights.parent} says layer {layer} and {match[0]}, which differ; leave the right one")
    into, out = ends_of_module(f"layers.{int(match[2])}{MODULES[match[1]]}", model) if match else (None, None)
    end = buffer.get("io", "out")
    if end in ("in", "out"):
        site = into if end == "in" else out
        return facts | ({} if site is None else {"site": site})
    if end not in ("in_and_out", "in_to_out") or into is None or out is None:
        raise InputError(
            f"the dictionary in {files.weights.parent} was trained with io {end!r} of {submodule or 'an unnamed module'}; expected out or "
            "in, or for a transcoder in_and_out of a module whose input and output are sites known here"
        )
    return facts | {"site": into, "site_out": out}


def promised(path: Path) -> dict[str, Any]:
    """The authors' measurements."""
    if not path.is_file():
        return {}
    found: Results = read_json(path, "a dictionary's eval_results.json", Results)
    explained = {"fvu": 1 - found["frac_variance_explained"]} if "frac_variance_explained" in found else {}
    recovered = {"loss_recovered": found["frac_recovered"]} if "frac_recovered" in found else {}
    return {"promised": ({"l0": found["l0"]} if "l0" in found else {}) | explained | recovered}


def normalised(where: Path, parts: Parts, buffers: Mapping[str, Tensor], places: int | None = None, times: int = 1) -> Parts:
    """The same function for raw activations, of a dictionary for x' = (x − mean) · scale, which gives y = y' / (scale + 1e-8) + mean.

    `places`: how many a crosscoder reads, each with its own scale. `times`: how often x is normalised, 1 or 2. Source: NormalizableMixin of
    crosscoder_learning; a mean or deviation that is not a number switches it off.
    """
    if missing := [name for name in NORMALISER if name not in buffers]:
        raise InputError(f"expected all of {', '.join(NORMALISER)} in {where}, which lacks {', '.join(missing)}; {AGAIN}")
    if any(bool(buffers[name].isnan().any()) for name in NORMALISER[:2]):
        return parts
    p = places or 1
    shapes = {"activation_mean": "d" if places is None else "p d", "activation_global_scale": "" if places is None else "p"}
    found = checked(where, {name: buffers[name] for name in shapes}, shapes, p=p, d=parts.W_enc_fd.shape[1] // p)
    mean_d, scale_p = (found[name].to(parts.b_enc_f).flatten() for name in shapes)
    scale_d = scale_p.repeat_interleave(len(mean_d) // p)
    shift_d = mean_d if times == 1 else mean_d + mean_d / scale_d
    into_d, out_d = scale_d**times, scale_d + 1e-8
    return parts._replace(
        W_enc_fd=parts.W_enc_fd * into_d,
        b_in_d=shift_d if parts.b_in_d is None else shift_d + parts.b_in_d / into_d,
        W_dec_fo=parts.W_dec_fo / out_d,
        b_dec_o=parts.b_dec_o / out_d + mean_d,
    )
