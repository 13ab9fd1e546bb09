"""A direction that moves one dictionary feature and little else: SAE-TS (Chalnev, Siu and Conmy 2024, arXiv 2411.02193).

k directions that were measured · d width of the site · f features
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.disk.reading import parse_json, read_tensors
from sae.disk.writing import write_tensors
from sae.errors import InputError
from sae.model.sites import parse_site
from steering.vector import SteeringVector

FORMAT = "steering-effects-1"
RIDGES = np.logspace(-6, 3, 19)  # in units of the mean variance of the directions' coordinates times their number


class Effects(NamedTuple):
    """y = x M + b: the change of each feature's mean activation in the text that the model writes with x added."""

    M_df: Tensor
    b_f: Tensor
    """average effect of steering at that budget over directions"""
    site: str
    provenance: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """One safetensors file; site and provenance in its metadata."""
        metadata = {"format": FORMAT, "site": self.site, "provenance": json.dumps(self.provenance)}
        write_tensors(Path(path), {"M": self.M_df, "b": self.b_f}, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "Effects":
        """Raises `InputError` unless `path` is a complete file that `save` wrote."""
        then = "fit them with --fit"
        tensors, metadata = read_tensors(Path(path), "effects", {"M": ("F32", "d f"), "b": ("F32", "f")}, then=then)
        if metadata.get("format") != FORMAT or not {"site", "provenance"} <= metadata.keys():
            raise InputError(f"expected effects ({FORMAT}) in {path}, got another file; {then}")
        provenance = parse_json(metadata["provenance"], f"the provenance of {path}", dict[str, Any])
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise InputError(f"expected effects of finite numbers in {path}, got some that are not; {then}")
        return cls(tensors["M"], tensors["b"], str(parse_site(metadata["site"])), provenance)


def fit_effects(x_kd: Tensor, y_kf: Tensor, site: str, provenance: dict[str, Any] | None = None) -> Effects:
    """Ridge regression of measured effects `y_kf` on what was added, `x_kd` (coefficient times direction); b is not penalised.

    The paper runs Adam on the mean squared error; this is the closed form, whose minimum at ridge 0 is the same one. The penalty, one
    for all features, is that of `RIDGES` with the least leave-one-out error; it and the share of the variance that is predicted of
    directions left out are in the provenance. Raises `InputError` for numbers that are not finite and for fewer than 3 directions.
    """
    from sklearn.linear_model import RidgeCV

    if x_kd.ndim != 2 or y_kf.ndim != 2 or len(x_kd) != len(y_kf) or len(x_kd) < 3:
        raise InputError(f"expected one row of effects for each of at least 3 directions, got {tuple(x_kd.shape)} and {tuple(y_kf.shape)}")
    if not (torch.isfinite(x_kd).all() and torch.isfinite(y_kf).all()):  # host sync
        raise InputError("expected directions and effects of finite numbers, got some that are infinite or not a number")
    x, y = x_kd.double().cpu().numpy(), y_kf.double().cpu().numpy()
    unit = len(x) * x.var(axis=0).mean()
    variance = y.var(axis=0).mean()
    if not (unit > 0 and variance > 0):
        raise InputError("expected directions that differ and effects that differ, got equal ones")
    fitted = RidgeCV(alphas=RIDGES * unit).fit(x, y)
    known = {
        "method": "fit_effects",
        "directions": len(x),
        "ridge": float(fitted.alpha_ / unit),
        "left_out_explained": float(1 + fitted.best_score_ / variance),
    }
    M_df, b_f = torch.from_numpy(fitted.coef_.T.copy()).float(), torch.from_numpy(fitted.intercept_).float()
    return Effects(M_df, b_f, site, known | (provenance or {}))


def targeted_direction(effects: Effects, feature: int, bias_weight: float = 1.0) -> SteeringVector:
    """s = M_j/|M_j| − λ (M b)/|M b|, brought to norm 1: where feature j rises fastest, away from what rises under any steering.

    λ is `bias_weight`, 1 in the paper. Raises `InputError` for a feature that does not exist or that no direction moved.
    """
    f = effects.M_df.shape[1]
    if not 0 <= feature < f:
        raise InputError(f"feature {feature} does not exist: the effects are of features 0 to {f - 1}")
    own_d, bias_d = effects.M_df[:, feature].double(), effects.M_df.double() @ effects.b_f.double()
    if not own_d.any():
        raise InputError(f"feature {feature} was moved by none of the measured directions, so no direction can be aimed at it")
    towards_d = own_d / own_d.norm()
    if bias_weight and bias_d.any():
        towards_d = towards_d - bias_weight * bias_d / bias_d.norm()
    if not towards_d.norm() > 0:  # host sync
        raise InputError(
            f"feature {feature} rises exactly as under any steering, so no direction can be aimed at it; lower the bias's weight"
        )
    provenance = {"method": "targeted", "feature": feature, "bias_weight": bias_weight, "effects": effects.provenance}
    return SteeringVector.at(effects.site, (towards_d / towards_d.norm()).float(), provenance)
