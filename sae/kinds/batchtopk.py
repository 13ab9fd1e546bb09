"""BatchTopK: the b·k largest of a batch of b rows (Bussmann et al. 2024, arXiv 2412.06410), and Matryoshka (2503.17547), whose first
parts of the features must each reconstruct alone.

loss = mean over b of ‖y_b − ŷ_b‖² (Matryoshka: the mean over prefixes of that) plus AuxK's; decoder rows have length 1. Once trained
a feature is active above a threshold, one number for all features: the running mean of the batches' smallest kept activation, and at the
end the number that keeps k per row on held-out rows (`threshold_for`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.gates import Gate, Threshold
from sae.entries import Buffers, entries_above, largest
from sae.errors import InputError
from sae.kinds.kind import Aided, Now, aid_loss
from sae.mesh import Axis
from sae.objective import Goal, Own, Step, Terms, Weights
from sae.objective.choice import SAMPLE
from sae.objective.formula import pre_activations, squared_error
from sae.objective.rule import Aid, Rule

REMEMBERS = 0.999
"""decay of the running mean of the threshold in a step"""


class BatchTopKGoal(NamedTuple):
    k: int
    prefixes: tuple[int, ...] = ()
    aid: Aid | None = None

    def loss(self, x_bd: Tensor, y_bo: Tensor | None, weights: Weights, own: Own) -> Terms:
        z_bf = pre_activations(x_bd, y_bo, weights)
        kept_n = largest(z_bf.detach().flatten(), len(x_bd) * self.k)
        z_n = z_bf.flatten()
        acts_bf = torch.zeros_like(z_n).scatter(0, kept_n, z_n[kept_n].relu()).view_as(z_bf)
        error_b = squared_error(x_bd, y_bo, acts_bf, weights, own)
        if self.prefixes:
            inside_pf = torch.arange(acts_bf.shape[1]) < torch.tensor(self.prefixes)[:, None]
            parts = [squared_error(x_bd, y_bo, acts_bf * inside_f.to(acts_bf), weights, own) for inside_f in inside_pf]
            error_b = torch.stack(parts).mean(0)
        return Terms(error_b.mean() + aid_loss(x_bd, y_bo, acts_bf, weights, own, self.aid), acts_bf)

    def rule(self, weights: Weights, own: Own) -> Rule:
        return Rule(top=self.k, over="batch", prefixes=self.prefixes, aid=self.aid)


@dataclass(kw_only=True)
class BatchTopK(Aided):
    """Train dictionaries that keep the k·rows largest of a batch (Bussmann et al. 2024)."""

    def prefixes_of(self, d_sae: int) -> tuple[int, ...]:
        return ()

    def state(self) -> dict[str, Tensor]:
        return {"threshold": torch.zeros(()), "weight": torch.zeros(())}

    def goal(self, value: int, now: Now) -> Goal:
        return BatchTopKGoal(value, self.prefixes_of(now.d_sae), self.aid(now))

    def after(self, result: Step, own: Own, now: Now) -> None:
        now.state["threshold"].lerp_(result.threshold.to(now.state["threshold"]), 1 - REMEMBERS)
        now.state["weight"].lerp_(torch.ones_like(now.state["weight"]), 1 - REMEMBERS)

    def encoder(self, weights: Weights, own: Own, state: Mapping[str, Tensor], value: int) -> tuple[Tensor, Tensor, Gate]:
        threshold = state["threshold"] / state["weight"].clamp(min=1 - REMEMBERS)  # both begin at 0, and their ratio has no such bias
        return weights.W_enc_fd, weights.b_enc_f, Threshold(threshold.expand(len(weights.b_enc_f)).clone())


@dataclass(kw_only=True)
class Matryoshka(BatchTopK):
    """Train BatchTopK dictionaries whose first features also reconstruct alone, at several sizes (Bussmann et al. 2025)."""

    prefixes: tuple[int, ...] = ()
    """Numbers of first features that must reconstruct the row alone, rising; all of --d-sae always do too. Default: a sixteenth, an eighth,
    a quarter, half and all."""

    def check(self, d_sae: int) -> None:
        super().check(d_sae)
        if not self.prefixes and d_sae % 16:
            raise InputError(f"expected --d-sae that divides by 16 for the default groups, got {d_sae}; give --prefixes or another number")
        ends = self.prefixes_of(d_sae)
        if any(low >= high for low, high in zip((0, *ends), ends)) or ends[-1] > d_sae:
            raise InputError(f"--prefixes takes rising numbers of features, the last at most --d-sae {d_sae}, got {list(self.prefixes)}")

    def prefixes_of(self, d_sae: int) -> tuple[int, ...]:
        if not self.prefixes:
            return tuple(d_sae // part for part in (16, 8, 4, 2, 1))
        return self.prefixes if self.prefixes[-1] == d_sae else (*self.prefixes, d_sae)


@torch.no_grad()
def threshold_for(
    dictionary: Dictionary, rows: Sequence[Tensor], k: int, running: float = 0.0, every: Axis | None = None
) -> tuple[float, int, float]:
    """The threshold above which `dictionary` has k active features per row on these chunks of rows [b, d]; the number of rows; and how many
    features per row are active above `running`.

    It is the largest pre-activation after the first k·rows, or 0 if fewer are above 0. If each process of `every` has a part of the
    features as its `dictionary`, all call it.
    """
    buffers, count, every = Buffers(), sum(map(len, rows)), every or Axis()

    def above(chunks: Sequence[Tensor], low: float) -> Tensor:
        return torch.cat([entries_above(dictionary.pre_activations(x_bd), low, 0, buffers).value_n for x_bd in chunks])

    sample = rows[0][:SAMPLE]
    guess = value_after(above([sample], 0.0), k * len(sample), every)
    for low in (min(0.85 * guess, max(running, guess / 2)), guess / 4, 0.0):
        value_n = above(rows, low)
        if low == 0 or every.total(len(value_n)) > k * count:
            break
    counted = [value_n] if running >= low else map(dictionary.pre_activations, rows)
    active = every.total(sum(int(torch.count_nonzero(z > max(running, 0.0))) for z in counted))
    return value_after(value_n, k * count, every), count, active / count


def value_after(value_n: Tensor, k: int, every: Axis) -> float:
    """The largest value after the first k of those of all processes; 0 if there are no more than k."""
    lengths = every.numbers(len(value_n))
    if sum(lengths) <= k:
        return 0.0
    every_n = every.gather(torch.nn.functional.pad(value_n, (0, int(max(lengths)) - len(value_n)), value=-math.inf)).flatten()
    return float(every_n.kthvalue(len(every_n) - k).values)  # host sync
