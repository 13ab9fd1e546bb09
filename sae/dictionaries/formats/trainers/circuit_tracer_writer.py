"""Writes per-layer transcoders as circuit-tracer reads them: `config.yaml` + `layer_0.safetensors`, `layer_1.safetensors`, …

W_enc and W_dec are feature-major there; y = gate(x W_encᵀ + b_enc) W_dec + b_dec (+ x W_skipᵀ). d model width · f features
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from sae.dictionaries.formats.trainers.circuit_tracer import CONFIG, THRESHOLD
from sae.dictionaries.formats.transformer_lens import hook_of_site
from sae.dictionaries.gates import BareTopK, Threshold, TopK
from sae.dictionaries.parts import Parts
from sae.disk.writing import atomic, write_tensors
from sae.errors import InputError
from sae.model.sites import parse_site

READS = ("resid_mid", "mlp_in_nogain", "mlp_in")
"""kinds of sites that feed a block's MLP, which circuit-tracer replaces"""


def save_set(transcoders: Iterable[Parts], folder: Path, model_name: str | None = None) -> int:
    """Writes the transcoders, one for each of the layers 0 to n − 1 in any order, into the empty `folder`; returns n.

    One is in memory at a time if `transcoders` yields one at a time. `model_name`: TransformerLens' name of the model; by default the
    name in the transcoders. Raises `InputError` for what circuit-tracer cannot compute, and where a set is not uniform or not whole.
    """
    shared: dict[str, Any] = {}
    layers: set[int] = set()
    for parts in transcoders:
        layer, facts = describe(parts, model_name)
        for key, value in facts.items():
            if shared.setdefault(key, value) != value:
                raise InputError(f"expected one {key} in all layers of a set, got {shared[key]!r} and, in layer {layer}, {value!r}")
        if layer in layers:
            raise InputError(f"expected one transcoder for each layer, got two for layer {layer}; leave one of them out")
        layers.add(layer)
        write_tensors(folder / f"layer_{layer}.safetensors", tensors_of(parts))
    missing = sorted(set(range(max(layers, default=0) + 1)) - layers)
    if missing:
        raise InputError(f"expected a transcoder for each layer, starting at 0, but {', '.join(map(str, missing))} lack one; give them too")
    k = shared["k"]
    config = {"model_kind": "transcoder_set", **{key: shared[key] for key in ("model_name", "feature_input_hook", "feature_output_hook")}}
    config |= {} if k is None else {"activation": "topk", "k": k}
    with atomic(folder / CONFIG) as temporary:
        text = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in config.items())
        temporary.write_text(text, encoding="utf-8")
    if k is not None:
        print(f"circuit-tracer heeds k in {CONFIG} only in a repository of the hub: a local folder it takes for ReLU", file=sys.stderr)
    if shared["gate"] == "TopK":
        print("circuit-tracer's TopK has no ReLU: where fewer than k pre-activations are above 0, it keeps others", file=sys.stderr)
    return len(layers)


def describe(parts: Parts, model_name: str | None) -> tuple[int, dict[str, Any]]:
    """The layer, and what all layers must share."""
    if parts.site is None or not parts.is_transcoder:
        raise InputError(f"expected a transcoder that names where it reads and writes, got a dictionary at {parts.site or 'no known site'}")
    (kind, layer), (kind_out, layer_out) = parse_site(parts.site), parse_site(str(parts.site_out))
    d_in, d_out = parts.W_enc_fd.shape[1], parts.W_dec_fo.shape[1]
    if kind not in READS or kind_out != "mlp_out" or layer != layer_out or d_in != d_out:
        raise InputError(
            f"expected a transcoder of one width around a block's MLP, which circuit-tracer replaces, got one from {parts.site} ({d_in}) "
            f"to {parts.site_out} ({d_out})"
        )
    if parts.frame is not None:
        raise InputError(f"expected a transcoder without a frame, which circuit-tracer has not, got {parts.frame.kind} at {parts.site}")
    gate = parts.gate
    if type(gate) not in (Threshold, TopK, BareTopK):
        raise InputError(f"expected ReLU, JumpReLU or TopK, which circuit-tracer has, got {type(gate).__name__} at {parts.site}")
    name = model_name or parts.metadata.get("model_name")
    if name is None:
        raise InputError(f"expected the name of the model that the transcoder at {parts.site} is for, found none; give --model-name")
    k = gate.k if isinstance(gate, TopK) else None
    sites = {"feature_input_hook": parts.site, "feature_output_hook": parts.site_out}
    hooks = {key: str(hook_of_site(site)).removeprefix(f"blocks.{layer}.") for key, site in sites.items()}
    kinds = {"gate": type(gate).__name__, "k": k, "skip connection": parts.W_skip_od is not None}
    return layer, {"model_name": name, "width": len(parts.b_enc_f), **hooks, **kinds}


def tensors_of(parts: Parts) -> dict[str, Tensor]:
    gate = parts.gate
    b_enc_f = parts.b_enc_f if parts.b_in_d is None else parts.b_enc_f - parts.W_enc_fd @ parts.b_in_d
    tensors: dict[str, Tensor | None] = {"W_enc": parts.W_enc_fd, "W_dec": parts.W_dec_fo, "b_enc": b_enc_f, "b_dec": parts.b_dec_o}
    tensors |= {"W_skip": parts.W_skip_od, THRESHOLD: gate.theta_f if isinstance(gate, Threshold) else None}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}  # host sync
