"""Dictionaries spliced into a model: the sum of their outputs replaces the actual value, or is compared with it.

One dictionary reconstructs its input, or makes another value from it (a transcoder). Several (a bundle) read at their own sites
in one forward pass, each of which already carries what the earlier ones wrote, and what they write at one site adds up.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError

if TYPE_CHECKING:
    from sae.model.language_model import Edit, LanguageModel

There = Callable[[str, Tensor, Tensor], Tensor]
"""from a site, the value there and what is written there, each [s, p, d], to the value that the model continues with"""
CHUNK_BYTES = 128 << 20
"""of one tensor of activations [n, f]"""


class Splice:
    """For one forward pass after another; `edits` go into `LanguageModel.edited`."""

    def __init__(self, dictionaries: Sequence[Dictionary], there: There, encoded: Callable[[int, slice, Tensor], None] | None = None):
        """`encoded` gets the number of a dictionary, some positions of the batch [s · p], and their activations [n, f]."""
        self.dictionaries, self.there, self.encoded = dictionaries, there, encoded
        self.writers = Counter(site for dictionary in dictionaries for site in sites_of(dictionary, "writes"))
        self.read: list[dict[str, Tensor]] = [{} for _ in dictionaries]
        self.written: dict[str, Tensor] = {}
        self.arrived: Counter[str] = Counter()

    @property
    def edits(self) -> "dict[str, Edit]":
        reads = {site for dictionary in self.dictionaries for site in sites_of(dictionary, "reads")}
        return {site: partial(self._at, site) for site in reads | self.writers.keys()}

    def _at(self, site: str, x_spd: Tensor) -> Tensor:
        for k, dictionary in enumerate(self.dictionaries):
            if site in sites_of(dictionary, "reads"):
                self.read[k][site] = x_spd
                if len(self.read[k]) == len(dictionary.reads):
                    self._compute(k)
        if site not in self.writers:
            return x_spd
        if self.arrived[site] < self.writers[site]:
            late = next(one for one in self.dictionaries if site in sites_of(one, "writes"))
            reads = " and ".join(sites_of(late, "reads"))
            raise InputError(f"the dictionary writes at {site} before it reads at {reads}, so it cannot be spliced in")
        self.arrived[site] = 0
        return self.there(site, x_spd, self.written.pop(site).to(x_spd))

    def _compute(self, k: int) -> None:
        dictionary = self.dictionaries[k]
        x_spd = dictionary.joined(self.read[k]).to(dictionary.W_dec_fo.device)
        self.read[k] = {}
        x_nd, chunk = x_spd.flatten(0, 1), max(1, CHUNK_BYTES // (4 * dictionary.d_sae))
        outputs = []
        for start in range(0, len(x_nd), chunk):
            positions = slice(start, start + chunk)
            acts_nf = dictionary.encode(x_nd[positions])
            if self.encoded is not None:
                self.encoded(k, positions, acts_nf)
            outputs.append(dictionary.decode(acts_nf, x_nd[positions]))
        y_spo = torch.cat(outputs).unflatten(0, x_spd.shape[:2])
        for site, y_spd in dictionary.split(y_spo).items():
            self.written[site] = self.written[site] + y_spd if site in self.written else y_spd
            self.arrived[site] += 1


def sites_of(dictionary: Dictionary, does: str) -> list[str]:
    """The sites that the dictionaries read ("reads") or write ("writes")."""
    return [str(port.site) for port in getattr(dictionary, does)]


def require_widths(lm: "LanguageModel", dictionaries: Sequence[Dictionary]) -> None:
    """Raises `InputError` unless all of them are as wide as the model's sites."""
    for dictionary in dictionaries:
        for site, width in (*dictionary.reads, *dictionary.writes):
            if width != lm.width(str(site)):
                raise InputError(f"expected a dictionary {lm.width(str(site))} wide for {site} of {lm.name}, got one for {width}")
