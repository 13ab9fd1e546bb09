"""Dictionaries at sites of a model: the value at a site as features, skip and error, which add up to it exactly.

y = Σ_j v_j W_dec_j + skip + error. v is the activation in the model's own units; the skip is everything else that the dictionary writes
(for most kinds a constant, with the skip matrix of a transcoder or in a frame a function of the token); the error is what the dictionary
misses.

s sequences · p positions · d width that is read · o width that is written · f features · k some features · n nodes of a site
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sae.dictionaries.bundle import load
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.gates import Gate
from sae.dictionaries.source import sampled_crc32
from sae.errors import InputError
from sae.evaluation.splice import require_widths
from sae.model.language_model import LanguageModel
from sae.model.sites import EMBED, KINDS, parse_site

SKIP, ERROR = "skip", "error"
RESIDUAL = ("resid_pre", "resid_mid", "resid_post")
"""kinds of sites through which everything in the model passes"""


class Split(NamedTuple):
    value_spf: Tensor
    """activation times `Dictionary.unit`"""
    skip_spo: Tensor
    error_spo: Tensor


@dataclass(frozen=True, eq=False)
class FeatureSite:
    """One dictionary at its output site. Its nodes are the features, the skip and the error, in this order."""

    dictionary: Dictionary
    reads: str
    writes: str
    source: str = ""
    has_error: bool = True
    """False for a complete basis, whose error is rounding"""

    @property
    def d_sae(self) -> int:
        return self.dictionary.d_sae

    @property
    def n_nodes(self) -> int:
        return self.d_sae + 2

    @property
    def skip(self) -> int:
        return self.d_sae

    @property
    def error(self) -> int:
        return self.d_sae + 1

    @property
    def is_residual(self) -> bool:
        return self.writes.partition(".")[0] in RESIDUAL

    @cached_property
    def exists_n(self) -> Tensor:
        """Bool [n]: whether the node can differ between runs."""
        exists_n = torch.ones(self.n_nodes, dtype=torch.bool)
        exists_n[self.skip], exists_n[self.error] = self.dictionary.decodes_with_input, self.has_error
        return exists_n

    @cached_property
    def crc32(self) -> str:
        return sampled_crc32(self.dictionary.parts())

    def name(self, node: int) -> str:
        """ "resid_post.2/17", "resid_post.2/skip", "resid_post.2/error" """
        kind = {self.skip: SKIP, self.error: ERROR}.get(node, str(node))
        return f"{self.writes}/{kind}"

    def node(self, kind: str) -> int:
        """The number of the part after the slash. Raises `InputError` for a name that is not one of this site's nodes."""
        named = {SKIP: self.skip, ERROR: self.error}
        found = named.get(kind, int(kind) if kind.isascii() and kind.isdigit() else -1)
        if not (0 <= found < self.d_sae or kind in named):
            raise InputError(f"expected a feature from 0 to {self.d_sae - 1}, {SKIP} or {ERROR} at {self.writes}, got {kind!r}")
        return found

    def split(self, x_spd: Tensor, y_spo: Tensor) -> Split:
        """The parts of y at the output site for the input x, in the dictionary's dtype; gradients flow to both."""
        dictionary = self.dictionary
        x_spd, y_spo = (t.to(dictionary.W_dec_fo.device, dictionary.dtype) for t in (x_spd, y_spo))
        acts_spf = dictionary.encode(x_spd)
        error_spo = y_spo - dictionary.decode(acts_spf, x_spd)
        return Split(acts_spf * dictionary.unit(x_spd), dictionary.baseline(x_spd).expand_as(error_spo), error_spo)

    def joined(self, split: Split, features_k: Tensor) -> Tensor:
        """The vector with these parts, [s, p, o]; all features except `features_k` are 0."""
        return split.value_spf[..., features_k] @ self.rows(features_k) + split.skip_spo + split.error_spo

    def rows(self, features_k: Tensor) -> Tensor:
        return self.dictionary.rows(features_k).to(self.dictionary.dtype)


def active(value_spf: Tensor) -> Tensor:
    """Features that are not 0 somewhere, [k]."""
    return (value_spf.detach() != 0).flatten(0, -2).any(0).nonzero()[:, 0]  # host sync


def open_sites(lm: LanguageModel, sources: Sequence[str]) -> list[FeatureSite]:
    """The dictionaries, or those of sets of them, in the order in which the model reaches them.

    Raises `InputError` for one of another model, width or unknown site, one that writes at several sites, two that write at one site, one
    that writes before another has read, and for the embedding, which lies before what paths between prompts change.
    """
    found = []
    for source in sources:
        opened = load(source, lm.device)
        for dictionary in [opened] if isinstance(opened, Dictionary) else list(opened.values()):
            dictionary.require_model(lm.name, lm.fingerprint(), named=True)
            reads, writes = dictionary.require_site(), dictionary.site_out
            assert writes is not None
            require_widths(lm, [dictionary])
            if EMBED in (reads, writes):
                raise InputError(f"expected dictionaries after the embedding, got {source} at {EMBED}; leave it out")
            found.append(FeatureSite(dictionary, reads, writes, str(source)))
    return in_order(found)


def in_order(sites: Sequence[FeatureSite]) -> list[FeatureSite]:
    """In the order of the model. Raises `InputError` for two at one site and for two that overlap."""

    def order(name: str) -> tuple[int, int]:
        kind, layer = parse_site(name)
        return layer, KINDS.index(kind)

    ordered = sorted(sites, key=lambda site: order(site.writes))
    for one, other in pairwise(ordered):
        if one.writes == other.writes:
            raise InputError(f"expected one dictionary for each site, got two that write at {one.writes}; leave one of them out")
        if order(other.reads) < order(one.writes):
            raise InputError(
                f"expected dictionaries one after the other, but {other.writes} is written from {other.reads}, before {one.writes}; "
                "leave one of them out"
            )
    return ordered


Change = Callable[[int, Tensor, Tensor], Tensor]
"""of the number of a site, what its dictionary reads [s, p, d] and what is there [s, p, o]: what the model continues with"""


@contextmanager
def changed(lm: LanguageModel, sites: Sequence[FeatureSite], change: Change) -> Iterator[None]:
    """Inside, every pass continues with what `change` makes of each site's value; later sites read what earlier ones made."""
    read: dict[str, Tensor] = {}
    writer = {site.writes: number for number, site in enumerate(sites)}

    def at(place: str, value: Tensor) -> Tensor:
        if place in writer:
            reads = sites[writer[place]].reads
            value = change(writer[place], value if reads == place else read[reads], value)
        read[place] = value
        return value

    places = {place for site in sites for place in (site.reads, site.writes)}
    with lm.edited({place: partial(at, place) for place in places}):
        yield


class Linear(Gate):
    """Activations equal the pre-activations: for the directions of a basis."""

    signed = True

    def forward(self, z_bf: Tensor) -> Tensor:
        return z_bf


def basis_site(site: FeatureSite, directions_oo: Tensor) -> FeatureSite:
    """An orthonormal basis, a direction in each row, as nodes where the site's dictionary writes."""
    zero_o = torch.zeros(len(directions_oo), dtype=directions_oo.dtype, device=directions_oo.device)
    basis = Dictionary(directions_oo, zero_o, directions_oo, zero_o, gate=Linear(), metadata={"site": site.writes})
    return FeatureSite(basis.requires_grad_(False), site.writes, site.writes, has_error=False)
