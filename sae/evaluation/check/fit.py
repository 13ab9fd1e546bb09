"""How well one way to use a dictionary fits the recorded rows, as sums over each sequence, for intervals and differences.

n rows (tokens) · s sequences · r rounds of the bootstrap, the first being the original data · o width that is written · f features
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.gates import TopK
from sae.evaluation.reconstruction import CHUNK_BYTES, row_values

RANDOM_FEATURES = 16384
"""of the random dictionary at most"""


class Fit(NamedTuple):
    """Its methods map weights of sequences [r, s] to values of each round [r]."""

    sums_sc: np.ndarray
    """over the rows of each sequence: 1, squared error, cosine, ‖y‖, ‖ŷ‖, features that fire, ‖y − ȳ‖² with ȳ the mean of all rows"""
    total_so: np.ndarray
    """y − ȳ"""
    silent: int
    """features that fire on no row"""

    def fvu(self, weight_rs: np.ndarray) -> np.ndarray:
        """Σ‖y − ŷ‖² / Σ‖y − ȳ‖², with the ȳ of the rows that were drawn."""
        n_r, error_r, square_r = (weight_rs @ self.sums_sc[:, c] for c in (0, 1, 6))
        shift_r = np.square(weight_rs @ self.total_so).sum(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return error_r / (square_r - shift_r / n_r)

    def cosine(self, weight_rs: np.ndarray) -> np.ndarray:
        return (weight_rs @ self.sums_sc[:, 2]) / (weight_rs @ self.sums_sc[:, 0])

    def norm_ratio(self, weight_rs: np.ndarray) -> np.ndarray:
        return (weight_rs @ self.sums_sc[:, 4]) / (weight_rs @ self.sums_sc[:, 3])

    def l0(self, weight_rs: np.ndarray) -> np.ndarray:
        return (weight_rs @ self.sums_sc[:, 5]) / (weight_rs @ self.sums_sc[:, 0])


@torch.no_grad()
def fit(dictionary: Dictionary, x_nd: Tensor, y_no: Tensor, sequence_n: Tensor, sequences: int) -> Fit:
    """How well the dictionary maps the rows it reads to its targets; each row belongs to a sequence numbered below `sequences`."""
    device, chunk = dictionary.W_dec_fo.device, max(1, CHUNK_BYTES // (4 * dictionary.d_sae))
    values, fired_f = [], torch.zeros(dictionary.d_sae, dtype=torch.bool, device=device)
    for x_bd, y_bo in zip(x_nd.split(chunk), y_no.split(chunk)):
        x_bd, y_bo = x_bd.to(device), y_bo.to(device)
        acts_bf = dictionary.encode(x_bd)
        fired_bf = acts_bf != 0
        fired_f |= fired_bf.any(0)
        values.append(
            torch.cat([row_values(y_bo, dictionary.decode(acts_bf, x_bd))[:, :4], fired_bf.sum(1, dtype=torch.float64)[:, None]], 1)
        )
    values_nc = torch.cat(values).cpu()  # host sync
    centred_no = y_no.double() - y_no.double().mean(0)
    columns_nc = torch.cat([torch.ones_like(values_nc[:, :1]), values_nc, centred_no.square().sum(1, keepdim=True)], dim=1)
    sums_sc, total_so = (torch.zeros(sequences, c.shape[1], dtype=torch.float64) for c in (columns_nc, centred_no))
    sums_sc.index_add_(0, sequence_n, columns_nc)
    total_so.index_add_(0, sequence_n, centred_no)
    return Fit(sums_sc.numpy(), total_so.numpy(), int((~fired_f).sum()))


def random_fvu(y_no: Tensor, d_sae: int, l0: float) -> float:
    """FVU of a dictionary of random directions with as many features active: the largest `l0` projections on them, times the one factor
    that fits best, beside the mean. What is not clearly below it shows nothing that a dictionary has learnt.
    """
    generator = torch.Generator().manual_seed(0)
    W_fo = torch.nn.functional.normalize(torch.randn(min(d_sae, RANDOM_FEATURES), y_no.shape[1], generator=generator), dim=-1)
    gate, centred_no = TopK(max(1, round(l0))), y_no - y_no.mean(0)
    rebuilt_no = torch.cat([gate(y_bo @ W_fo.T) @ W_fo for y_bo in centred_no.split(max(1, CHUNK_BYTES // (4 * len(W_fo))))])
    square, product = (float((a * b).sum(dtype=torch.float64)) for a, b in ((rebuilt_no, rebuilt_no), (centred_no, rebuilt_no)))
    total = float(centred_no.square().sum(dtype=torch.float64))
    return 1 - product**2 / (square * total) if square and total else 1.0
