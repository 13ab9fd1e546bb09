"""SAELens' estimates of the activations, made before training and folded into the weights afterwards: a factor, or a whitening.

A checkpoint made in between has weights for normalised activations, and the numbers in a separate file.

d model width · f features
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from sae.dictionaries.formats.saelens.cfg import CFG, Settings
from sae.dictionaries.formats.saelens.published import factor_of
from sae.disk.reading import Number, read_json, read_tensors
from sae.errors import InputError

SCALER = "activation_scaler.json"
WHITENING = "activation_whitening.safetensors"
STORE = "activations_store_state.safetensors"  # versions 3 to 5; without a factor once that is folded, though cfg.json still says its name


class Scaler(TypedDict):
    scaling_factor: Number | None
    has_whitening: NotRequired[bool]


class Estimates(NamedTuple):
    factor: float | None = None
    whitening: dict[str, Tensor] | None = None
    """mean [d], matrix M and inverse_matrix [d, d]: activations are (x − mean) M"""


def read_estimates(folder: Path, settings: Settings) -> Estimates:
    """Raises `InputError` if cfg.json names a normalisation whose numbers are missing, or if the numbers exist without its name."""
    name = settings.estimated
    scaler: Scaler | None = read_json(folder / SCALER, "SAELens' estimates", Scaler) if (folder / SCALER).exists() else None
    if name is None:
        if scaler is not None and (scaler["scaling_factor"] is not None or scaler.get("has_whitening")):
            raise InputError(f"{folder / SCALER} holds an estimate, but {CFG} names no normalisation that has one; leave the right one")
        return Estimates()
    if name == "covariance_whitening":
        if not (folder / WHITENING).exists():
            raise InputError(
                f"the dictionary in {folder} has normalize_activations {name!r}, but no {WHITENING}; copy that file too, or take "
                "the dictionary that SAELens saved when training ended"
            )
        d = settings.widths["d_in"]
        schema = {"mean": ("F32 F64", "d"), "matrix": ("F32 F64", "d d"), "inverse_matrix": ("F32 F64", "d d")}
        whitening, _ = read_tensors(folder / WHITENING, "SAELens' whitening", schema, d=d)
        if not all(bool(tensor.isfinite().all()) for tensor in whitening.values()):
            raise InputError(f"{folder / WHITENING} holds NaN or infinity; copy or train the dictionary again")
        return Estimates(None, whitening)
    factor = None if scaler is None else scaler["scaling_factor"]
    if scaler is None and (folder / STORE).exists():
        state = read_tensors(folder / STORE, "the state of SAELens' activations store")[0]
        if "estimated_norm_scaling_factor" not in state:
            return Estimates()
        factor = float(state["estimated_norm_scaling_factor"])
    elif scaler is None:
        factor = factor_of(folder)
    if factor is None or not 0 < factor < math.inf:
        raise InputError(
            f"the dictionary in {folder} has normalize_activations {name!r}, but by which factor activations are multiplied is not there; "
            f'write {{"scaling_factor": FACTOR}} into {folder / SCALER} (SAELens\' list of dictionaries calls it norm_scaling_factor)'
        )
    return Estimates(factor)


def fold_factor(w: dict[str, Tensor], factor: float, rescales: bool) -> None:
    """Converts to raw x instead of factor · x, and to the output for raw x. A threshold in units of activation times decoder norm follows
    the norms."""
    w["W_enc"], w["W_dec"], w["b_dec"] = w["W_enc"] * factor, w["W_dec"] / factor, w["b_dec"] / factor
    if "topk_threshold" in w and rescales:
        w["topk_threshold"] = w["topk_threshold"] / factor


def fold_whitening(w: dict[str, Tensor], whitening: dict[str, Tensor], subtracts_b_dec: bool) -> None:
    """Converts to raw x instead of (x − mean) M, and to the output for raw x (arXiv 2511.13981); computed in the whitening's dtype."""
    mean_d, M_dd, inverse_dd = (whitening[name].to(w["W_enc"].device) for name in ("mean", "matrix", "inverse_matrix"))
    dtype = torch.promote_types(w["W_enc"].dtype, M_dd.dtype)
    mean_d, M_dd, inverse_dd = mean_d.to(dtype), M_dd.to(dtype), inverse_dd.to(dtype)
    W_enc_df = M_dd @ w["W_enc"].to(dtype)
    folded = {"W_enc": W_enc_df, "W_dec": w["W_dec"].to(dtype) @ inverse_dd, "b_dec": w["b_dec"].to(dtype) @ inverse_dd + mean_d}
    if not subtracts_b_dec:  # else the new b_dec takes the mean off
        folded["b_enc"] = w["b_enc"].to(dtype) - mean_d @ W_enc_df
    w |= {name: tensor.to(w[name].dtype) for name, tensor in folded.items()}
