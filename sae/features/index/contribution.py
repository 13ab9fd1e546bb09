"""How much each feature reduces the reconstruction error, from active entries alone.

k decoder rows at hand · b rows (tokens) of a chunk · d model width · o width of what is written · f features · n entries

With r = y − ŷ, leaving feature j out of a token where it is active with a changes ‖r‖² by 2 a r·d_j + a²‖d_j‖², d_j its decoder row.
Summed over tokens and divided by Σ‖y − ȳ‖², that is how much the fraction of variance unexplained (FVU) rises without the feature.
y is the dictionary's target: its input, or for a transcoder the value at its output site.
"""

import threading

import numpy as np
import torch
from torch import Tensor

from sae.dictionaries.dictionary import Dictionary
from sae.entries import Entries, add_weighted_sums, starts_of

UNIT = 36
MAX_ROWS = 1 << 16  # of a chunk: then sums of its numbers, in units of 2^-36, are exact in float64


def exact_sums(values: np.ndarray, group: np.ndarray | None = None, groups: int = 1) -> np.ndarray:
    """Sums of `values` by group in fixed point, int64 [2, groups]: whole part, and the rest in units of 2^-36.

    Integer sums do not depend on the order, so merged parts have the same sums as one pass.
    """
    whole = np.floor(values)
    rest = np.rint((values - whole) * 2.0**UNIT)
    group = np.zeros(len(values), np.int64) if group is None else group
    return carried(np.stack([np.bincount(group, part, groups).astype(np.int64) for part in (whole, rest)]))


def carried(sums: np.ndarray) -> np.ndarray:
    """The same numbers with a rest below 1."""
    return np.stack([sums[0] + (sums[1] >> UNIT), sums[1] & ((1 << UNIT) - 1)])


def whole_number(sums: np.ndarray) -> int:
    """One sum in units of 2^-36."""
    return (int(sums[0]) << UNIT) + int(sums[1])


class ErrorSums:
    """Sums over tokens from which the features' contributions are computed: `sums` of name to int64 [2, ...], see `exact_sums`."""

    def __init__(self, dictionary: Dictionary):
        self.dictionary = dictionary
        if dictionary.features_at_once >= dictionary.d_sae:
            self.whole_fo: Tensor | None = dictionary.W_dec_fo.float()
            self.square_f = self.whole_fo.square().sum(-1)
        else:
            self.whole_fo = None
        sizes = {"feature": dictionary.d_sae, "x": dictionary.d_out, "square": 1, "error": 1}
        self._lock = threading.Lock()  # chunks may come from several threads, in any order: whole numbers add to the same
        self.sums = {name: np.zeros((2, size), np.int64) for name, size in sizes.items()}

    @torch.no_grad()
    def add(self, x_bd: Tensor, entries: Entries, y_bo: Tensor | None = None) -> None:
        """Rows as they were encoded and their entries; `y_bo` is what to reconstruct where that is not `x_bd` itself.

        Of weights that are used in blocks, as many rows at a time as have no more decoder rows than one block.
        """
        starts, y_bo = starts_of(entries.row_n, len(x_bd)), x_bd if y_bo is None else y_bo
        if self.whole_fo is not None:
            self._add_rows(x_bd, y_bo, starts, entries.feature_n, entries.value_n, self.whole_fo, self.square_f)
            return
        bounds = starts.cpu().numpy().astype(np.int64)  # host sync
        low = 0
        while low < len(x_bd):
            high = max(low + 1, int(np.searchsorted(bounds, bounds[low] + self.dictionary.features_at_once, "right")) - 1)
            of, begin = slice(bounds[low], bounds[high]), starts[low]
            features, place_n = entries.feature_n[of].long().unique(return_inverse=True)
            rows_ko = self.dictionary.rows(features).float()
            part = (starts[low : high + 1] - begin, place_n.int(), entries.value_n[of], rows_ko, rows_ko.square().sum(-1))
            self._add_rows(x_bd[low:high], y_bo[low:high], *part, features)
            low = high

    def _add_rows(
        self, x_bd: Tensor, y_bo: Tensor, starts: Tensor, place_n: Tensor, value_n: Tensor, rows_ko: Tensor, square_k: Tensor,
        features: Tensor | None = None,
    ) -> None:  # fmt: skip
        """`rows_ko`: decoder rows of `features`, by default of all."""
        x_bd, y_bo, value_n = x_bd.float(), y_bo.float(), value_n.float()
        error_bo = self.dictionary.b_dec_o.float() - y_bo  # ŷ − y, once the features are added
        # before that, it serves for the variance, which no shift changes; without a large mean float32 is enough for a row
        self._add("square", error_bo.square().sum(-1).double().cpu().numpy())  # host sync
        y_o = error_bo.sum(0, dtype=torch.float64).cpu().numpy()  # host sync
        self._add("x", y_o, np.arange(len(y_o)), len(y_o))
        if self.dictionary.decodes_with_input:
            error_bo = self.dictionary.baseline(x_bd.to(self.dictionary.dtype)).float() - y_bo
            unit = self.dictionary.unit(x_bd)
            row_n = torch.arange(len(x_bd), device=starts.device).repeat_interleave(starts.diff())
            value_n = value_n * unit[row_n, 0] if isinstance(unit, Tensor) else value_n
        add_weighted_sums(error_bo, rows_ko, place_n, starts, value_n, False)
        with torch.sparse.check_sparse_tensor_invariants(False):  # the indices are right by construction, checking them is a pass
            zeros = torch.sparse_csr_tensor(starts, place_n, torch.zeros_like(value_n), (len(x_bd), len(rows_ko)))
            along_n = torch.sparse.sampled_addmm(zeros, error_bo, rows_ko.T).values()
        value_n = value_n.double()
        change_n = value_n * (value_n * square_k.index_select(0, place_n) - 2 * along_n)
        feature_n = place_n if features is None else features[place_n]
        self._add("feature", change_n.cpu().numpy(), feature_n.cpu().numpy(), self.dictionary.d_sae)  # host sync
        self._add("error", error_bo.square_().sum(-1).double().cpu().numpy())  # host sync

    def _add(self, name: str, values: np.ndarray, group: np.ndarray | None = None, groups: int = 1) -> None:
        part = exact_sums(values, group, groups)
        with self._lock:
            self.sums[name] = carried(self.sums[name] + part)


def contributions(sums: dict[str, np.ndarray], rows: int) -> tuple[np.ndarray, float]:
    """How much the FVU rises without each feature, float32 [f], and the FVU itself; NaN where the activations do not vary at all."""
    mean_part = sum(whole_number(column) ** 2 for column in sums["x"].T)  # whole numbers of any size: a large mean cancels nothing
    centred = ((whole_number(sums["square"][:, 0]) * rows << UNIT) - mean_part) / (rows << 2 * UNIT)
    if centred <= 1e-6 * whole_number(sums["square"][:, 0]) / 2.0**UNIT:  # no more than float32's rounding of the squares
        return np.full(sums["feature"].shape[1], np.nan, np.float32), float("nan")
    feature = sums["feature"][0] + sums["feature"][1] / 2.0**UNIT
    return (feature / centred).astype(np.float32), whole_number(sums["error"][:, 0]) / 2.0**UNIT / centred
