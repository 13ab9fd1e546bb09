"""Which features of a crosscoder belong to one of two models, and which only seem to.

b rows (tokens) · f features · p the two sites · w width of one site · n entries · t examples kept of each feature

Everything is in units of each site, whose rows are divided by the square root of their mean squared norm: so a feature's decoder rows
of two models can be compared.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sae.dictionaries.dictionary import Dictionary

ENTRIES = 1 << 14
"""at a time: [n, w] values of each are in memory"""
ONE_MODEL, SHARED = 0.1, 0.4
"""A relative norm below the first is of the first model alone, from the second up to 1 - it shared, above 1 - the first of the second."""
NU_ERROR, NU_RECONSTRUCTION = 0.2, 0.5
"""A feature of one model is specific where both ν are below these."""
CLASSES = ("first", "between", "shared", "second", "silent")
VERDICTS = ("specific", "shrunken", "decoupled", "both", "unknown")
SAID = {
    "specific": f"specific: ν^ε below {NU_ERROR:g} and ν^r below {NU_RECONSTRUCTION:g}",
    "shrunken": "shrunken: the other model's error holds it",
    "decoupled": "decoupled: other features write it in the other model",
    "both": "shrunken and decoupled",
    "unknown": "unknown: β in its own model is not above 0",
}


class Measures(NamedTuple):
    """The measures of every feature; NaN if undefined."""

    relative_norm_f: Tensor
    """‖d²‖ / (‖d¹‖ + ‖d²‖) of its decoder rows: 0 of the first model alone, 1 of the second, .5 shared"""
    cosine_f: Tensor
    """of its two decoder rows"""
    count_f: Tensor
    """rows on which it fires, int64"""
    max_f: Tensor
    """its largest activation, by size"""
    beta_error_pf: Tensor
    beta_reconstruction_pf: Tensor
    nu_error_f: Tensor
    nu_reconstruction_f: Tensor

    @property
    def classes(self) -> list[str]:
        """Of each feature, one of CLASSES."""
        r = self.relative_norm_f
        bounds = ((r < ONE_MODEL, 0), (r > 1 - ONE_MODEL, 3), ((r >= SHARED) & (r <= 1 - SHARED), 2))
        number_f = torch.full(r.shape, 1)
        for here_f, number in bounds:
            number_f[here_f] = number
        number_f[(self.count_f == 0) | r.isnan()] = 4
        return [CLASSES[number] for number in number_f.tolist()]

    @property
    def verdicts(self) -> list[str]:
        """For each feature, one of VERDICTS: the result of latent scaling, if it were a feature of a single model."""
        shrunken, decoupled = (self.nu_error_f >= NU_ERROR).tolist(), (self.nu_reconstruction_f >= NU_RECONSTRUCTION).tolist()
        unknown = (self.nu_error_f.isnan() | self.nu_reconstruction_f.isnan()).tolist()
        return [VERDICTS[4 if none else s + 2 * d] for none, s, d in zip(unknown, shrunken, decoupled)]


class LatentScaling:
    """Sums for the latent scaling of every feature of a crosscoder of two sites (Minder et al. 2025, arXiv 2504.02922, §3.2).

    A feature lives in the model h where its decoder row d is longer; o is the other model. In each model m the row d^h is scaled so that
    it explains most of what is there to explain, in least squares over all rows, a the activation:

        β^{ε,m} = argmin_β Σ ‖β a d^h − (x^m − x̂^m + a d^m)‖²      the error without the feature itself
        β^{r,m} = argmin_β Σ ‖β a d^h − x̂^m‖²                      the reconstruction

    both Σ a ⟨y, d^h⟩ / (Σ a² ‖d^h‖²), with y what stands after the minus. ν^ε = β^{ε,o} / β^{ε,h} is near 0 where the other model's
    error holds nothing of the feature, near 1 where the other decoder row was merely shrunk to 0 (complete shrinkage); ν^r is large where
    other features write the same direction in the other model on the same tokens (latent decoupling). β are as the authors' code has them.
    """

    def __init__(self, dictionary: Dictionary, mean_squared_norms: tuple[float, float]):
        self.dictionary = dictionary
        device, f = dictionary.W_dec_fo.device, dictionary.d_sae
        self.scale_p = torch.tensor(mean_squared_norms, dtype=torch.float64, device=device) ** -0.5
        rows_pfw = self._by_site(dictionary.rows(torch.arange(f, device=device)).float())
        self.norms_pf = torch.linalg.vector_norm(rows_pfw, dim=-1, dtype=torch.float64)
        self.cosine_f = (rows_pfw[0] * rows_pfw[1]).sum(-1, dtype=torch.float64) / self.norms_pf.prod(0)
        self.home_f = (self.norms_pf[1] > self.norms_pf[0]).long()
        self.v_fw = torch.where((self.home_f == 1)[:, None], rows_pfw[1], rows_pfw[0])
        self.own_pf = (rows_pfw * self.v_fw).sum(-1, dtype=torch.float64)
        self.square_f = torch.zeros(f, dtype=torch.float64, device=device)
        self.error_pf, self.reconstruction_pf = (torch.zeros(2, f, dtype=torch.float64, device=device) for _ in range(2))
        self.count_f = torch.zeros(f, dtype=torch.int64, device=device)
        self.max_f = torch.zeros(f, dtype=torch.float64, device=device)

    def add(self, x_bo: Tensor, acts_bf: Tensor, x_hat_bo: Tensor) -> None:
        """Rows of both sites concatenated, and the dictionary's output for them."""
        x_hat_pbw = self._by_site(x_hat_bo.double())
        error_pbw = (self._by_site(x_bo.double()) - x_hat_pbw).float()
        row_n, feature_n = acts_bf.nonzero(as_tuple=True)  # host sync
        self.count_f += torch.bincount(feature_n, minlength=len(self.count_f))
        for rows, features in zip(row_n.split(ENTRIES), feature_n.split(ENTRIES)):
            value_n, v_nw = acts_bf[rows, features].double(), self.v_fw[features]
            self.square_f.index_add_(0, features, value_n.square())
            self.max_f.scatter_reduce_(0, features, value_n.abs(), "amax")
            for sums_pf, y_pbw in ((self.error_pf, error_pbw), (self.reconstruction_pf, x_hat_pbw.float())):
                for sums_f, y_bw in zip(sums_pf, y_pbw):
                    sums_f.index_add_(0, features, value_n * (y_bw[rows] * v_nw).sum(-1).double())

    def result(self) -> Measures:
        """β and ν are NaN for features that never fire or whose rows are 0, ν also where β in the feature's own model is not above 0."""
        below_f = self.square_f * self.norms_pf.amax(0).square()
        beta_error_pf = _ratio(self.error_pf + self.square_f * self.own_pf, below_f)
        beta_reconstruction_pf = _ratio(self.reconstruction_pf, below_f)
        return Measures(
            _ratio(self.norms_pf[1], self.norms_pf.sum(0)).cpu(),
            self.cosine_f.cpu(),
            self.count_f.cpu(),
            self.max_f.cpu(),
            beta_error_pf.cpu(),
            beta_reconstruction_pf.cpu(),
            self._nu(beta_error_pf).cpu(),
            self._nu(beta_reconstruction_pf).cpu(),
        )

    def _nu(self, beta_pf: Tensor) -> Tensor:
        own_f, other_f = (beta_pf.gather(0, home_f[None])[0] for home_f in (self.home_f, 1 - self.home_f))
        return torch.where(own_f > 0, other_f / own_f, torch.nan)

    def _by_site(self, rows_no: Tensor) -> Tensor:
        """[n, o] as [p, n, w] in units of each site."""
        return rows_no.unflatten(-1, (2, -1)).transpose(0, 1) * self.scale_p[:, None, None].to(rows_no)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, torch.nan)


class TopExamples:
    """For each feature the tokens on which it fires most strongly, by absolute value: values and global positions, [f, t]."""

    def __init__(self, f: int, t: int, device: torch.device):
        self.t = t
        self.value_ft = torch.zeros(f, t, device=device)
        self.position_ft = torch.full((f, t), -1, dtype=torch.int64, device=device)

    def add(self, acts_bf: Tensor, positions_b: Tensor) -> None:
        row_n, feature_n = acts_bf.nonzero(as_tuple=True)  # host sync
        value_n = acts_bf[row_n, feature_n]
        order_n = value_n.abs().argsort(descending=True, stable=True)
        order_n = order_n[feature_n[order_n].argsort(stable=True)]  # feature by feature, the strongest first
        feature_n = feature_n[order_n]
        rank_n = torch.arange(len(feature_n), device=feature_n.device) - torch.searchsorted(feature_n, feature_n)
        order_n, at = order_n[rank_n < self.t], (feature_n[rank_n < self.t], rank_n[rank_n < self.t])
        values = torch.cat([self.value_ft, torch.zeros_like(self.value_ft).index_put_(at, value_n[order_n])], dim=1)
        here = positions_b.to(row_n.device)[row_n[order_n]]
        positions = torch.cat([self.position_ft, torch.full_like(self.position_ft, -1).index_put_(at, here)], dim=1)
        kept_ft = values.abs().topk(self.t, dim=1).indices
        self.value_ft, self.position_ft = values.gather(1, kept_ft), positions.gather(1, kept_ft)

    def of(self, feature: int) -> list[int]:
        """Global positions, the strongest first."""
        fires = self.value_ft[feature] != 0
        return self.position_ft[feature][fires].tolist()
