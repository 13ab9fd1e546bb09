"""The sites of a source that a dictionary reads and writes, and their units.

b rows (tokens) · d width that is read · o width that is written
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.activations.source import Source
from sae.errors import InputError
from sae.model.sites import split_model
from sae.training.config import RunConfig


class Ends(NamedTuple):
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    """equal to `reads` for an autoencoder"""
    widths: dict[str, int]

    @classmethod
    def of(cls, source: Source, config: RunConfig) -> "Ends":
        """The ends of a run. Raises `InputError` for sites that the source lacks, and for several sites of unequal width."""
        there = list(source.widths)
        if not config.reads and len(there) - len(config.writes) != 1:
            raise InputError(f"expected one site to train on, got {' '.join(there) or 'none'}; name one with --reads")
        reads = config.reads or tuple(site for site in there if site not in config.writes)
        writes = config.writes or reads
        missing = dict.fromkeys(site for site in (*reads, *writes) if site not in source.widths)
        if missing:
            raise InputError(f"expected sites among {' '.join(there)}, got {' '.join(missing)}; choose others, or harvest them")
        for sites in (reads, writes):
            if len({source.widths[site] for site in sites}) > 1:
                found = ", ".join(f"{site} {source.widths[site]}" for site in sites)
                raise InputError(f"expected sites of one width side by side, got {found}; choose others")
        return cls(reads, writes, {site: source.widths[site] for site in (*reads, *writes)})

    @property
    def transcodes(self) -> bool:
        return self.reads != self.writes

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.widths)

    @property
    def d_in(self) -> int:
        return sum(self.widths[site] for site in self.reads)

    @property
    def d_out(self) -> int:
        return sum(self.widths[site] for site in self.writes)

    def __str__(self) -> str:
        read = f"{' and '.join(self.reads)} ({self.d_in} wide)"
        return f"{read} to {' and '.join(self.writes)} ({self.d_out} wide)" if self.transcodes else read

    def metadata(self) -> dict[str, Any]:
        """ "site" and, for a transcoder, "site_out", with the model's own names if all sites belong to one model."""
        found = {"site": one_or_list(self.named(self.reads))}
        return found | {"site_out": one_or_list(self.named(self.writes))} if self.transcodes else found

    def named(self, sites: tuple[str, ...]) -> tuple[str, ...]:
        """The sites without the name of a second model, if all sites belong to one model."""
        of_one = len({split_model(site)[0] for site in self.sites}) == 1
        return tuple(split_model(site)[1] for site in sites) if of_one else sites

    def models(self, manifest: dict[str, Any]) -> dict[str | None, dict[str, Any]]:
        """Facts about the models of these sites: None -> the only or the first model, name -> a second model."""
        every = {None: manifest["model"], **manifest.get("models", {})}
        names = {split_model(site)[0] for site in self.sites}
        return {name: every[name] for name in every if name in names} if len(names) > 1 else {None: every[names.pop()]}

    def scales(self, source: Source) -> dict[str, float]:
        """site -> factor that makes the mean squared norm of its rows equal to its width; prints what is known about massive rows, which
        affect it."""
        found = {}
        for site, width in self.widths.items():
            if said := source.about_massive(site):
                print(said)
            mean_squared_norm = source.mean_squared_norm(site)
            if not mean_squared_norm > 0:
                raise InputError(f"expected activations to train on, but all at {site} are zero; choose another site")
            found[site] = (width / mean_squared_norm) ** 0.5
        return found

    def pair(self, batch: dict[str, Tensor], scales: dict[str, float]) -> tuple[Tensor, Tensor | None]:
        """x [b, d] and, for a transcoder, y [b, o], in training units."""
        x_bd = side_by_side([batch[site] * scales[site] for site in self.reads])
        return x_bd, side_by_side([batch[site] * scales[site] for site in self.writes]) if self.transcodes else None

    def factors(self, scales: dict[str, float]) -> tuple[float | Tensor, float | Tensor]:
        """The factors that multiplied inputs and outputs, as `Dictionary.folded` takes them."""
        return self._factor(self.reads, scales), self._factor(self.writes, scales)

    def _factor(self, sites: tuple[str, ...], scales: dict[str, float]) -> float | Tensor:
        if len(sites) == 1:
            return scales[sites[0]]
        return torch.cat([torch.full((self.widths[site],), scales[site]) for site in sites])


def side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def one_or_list(sites: tuple[str, ...]) -> str | list[str]:
    return sites[0] if len(sites) == 1 else list(sites)
