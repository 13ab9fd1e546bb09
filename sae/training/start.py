"""The start of a run: random rows or a trained dictionary, and how far training moved it.

b rows (tokens) · d width that is read · o width that is written · f features
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae.activations.source import Source
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.rows import BLOCK_BYTES, ranges, rows_of
from sae.errors import InputError
from sae.kinds import name_of
from sae.mesh import Axis
from sae.training.config import RunConfig
from sae.training.ends import Ends, side_by_side
from sae.training.sweep import acts_and_output

ROWS = 512
"""rows encoded at a time when a dictionary is measured"""


def starting_point(
    source: Source, ends: Ends, scales: dict[str, float], config: RunConfig, features: slice = slice(None)
) -> tuple[Dictionary, dict[str, Tensor]]:
    """The initial dictionary of a sweep, in training units, and initial values of the kind's own parameters if they are not the usual ones.

    Only `features` of it.

    Either `--init`, or random decoder rows with the encoder as their transpose (a transcoder's encoder has its own random rows) and zero
    skip and biases. With `b_dec` "mean" the decoder bias starts at the mean of the outputs, and a transcoder's encoder bias subtracts the
    mean of the inputs. Raises `InputError` as `opened` does.
    """
    if config.init is not None:
        factor_in, factor_out = ends.factors(scales)
        part = part_of(opened(config.init, source, ends, config), features).folded(1 / factor_in, 1 / factor_out)
        own = config.kind.taken_over(part.gate)
        assert own is not None  # `opened` has asked
        return part, own
    norm = config.decoder_norm or (1.0 if config.kind.unit_rows else 0.3)
    dictionary = Dictionary.initial(ends.d_out, config.d_sae, seed=config.seed, decoder_norm=norm, features=features)
    if ends.transcodes:
        reads = Dictionary.initial(ends.d_in, config.d_sae, seed=config.seed + 1, decoder_norm=norm, features=features)
        W_skip_od = torch.zeros(ends.d_out, ends.d_in) if config.skip else None
        rest = (reads.b_enc_f, dictionary.W_dec_fo, dictionary.b_dec_o)
        dictionary = Dictionary(reads.W_enc_fd, *rest, W_skip_od=W_skip_od)
    dictionary.metadata = ends.metadata()
    if (config.b_dec or ("mean" if config.kind.unit_rows else "zero")) == "mean":
        read_d, written_o = (
            side_by_side([source.first_rows(site).double().mean(0) * scales[site] for site in sites]) for sites in (ends.reads, ends.writes)
        )
        with torch.no_grad():
            dictionary.b_dec_o.copy_(written_o)
            if ends.transcodes:  # an autoencoder takes b_dec off what it reads
                dictionary.b_enc_f.copy_(-dictionary.W_enc_fd @ read_d.float())
    return dictionary, {}


@torch.no_grad()
def opened(init: Path, source: Source, ends: Ends, config: RunConfig) -> Dictionary:
    """The dictionary of `--init` in the objective's form, gate((x − b_dec) W_encᵀ + b_enc): the same function up to rounding.

    Raises `InputError` for one of another model, site or width, for a number of features other than `--d-sae`, and for a gate that the kind
    cannot continue with.
    """
    found = Dictionary.load(init)
    for second, model in ends.models(source.manifest).items():
        found.require_model(model["name"], model["fingerprint"], named=True, second=second)
    theirs = tuple(port.site for port in found.reads), tuple(port.site for port in found.writes)
    if None not in theirs[0] and theirs != (ends.named(ends.reads), ends.named(ends.writes)):
        there = [" and ".join(map(str, sites)) for sites in theirs]
        raise InputError(
            f"the dictionary in {init} was made for {' to '.join(dict.fromkeys(there))}, so it says nothing about {ends}; "
            "use it at its own site"
        )
    if (found.d_in, found.d_out) != (ends.d_in, ends.d_out):
        raise InputError(f"expected --init of the width of {ends}, got {found.d_in} in {init}; give another")
    if found.frame is not None:
        raise InputError(f"expected --init of a dictionary that takes activations as they are, but {init} normalises them; give another")
    if (found.W_skip_od is not None) != config.skip:
        has, do = ("no skip", "leave --skip out") if config.skip else ("a skip", "give --skip")
        raise InputError(f"the dictionary of --init in {init} has {has}; {do}, or give another")
    if config.kind.taken_over(found.gate) is None:
        raise InputError(
            f"expected --init with a gate that {name_of(config.kind)} can continue with, got {found.gate} in {init}; train another kind, "
            "or give another dictionary"
        )
    if found.d_sae != config.d_sae:
        raise InputError(f"expected --d-sae {found.d_sae}, the number of features in {init}, got {config.d_sae}; give that number")
    norm_f = found.norms()
    if config.kind.unit_rows and found.gate.scaled(norm_f) is None and norm_f.max() > 1.001 * norm_f.min():
        raise InputError(f"expected --init with decoder rows of one length, since {found.gate} compares them, got others; give another")
    W_enc_fd, b_enc_f, W_dec_fo, b_dec_o = (weight.float() for weight in (found.W_enc_fd, found.b_enc_f, found.W_dec_fo, found.b_dec_o))
    if ends.transcodes:
        b_enc_f = b_enc_f if found.b_in_d is None else b_enc_f - W_enc_fd @ found.b_in_d.float()
        skip = None if found.W_skip_od is None else found.W_skip_od.float()
        return Dictionary(W_enc_fd, b_enc_f, W_dec_fo, b_dec_o, gate=found.gate, W_skip_od=skip, metadata=ends.metadata())
    shift_d = b_dec_o if found.b_in_d is None else b_dec_o - found.b_in_d.float()
    moved_f = b_enc_f + W_enc_fd @ shift_d
    return Dictionary(W_enc_fd, moved_f, W_dec_fo, b_dec_o, gate=found.gate, b_in_d=b_dec_o, metadata=ends.metadata())


def part_of(dictionary: Dictionary, features: slice) -> Dictionary:
    """Some features of a dictionary, without a copy; a gate that keeps k of a row keeps k of these."""
    whole = dictionary.parts()
    mine = {name: getattr(whole, name)[features] for name in ("W_enc_fd", "b_enc_f", "W_dec_fo")}
    return Dictionary.of(whole._replace(gate=whole.gate.of(features) or whole.gate, **mine))


def change_since(init: Dictionary, trained: Dictionary, source: Source, ends: Ends, every: Axis) -> dict[str, Any]:
    """How training changed `--init`, for training.json: FVU and L0 before and after, and each feature's cosine to its initial row.

    Measured on a sample of the training rows, because held-out rows are for `sae evaluate`. Each process of `every` passes its part of
    both dictionaries; the first one gets all cosines.
    """
    rows = {site: source.first_rows(site).float() for site in ends.sites}
    x_bd, y_bo = ends.pair(rows, dict.fromkeys(rows, 1.0))
    y_bo = x_bd if y_bo is None else y_bo
    cosines = []
    for part in ranges(init.d_sae, max(1, BLOCK_BYTES // (4 * init.d_out))):
        unit = [normalize(rows_of(one.W_dec_fo, part).cpu(), dim=-1) for one in (init, trained)]
        cosines.append((unit[0] * unit[1]).sum(-1))
    return {
        "rows": len(x_bd),
        "before": quality(init, x_bd, y_bo, every),
        "after": quality(trained, x_bd, y_bo, every),
        "decoder_cosines": [round(cosine, 4) for cosine_f in every.to_first(torch.cat(cosines)) for cosine in cosine_f.tolist()],
    }


@torch.no_grad()
def quality(dictionary: Dictionary, x_bd: Tensor, y_bo: Tensor, every: Axis) -> dict[str, float]:
    """FVU and L0 on raw activations of the dictionary of which each process of `every` has a part."""
    error, fired = 0.0, 0
    for start in range(0, len(x_bd), ROWS):
        part_bd, part_bo = (rows[start : start + ROWS].to(dictionary.W_dec_fo.device) for rows in (x_bd, y_bo))
        acts_bf, written_bo = acts_and_output(dictionary, part_bd, every)
        error += float((written_bo - part_bo).double().square().sum())
        fired += int((acts_bf != 0).sum())
    power = float((y_bo - y_bo.mean(0)).double().square().sum())
    return {"fvu": error / power, "l0": every.total(fired) / len(x_bd)}


def said(change: dict[str, Any]) -> str:
    """ "FVU 0.21 (was 0.25), L0 31.0 (was 29.5) on 4,096 training rows; cosine of decoder rows to --init: median 0.98, lowest 0.12" """
    before, after = change["before"], change["after"]
    cosine_f = torch.tensor(change["decoder_cosines"])
    return (
        f"FVU {after['fvu']:.3g} (was {before['fvu']:.3g}), L0 {after['l0']:.1f} (was {before['l0']:.1f}) on {change['rows']:,} training "
        f"rows; cosine of decoder rows to --init: median {cosine_f.median():.2f}, lowest {cosine_f.min():.2f}"
    )
