"""How well a dictionary reconstructs activations, and with how many features; sums over any number of rows in float64.

b rows (tokens) · d model width · f features
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.parts import Port
from sae.encoding import Encoder
from sae.entries import Buffers, Entries
from sae.errors import InputError
from sae.statistics import ratio

DENSE_ABOVE = 0.1
"""a feature that fires on a larger share of rows than this counts as dense"""
SUMS = ("mean_d", "centred", "sums", "fired_f", "activity_f", "l0_histogram")
CHUNK_BYTES = 128 << 20
"""of one [rows, f] tensor of activations"""


class Reconstruction(NamedTuple):
    rows: int
    """rows (tokens) scanned"""
    fvu: float
    """Σ‖x − x̂‖² / Σ‖x − x̄‖² with x̄ the mean row: the fraction of variance unexplained"""
    explained_variance: float
    """1 − fvu"""
    explained_second_moment: float
    """1 − Σ‖x − x̂‖² / Σ‖x‖²: about the origin, so a large mean flatters it; some tools report this as explained variance"""
    mse: float
    """mean over rows of ‖x − x̂‖², summed over dimensions"""
    l0: float
    """mean number of features that fire on a row"""
    l0_percentiles: dict[str, int]
    """of the number of features that fire on a row"""
    l1: float
    """mean over rows of Σ_f |activation| · decoder norm"""
    cosine: float
    """mean over rows of cos(x, x̂), 0 where either is the zero vector"""
    norm_ratio: float
    """mean ‖x̂‖ / mean ‖x‖: below 1 is shrinkage"""
    relative_bias: float
    """E[x̂·x̂] / E[x·x̂]: 1 when unbiased, below 1 when a common factor would improve the fit (Rajamanoharan et al. 2024, eq. 10)"""
    dead: int
    """features that fired on no scanned row"""
    dense: int
    """features that fired on more than a tenth of the rows"""
    density_f: Tensor
    """share of rows on which each feature fires, float64 [f], on the CPU"""
    mean_d: Tensor
    """the mean row x̄, float64 [d]"""


@dataclass
class ReconstructionMetrics:
    """Running sums; `add` batches of any size, in any order, `merge` what was summed elsewhere, then ask for the `result`."""

    decoder_norm_f: Tensor
    d_in: int
    ports: tuple[Port, ...] = ()
    """for a dictionary that writes at several sites, each of which is also measured separately"""

    def __post_init__(self) -> None:
        self.parts = [ReconstructionMetrics(self.decoder_norm_f, port.width) for port in self.ports if len(self.ports) > 1]
        device, f = self.decoder_norm_f.device, len(self.decoder_norm_f)
        self.rows = 0
        self.mean_d = torch.zeros(self.d_in, dtype=torch.float64, device=device)
        self.centred = torch.zeros((), dtype=torch.float64, device=device)  # Σ‖x − mean‖²
        self.sums = torch.zeros(6, dtype=torch.float64, device=device)  # of `row_values`
        self.fired_f = torch.zeros(f, dtype=torch.int64, device=device)
        self.activity_f = torch.zeros(f, dtype=torch.float64, device=device)
        self.l0_histogram = torch.zeros(f + 1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, x_bd: Tensor, code: Tensor | Entries, x_hat_bd: Tensor) -> None:
        """`x_bd`, what is to be rebuilt, in any float dtype; of these rows the activations, [b, f] or a list, and what they rebuild."""
        if self.parts:
            widths = [part.d_in for part in self.parts]
            for part, x_bw, x_hat_bw in zip(self.parts, x_bd.split(widths, dim=-1), x_hat_bd.split(widths, dim=-1)):
                part.add(x_bw, code, x_hat_bw)
        if isinstance(code, Entries):
            self.fired_f += torch.bincount(code.feature_n, minlength=len(self.fired_f))
            active_b = torch.bincount(code.row_n, minlength=len(x_bd))
            self.activity_f.index_add_(0, code.feature_n, code.value_n.double().abs())
        else:
            fired_bf = code != 0
            self.fired_f += fired_bf.sum(0)
            active_b = fired_bf.sum(1)
            self.activity_f += code.abs().sum(0, dtype=torch.float64)
        self.l0_histogram += torch.bincount(active_b, minlength=len(self.l0_histogram))
        x_bd = x_bd.double()
        self.sums += row_values(x_bd, x_hat_bd).sum(0)
        mean_d = x_bd.mean(0)
        self._merge_variance(len(x_bd), mean_d, (x_bd - mean_d).square().sum())

    def _merge_variance(self, rows: int, mean_d: Tensor, centred: Tensor) -> None:
        """Chan, Golub and LeVeque's update: no cancellation, for any mean."""
        if not rows:
            return
        total, shift_d = self.rows + rows, mean_d - self.mean_d
        self.centred += centred + shift_d.square().sum() * (self.rows * rows / total)
        self.mean_d += shift_d * (rows / total)
        self.rows = total

    def merge(self, other: "ReconstructionMetrics") -> None:
        """Adds the sums of another instance for the same dictionary."""
        self.merge_state(other.state())

    def state(self) -> dict[str, Tensor]:
        """All sums, by name; copies on the CPU."""
        own = {name: getattr(self, name).cpu() for name in SUMS} | {"rows": torch.tensor(self.rows)}  # host sync
        return own | {f"{number}.{name}": sum_ for number, part in enumerate(self.parts) for name, sum_ in part.state().items()}

    def merge_state(self, state: dict[str, Tensor]) -> None:
        """`merge` of the instance whose state this is."""
        device = self.centred.device
        self._merge_variance(int(state["rows"]), state["mean_d"].to(device), state["centred"].to(device))
        for name in SUMS[2:]:
            getattr(self, name).add_(state[name].to(device))
        for number, part in enumerate(self.parts):
            part.merge_state({name.removeprefix(f"{number}."): sum_ for name, sum_ in state.items() if name.startswith(f"{number}.")})

    def by_site(self) -> dict[str, Reconstruction]:
        """The result at each of several sites; empty for one site. Raises as `result` does."""
        return {str(port.site): part.result() for port, part in zip(self.ports, self.parts)}

    def result(self) -> Reconstruction:
        """Raises `InputError` when no row was added or when a value is not finite."""
        if not self.rows:
            raise InputError("expected at least one row of activations to measure a dictionary on, got none; give it more rows")
        n = self.rows
        error, cosine, x_norm, x_hat_norm, x_hat_square, product = self.sums.tolist()  # host sync
        centred, mean_square = self.centred.item(), self.mean_d.square().sum().item()  # host sync
        if not all(map(torch.isfinite, (self.sums.sum(), self.centred))):
            raise InputError(f"expected finite activations and reconstructions, found NaN or infinity among {n:,} rows; check the cache")
        fvu = float(ratio(error, centred))
        cumulative = self.l0_histogram.cumsum(0).cpu()  # host sync
        density_f = (self.fired_f / n).cpu().double()  # host sync
        return Reconstruction(
            rows=n,
            fvu=fvu,
            explained_variance=1 - fvu,
            explained_second_moment=1 - float(ratio(error, centred + n * mean_square)),
            mse=error / n,
            l0=self.fired_f.sum().item() / n,  # host sync
            l0_percentiles={str(q): int((cumulative < q / 100 * n).sum()) for q in (5, 25, 50, 75, 95)},
            l1=(self.activity_f @ self.decoder_norm_f.double()).item() / n,  # host sync
            cosine=cosine / n,
            norm_ratio=float(ratio(x_hat_norm, x_norm)),
            relative_bias=float(ratio(x_hat_square, product)),
            dead=int((density_f == 0).sum()),
            dense=int((density_f > DENSE_ABOVE).sum()),
            density_f=density_f,
            mean_d=self.mean_d.cpu(),  # host sync
        )


def row_values(x_bd: Tensor, x_hat_bd: Tensor) -> Tensor:
    """Of each row, float64 [b, 6]: ‖x − x̂‖², cos(x, x̂), ‖x‖, ‖x̂‖, x̂·x̂, x·x̂."""
    x_bd, x_hat_bd = x_bd.double(), x_hat_bd.double()
    x_norm_b, x_hat_norm_b, product_b = x_bd.norm(dim=1), x_hat_bd.norm(dim=1), (x_bd * x_hat_bd).sum(1)
    cosine_b = product_b / (x_norm_b * x_hat_norm_b).clamp(min=torch.finfo(torch.float64).tiny)
    error_b = (x_bd - x_hat_bd).square().sum(1)
    return torch.stack([error_b, cosine_b, x_norm_b, x_hat_norm_b, x_hat_norm_b**2, product_b], dim=1)


@torch.no_grad()
def add_reconstruction(
    dictionary: Dictionary,
    x_bd: Tensor,
    metrics: ReconstructionMetrics | None = None,
    y_bo: Tensor | None = None,
    encoder: Encoder | None = None,
) -> ReconstructionMetrics:
    """Adds the rows `x_bd` to `metrics` (new ones if None), a chunk at a time so that [rows, f] never exists for large f.

    `y_bo` are a transcoder's targets; `encoder`: another way than the float32 product, made by the dictionary's method of that name. A
    chunk is moved to the dictionary's device when it is encoded.
    """
    buffers = Buffers()
    metrics = metrics or ReconstructionMetrics(dictionary.norms(), dictionary.d_out, dictionary.writes)
    chunk = max(1, CHUNK_BYTES // (4 * dictionary.d_sae))
    for start in range(0, len(x_bd), chunk):
        x = x_bd[start : start + chunk].to(dictionary.W_dec_fo.device)
        y = x if y_bo is None else y_bo[start : start + chunk].to(x.device)
        entries = dictionary.entries(x, buffers, encoder)
        metrics.add(y, entries, dictionary.decode_entries(entries, x))
    return metrics
