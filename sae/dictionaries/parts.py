"""The parts of a dictionary: what formats read and write, and what `Dictionary` computes with.

d width that is read · f features · o width that is written
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from sae.dictionaries.frames import Frame
from sae.dictionaries.gates import Gate
from sae.errors import InputError


class Parts(NamedTuple):
    W_enc_fd: Tensor
    b_enc_f: Tensor
    W_dec_fo: Tensor
    b_dec_o: Tensor
    gate: Gate
    metadata: dict[str, Any]
    """facts about its origin: "site" and, for a transcoder, "site_out" with our names, "model_name", others as in its file"""
    b_in_d: Tensor | None = None
    """subtracted from the input"""
    W_skip_od: Tensor | None = None
    """of a dictionary that writes at several sites perhaps only the first rows; the others are then 0"""
    frame: Frame | None = None

    @property
    def reads(self) -> "tuple[Port, ...]":
        """Its input: one site, or several of equal width, concatenated (a crosscoder)."""
        return ports(self.metadata.get("site"), self.W_enc_fd.shape[1])

    @property
    def writes(self) -> "tuple[Port, ...]":
        """Its output: equal to `reads` except for transcoders."""
        return ports(self.metadata.get("site_out", self.metadata.get("site")), self.W_dec_fo.shape[1])

    @property
    def site(self) -> str | None:
        """The only input site, for example "resid_post.2"; None if unknown. Raises `InputError` for several."""
        return only(self.reads, "reads")

    @property
    def site_out(self) -> str | None:
        """The only output site. Raises `InputError` for several."""
        return only(self.writes, "writes")

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes at another site than it reads."""
        return self.reads != self.writes


class Port(NamedTuple):
    """An input or output of a dictionary."""

    site: str | None
    """for example "resid_post.2"; None if unknown"""
    width: int


def ports(sites: str | list[str] | None, width: int) -> tuple[Port, ...]:
    """The sites of `width` columns, all of one width. Raises `InputError` if the width does not divide."""
    sites = sites if isinstance(sites, list) else [sites]  # type: ignore[list-item]
    if width % max(1, len(sites)):
        raise InputError(f"expected a width that {len(sites)} sites share, {', '.join(map(str, sites))}, got {width}")
    return tuple(Port(site, width // len(sites)) for site in sites)


def only(ports: tuple[Port, ...], does: str) -> str | None:
    if len(ports) != 1:
        sites = ", ".join(str(port.site) for port in ports)
        raise InputError(
            f"expected a dictionary of one site, but this one {does} {len(ports)} of them ({sites}); give another, or look at this one "
            "with sae evaluate, sae index, sae browse --model none and sae diff-models"
        )
    return ports[0].site


Layers = Mapping[int, Callable[[], Parts]]
"""A set of dictionaries, one for each of several layers of a model; each is read at first use."""


class Choice(dict[int, Callable[[], Parts]]):
    """Dictionaries of one site in one file, by number, of which one is to be chosen."""

    facts: tuple[str, ...] = ()
    """what distinguishes each from the others"""
