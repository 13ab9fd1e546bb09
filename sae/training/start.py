"""Where a run starts: at random rows, or at a dictionary that is already trained; how far it went from there.

b rows (tokens) · d model width · f features
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.activations.source import Source
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.gates import Threshold
from sae.errors import InputError
from sae.training.config import RunConfig

ROWS = 512
"""encoded at a time where a dictionary is measured"""


def starting_point(source: Source, site: str, scale: float, config: RunConfig) -> Dictionary:
    """The dictionary that all of a sweep begin as, in training units (activations times `scale`).

    Random decoder rows, the encoder their transpose, and biases of zero, of which the decoder's may start at the mean activation; or
    `--init`. Raises `InputError` as `opened` does.
    """
    if config.init is not None:
        return opened(config.init, source, site, config).folded(1 / scale)
    dictionary = Dictionary.initial(source.widths[site], config.d_sae, seed=config.seed, decoder_norm=config.decoder_norm)
    if config.b_dec == "mean":
        with torch.no_grad():
            dictionary.b_dec_o.copy_(source.first_rows(site).double().mean(0) * scale)
    return dictionary


@torch.no_grad()
def opened(init: Path, source: Source, site: str, config: RunConfig) -> Dictionary:
    """The dictionary of `--init` as the objective has it: relu((x − b_dec) W_encᵀ + b_enc), the same function to rounding.

    Raises `InputError` for one of another model, site or width, with another number of features than `--d-sae`, and for kinds whose
    function the objective does not train.
    """
    found = Dictionary.load(init)
    model = source.manifest["model"]
    found.require_model(model["name"], model["fingerprint"], named=True)
    found.require_site(site)
    relu = isinstance(found.gate, Threshold) and (found.gate.theta_f is None or not found.gate.theta_f.any())
    if not relu or found.frame is not None or found.W_skip_od is not None or found.is_transcoder:
        raise InputError(
            f"expected a ReLU autoencoder without a frame or a skip as --init, got a dictionary in {init} that has another function; "
            "train a new one, or give another"
        )
    if found.d_in != source.widths[site]:
        raise InputError(f"expected --init of the width of {site}, {source.widths[site]}, got {found.d_in} in {init}; give another")
    if found.d_sae != config.d_sae:
        raise InputError(f"expected --d-sae {found.d_sae}, the number of features in {init}, got {config.d_sae}; give that number")
    W_enc_fd, b_enc_f, W_dec_fd, b_dec_d = (weight.float() for weight in (found.W_enc_fd, found.b_enc_f, found.W_dec_fo, found.b_dec_o))
    shift_d = b_dec_d if found.b_in_d is None else b_dec_d - found.b_in_d.float()
    return Dictionary.autoencoder(W_enc_fd, b_enc_f + W_enc_fd @ shift_d, W_dec_fd, b_dec_d)


def change_since(init: Dictionary, trained: Dictionary, source: Source, site: str) -> dict[str, Any]:
    """What training made of `--init`, as it goes into training.json: FVU and L0 of both, and each feature's cosine to what it was.

    Measured on a sample of the training rows, so that held-out rows are for `sae evaluate`.
    """
    x_bd = source.first_rows(site).float()
    rows = [torch.nn.functional.normalize(one.W_dec_fo.cpu(), dim=-1) for one in (init, trained)]
    cosine_f = (rows[0] * rows[1]).sum(-1)
    return {
        "rows": len(x_bd),
        "before": quality(init, x_bd),
        "after": quality(trained, x_bd),
        "decoder_cosines": [round(cosine, 4) for cosine in cosine_f.tolist()],
    }


@torch.no_grad()
def quality(dictionary: Dictionary, x_bd: Tensor) -> dict[str, float]:
    """FVU and L0 on raw activations."""
    error, fired = 0.0, 0
    for part_bd in x_bd.to(dictionary.W_dec_fo.device).split(ROWS):
        acts_bf = dictionary.encode(part_bd)
        error += float((dictionary.decode(acts_bf, part_bd) - part_bd).double().square().sum())
        fired += int((acts_bf != 0).sum())
    power = float((x_bd - x_bd.mean(0)).double().square().sum())
    return {"fvu": error / power, "l0": fired / len(x_bd)}


def said(change: dict[str, Any]) -> str:
    """ "FVU 0.21 (was 0.25), L0 31.0 (was 29.5) on 4,096 training rows; cosine of decoder rows to --init: median 0.98, lowest 0.12" """
    before, after = change["before"], change["after"]
    cosine_f = torch.tensor(change["decoder_cosines"])
    return (
        f"FVU {after['fvu']:.3g} (was {before['fvu']:.3g}), L0 {after['l0']:.1f} (was {before['l0']:.1f}) on {change['rows']:,} training "
        f"rows; cosine of decoder rows to --init: median {cosine_f.median():.2f}, lowest {cosine_f.min():.2f}"
    )
