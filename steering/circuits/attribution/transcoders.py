"""A set of per-layer transcoders for an attribution graph: each reads before its block's MLP and replaces the MLP's output.

d width of the stream
"""

import sys
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from sae.dictionaries.bundle import Bundle, load
from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.model.sites import parse_site
from sae.model.structure.norms import Norm

READS = ("mlp_in", "mlp_in_nogain", "resid_mid")
"""kinds of sites"""


class Transcoder(NamedTuple):
    dictionary: Dictionary
    site: str
    """the site that is recorded in the model"""
    gain_and_bias_d: tuple[Tensor, Tensor] | None
    """of the norm before the MLP, if the dictionary reads the norm's output before these; else None"""

    def read(self, value_pd: Tensor) -> Tensor:
        """The dictionary's input, from the value at `site`."""
        value_pd = value_pd.to(self.dictionary.dtype)
        if self.gain_and_bias_d is None:
            return value_pd
        gain_d, bias_d = self.gain_and_bias_d
        return (value_pd - bias_d) / gain_d


def open_transcoders(lm: LanguageModel, source: str) -> dict[int, Transcoder]:
    """By layer, from a folder, file or name on the hub in any of the formats; a single transcoder is a set of one layer.

    A line on stderr says which blocks have none. Raises `InputError` for anything else, and for a set of another model.
    """
    found = load(source, lm.device)
    return checked(lm, found if isinstance(found, Bundle) else {0: found}, source)


def checked(lm: LanguageModel, dictionaries: Mapping[int, Dictionary], source: str) -> dict[int, Transcoder]:
    """By the layer at which they write."""
    found: dict[int, Transcoder] = {}
    for dictionary in dictionaries.values():
        layer, one = _transcoder(lm, dictionary, source)
        if layer in found:
            raise InputError(f"expected one transcoder for each block in {source}, got two for block {layer}")
        found[layer] = one
    if missing := [str(layer) for layer in range(lm.n_layers) if layer not in found]:
        print(f"{source} has no transcoder for blocks {', '.join(missing)}: what their MLPs add counts as error", file=sys.stderr)
    first = next(iter(found.values())).dictionary
    first.require_model(lm.name, lm.fingerprint() if "model_fingerprint" in first.metadata else None, named=True)
    return dict(sorted(found.items()))


def _transcoder(lm: LanguageModel, dictionary: Dictionary, source: str) -> tuple[int, Transcoder]:
    reads, writes = dictionary.reads, dictionary.writes
    sites = f"from {' and '.join(str(port.site) for port in reads)} to {' and '.join(str(port.site) for port in writes)}"
    site_in, site_out = reads[0].site, writes[0].site
    if len(reads) != 1 or len(writes) != 1 or site_in is None or site_out is None:
        raise InputError(f"expected per-layer transcoders in {source}, that read at one known site and write at one, got {sites}")
    (kind, layer), (kind_out, layer_out) = parse_site(site_in, lm.n_layers), parse_site(site_out, lm.n_layers)
    if kind not in READS or kind_out != "mlp_out" or layer != layer_out:
        raise InputError(
            f"expected per-layer transcoders in {source}, from {', '.join(READS)} to mlp_out of the same block, got one {sites}; "
            "an autoencoder or a cross-layer transcoder gives no such graph"
        )
    if (reads[0].width, writes[0].width) != (lm.d_model, lm.d_model):
        raise InputError(
            f"expected transcoders of the width {lm.d_model} of {lm.name!r}, got one {sites} of {reads[0].width} to {writes[0].width}; "
            "give the model that they were made for"
        )
    if dictionary.frame is not None:
        raise InputError(
            f"expected transcoders without a frame, since {dictionary.frame.kind} depends on the token in a way that is not linear, got "
            f"one {sites}; fold it in first"
        )
    if kind != "mlp_in_nogain":
        return layer, Transcoder(dictionary, f"{kind}.{layer}", None)
    norm = next((norm for norm in lm.norms.values() if isinstance(norm, Norm) and norm.module is lm.norm_before(f"mlp_in.{layer}")), None)
    if norm is None or not bool((norm.formula.gain_d != 0).all()):  # host sync
        raise InputError(f"expected a norm without a gain of 0 before the MLP of block {layer} of {lm.name!r}, got none to read behind")
    gain_d, bias_d = (part.to(lm.device, dictionary.dtype) for part in (norm.formula.gain_d, norm.bias_d))
    return layer, Transcoder(dictionary, f"mlp_in.{layer}", (gain_d, bias_d))
