"""SAELens' folder, `cfg.json` + `sae_weights.safetensors`, read strictly and written; cfg.py understands cfg.json.

d model width · f features · o width of what is written
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.dictionaries.formats.saelens.cfg import CENTRED, CFG, DECIDED, HEADS, Settings, read_settings
from sae.dictionaries.formats.saelens.estimates import Estimates, fold_factor, fold_whitening, read_estimates
from sae.dictionaries.formats.tensors import read_weights, require_finite, unit_rows
from sae.dictionaries.formats.transformer_lens import hook_of_site
from sae.dictionaries.frames import Frame
from sae.dictionaries.gates import AbsTopK, BareTopK, Gate, GroupMax, Threshold, TopK, gated
from sae.dictionaries.parts import Layers, Parts, Port
from sae.disk.mapped import is_mapped, require_room
from sae.disk.streamed import Streamed, in_order, write_streamed
from sae.disk.writing import write_json
from sae.errors import InputError
from sae.mesh import Axis

WEIGHTS = "sae_weights.safetensors"
TRAIN_AGAIN = "copy or train the dictionary again"
BLOCK_BYTES = 1 << 26
"""size of the part of W_enc that is transposed at a time when it is written"""
KEEPS_K: dict[Callable[[int], Gate], str] = {TopK: "topk", AbsTopK: "abstopk", BareTopK: "bare_topk", GroupMax: "groupmax"}
"""names of the gates with a k"""


def recognises(path: Path) -> bool:
    """Also a folder that lacks cfg.json alone; those that OpenMOSS' tools write have weights of the same name."""
    if not (path.is_dir() and (path / WEIGHTS).is_file()):
        return False
    return (path / CFG).is_file() or not any((path / name).is_file() for name in ("config.json", "hyperparams.json"))


def load(folder: Path, device: str | torch.device = "cpu") -> Parts:
    """Raises `InputError` naming the key or tensor for anything but a complete dictionary of a known kind, at one of our sites."""
    settings = read_settings(folder)
    w = read_weights(folder / WEIGHTS, device, TRAIN_AGAIN)
    if settings.architecture == "jumprelu" and "log_threshold" in w:  # in training, before version 6.48
        w["threshold"] = w.pop("log_threshold").exp()
    scale_f = w.pop("scaling_factor", None)  # SAELens before version 6 always saved one, of ones where there was no fine-tuning
    require_whole(folder, settings, w if scale_f is None else w | {"scaling_factor": scale_f})
    if settings.finetuned is not (scale_f is not None and not bool((scale_f == 1).all())):
        raise InputError(
            f"the dictionary in {folder} has finetuning_scaling_factor {settings.finetuned}, but its weights hold "
            f"{'no' if scale_f is None else 'a'} scaling_factor{'' if scale_f is None else ' that says otherwise'}; leave the right one"
        )
    estimates = read_estimates(folder, settings)
    to = getattr(torch, settings.dtype) if settings.dtype else None
    # of weights that stay on the disk: a wider dtype changes no value, and they are computed with in float32 anyhow
    keeps = is_mapped(w["W_dec"]) and (to is None or torch.promote_types(w["W_dec"].dtype, to) == to)
    rewrites = settings.architecture == "gated" or settings.rescales or settings.finetuned or estimates != Estimates()
    if is_mapped(w["W_dec"]) and (rewrites or not keeps):
        require_room(2 * (w["W_enc"].nbytes + w["W_dec"].nbytes), f"the dictionary in {folder}, which is rewritten when it is opened")
    if to is not None:
        w = {name: tensor if keeps and tensor.ndim > 1 else tensor.to(to) for name, tensor in w.items()}
    if estimates.factor is not None:
        fold_factor(w, estimates.factor, settings.rescales)
    gate = gate_of(settings, w)
    if estimates.whitening is not None:
        fold_whitening(w, estimates.whitening, settings.subtracts_b_dec)
    if scale_f is not None and settings.finetuned:
        w["W_dec"] = w["W_dec"] * scale_f[:, None]
    b_in_d = w["b_dec"] if settings.subtracts_b_dec else None
    W_enc_fd = w["W_enc"].T if is_mapped(w["W_enc"]) else w["W_enc"].T.contiguous()
    return Parts(W_enc_fd, w["b_enc"], w["W_dec"], w["b_dec"], gate, settings.metadata, b_in_d, w.get("W_skip"), settings.frame)


def load_set(path: Path, device: str | torch.device = "cpu") -> Layers:
    """Folders layer_0, layer_1, … with a dictionary in each, which `sae import-dictionary` writes of a set."""
    folders = {int(folder.name.partition("_")[2]): folder for folder in path.glob("layer_*") if folder.name[6:].isdecimal()}
    return {layer: partial(load, folders[layer], device) for layer in sorted(folders)}


def gate_of(settings: Settings, w: dict[str, Tensor]) -> Gate:
    """The gate; weights are changed where a kind is another one in disguise, which is exact.

    A TopK that rescales by decoder norms is a TopK whose encoder has them and whose decoder has none.
    """
    if settings.architecture == "gated":
        W_enc_fd, gate = gated(w["W_enc"].T, w.pop("r_mag"), w["b_mag"], w.pop("b_gate"))
        w["W_enc"], w["b_enc"] = W_enc_fd.T, w.pop("b_mag")
        return gate
    if settings.rescales:
        W_enc_fd, w["b_enc"], w["W_dec"] = unit_rows(w["W_enc"].T, w["b_enc"], w["W_dec"])
        w["W_enc"] = W_enc_fd.T
    if "topk_threshold" in w:
        return Threshold(w["topk_threshold"].expand(len(w["b_enc"])).clone())
    if "threshold" in w:
        return Threshold(w["threshold"])
    if settings.k is None:
        return Threshold()
    kinds = {name: gate for gate, name in KEEPS_K.items()}
    return kinds[settings.architecture.removesuffix("_transcoder").removesuffix("_skip")](settings.k)


def require_whole(folder: Path, settings: Settings, weights: dict[str, Tensor]) -> None:
    """Raises `InputError` unless there are just the tensors of the kind, of the sizes in cfg.json, floating point and finite."""
    shapes = settings.shapes()
    missing = [name for name in shapes if name not in weights]
    if missing:
        raise InputError(f"the dictionary in {folder} lacks {', '.join(missing)}; a whole one has {CFG} and {WEIGHTS} as they were saved")
    if "scaling_factor" in weights:
        shapes["scaling_factor"] = shapes["W_dec"][:1]
    unknown = sorted(set(weights) - set(shapes))
    if unknown:
        raise InputError(
            f"{folder / WEIGHTS} holds {', '.join(unknown)} beside {', '.join(shapes)}, unlike architecture {settings.architecture!r}"
        )
    for name, shape in shapes.items():
        tensor = weights[name]
        if tuple(tensor.shape) != shape:
            raise InputError(f"{name} in {folder} has shape {tuple(tensor.shape)} where cfg.json asks for {shape}")
        if not tensor.is_floating_point() or (tensor.dtype != weights["W_dec"].dtype and name != "topk_threshold"):
            raise InputError(f"expected floating-point tensors of one dtype in {folder / WEIGHTS}, got {name} of {tensor.dtype}")
        require_finite(folder, name, tensor, TRAIN_AGAIN)


def save(d: Parts, folder: Path, every: Axis | None = None) -> None:
    """Writes the folder that SAELens' `SAE.load_from_disk` opens; each file is written completely or not at all.

    If several processes have equal parts of the features, all of `every` call it, and the first writes the whole dictionary. It then holds
    one other process's part of a matrix at a time.

    An input bias that is not the decoder's bias is folded into the encoder's. What SAELens does not have (some gates, a transcoder that
    keeps k, an autoencoder with a skip matrix) is written in the same way with an architecture that SAELens refuses.
    """
    gate, frame, transcoder, every = d.gate, d.frame, d.is_transcoder, every or Axis()
    o, d_in = len(d.b_dec_o), d.W_enc_fd.shape[1]
    subtracts = d.b_in_d is not None and not transcoder and torch.equal(d.b_in_d, d.b_dec_o)
    b_enc_f = d.b_enc_f if d.b_in_d is None or subtracts else d.b_enc_f - d.W_enc_fd @ d.b_in_d
    weights = {"W_enc": d.W_enc_fd.T, "b_enc": b_enc_f, "W_dec": d.W_dec_fo, "b_dec": d.b_dec_o}
    extra: dict[str, Any] = {}
    if type(gate) in KEEPS_K:
        name, extra["k"], extra["rescale_acts_by_decoder_norm"] = KEEPS_K[type(gate)], gate.k, False
    elif isinstance(gate, Threshold):
        name = "standard" if gate.theta_f is None else "jumprelu"
        weights |= {} if gate.theta_f is None else {"threshold": gate.theta_f}
    else:
        raise InputError(f"expected a gate that SAELens has too, got {type(gate).__name__}, which it cannot compute")
    if d.W_skip_od is not None:
        name += "_skip"
        weights["W_skip"] = torch.nn.functional.pad(d.W_skip_od, (0, 0, 0, o - len(d.W_skip_od)))
    if transcoder:
        name, extra["d_out"] = f"{name}_transcoder".removeprefix("standard_"), o
    d_sae = len(d.b_enc_f) * every.size
    streamed = {name: streamed_tensor(name, weights[name].detach(), d_sae, every) for name in in_order(weights)}
    write_streamed(folder / WEIGHTS, streamed, {}, every.leads)
    if not every.leads:
        return
    hooks: dict[str, Any] = {"hook_name": hook_of(d.reads)}
    hooks |= {"hook_name_out": hook_of(d.writes)} if transcoder else {}
    write_json(
        folder / CFG,
        {
            "architecture": name,
            "d_in": d_in,
            "d_sae": d_sae,
            **extra,
            "dtype": str(d.W_dec_fo.dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": subtracts,
            "normalize_activations": "none" if frame is None or frame.kind == "centred" else frame.kind,
            "reshape_activations": "hook_z" if (d.reads[0].site or "").partition(".")[0] in HEADS else "none",
            # without the version SAELens takes the folder for an older format and drops the metadata
            "metadata": {"sae_lens_version": "6.0.0", **hooks, **facts(d), **loaded_with(frame, d.metadata)},
        },
    )


def streamed_tensor(name: str, tensor: Tensor, d_sae: int, every: Axis) -> Streamed:
    """A tensor of the file, of which every process has the part of its own features."""
    if name in ("b_dec", "W_skip"):
        return Streamed(tensor.dtype, tuple(tensor.shape), [tensor.cpu().contiguous()])  # host sync
    if name == "W_enc":
        return Streamed(tensor.dtype, (len(tensor), d_sae), columns(tensor, d_sae, every))
    return Streamed(tensor.dtype, (d_sae, *tensor.shape[1:]), every.to_first(tensor))


def columns(W_enc_df: Tensor, d_sae: int, every: Axis) -> Iterator[Tensor]:
    """Yields, in the first process, some rows [n, d_sae] after others of the whole matrix."""
    for part_nf in W_enc_df.split(max(1, BLOCK_BYTES // (W_enc_df.element_size() * d_sae))):
        parts = list(every.to_first(part_nf))
        if every.leads:
            yield parts[0] if every.alone else torch.cat(parts, dim=1)


def hook_of(ports: tuple[Port, ...]) -> str | None:
    """TransformerLens' name of a site; None of several, which stand under our own names alone."""
    return hook_of_site(ports[0].site) if len(ports) == 1 else None


def facts(d: Parts) -> dict[str, Any]:
    """The metadata; facts of another format whose names are settings of SAELens are kept separately."""
    sites = {"site_out"} if not d.is_transcoder else set()
    others = {key: value for key, value in d.metadata.items() if key in DECIDED - {"hook_name_out"}}
    rest = {key: value for key, value in d.metadata.items() if key not in others.keys() | sites}
    return rest | ({"settings_of_source": others} if others else {})


def loaded_with(frame: Frame | None, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """How TransformerLens must load the model for a dictionary that subtracts the mean over the width from its input."""
    given = metadata.get("model_from_pretrained_kwargs") or {}
    if frame is None or frame.kind != "centred":
        return {}
    return {"model_from_pretrained_kwargs": {**given, CENTRED: True}}
